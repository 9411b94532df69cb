"""Log-probs of sampled tokens are computed by as many threads as an SM has room for.

A trainer asks for the log-prob of every token that it samples. vLLM's second model runner (``v1/worker/gpu``, the default
for dense models from 0.22) computes it, and the token's rank, with one Triton program per sequence that walks a row of
logits in steps of 1,024 (twice) and 8,192 words. A Qwen3 row has 151,936: 150 steps and 150 again, each of which waits for
memory and for the one before. With steps of 16,384 and 32 warps it is 10. On an H200 an 8B model's rollouts of 8 sequences
come to 1,479 instead of 1,451 tokens/s, of 64 to 10,099 instead of 9,822 (docs/steps.md). The sum over the row has another
order: log-probs differ by float32's rounding.

CUDA alone: 32 of ROCm's warps are more threads than a program may have there.
Delete when: vLLM launches both kernels with steps of 8,192 or more and the warps for them.
"""

from __future__ import annotations

from typing import Any

from rlpatch.adapters.vllm._platform import has, no_triton_on_cuda
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

MODULE = "vllm.v1.worker.gpu.sample.logprob"
KERNELS = ("_topk_log_softmax_kernel", "_ranks_kernel")
STEP, WARPS = 16384, 32  # 16 values a thread: leaves registers for older GPUs, too


def _run(wrapped: Any, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``kernel[grid](…)`` ends up here: ``JITFunction.run``."""
    if "num_warps" not in kwargs and kwargs.get("BLOCK_SIZE", STEP) < STEP:
        kwargs = {**kwargs, "BLOCK_SIZE": STEP, "num_warps": WARPS}
    return wrapped(*args, **kwargs)


def _probe() -> str | None:
    return None if has(MODULE) else f"there is no {MODULE}"


def _patches(context: Context) -> list[Patch]:
    return [Patch(MODULE, f"{kernel}.run", _run) for kernel in KERNELS]


ADAPTER = Adapter(
    capability="logprob_kernels",
    library="vllm",
    versions=">=0.12,<0.34",
    module="vllm.entrypoints.llm",
    probe=_probe,
    relevant=no_triton_on_cuda,
    patches=_patches,
    relies_on=(
        # any step serves: what lies behind a row's end is masked, and sums go on from step to step
        Relies(
            f"{MODULE}:_topk_log_softmax_kernel",
            parameters=("BLOCK_SIZE",),
            fingerprints=("e3dd776899c7", "7f3b54c325db", "58a742c58c35"),
        ),
        Relies(
            f"{MODULE}:_ranks_kernel",
            parameters=("BLOCK_SIZE",),
            fingerprints=("80c22353c875", "b7236199a0c0", "5ce223af109b"),
        ),
    ),
)
