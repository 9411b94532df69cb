"""One call for a model with an engine attached: the counterpart of the loaders that people come from.

`load` does in one step what an ordinary script does in two: the trainer's model is loaded, and the engine is filled from
its memory. The pair exists before any trainer does; adapters may be added to the model later (`Colocation.follow`), and
a TRL trainer that is given the model finds the pair (`phases.of_trainer`) and builds no second engine.

An adapter read from disk (`Attachment.load_lora`) never touches the trainer's model: PEFT loads it into a skeleton, a
second tree of modules over the very same weights, kept from before any adapter was added.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpatch import control
from rlpatch.errors import SharingError, UnsupportedError, UsageError
from rlpatch.versions import dtype_argument

if TYPE_CHECKING:
    import torch

    from rlpatch.lora.target import Adaptation
    from rlpatch.phases import Colocation
    from rlpatch.registry import Context

logger = logging.getLogger("rlpatch")

UTILIZATION = 0.5  # of the device, when the caller says nothing
_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"
_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."  # PEFT's, in adapter files

# Arguments of ``LLM`` that `load` decides, and what to give it instead.
_OURS = {
    "model": "give the path as the first argument",
    "tokenizer": "the tokenizer of the model's folder is used",
    "max_model_len": "use max_seq_length=",
    "load_format": "the engine is filled from the trainer's memory",
    "quantization": "use load_in_4bit=True",
    "enable_sleep_mode": "rlpatch.apply(standby=…) decides whether the KV cache stays resident",
    "enable_lora": "rlpatch.apply(lora='slots') and max_lora_rank= decide it",
    "max_loras": "one adapter at a time is in place; model.fast_generate(lora=…) chooses it",
    "distributed_executor_backend": "the engine runs in this process",
}
# Arguments of the loaders that people come from, and where they went.
_ELSEWHERE = {
    "model_name": "it is called model here, and is the first argument",
    "fast_inference": "leave it out: load always attaches an engine",
    "load_in_8bit": "vLLM cannot take over 8-bit weights; use load_in_4bit=True or 16 bits",
    "load_in_16bit": "leave it out, or say dtype='bfloat16'",
    "load_in_fp8": "fp8 weights cannot be trained through one copy; use 16 bits or load_in_4bit=True",
    "full_finetuning": "leave it out: every parameter is trainable until get_peft_model freezes the base",
    "use_gradient_checkpointing": "set gradient_checkpointing in the trainer's config",
    "float8_kv_cache": "use kv_cache_dtype='fp8'",
    "random_state": "use seed= for the engine, and the trainer's seed for the rest",
    "unsloth_vllm_standby": "use rlpatch.apply(standby=True), which is the default",
    "token": "log in with `hf auth login`, or set HF_TOKEN",
    "device_map": "the model goes to this process's device; the engine has to be on the same one",
    "fix_tokenizer": "leave it out: the tokenizer is used as it is",
    "rope_scaling": "set it in the model's config.json, which model and engine both read",
    "torch_dtype": "it is called dtype",
}


# ---- arguments -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked arguments of `load`; see `rlpatch.load`. ``dtype`` is a name such as ``"bfloat16"``, or None."""

    model: str
    max_seq_length: int
    load_in_4bit: bool
    max_lora_rank: int
    gpu_memory_utilization: float
    dtype: str | None
    revision: str | None
    trust_remote_code: bool
    model_arguments: Mapping[str, Any]
    engine: Mapping[str, Any]


