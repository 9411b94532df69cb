"""A model as shapes: every weight of a decoder, from its ``config.json`` alone.

Layouts are those of transformers' modeling files (``src/transformers/models/<model_type>/modeling_<model_type>.py``), of
which the tests build each family and compare shape by shape. torch is not needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlpatch.errors import UsageError

DTYPES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1,
}  # fmt: skip
_ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp8": "float8_e4m3fn",
}
LINEAR, EXPERTS, EMBEDDING, VECTOR, OTHER = "linear", "experts", "embedding", "vector", "other"
_HEADER_LIMIT = 100 << 20  # safetensors' own limit of a header


def dtype_name(dtype: object, name: str = "dtype") -> str:
    """``"bfloat16"`` of ``"bf16"``, ``"torch.bfloat16"`` or torch's own object.

    Raises:
        UsageError: no dtype that weights are kept in.
    """
    text = str(dtype).removeprefix("torch.").lower()
    text = _ALIASES.get(text, text)
    if text not in DTYPES:
        raise UsageError(f"{name}={dtype!r}: expected one of {', '.join(DTYPES)}")
    return text


def width(dtype: object) -> int:
    """Bytes of one element."""
    return DTYPES[dtype_name(dtype)]


@dataclass(frozen=True)
class Tensor:
    """`count` weights of one name and shape.

    Attributes:
        name: The module's last name (``"q_proj"``), or the parameter's where the module has several.
        shape: As the trainer holds it; of a linear layer ``(out, in)``, of GPT-2's Conv1D ``(in, out)``.
        count: How many there are in the model.
        kind: ``"linear"`` (can carry a LoRA and be quantized), ``"experts"`` (3-D), ``"embedding"``, ``"vector"`` (norms,
            biases) or ``"other"``.
        inputs: Of a linear layer: columns of its input.
        outputs: Of a linear layer: columns of its output.
    """

    name: str
    shape: tuple[int, ...]
    count: int = 1
    kind: str = LINEAR
    inputs: int = 0
    outputs: int = 0

    @property
    def elements(self) -> int:
        """Of one of them."""
        return math.prod(self.shape)

    @property
    def total(self) -> int:
        """Elements of all."""
        return self.elements * self.count


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic needs to know of a model.

    Attributes:
        name: For people.
        family: ``model_type``.
        hidden: Width of the residual stream.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Of one head.
        intermediate: Width of the MLP (of a dense layer).
        vocab: Rows of the embedding.
        tied: Whether embedding and LM head are one tensor.
        positions: ``max_position_embeddings``.
        tensors: Every weight, tied ones once.
        dtype: Of the checkpoint.
        experts: Routed experts of a layer; 0: dense.
        experts_per_token: Experts that one token goes through.
        expert_intermediate: Width of one expert.
        gated: Whether the MLP has a gate (two matrices up instead of one).
        norms: Norms over the residual stream in one layer.
        rms: Whether these are transformers' RMSNorm, which computes in float32, rather than `torch.nn.LayerNorm`.
        qk_norm: Whether queries and keys are normalized.
        rotary: Columns of vLLM's table of cosines and sines; 0: learned positions.
        window: Sliding window in tokens of `windowed` layers, or None.
        windowed: Layers whose attention looks at `window` tokens only.
        notes: What was assumed.
    """

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int
    tensors: tuple[Tensor, ...] = field(repr=False)
    dtype: str = "bfloat16"
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    gated: bool = True
    norms: int = 2
    rms: bool = True
    qk_norm: bool = False
    rotary: int = 0
    window: int | None = None
    windowed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(tensor.total for tensor in self.tensors)

    def bytes(self, dtype: object) -> int:
        """All weights in one dtype."""
        return self.parameters * width(dtype)

    def linears(self, targets: str | tuple[str, ...] = "all-linear") -> list[Tensor]:
        """The linear layers that PEFT adapts for these ``target_modules`` (never the LM head for ``"all-linear"``).

        Raises:
            UsageError: a name that no linear layer has.
        """
        linears = [tensor for tensor in self.tensors if tensor.kind == LINEAR]
        if targets == "all-linear":
            return [tensor for tensor in linears if tensor.name != "lm_head"]
        wanted = (targets,) if isinstance(targets, str) else tuple(targets)
        names = {tensor.name for tensor in linears}
        unknown = [name for name in wanted if name.rsplit(".", 1)[-1] not in names]
        if unknown or not wanted:
            raise UsageError(
                f"target_modules={list(wanted)!r}: {self.name} has no linear layer {', '.join(unknown) or 'of no name'}; "
                f"it has {', '.join(sorted(names))}, or say all-linear"
            )
        short = {name.rsplit(".", 1)[-1] for name in wanted}
        return [tensor for tensor in linears if tensor.name in short]


