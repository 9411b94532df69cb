"""TRL's colocated generation as one cycle (1.10 and later).

``VLLMGeneration`` (generation/vllm_generation.py) serves GRPO, RLOO and others: ``_init_vllm`` builds the engine and,
under ``enable_sleep_mode``, calls ``llm.sleep(level=2)``; ``sync_weights`` pushes every parameter through
``load_weights``; ``generate`` re-pushes after a level-2 sleep (``_llm_weights_sleeping``, trl#5142), wakes, generates
and sleeps again. With shared weights the push becomes nothing, and TRL's sleep mode becomes KV standby: the flag
``enable_sleep_mode`` is off for as long as the pair shares.
A model from ``rlpatch.load`` brings its engine with it, and ``_init_vllm`` then builds none.
Delete when: TRL has a hook around engine construction and generation.
"""

from __future__ import annotations

from rlpatch.adapters.trl import _vllm_generation
from rlpatch.registry import Adapter


def _probe() -> str | None:
    if missing := _vllm_generation.missing():
        return missing
    return None if _vllm_generation.repushes() else "its sleep mode is of the era that reloads the base checkpoint"


ADAPTER = Adapter(
    capability="generation",
    library="trl",
    versions=">=1.10,<1.17",
    module=_vllm_generation.MODULE,
    probe=_probe,
    patches=_vllm_generation.patches,
)