def _requested(
    model: Any,
    *,
    max_seq_length: int,
    load_in_4bit: bool = False,
    max_lora_rank: int = 64,
    gpu_memory_utilization: float | None = None,
    dtype: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model_arguments: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Request:
    """Check everything that can be checked without torch. Raises UsageError, naming argument, value and remedy."""
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        raise UsageError(
            f"load(model={type(model).__name__}): expected a folder or a hub id; a model object that you loaded yourself "
            "goes to the trainer as it is, which then shares its weights with the engine that TRL builds"
        )
    for name, value in (("max_seq_length", max_seq_length), ("max_lora_rank", max_lora_rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"load({name}={value!r}): expected a positive whole number")
    if not isinstance(load_in_4bit, bool):
        raise UsageError(f"load(load_in_4bit={load_in_4bit!r}): expected True or False")
    share = gpu_memory_utilization if gpu_memory_utilization is not None else UTILIZATION
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise UsageError(f"load(gpu_memory_utilization={share!r}): expected a share of the device between 0 and 1")
    for name in engine:
        if name in _OURS or name in _ELSEWHERE:
            raise UsageError(f"load({name}={engine[name]!r}): {(_OURS | _ELSEWHERE)[name]}")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if engine.get(name, 1) != 1:
            raise UsageError(
                f"load({name}={engine[name]!r}): each engine would hold a part of every weight, and the trainer holds them "
                "whole; leave it at 1 and start one process per device"
            )
    arguments = dict(model_arguments or {})
    for name in ("dtype", "torch_dtype", "revision", "trust_remote_code", "device_map", "quantization_config"):
        if name in arguments:
            instead = {"device_map": "leave it out", "quantization_config": "use load_in_4bit="}.get(
                name, f"use load({name.removeprefix('torch_')}=…)"
            )
            raise UsageError(f"load(model_arguments={{{name!r}: …}}): {instead}, so that the engine gets the same")
    return Request(
        os.fspath(model), max_seq_length, load_in_4bit, max_lora_rank, float(share), _dtype_name(dtype), revision,
        bool(trust_remote_code), arguments, engine,
    )  # fmt: skip


def _dtype_name(dtype: Any) -> str | None:
    """``"bfloat16"`` of ``torch.bfloat16``, ``"torch.bfloat16"``, ``"bf16"`` or itself; None of None and ``"auto"``."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}.get(
        name, name
    )
    if name not in ("bfloat16", "float16", "float32"):
        raise UsageError(
            f"load(dtype={dtype!r}): expected 'bfloat16', 'float16' or 'float32' (or torch's), or None for the checkpoint's"
        )
    return name


def _check_context(context: Context, request: Request) -> None:
    """Settings of `apply` under which nothing can be shared from the start."""
    if not context.share_weights:
        raise UsageError(
            "apply(share_weights=False) is in force, and rlpatch.load is there to share the weights; apply() without it, "
            "or load the model with transformers and hand it to the trainer"
        )
    if context.lora == "merge":
        raise UsageError(
            "apply(lora='merge') leaves adapters to TRL, which pushes merged weights into an engine with a copy of its "
            "own, and rlpatch.load makes one copy; use lora='auto', 'fold' or 'slots'"
        )
    if context.lora == "fold" and request.load_in_4bit:
        raise UsageError(
            "load(load_in_4bit=True) under apply(lora='fold'): rounding base + adapter to 4 bits would lose the adapter; "
            "use lora='slots' or 'auto', or load the base in 16 bits"
        )


def _check_engine_arguments(engine: Mapping[str, Any]) -> None:
    """Arguments that vLLM does not have are said before anything is loaded."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)} | set(inspect.signature(LLM.__init__).parameters)
    for name in engine:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *inspect.signature(load).parameters], 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise UsageError(f"load({name}=…): neither rlpatch.load nor this vLLM has an argument of that name; {hint}")


# ---- loading -------------------------------------------------------------------------------------------------------


def load(model: Any, **arguments: Any) -> tuple[Any, Any]:
    """See `rlpatch.load`."""
    request = _requested(model, **arguments)
    context = control.context()
    if context is None:
        import rlpatch

        rlpatch.apply()
        context = control.context()
    assert context is not None
    _check_context(context, request)
    _can_quantize(request)
    with _in_process():
        _import_engine(context)
        _check_engine_arguments(request.engine)
        trainer, tokenizer = _load_model(request)
        attachment = _attach(context, request, trainer)
    attachment.bind()
    return trainer, tokenizer


@contextlib.contextmanager
def _in_process() -> Iterator[None]:
    """Let vLLM build the engine in this process: in another, its memory is out of the trainer's reach."""
    before = os.environ.get(_MULTIPROCESSING)
    if before not in (None, "", "0"):
        logger.info("rlpatch: %s=%s is set to 0 while the engine is built", _MULTIPROCESSING, before)
    os.environ[_MULTIPROCESSING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MULTIPROCESSING]
        else:
            os.environ[_MULTIPROCESSING] = before


def _import_engine(context: Context) -> None:
    """Import what the adapters wait for. Raises UnsupportedError when no adapter can share with this vLLM."""
    import transformers.modeling_utils  # noqa: F401
    import vllm.entrypoints.llm  # noqa: F401

    for capability in ("engine", "share_weights"):
        if capability not in context.providers:
            reason = context.reasons.get(capability) or "switched off by include= or exclude= of apply()"
            raise UnsupportedError(
                f"rlpatch.load needs {capability}, and it is not applied: {reason}. `python -m rlpatch doctor` lists the "
                "releases that are served"
            )


def _can_quantize(request: Request) -> None:
    if not request.load_in_4bit:
        return
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "load(load_in_4bit=True): vLLM serves bitsandbytes weights on GPUs only, and torch sees none here; leave it out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "load(load_in_4bit=True): bitsandbytes is not installed; pip install bitsandbytes, or leave it out"
        )