# ---- families --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    tied: bool = False
    norms: int = 2
    rms: bool = True
    qk_norm: str = ""  # "head": over one head, "all": over all heads
    qkv_bias: bool | str = False  # a string names the config's field
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    fused: bool = False  # qkv and gate_up are one matrix each
    gated: bool = True
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    transposed: bool = False  # Conv1D
    learned_positions: bool = False
    grouped: bool = True  # knows key/value heads
    fields: Mapping[str, str] = field(default_factory=dict)  # our name -> the config's
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # transformers' own, left out of config.json when not changed
    experts: str = ""  # the config's field with the number of experts
    expert_width: str = "moe_intermediate_size"


_LLAMA = _Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_GEMMA3 = _Family(
    tied=True, norms=4, qk_norm="head", qkv_bias="attention_bias", out_bias="attention_bias",
    defaults={"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
)  # fmt: skip
_QWEN3 = _Family(
    qk_norm="head", qkv_bias="attention_bias", out_bias="attention_bias", defaults={"head_dim": 128}
)  # fmt: skip
FAMILIES: dict[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, defaults={}, experts="num_experts"),
    "mixtral": _Family(experts="num_local_experts", expert_width="intermediate_size"),
    "gemma": _Family(
        tied=True, qkv_bias="attention_bias", out_bias="attention_bias", defaults={"head_dim": 256, "vocab_size": 256000}
    ),
    "gemma2": _Family(
        tied=True, norms=4, qkv_bias="attention_bias", out_bias="attention_bias",
        defaults={"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000},
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": _Family(fused=True, names=("qkv_proj", "", "", "o_proj", "gate_up_proj", "", "down_proj")),
    "olmo2": _Family(qk_norm="all", qkv_bias="attention_bias", out_bias="attention_bias"),
    "gpt2": _Family(
        tied=True, rms=False, qkv_bias=True, out_bias=True, mlp_bias=True, fused=True, gated=False, transposed=True,
        learned_positions=True, grouped=False,
        names=("c_attn", "", "", "c_proj", "c_fc", "", "c_proj"),
        fields={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions", "intermediate_size": "n_inner"},
        defaults={"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    ),
    "gpt_neox": _Family(
        grouped=False, rms=False, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias=True, fused=True,
        gated=False,
        names=("query_key_value", "", "", "dense", "dense_h_to_4h", "", "dense_4h_to_h"),
        defaults={"attention_bias": True, "max_position_embeddings": 2048},
    ),
}  # fmt: skip
_UNPLANNED = {
    "kv_lora_rank": "multi-head latent attention",
    "ssm_state_size": "state-space layers",
    "mamba_d_state": "state-space layers",
    "linear_num_value_heads": "linear attention",
}
_EXPERTS = ("num_experts", "num_local_experts")
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


class _Config:
    """The fields of a config, by the name that most families use."""

    def __init__(self, raw: Mapping[str, Any], family: _Family, origin: str) -> None:
        self.raw, self.family, self.origin = raw, family, origin

    def _key(self, name: str) -> str:
        own = self.family.fields.get(name, name)
        return own if own in self.raw or name not in self.raw else name

    def get(self, name: str, default: Any = None) -> Any:
        key = self._key(name)
        value = self.raw.get(key)
        if value is None:
            value = self.family.defaults.get(key)
        return default if value is None else value

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(
                f"{self.origin}: {self._key(name)} is {value!r}; expected a whole number of at least {least}"
            )
        return value

    def flag(self, value: bool | str) -> bool:
        return bool(self.get(value, False)) if isinstance(value, str) else value


def from_config(config: Mapping[str, Any], name: str = "", origin: str = "config.json") -> ModelShape:
    """The shape of a model from its transformers-style config.

    Args:
        config: The contents of ``config.json``.
        name: For people; default: the config's own or the family's.
        origin: Where it is from, for errors.

    Raises:
        UsageError: fields are missing or wrong (all that are missing are named), or the kind of layers is not planned.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"{origin}: expected an object with the fields of a transformers config")
    notes: list[str] = []
    outer, raw = config, config
    if isinstance(config.get("text_config"), Mapping):
        raw = config["text_config"]
        notes.append("only the language model is counted; a vision or audio tower comes on top")
    model_type = str(raw.get("model_type") or outer.get("model_type") or "")
    family = FAMILIES.get(model_type)
    if family is None:
        family = _LLAMA
        notes.append(
            f"model_type {model_type!r} is not known: counted like Llama; weights beside the config make it exact"
        )
    for field_name, what in _UNPLANNED.items():
        if raw.get(field_name):
            raise UsageError(f"{origin}: {what} ({field_name}) cannot be planned; set the memory by hand")
    if any("linear" in str(kind) or "mamba" in str(kind) for kind in raw.get("layer_types") or ()):
        raise UsageError(f"{origin}: layer_types with linear attention or state-space layers cannot be planned")
    c = _Config(raw, family, origin)
    required = _REQUIRED + (("intermediate_size",) if model_type not in ("gpt2", "qwen3_moe") else ())
    count_field = family.experts
    if family.experts:
        # transformers 5 writes one family's field under the other's name
        count_field = next((key for key in _EXPERTS if c.get(key) is not None), family.experts)
        required += (count_field, "num_experts_per_tok", family.expert_width)
    missing = [c._key(field_name) for field_name in dict.fromkeys(required) if c.get(field_name) is None]
    if missing:
        raise UsageError(f"{origin}: no {', '.join(missing)}; is it the config.json of a causal language model?")

    hidden, layers, heads = c.count("hidden_size"), c.count("num_hidden_layers"), c.count("num_attention_heads")
    vocab = c.count("vocab_size")
    kv_heads = c.count("num_key_value_heads", heads) if family.grouped else heads
    if heads % kv_heads:
        raise UsageError(f"{origin}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if c.get("head_dim") is None and hidden % heads:
        raise UsageError(
            f"{origin}: no head_dim, and hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    head_dim = c.count("head_dim", hidden // heads)
    positions = c.count("max_position_embeddings", 2048)
    intermediate = c.count("intermediate_size", 4 * hidden)
    tied = bool(outer.get("tie_word_embeddings", raw.get("tie_word_embeddings", family.tied)))
    experts = c.count(count_field) if family.experts else 0
    per_token = c.count("num_experts_per_tok") if experts else 0
    expert_width = c.count(family.expert_width) if experts else 0
    kinds = raw.get("layer_types")
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if isinstance(kinds, (list, tuple)):
        windowed = sum(kind == "sliding_attention" for kind in kinds)
    elif model_type.startswith("gemma3"):
        windowed = layers - layers // c.count("sliding_window_pattern", 6)
    elif model_type == "gemma2":
        windowed = (layers + 1) // 2
    else:
        windowed = layers
    # Mixture-of-experts layers: every `decoder_sparse_step`-th one, but those named
    sparse = 0
    if experts:
        step, dense = c.count("decoder_sparse_step", 1), set(raw.get("mlp_only_layers") or ())
        sparse = sum(i not in dense and (i + 1) % step == 0 for i in range(layers))
    tensors = tuple(
        _weights(family, c, hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, tied, positions,
                 experts, expert_width, sparse)
    )  # fmt: skip
    dtype = raw.get("dtype") or raw.get("torch_dtype") or outer.get("dtype") or outer.get("torch_dtype")
    if dtype is None:
        notes.append("the config tells no dtype: bfloat16 assumed")
    return ModelShape(
        name=name or str(outer.get("_name_or_path") or "") or model_type or "model",
        family=model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        tied=tied,
        positions=positions,
        tensors=tensors,
        dtype=dtype_name(dtype or "bfloat16", f"{origin}: dtype"),
        experts=experts,
        experts_per_token=per_token,
        expert_intermediate=expert_width,
        gated=family.gated,
        norms=family.norms,
        rms=family.rms,
        qk_norm=bool(family.qk_norm),
        rotary=0 if family.learned_positions else head_dim,
        window=window if isinstance(window, int) and windowed else None,
        windowed=windowed if isinstance(window, int) else 0,
        notes=tuple(notes),
    )


def _weights(
    family: _Family, c: _Config, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int,
    vocab: int, tied: bool, positions: int, experts: int, expert_width: int, sparse: int,
) -> Iterator[Tensor]:  # fmt: skip
    def linear(name: str, inputs: int, outputs: int, bias: bool, count: int) -> Iterator[Tensor]:
        if count:
            shape = (inputs, outputs) if family.transposed else (outputs, inputs)
            yield Tensor(name, shape, count, LINEAR, inputs, outputs)
            if bias:
                yield Tensor(f"{name}.bias", (outputs,), count, VECTOR)

    def norm(name: str, columns: int, count: int) -> Iterator[Tensor]:
        yield Tensor(name, (columns,), count * (1 if family.rms else 2), VECTOR)  # LayerNorm has a bias, too

    q, k, v, o, gate, up, down = family.names
    wide, narrow = heads * head_dim, kv_heads * head_dim
    qkv_bias, out_bias, mlp_bias = c.flag(family.qkv_bias), c.flag(family.out_bias), c.flag(family.mlp_bias)
    yield Tensor("embed_tokens", (vocab, hidden), 1, EMBEDDING)
    if family.learned_positions:
        yield Tensor("wpe", (positions, hidden), 1, EMBEDDING)
    if family.fused:
        yield from linear(q, hidden, wide + 2 * narrow, qkv_bias, layers)
    else:
        yield from linear(q, hidden, wide, qkv_bias, layers)
        yield from linear(k, hidden, narrow, qkv_bias, layers)
        yield from linear(v, hidden, narrow, qkv_bias, layers)
    yield from linear(o, wide, hidden, out_bias, layers)
    if family.qk_norm:
        yield from norm("q_norm", wide if family.qk_norm == "all" else head_dim, layers)
        yield from norm("k_norm", narrow if family.qk_norm == "all" else head_dim, layers)
    dense = layers - sparse
    if family.gated and not family.fused:
        yield from linear(gate, hidden, intermediate, mlp_bias, dense)
        yield from linear(up, hidden, intermediate, mlp_bias, dense)
    else:
        yield from linear(gate, hidden, intermediate * (2 if family.gated else 1), mlp_bias, dense)
    yield from linear(down, intermediate, hidden, mlp_bias, dense)
    if sparse:
        yield Tensor("router", (experts, hidden), sparse, OTHER)
        yield Tensor("experts.gate_up_proj", (experts, 2 * expert_width, hidden), sparse, EXPERTS)
        yield Tensor("experts.down_proj", (experts, hidden, expert_width), sparse, EXPERTS)
    yield from norm("norm", hidden, family.norms * layers + 1)
    if not tied:
        yield Tensor("lm_head", (vocab, hidden), 1, LINEAR, hidden, vocab)


# ---- where they come from --------------------------------------------------------------------------------------------


def read(model: str | Path, shapes: Mapping[str, Mapping[str, Any]] | None = None, name: str = "model") -> ModelShape:
    """The shape of a checkpoint folder, a ``config.json`` or one of `shapes`.

    Weights that lie in the folder (``*.safetensors``) are counted, from their headers: what the config does not tell of
    is then part of the sum.

    Args:
        model: Path or key of `shapes`.
        shapes: Configs by name.

    Raises:
        UsageError: there is no such thing, or its config cannot be used; names it.
    """
    for known, config in (shapes or {}).items():
        if str(model).lower() == known.lower():
            return from_config(config, name=known, origin=known)
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        known = f", or a shape: {', '.join(shapes)}" if shapes else ""
        raise UsageError(
            f"{name} {str(model)!r}: no such folder with a config.json and no such file; give a checkpoint's folder, a "
            f"config.json{known}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as JSON: {error}") from error
    shape = from_config(config, name=path.name if path.is_dir() else file.resolve().parent.name, origin=str(file))
    if not path.is_dir():
        return shape
    stored = stored_elements(path)
    missing = (stored or 0) - shape.parameters
    if missing > 0:
        note = f"the weight files hold {missing:,} elements that the config does not tell of; they are counted"
        return replace(
            shape,
            tensors=(*shape.tensors, Tensor("others", (missing,), 1, OTHER)),
            notes=(*(n for n in shape.notes if "comes on top" not in n), note),
        )
    return shape


def stored_elements(folder: Path) -> int | None:
    """Elements in the ``*.safetensors`` files of `folder`, from their headers; None: there are none, or not all of them.

    Raises:
        UsageError: a file is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{index}: cannot be read: {error!r}") from error
        if not wanted <= {file.name for file in files}:
            return None
        files = [file for file in files if file.name in wanted]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        return None
    return sum(map(_header_elements, files))


def _header_elements(file: Path) -> int:
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > _HEADER_LIMIT:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: not a safetensors file: {error}") from error


def positive(value: Any, name: str, least: int = 1) -> int:
    """`value` if it is a whole number of at least `least`.

    Raises:
        UsageError: it is not; names the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}={value!r}: expected a whole number of at least {least}")
    return value
