"""Weights from the trainer's memory while every sleep level but 1 discards all memory (0.10.1 to 0.16).

As in ``weights_v0_17.py``, with one difference: there is no level 0. ``Worker.sleep(level)`` asks
``CuMemAllocator.sleep(("weights",) if level == 1 else ())``, so ``LLM.sleep(level=0)`` takes the trainer's weights away
like level 2 and is guarded like it. ``LLM.sleep`` resets the prefix cache itself in these releases; KV standby does too.
Up to 0.11.0 ``v1.executor.abstract.Executor`` inherits ``sleep`` from ``executor.executor_base.ExecutorBase`` and stands
before it in the order of ``UniProcExecutor`` and ``ExecutorWithExternalLauncher``, so that the guard on it is reached.
0.10 may fall back to its V0 engine, which is left alone.
Delete when: the oldest supported vLLM is 0.17.
"""

from __future__ import annotations

from rlpatch.adapters.vllm._weights import RELIES, RELOAD_GUARD, TrainerMemory, has_registry, sleep_guards
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _patches(context: Context) -> list[Patch]:
    return [*sleep_guards(lowest=0), RELOAD_GUARD]


def _probe() -> str | None:
    import inspect

    from vllm.entrypoints.llm import LLM

    if "mode" in inspect.signature(LLM.sleep).parameters:
        return "LLM.sleep has a level 0 that keeps everything"
    return has_registry()


ADAPTER = Adapter(
    capability="share_weights",
    library="vllm",
    versions=">=0.10.1,<0.17",
    module="vllm.entrypoints.llm",
    probe=_probe,
    provides=TrainerMemory,
    patches=_patches,
    relies_on=(
        Relies("vllm.model_executor.model_loader:register_model_loader", positional=("load_format",)),
        *RELIES,
    ),
)
