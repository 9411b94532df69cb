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
from rlpatch.relies import Relies

_MODULE = _vllm_generation.MODULE


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
    relies_on=(
        # Builds the engine with LLM(…) once, sleeps at level 2 and notes that; the same in 1.10.0 to 1.16.0.
        Relies(f"{_MODULE}:VLLMGeneration._init_vllm", fingerprints=("1cc09347ab3d",)),
        Relies(
            f"{_MODULE}:VLLMGeneration.sync_weights",
            contains=("self.enable_sleep_mode", "self.llm.reset_prefix_cache()", "self._llm_weights_sleeping = False"),
        ),
        Relies(
            f"{_MODULE}:VLLMGeneration.generate",
            contains=(
                "self.mode == 'colocate' and self.enable_sleep_mode and self._llm_weights_sleeping",
                "self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)",
            ),
            lacks=("'reload_weights'",),
        ),
        *_vllm_generation.RELIES,
    ),
)
