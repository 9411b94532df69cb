"""Rollouts come as token ids: the engine does not spell them out as text that nobody reads.

``VLLMGeneration.generate`` returns ids and log-probs, and the trainer decodes the ids once, in one batch. vLLM decodes them
as well, token by token and once more for each log-prob (``decoded_token``), in the trainer's process between two steps of
the engine: 20 µs per token on a slow CPU (tiny model, 64 × 128 tokens: 0.64 s instead of 0.80 s, bench/results/
detokenize-cpu.json), more than a millisecond of a step of 64 sequences unless the device is busy for longer.

Left alone: stop strings, which vLLM finds in the text, and whatever ``generation_kwargs`` say about text themselves.
Delete when: TRL passes ``detokenize=False``.
"""

from __future__ import annotations

from typing import Any

from rlpatch.adapters.trl import _vllm_generation
from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_TEXT = {"detokenize", "stop", "include_stop_str_in_output", "output_kind"}


def _generate(wrapped: Any, generation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = generation.generation_kwargs
    if generation.mode != "colocate" or _TEXT & set(given):
        return wrapped(*args, **kwargs)
    generation.generation_kwargs = {**given, "detokenize": False}
    try:
        return wrapped(*args, **kwargs)
    finally:
        generation.generation_kwargs = given


def _patches(context: Context) -> list[Patch]:
    return [Patch(_vllm_generation.MODULE, "VLLMGeneration.generate", _generate)]


ADAPTER = Adapter(
    capability="detokenize",
    library="trl",
    versions=">=0.28,<1.17",
    module=_vllm_generation.MODULE,
    patches=_patches,
    relies_on=(
        Relies(
            f"{_vllm_generation.MODULE}:VLLMGeneration.generate",
            contains=("generation_kwargs.update(self.generation_kwargs)", "SamplingParams(**generation_kwargs)"),
        ),
        Relies(f"{_vllm_generation.MODULE}:VLLMGeneration.generation_kwargs"),
    ),
)
