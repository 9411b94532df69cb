"""A smaller card, emulated: ``python -m rlpatch.bench.ballast GIB`` holds device memory until GIB are free.

It prints one JSON line (``{"free": bytes, "held": bytes}`` or ``{"error": …}``) and holds on until its standard input
closes. The process under test additionally calls `scale_totals`, so that vLLM takes the card for one of GIB.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rlpatch.patching import Patch, PatchSet

_SLACK = 8 << 20  # bytes; torch's allocator takes large blocks in granules of 2 MiB


def hold(gib: float) -> tuple[list[Any], int]:
    """Allocate on device 0 until `gib` GiB are free (to within 8 MiB, never less).

    Returns:
        The tensors to keep, and the bytes free.

    Raises:
        MemoryError: less than `gib` GiB are free to begin with.
    """
    import torch

    target = int(gib * 2**30)
    held: list[Any] = [torch.empty(1, dtype=torch.uint8, device="cuda")]  # the context is there before free is read
    free = torch.cuda.mem_get_info()[0]
    if free < target:
        raise MemoryError(f"{gib:g} GiB cannot be emulated: {free / 2**30:.1f} GiB are free on this device")
    while free - target > _SLACK:
        held.append(torch.empty(free - target - _SLACK // 2, dtype=torch.uint8, device="cuda"))
        free = torch.cuda.mem_get_info()[0]
    return held, int(free)


def scale_totals(gib: float) -> PatchSet:
    """Patches (to be applied) under which the device seems to have `gib` GiB in all; what is free stays as it is.

    vLLM takes its budget from ``torch.accelerator.get_memory_info`` (``utils/mem_utils.MemorySnapshot``, 0.25 and
    later) or ``torch.cuda.mem_get_info`` (before), and its batch-size defaults from
    ``current_platform.get_device_total_memory``, which asks NVML or ``get_device_properties``. That last function of
    torch's is left alone: Inductor and Triton read it while compiling.
    """
    total = int(gib * 2**30)

    def info(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        return min(int(wrapped(*args, **kwargs)[0]), total), total

    def device_total(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return min(int(wrapped(*args, **kwargs)), total)

    import torch
    from vllm.platforms import current_platform

    platform = type(current_platform)
    patches = [Patch("torch.cuda", "mem_get_info", info)]
    if hasattr(torch.accelerator, "get_memory_info"):
        patches.append(Patch("torch.accelerator", "get_memory_info", info))
    patches.append(Patch(platform.__module__, f"{platform.__qualname__}.get_device_total_memory", device_total))
    return PatchSet("emulated device size", patches)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        gib = float(arguments[0])
    except (IndexError, ValueError):
        print("usage: python -m rlpatch.bench.ballast GIB", file=sys.stderr)
        return 2
    try:
        held, free = hold(gib)
    except (MemoryError, RuntimeError, AssertionError) as error:
        print(json.dumps({"error": str(error).splitlines()[0]}), flush=True)
        return 1
    print(json.dumps({"free": free, "held": sum(tensor.numel() for tensor in held)}), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
