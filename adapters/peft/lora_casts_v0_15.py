"""A LoRA takes its input as it is where PEFT's cast of it is taken back at once.

``lora.Linear.forward`` brings its input to the adapter's dtype before ``lora_B(lora_A(dropout(x))) * scaling``
(``_cast_input_dtype``: of ``LoraLayer`` in 0.15, of ``BaseTunerLayer`` from 0.16 on; in 0.14 a ``.to`` in the line itself,
which nothing can leave out). PEFT keeps adapters in float32, so under 16-bit autocast a 16-bit input becomes a float32
copy for a moment, of which autocast makes a 16-bit one for ``lora_A``'s product and saves it for the backward pass: per
adapted layer, seven a transformer layer, and once more on the way back. 16 bits → float32 → the same 16 bits is the
identity, for the input as for its gradient, so the input itself serves; layers that read one tensor then save it once.

The same bits, provided that nothing stands between the two casts and that the gradient's sums keep their order. Left as
PEFT has it are therefore: inputs of another dtype than autocast's (a float32 residual stream is cast by autocast alone),
or adapters of another dtype than float32; dropout that drops (its noise is drawn and scaled in the dtype that it finds);
variants (DoRA, aLoRA, …); several active adapters, whose gradients PEFT adds up in float32 before they meet those of
others; an ``lora_A`` that is not a plain ``Linear`` or has hooks; inputs that are not contiguous from the start of their
storage, of which the copy has another layout than the tensor. Layers other than ``lora.Linear`` itself cast for
themselves: over bitsandbytes' weights PEFT does not cast under autocast either; batches that mix adapters
(``_mixed_batch_forward``) use ``.to``. ``torch.compile`` looks through wrappers: in compiled code PEFT's cast stays.

What is saved is the input and no copy: a model that overwrites an adapted layer's input afterwards, which torch refuses
where the layer's own weight is trained, is refused (an error, nothing silent). None of transformers' is known to.
Delete when: PEFT leaves the cast to autocast in ``lora.Linear`` as it does in ``lora.Linear4bit``.
"""

from __future__ import annotations

from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies

_LAYER = "peft.tuners.lora.layer"


def _cast(wrapped: Any, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and not kwargs and _for_nothing(*args) and _is_plain(layer, watched=True):
        return args[0]
    return wrapped(*args, **kwargs)


def _for_nothing(x: Any, dtype: Any) -> bool:
    """Whether autocast makes `x` again of what a cast of it to `dtype` gives."""
    import torch

    if dtype is not torch.float32 or not isinstance(x, torch.Tensor):
        return False
    narrow = x.dtype
    if narrow is not torch.bfloat16 and narrow is not torch.float16:
        return False
    device = x.device.type
    if device != "cuda" and device != "cpu":  # torch refuses to say for devices that have no autocast
        return False
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) is not narrow:
        return False
    return x.is_contiguous() and x.storage_offset() == 0


def _is_plain(layer: Any, watched: bool = False) -> bool:
    """Whether `layer` is a ``lora.Linear`` of which one adapter is active, with nothing between its cast and its product.

    Args:
        watched: As its modules are now: in training or not, with hooks or without; else as they will be in training.
    """
    from torch.nn import Dropout, Identity, Linear

    kind = type(layer)
    if kind.__name__ != "Linear" or kind.__module__ != _LAYER:
        return False
    own = vars(layer)
    modules = own["_modules"]  # seven layers, every pass: torch's own look-up of a module takes a microsecond
    factors = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in factors]
    if len(active) != 1:
        return False
    name = active[0]
    if name in own.get("lora_variant", ()) or own["use_dora"].get(name, False):
        return False
    factor, dropout = factors[name], modules["lora_dropout"]._modules[name]
    if type(factor) is not Linear or (watched and (factor._forward_pre_hooks or factor._forward_hooks)):
        return False
    if type(dropout) is Identity:
        return True
    return type(dropout) is Dropout and (dropout.p == 0 or (watched and not dropout.training))


def left_out(model: Any) -> bool:
    """Whether no adapted layer of `model` casts a 16-bit input in training under autocast, for the memory plan.

    Embeddings and experts (``ParamWrapper``) do not cast theirs. Bitsandbytes' layers do not either, but the plan counts
    them as if they did.
    """
    from peft.tuners.lora import layer as lora

    others = tuple(getattr(lora, kind) for kind in ("Embedding", "ParamWrapper") if hasattr(lora, kind))
    layers = [m for m in model.modules() if isinstance(m, lora.LoraLayer) and not isinstance(m, others)]
    return bool(layers) and all(_is_plain(layer) for layer in layers)


def _patches(context: Context) -> list[Patch]:
    return [Patch("peft.tuners.lora.layer", "Linear._cast_input_dtype", _cast)]


def _probe() -> str | None:
    from peft.tuners.lora import layer

    return None if hasattr(layer.Linear, "_cast_input_dtype") else "lora.Linear has no _cast_input_dtype"


ADAPTER = Adapter(
    capability="lora_casts",
    library="peft",
    versions=">=0.15,<0.22",
    module="peft.tuners.lora.layer",
    probe=_probe,
    provides=left_out,
    patches=_patches,
    relies_on=(
        # where the cast's result goes, every variant read
        Relies(f"{_LAYER}:Linear.forward", fingerprints=("d7e1507b35bc", "de90ac51a77b", "5cd0508e909e")),
        Relies(
            f"{_LAYER}:Linear._cast_input_dtype",
            positional=("x", "dtype"),
            fingerprints=("4a3b4031d316", "f8fd780187a6"),
        ),
        *(Relies(f"{_LAYER}:LoraLayer.{name}") for name in ("active_adapters", "lora_A", "lora_dropout", "use_dora")),
        Relies(f"{_LAYER}:LoraLayer.lora_variant", versions=">=0.16"),
        Relies(f"{_LAYER}:LoraLayer.update_layer", contains=("nn.Identity()", "nn.Dropout(p=lora_dropout)")),
        Relies(f"{_LAYER}:Embedding"),
        Relies(f"{_LAYER}:ParamWrapper", versions=">=0.17"),
    ),
)
