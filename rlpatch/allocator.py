"""Expandable segments of torch's CUDA allocator, while a trainer and its engine take turns on one device.

The allocator asks the driver for segments of the sizes that it needs at the time and gives a segment back whole or not at
all. Beside an engine that is costly twice: what settles among activations and gradients (the optimizer's state above all)
keeps their segments from the KV cache, and at long contexts free memory ends up in blocks too small for what is asked (8 to
9 GiB of 80, docs/memory.md). Expandable segments give back what is free in them, page by page (2 or 20 MiB), and grow.

The price: giving back the gradients before a rollout takes 2 ms per GiB instead of 0.5, and getting them again 1 ms: 0.05 s
of a step (8B on an H200, bench/results/h200-8b-full-expandable-vllm0.25.1.json). So they are switched on where the memory
plan does not fit otherwise, or only just, when a pair's engine is about to be built: in the running process, and in the
variable where vLLM looks for them, whose memory pool does not go together with them (pytorch/pytorch#147851) and switches
them off around itself (vllm-project/vllm#40812). Everything allocated before stays where it is.
"""

from __future__ import annotations

import os
import sys

CONF = "PYTORCH_CUDA_ALLOC_CONF"  # the one where vLLM looks before 0.31
VARIABLES = ("PYTORCH_ALLOC_CONF", CONF, "PYTORCH_HIP_ALLOC_CONF")
_OPTION = "expandable_segments"

_before: list[str | None] = []  # what CONF was, where it was changed here


def expandable() -> bool:
    """Whether the environment asks torch's allocator for expandable segments."""
    options = ",".join(os.environ.get(variable, "") for variable in VARIABLES)
    return f"{_OPTION}:true" in options.lower().replace(" ", "")


def refusal() -> str | None:
    """Why they cannot be switched on, or None: they can, or are."""
    for variable in VARIABLES:
        given = os.environ.get(variable, "")
        if _OPTION in given:
            return None if expandable() else f"{variable}={given}"
        if given and variable != CONF:
            return f"{variable}={given} is set, and vLLM looks for them in {CONF}"
    if "backend" in os.environ.get(CONF, ""):
        return f"{CONF}={os.environ[CONF]}"
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        return "with several processes they were not tried: their memory cannot be lent by CUDA IPC, as all-reduce does"
    return None if sys.platform == "linux" else f"torch does not offer them on {sys.platform}"


def expand() -> str | None:
    """Switch them on for what is allocated from now on; nothing where the environment speaks of them already.

    Returns:
        Why they are off, or None: they are on.
    """
    why = refusal()
    if why is not None or expandable():
        return why
    given = os.environ.get(CONF)
    wanted = ",".join(filter(None, (given, f"{_OPTION}:True")))
    try:
        _set(wanted)
        if not _in_force():
            _set(given or f"{_OPTION}:False")
            return "torch does not take them"
    except Exception as error:  # training goes on without
        return f"they could not be switched on: {error!r}"
    _before.append(given)
    os.environ[CONF] = wanted
    return None


def collapse() -> None:
    """Undo `expand`: what is allocated from now on is allocated as before."""
    while _before:
        given = _before.pop()
        _set(given or f"{_OPTION}:False")
        if given is None:
            os.environ.pop(CONF, None)
        else:
            os.environ[CONF] = given


def _set(options: str) -> None:
    """All options at once; torch forgets those that are not named."""
    import torch

    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # 2.9 and later
    (setter or torch.cuda.memory._set_allocator_settings)(options)


def _in_force() -> bool:
    import torch

    return torch.cuda.memory._snapshot()["allocator_settings"][_OPTION] is True
