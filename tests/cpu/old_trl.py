"""Lets TRL before 0.29 be imported beside transformers 5 and a vLLM much newer than it knew; tests only.

There is no CPU build of the vLLM releases that these TRL releases accept. What is put right is what their *imports* and
their sampling parameters trip over; weights, KV cache, sleep and generation are left as they are:

- transformers 5 answers ``_is_package_available(name)`` with a tuple, which is always true;
- transformers 5 models have no ``warnings_issued``, to which TRL before 0.27 adds a note;
- TRL 0.26 replaces a function in ``vllm.transformers_utils.tokenizer``, which is gone;
- TRL to 0.26 imports ``GuidedDecodingParams`` and passes ``guided_decoding=None`` to ``SamplingParams``; to 0.25
  ``truncate_prompt_tokens`` too, which is gone (prompts here are shorter than any limit);
- TRL before 0.20 leaves the variables that ``external_launcher`` reads to a launcher such as torchrun.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path


def _source(module: str) -> str:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return ""
    file = Path(spec.origin).parent / module
    return file.read_text() if file.is_file() else ""


class _Answer(tuple):  # type: ignore[type-arg]
    """Whether a package is there, and its version; false when it is not."""

    def __bool__(self) -> bool:
        return bool(self[0])


def make_importable() -> None:
    """Call before TRL is imported; does nothing for releases that need no help."""
    if "transformers.utils.import_utils import _is_package_available" not in _source("import_utils.py"):
        return
    import transformers.utils.import_utils as availability

    original = availability._is_package_available
    availability._is_package_available = lambda *args, **kwargs: _Answer(original(*args, **kwargs))
    import transformers

    if not hasattr(transformers.PreTrainedModel, "warnings_issued"):
        transformers.PreTrainedModel.warnings_issued = {}
    if 'os.environ["RANK"]' not in _source("trainer/grpo_trainer.py") and not _source("generation/vllm_generation.py"):
        for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
            os.environ.setdefault(variable, value)
    import vllm
    import vllm.sampling_params

    if importlib.util.find_spec("vllm.transformers_utils.tokenizer") is None:
        sys.modules["vllm.transformers_utils.tokenizer"] = module = types.ModuleType(
            "vllm.transformers_utils.tokenizer"
        )
        vllm.transformers_utils.tokenizer = module
    if not hasattr(vllm.sampling_params, "GuidedDecodingParams"):
        vllm.sampling_params.GuidedDecodingParams = None

        class SamplingParams(vllm.SamplingParams):
            guided_decoding: None = None
            truncate_prompt_tokens: int | None = None

        vllm.SamplingParams = SamplingParams
