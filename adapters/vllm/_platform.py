"""What platform the imported vLLM was built for."""

from __future__ import annotations

import importlib.util


def on_cpu() -> bool:
    """True when vLLM's current platform is the CPU backend."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def only_on_cpu() -> str | None:
    """Relevance of adapters that concern the CPU backend alone."""
    return None if on_cpu() else "the engine does not run on CPU"


def no_triton_on_cuda() -> str | None:
    """Relevance of adapters with kernels in Triton that were tried on CUDA alone."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cuda():
        return "the engine does not run on CUDA"
    return None if HAS_TRITON else "there is no Triton"


def has(module: str) -> bool:
    """Whether `module` can be imported; its parents are, itself is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
