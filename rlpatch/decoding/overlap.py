"""Programmatic dependent launch: a kernel is launched while the one before it still runs, and waits for what that wrote.

Kernels call `gdc_wait` before they read or write anything, and `gdc_launch_dependents` for the next one to be launched.
"""

from __future__ import annotations

from functools import lru_cache

import torch

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # before Triton 3.4
    gdc_launch_dependents = gdc_wait = None

__all__ = ["gdc_launch_dependents", "gdc_wait", "overlaps"]


@lru_cache(maxsize=8)
def overlaps(device: torch.device) -> bool:
    """Whether kernels can be launched while the one before them ends: from Hopper on, with Triton 3.4 or later."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    try:
        from triton.backends.nvidia.compiler import CUDAOptions
    except ImportError:
        return False
    return gdc_wait is not None and "launch_pdl" in CUDAOptions.__dataclass_fields__
