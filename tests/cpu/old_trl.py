"""Lets TRL before 0.29 be imported beside transformers 5 and a vLLM much newer than it knew; tests only.

What is put right is what their *imports* and
their sampling parameters trip over; weights, KV cache, sleep and generation are left as they are:

- transformers 5 answers ``_is_package_available(name)`` with a tuple, which is always true;
- transformers 5 models have no ``warnings_issued``, to which TRL before 0.27 adds a note;
- TRL 0.26 replaces a function in ``vllm.transformers_utils.tokenizer``, which is gone;
- TRL to 0.26 imports ``GuidedDecodingParams`` and passes ``guided_decoding=None`` to ``SamplingParams``; to 0.25
  ``truncate_prompt_tokens`` too, which is gone (prompts here are shorter than any limit);
- vLLM before 0.10.2 knows no ``kv_cache_memory_bytes``, which tests set;
- torch 2.6's scaled dot product attention answers NaN for rows that transformers 4.53 and later mask whole: eager then;
- TRL before 0.20 leaves the variables that ``external_launcher`` reads to a launcher such as torchrun.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
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


def bound_kv_cache() -> None:
    """One GiB where vLLM's CPU worker sizes the KV cache by its variable alone (4 GiB by default, before 0.20)."""
    spec = importlib.util.find_spec("vllm")
    worker = Path(spec.origin).parent / "v1/worker/cpu_worker.py" if spec is not None and spec.origin else None
    if worker is not None and worker.is_file() and "kv_cache_memory_bytes" not in worker.read_text():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def _drop_argument(kind: type, name: str) -> None:
    """Let the constructor of `kind` ignore the keyword argument `name`."""
    original = kind.__init__

    @functools.wraps(original)
    def init(self: object, *args: object, **kwargs: object) -> None:
        kwargs.pop(name, None)
        original(self, *args, **kwargs)

    kind.__init__ = init


def _without_nan() -> None:
    import torch
    import transformers

    if not torch.__version__.startswith("2.6") or not hasattr(transformers.PreTrainedModel, "_sdpa_can_dispatch"):
        return

    def refuse(self: object, *args: object, **kwargs: object) -> bool:
        raise ValueError("NaN for rows that are masked whole")

    transformers.PreTrainedModel._sdpa_can_dispatch = refuse


def make_importable() -> None:
    """Call before TRL is imported; does nothing for releases that need no help."""
    if "transformers.utils.import_utils import _is_package_available" not in _source("import_utils.py"):
        return
    import transformers.utils.import_utils as availability

    original = availability._is_package_available

    def answer(*args: object, **kwargs: object) -> object:
        found = original(*args, **kwargs)
        return _Answer(found) if isinstance(found, tuple) else found

    availability._is_package_available = answer
    import transformers

    if not hasattr(transformers.PreTrainedModel, "warnings_issued"):
        transformers.PreTrainedModel.warnings_issued = {}
    if 'os.environ["RANK"]' not in _source("trainer/grpo_trainer.py") and not _source("generation/vllm_generation.py"):
        for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
            os.environ.setdefault(variable, value)
    _without_nan()
    import vllm
    import vllm.sampling_params
    from vllm.engine.arg_utils import EngineArgs

    if "kv_cache_memory_bytes" not in inspect.signature(EngineArgs).parameters:
        _drop_argument(vllm.LLM, "kv_cache_memory_bytes")
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