def _device() -> torch.device:
    """This process's device: the one that vLLM and accelerate choose as well."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _load_model(request: Request) -> tuple[Any, Any]:
    """The trainer's model on its device, and the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    common = {"revision": request.revision, "trust_remote_code": request.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(request.model, padding_side="left", **common)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype: Any = getattr(torch, request.dtype) if request.dtype is not None else "auto"
    arguments = {**request.model_arguments, **common}
    if request.load_in_4bit:
        from transformers import BitsAndBytesConfig

        if dtype == "auto":
            config = AutoConfig.from_pretrained(request.model, **common)
            saved = getattr(config, dtype_argument(), None)
            dtype = saved if saved in (torch.bfloat16, torch.float16) else torch.bfloat16
        arguments["device_map"] = {"": _device()}
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(request.model, **{dtype_argument(): dtype}, **arguments)
    return (model if request.load_in_4bit else model.to(_device())), tokenizer


def _attach(context: Context, request: Request, model: Any) -> Attachment:
    """Build the engine out of the model's memory. After an error the model has its own memory again."""
    from vllm import LLM

    from rlpatch import phases
    from rlpatch.sharing import quantized
    from rlpatch.sharing.share import trainer_slots

    in_4bit = quantized.has_quantized(model)
    names = context.providers.get("checkpoint_names")
    pair = phases.Colocation(
        context,
        trainer_slots(model),
        refusal=_refusal(context, model, in_4bit),
        renamer=names(model) if names is not None else None,
        owner=weakref.ref(model),
        slots_rank=_slots_rank(context, request, in_4bit),
    )
    if pair.refusal is not None:
        raise SharingError(_cannot_share(request, pair.refusal))
    try:
        with pair.build():
            llm = LLM(**_engine_arguments(request, model, in_4bit))
            if not pair.shares:
                raise SharingError(_cannot_share(request, pair.refusal or "the engine has none of its tensors"))
    except BaseException:
        pair.abandon()
        raise
    return Attachment(model, pair, llm)


def _cannot_share(request: Request, reason: str) -> str:
    return (
        f"load({request.model!r}) cannot share the weights with the engine: {reason}. Load the model with transformers and "
        "hand it to the trainer, which then uses TRL's own engine and weight sync"
    )


def _refusal(context: Context, model: Any, in_4bit: bool) -> str | None:
    from rlpatch.sharing import quantized

    if in_4bit:
        provider = context.providers.get("quantized_weights")
        if provider is None:
            reason = context.reasons.get("quantized_weights", "no adapter serves this vLLM")
            raise UnsupportedError(quantized.without_engine(reason))
        found: str | None = provider.refusal(model)
        return found
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        return "the checkpoint is quantized, and not with bitsandbytes to 4 bits"
    return None


def _slots_rank(context: Context, request: Request, in_4bit: bool) -> int:
    """The rank to reserve LoRA slots for: where the fold will not do, they have to be there from the start."""
    if context.lora == "fold" and in_4bit:
        raise UsageError(
            f"{request.model!r} is quantized to 4 bits, and apply(lora='fold') would lose the adapter in the rounding; use "
            "lora='slots' or 'auto'"
        )
    if not in_4bit and context.lora != "slots":
        return 0
    provider = context.providers.get("lora_slots")
    if provider is None:
        reason = context.reasons.get("lora_slots", "no adapter reaches the LoRA slots of this vLLM")
        raise UnsupportedError(f"adapters have to be served from vLLM's LoRA slots here, and cannot be: {reason}")
    provider.engine_arguments(request.max_lora_rank)  # a rank beyond what vLLM accepts is said now
    return request.max_lora_rank


def _engine_arguments(request: Request, model: Any, in_4bit: bool) -> dict[str, Any]:
    """What TRL's colocated engine is built with, and what the caller added."""
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return {
        "model": request.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": request.max_seq_length,
        "gpu_memory_utilization": request.gpu_memory_utilization,
        "revision": request.revision,
        "tokenizer_revision": request.revision,
        "trust_remote_code": request.trust_remote_code,
        "max_num_batched_tokens": 4096,
        "logprobs_mode": "processed_logprobs",  # TRL's importance sampling correction compares with these
        "seed": int(os.environ.get("RANK", "0")),  # else every process would sample the same completions
        **({"quantization": "bitsandbytes"} if in_4bit else {}),
        # With torchrun's variables; without them vLLM needs none, and setting them would make accelerate distributed.
        **({"distributed_executor_backend": "external_launcher"} if distributed else {}),
        **request.engine,
    }


# ---- what a loaded model can do ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LoraHandle:
    """An adapter from disk, on the device and ready for ``model.fast_generate(lora=…)``.

    Attributes:
        name: The folder's name.
        path: The folder.
        config: Its ``peft.LoraConfig``.
        adaptation: The weights that it changes and by what: per target ``left [rows, r]`` and ``right [r, columns]``.
    """

    name: str
    path: Path
    config: Any
    adaptation: Adaptation = dataclasses.field(repr=False)
    pair: Callable[[], Colocation | None] = dataclasses.field(repr=False)

    @property
    def rank(self) -> int:
        """The largest rank of any weight."""
        from rlpatch.lora.slots import rank_of

        return rank_of(self.adaptation.targets)

    @property
    def tensors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Name of a weight -> (``lora_A [r, columns]``, ``lora_B [rows, r]``), in the adapter's dtype."""
        return {t.name: (product.right, product.left) for t in self.adaptation.targets for product in t.products}


class Method:
    """A function of a loaded model. Copies of the model (deepcopy, pickle) have no engine, and get `Lost` instead."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Lost, (self._function.__name__,)


class Lost:
    """Stands in a copy of a loaded model where the original has a function that needs the engine."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            f"model.{self.name} is a function of the model that rlpatch.load returned; this is a copy of it, and no engine "
            "shares its weights"
        )


class Attachment:
    """The engine of a loaded model, and the functions that the model gets from it.

    Args:
        model: The trainer's model as transformers made it, without adapters.
        pair: Built and sharing.
        llm: Its ``vllm.LLM``.
    """

    def __init__(self, model: Any, pair: Colocation, llm: Any) -> None:
        from rlpatch.sharing import quantized

        self._model = weakref.ref(model)
        self.pair = pair
        self.llm = llm
        self._quantized = quantized.has_quantized(model)
        self._skeleton = _skeleton(model)

    def bind(self) -> None:
        """Give the model its functions. A ``PeftModel`` around it forwards them."""
        for function in (self.fast_generate, self.save_lora, self.load_lora):
            setattr(self.model, function.__name__, Method(function))

    @property
    def model(self) -> Any:
        """The trainer's model."""
        model = self._model()
        assert model is not None, "the functions are attributes of the model"
        return model

    def fast_generate(self, prompts: Any, sampling_params: Any = None, lora: Any = None, **arguments: Any) -> Any:
        """Generate with vLLM, from the trainer's weights as they are now.

        Args:
            prompts: Whatever ``LLM.generate`` accepts.
            sampling_params: vLLM's ``SamplingParams``, one or one per prompt; None: the model's defaults.
            lora: None: the model's active adapters, the base if it has none; False: the base; what `load_lora` returned:
                that adapter instead of the active ones. ``lora_request=`` is the same argument.
            arguments: Further arguments of ``LLM.generate``.

        Returns:
            What ``LLM.generate`` returns, a list of ``RequestOutput``.

        Raises:
            UsageError: `lora` is none of these, or the model's adapters cannot reach the engine (both say why).
            SharingError: the weights are no longer shared (``rlpatch.revert()``, adapters that only TRL can merge).
        """
        if "lora_request" in arguments:
            alias = arguments.pop("lora_request")
            if lora is not None and alias is not None:
                raise UsageError("fast_generate(lora=…, lora_request=…): the two are one argument; give one of them")
            lora = alias if lora is None else lora
        instead = self._instead(lora)
        self._check_alive()
        try:
            self.pair.follow(self.model, quantized=self._quantized)
        except UsageError:
            if instead is None:  # the base can be served all the same, and is as it was
                raise
        if instead is not None and self.pair.replaced:
            raise UsageError(
                f"fast_generate(lora={_brief(lora)}): LoraConfig.modules_to_save trains a copy of {self.pair.replaced[0]}, "
                "which has taken the original's place in the engine, so that it cannot serve the base now"
            )
        self.pair.sync()
        with self.pair.rollout(instead):
            return self.llm.generate(prompts, sampling_params, **arguments)

    def save_lora(self, path: str | os.PathLike[str], adapter: str = "default") -> Path:
        """Write one adapter in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``).

        Args:
            path: The folder; created.
            adapter: The adapter's name.

        Returns:
            The folder.

        Raises:
            UsageError: the model has no such adapter, or `path` is a file.
        """
        folder = Path(path)
        configs = getattr(self.model, "peft_config", None) or {}
        if not configs:
            raise UsageError(
                "save_lora: the model has no adapters; add one with peft.get_peft_model(model, LoraConfig(…))"
            )
        if adapter not in configs:
            raise UsageError(f"save_lora(adapter={adapter!r}): the model has {', '.join(map(repr, configs))}")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"save_lora({str(path)!r}): this is a file; give a folder")
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = get_peft_model_state_dict(self.model, adapter_name=adapter)
        save_file(
            {_PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()},
            folder / _WEIGHTS[0],
            metadata={"format": "pt"},
        )
        config = copy.copy(configs[adapter])
        config.base_model_name_or_path = config.base_model_name_or_path or self.model.name_or_path
        config.inference_mode = True
        config.save_pretrained(str(folder))
        return folder

    def load_lora(self, path: str | os.PathLike[str]) -> LoraHandle:
        """Read an adapter in PEFT's format onto the device. The model and its own adapters are not touched.

        Args:
            path: A local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

        Returns:
            A handle for ``fast_generate(lora=…)``. It keeps what was read: changing the files later changes nothing.

        Raises:
            UsageError: a file is missing, the adapter is for another model (names the layer and both shapes), is more
                than plain LoRA, or its rank exceeds the engine's slots.
        """
        folder = Path(path)
        weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        for found, name in ((folder.is_dir(), None), ((folder / _CONFIG).is_file(), _CONFIG), (weights, _WEIGHTS[0])):
            if not found:
                what = "there is no such folder" if name is None else f"the folder has no {name}"
                raise UsageError(
                    f"load_lora({str(path)!r}): {what}; an adapter is a folder as PEFT and save_lora write it (an adapter "
                    "on the hub: huggingface_hub.snapshot_download gives a folder)"
                )
        assert weights is not None
        self._check_alive()
        if importlib.util.find_spec("peft") is None:
            raise UsageError("load_lora: reading an adapter needs peft, which is not installed; pip install peft")
        from peft import PeftConfig, PeftModel

        kind = json.loads((folder / _CONFIG).read_text()).get("peft_type")
        if kind != "LORA":
            raise UsageError(
                f"load_lora({str(path)!r}): the adapter is of type {kind}, and the engine serves LORA only"
            )
        config = PeftConfig.from_pretrained(str(folder))
        skeleton = _skeleton(self._skeleton)
        _check_shapes(str(path), weights, skeleton)
        try:
            adapted = PeftModel.from_pretrained(skeleton, str(folder), config=config, is_trainable=False)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UsageError(f"load_lora({str(path)!r}): PEFT cannot put it on this model: {error}") from error
        adaptation = self._adaptation(str(path), adapted)
        return LoraHandle(folder.name, folder, config, adaptation, weakref.ref(self.pair))

    # ---- inside ------------------------------------------------------------------------------------------------

    def _check_alive(self) -> None:
        from rlpatch import phases

        if self.pair not in phases.live():
            raise SharingError(
                "the engine of this model was parted from it by rlpatch.revert(), or by apply() with other settings; call "
                "rlpatch.load again"
            )
        if not self.pair.shares:
            raise SharingError(
                f"the engine of this model has weights of its own now ({self.pair.refusal}), which only the trainer brings "
                "up to date; generate through the trainer, or load the model again"
            )

    def _instead(self, lora: Any) -> Adaptation | None:
        from rlpatch.lora.target import Adaptation

        if lora is None:
            return None
        if lora is False:
            return Adaptation(())
        if not isinstance(lora, LoraHandle):
            raise UsageError(
                f"fast_generate(lora={_brief(lora)}): expected None (the active adapters), False (the base), or what "
                "model.load_lora(path) returned"
            )
        if lora.pair() is not self.pair:
            raise UsageError(
                f"fast_generate(lora={lora.name!r}): it was loaded for another model; call this one's load_lora"
            )
        return lora.adaptation

    def _adaptation(self, path: str, adapted: Any) -> Adaptation:
        """What an adapter on the skeleton amounts to. Raises UsageError where that cannot be put in place."""
        from rlpatch.lora.slots import accepted_rank, rank_of
        from rlpatch.lora.target import Adaptation, in_one_line

        reader = self.pair.context.providers.get("lora")
        if reader is None:
            reason = self.pair.context.reasons.get("lora", "it is switched off")
            raise UnsupportedError(f"load_lora: no adapter of rlpatch reads this PEFT: {reason}")
        read = reader(adapted).read()
        assert self.pair.engine is not None
        in_slots = self.pair.engine.lora_slots
        refused = read.refused if in_slots else {**read.refused, **read.unfoldable}
        for full, parameter in adapted.named_parameters():
            if ".modules_to_save." in full:
                refused = {**refused, full: "modules_to_save replaces whole weights"}
            del parameter
        if refused:
            raise UsageError(f"load_lora({path!r}): the engine cannot serve this adapter: {in_one_line(refused)}")
        if not read.targets:
            raise UsageError(f"load_lora({path!r}): the adapter changes no weight of this model")
        if in_slots:
            provider = self.pair.context.providers["lora_slots"]
            limit = self.pair.engine.llm.llm_engine.vllm_config.lora_config.max_lora_rank
            accepted_rank(rank_of(read.targets), provider.accepted_ranks(), limit=limit)
        missing = [target.parameter for target in read.targets if self.pair.sharing is not None
                   and target.parameter in self.pair.sharing.absent]  # fmt: skip
        if missing:
            raise UsageError(f"load_lora({path!r}): it changes {missing[0]}, and the engine has no such tensor")
        # The base may be trained between two rollouts: it is not this adapter's to say that it should be frozen.
        return Adaptation(
            tuple(dataclasses.replace(target, frozen=False) for target in read.targets), adapters=read.adapters
        )


def _brief(lora: Any) -> str:
    return repr(lora.name if isinstance(lora, LoraHandle) else lora)[:80]


def _skeleton(model: Any) -> Any:
    """A second tree of modules over the same memory: tensor objects of its own (PEFT freezes them), no second copy."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        twin = copy.copy(parameter)  # keeps the class and the quantization state of 4-bit weights
        twin.requires_grad_(False)
        memo[id(parameter)] = twin
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def _check_shapes(path: str, weights: Path, model: Any) -> None:
    """Raise UsageError for the first matrix in the file that does not fit its layer, naming the layer and both shapes.

    Layers of kinds other than linear and embedding are left to PEFT.
    """
    if weights.suffix != ".safetensors":
        return
    from safetensors import safe_open

    modules = dict(model.named_modules())
    with safe_open(weights, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - no mapping
            layer, _, matrix = key.removeprefix(_PREFIX).rpartition(".lora_")
            if matrix not in ("A.weight", "B.weight") or ".base_layer" in layer:
                continue
            if layer not in modules:
                raise UsageError(
                    f"load_lora({path!r}): the adapter is for another model: it changes {layer}, and this one has no such "
                    "layer"
                )
            module = modules[layer]
            wide, high = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if wide is None or high is None:
                continue
            shape = tuple(tensors.get_slice(key).get_shape())
            if shape[1 if matrix[0] == "A" else 0] != (wide if matrix[0] == "A" else high):
                raise UsageError(
                    f"load_lora({path!r}): the adapter is for another model: lora_{matrix[0]} of {layer} has shape "
                    f"{shape}, and the layer's weight has {(high, wide)}"
                )
