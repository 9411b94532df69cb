"""What PEFT's active LoRA adapters add to which weights, and the weights' names without PEFT's wrapping.

``get_peft_model`` puts a ``lora.Linear`` (``Embedding``, ``ParamWrapper``) in place of each adapted module; the module
itself becomes its ``base_layer``. ``LoraLayer.merge`` adds ``get_delta_weight(adapter)`` of every active adapter, one
after the other; its arithmetic (tuners/lora/layer.py, read in 0.14.0, 0.15.2, 0.17.1, 0.18.1, 0.19.1, 0.20.0 and 0.21.2)
is spelled out here as low-rank products, so that nobody has to form it in full:

- ``Linear``: ``B @ A * scaling``, transposed under ``fan_in_fan_out`` (Conv1D);
- ``Embedding``: ``(B @ A).T * scaling``;
- ``ParamWrapper`` (``target_parameters``, 0.17 and later) on 3-D experts: per expert ``e`` its r rows of
  A, and every E-th column of B, starting at ``e``.

What is not of this form is refused by name: variants such as DoRA, LoRA on biases, convolutions, quantized layers, other
tuners, ``trainable_token_indices``. ``modules_to_save`` are whole trained copies; they take the original's name.
Delete when: PEFT offers the factors of every layer's delta (``ParamWrapper.get_delta_factors`` is a first one, 0.21).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlpatch.registry import Adapter
from rlpatch.relies import Relies

if TYPE_CHECKING:
    import torch

    from rlpatch.lora.target import Adaptation, Product, Target

_LAYER = "peft.tuners.lora.layer"
_QUANTIZED = ".lora.bnb"  # where PEFT keeps its layers over bitsandbytes weights; their deltas are a Linear's


class PeftLora:
    """Reads the adapters of one model, again for every rollout: which are active may change.

    Args:
        model: A ``PeftModel``, or the model inside of one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layers: list[tuple[str, Any]] = []
        self._refused: dict[str, str] = {}
        self._tied: dict[int, list[str]] = {}
        self._configs: list[tuple[str, Any]] | None = None

    @staticmethod
    def adapted(model: Any) -> bool:
        """Whether `model` carries PEFT adapters of any kind."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return bool(getattr(model, "peft_config", None)) or any(isinstance(m, BaseTunerLayer) for m in model.modules())

    # ---- names -------------------------------------------------------------------------------------------------

    def names(self) -> dict[str, str]:
        """Full name -> plain name, for every tensor that the model would have without PEFT.

        The adapters' own tensors, and whatever ``modules_to_save`` replaces, are left out.
        """
        found: dict[str, str] = {}
        skipped, renamed = self._wrapping()
        for full, _ in [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]:
            if any(full.startswith(prefix) for prefix in skipped):
                continue
            plain = full
            for prefix, replacement in renamed:  # inner ones last: each is a prefix of the name as it still stands
                if plain.startswith(prefix):
                    plain = replacement + plain[len(prefix) :]
            found[full] = plain
        return found

    def _wrapping(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Prefixes to skip, and prefixes to replace, the longest first."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        skipped: list[str] = []
        renamed: list[tuple[str, str]] = []
        for name, module in self.model.named_modules():
            dot = f"{name}." if name else ""
            if isinstance(module, BaseTunerLayer):
                skipped += [f"{dot}{child}." for child, _ in module.named_children() if child != "base_layer"]
                skipped += [f"{dot}{own}" for own, _ in module.named_parameters(recurse=False)]
                renamed.append((f"{dot}base_layer.", dot))
            elif isinstance(module, ModulesToSaveWrapper):
                kept = self._saved(module)
                for child, _ in module.named_children():
                    if child == "modules_to_save":
                        others = [key for key in module.modules_to_save if f"modules_to_save.{key}" != kept]
                        skipped += [f"{dot}modules_to_save.{key}." for key in others]
                    elif child != kept:
                        skipped.append(f"{dot}{child}.")
                renamed.append((f"{dot}{kept}.", dot))
        if hasattr(self.model, "base_model") and hasattr(self.model, "peft_config"):
            inner = "base_model.model." if hasattr(self.model.base_model, "model") else "base_model."
            if any(name.startswith(inner) for name, _ in self.model.named_parameters()):
                renamed.append((inner, ""))
        return skipped, sorted(renamed, key=lambda pair: -len(pair[0]))

    @staticmethod
    def _saved(wrapper: Any) -> str:
        """The child of a ``ModulesToSaveWrapper`` that its forward uses."""
        names = getattr(wrapper, "active_adapters", None)
        if names is None:  # 0.14
            names = [wrapper.active_adapter]
        active = [name for name in names if name in wrapper.modules_to_save]
        if wrapper.disable_adapters or not active:
            return "original_module"
        return f"modules_to_save.{active[0]}"

    # ---- deltas ------------------------------------------------------------------------------------------------

    def read(self) -> Adaptation:
        """What the active adapters amount to now."""
        from rlpatch.lora.target import Adaptation

        targets: list[Target] = []
        refused: dict[str, str] = {}
        unfoldable: dict[str, str] = {}
        adapters: dict[str, None] = {}
        for name, layer in self._find_layers():
            active = [a for a in layer.active_adapters if a not in layer.merged_adapters]
            if layer.disable_adapters:
                continue
            present = [a for a in active if a in layer.lora_A or a in layer.lora_embedding_A]
            reason = self._unsupported(layer, present)
            if reason is not None:
                refused[name] = reason
                continue
            adapters.update(dict.fromkeys(present))
            if present:
                weight = self._parameter(layer)
                targets += self._targets(name, layer, weight, present)
                reason = self._unfoldable(layer, weight)
                if reason is not None:
                    unfoldable[targets[-1].parameter] = reason
        return Adaptation(tuple(targets), {**self._refused, **refused}, unfoldable, tuple(adapters))

    def _find_layers(self) -> list[tuple[str, Any]]:
        """The model's LoRA layers under their plain names; found anew when adapters were added or deleted."""
        configs = list((getattr(self.model, "peft_config", None) or {}).items())
        known = self._configs
        if known is None or [(a, id(c)) for a, c in known] != [(a, id(c)) for a, c in configs]:
            self._configs, self._layers, self._refused = configs, [], {}
            self._walk()
        return self._layers

    def _walk(self) -> None:
        from peft.tuners.lora import layer as lora
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import other

        plain = self._module_names()
        known = tuple(getattr(lora, kind) for kind in ("Linear", "Embedding", "ParamWrapper") if hasattr(lora, kind))
        tokens = tuple(getattr(other, kind) for kind in ("TrainableTokensWrapper",) if hasattr(other, kind))
        self._tied = self._registrations()
        inside_tokens: list[str] = []
        for full, module in self.model.named_modules():
            name = plain(full)
            if tokens and isinstance(module, tokens):
                self._refused[name] = "trainable_token_indices replaces single rows"
                inside_tokens.append(f"{full}.")
            elif isinstance(module, other.ModulesToSaveWrapper):
                self._check_saved(name, module)
            elif isinstance(module, BaseTunerLayer):
                if any(full.startswith(prefix) for prefix in inside_tokens):
                    continue
                if type(module) not in known and not type(module).__module__.endswith(_QUANTIZED):
                    kind = f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
                    self._refused[name] = f"a layer of type {kind} has no plain low-rank delta"
                else:
                    self._layers.append((name, module))

    def _module_names(self) -> Any:
        _, renamed = self._wrapping()

        def plain(full: str) -> str:
            full += "."
            for prefix, replacement in renamed:
                if full.startswith(prefix):
                    full = replacement + full[len(prefix) :]
            return full[:-1]

        return plain

    def _registrations(self) -> dict[int, list[str]]:
        """id of a parameter -> every plain name under which the model uses it."""
        uses: dict[int, list[str]] = {}
        names = self.names()
        for full, parameter in self.model.named_parameters(remove_duplicate=False):
            if full in names and names[full] not in uses.setdefault(id(parameter), []):
                uses[id(parameter)].append(names[full])
        return uses

    def _check_saved(self, name: str, wrapper: Any) -> None:
        """A trained copy of a tied weight has no place in an engine that keeps the two tied."""
        config = getattr(self.model, "config", None)
        tied = bool(getattr(config, "tie_word_embeddings", False))
        weight = getattr(wrapper.original_module, "weight", None)
        if not tied or weight is None:
            return
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if wrapper not in (embedding, head) or head is None:
            return
        copies = [self._weight_in_use(module) for module in (embedding, head)]
        if copies[0] is not copies[1]:
            self._refused[name] = "modules_to_save trains a copy of a weight that the engine keeps tied"

    def _weight_in_use(self, module: Any) -> Any:
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):
            kept = self._saved(module)
            module = module.original_module if kept == "original_module" else module.modules_to_save[kept[16:]]
        return module.weight

    def _unsupported(self, layer: Any, adapters: list[str]) -> str | None:
        for adapter in adapters:
            if adapter in _own(layer, "lora_variant", {}):
                kind = type(layer.lora_variant[adapter]).__name__
                return f"{kind} is more than a low-rank delta"
            if _own(layer, "use_dora", {}).get(adapter, False):
                return "DoRA is more than a low-rank delta"
            if _own(layer, "lora_bias", {}).get(adapter, False):
                return "lora_bias=True changes the bias as well"
        return None

    def _unfoldable(self, layer: Any, weight: Any) -> str | None:
        if type(layer).__module__.endswith(_QUANTIZED):
            return "its base is quantized"
        uses = self._tied.get(id(weight), [])
        if len(uses) > 1:
            return f"its weight is tied ({' and '.join(uses)}), and the adapter is not: folded, it would change both"
        return None

    @staticmethod
    def _parameter(layer: Any) -> Any:
        return layer.get_param() if _own(layer, "parameter_name") is not None else layer.get_base_layer().weight

    def _targets(self, name: str, layer: Any, weight: Any, adapters: list[str]) -> Iterator[Target]:
        from rlpatch.lora.target import Target

        parameter = f"{name}.{_own(layer, 'parameter_name', 'weight')}"
        frozen = not weight.requires_grad
        data = weight.detach()
        if data.dim() == 3:
            for expert in range(data.shape[0]):
                products = tuple(self._expert(layer, a, expert) for a in adapters)
                yield Target(f"{parameter}[{expert}]", data[expert], products, parameter, frozen)
        else:
            yield Target(parameter, data, tuple(self._product(layer, a) for a in adapters), parameter, frozen)

    @staticmethod
    def _product(layer: Any, adapter: str) -> Product:
        from rlpatch.lora.target import Product

        scale = float(layer.scaling[adapter])
        if adapter in layer.lora_embedding_A:
            a, b = (_tensor(table[adapter]) for table in (layer.lora_embedding_A, layer.lora_embedding_B))
            return Product(a.T, b.T, scale, adapter)
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        if _own(layer, "fan_in_fan_out", False):
            return Product(a.T, b.T, scale, adapter)
        return Product(b, a, scale, adapter)

    @staticmethod
    def _expert(layer: Any, adapter: str, expert: int) -> Product:
        from rlpatch.lora.target import Product

        count = layer.num_experts
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        rank = a.shape[0] // count
        a = a[expert * rank : (expert + 1) * rank]  # [r, in]
        b = b[:, expert::count]  # [out, r]
        scale = float(layer.scaling[adapter])
        if _own(layer, "_did_swap_in_out_features", False):  # experts stored as [experts, out, in]
            return Product(b, a, scale, adapter)
        return Product(a.T, b.T, scale, adapter)


def _own(layer: Any, name: str, default: Any = None) -> Any:
    """A plain attribute that not every layer has: torch's own search for one that is missing takes microseconds."""
    return vars(layer).get(name, default)


def _tensor(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = getattr(value, "weight", value)
    return tensor.detach()


def _probe() -> str | None:
    from peft.tuners.lora import layer

    missing = [n for n in ("LoraLayer", "Linear", "Embedding") if not hasattr(layer, n)]
    missing += [n for n in ("active_adapters", "disable_adapters", "merged") if not hasattr(layer.LoraLayer, n)]
    return f"peft.tuners.lora.layer has no {', '.join(missing)}" if missing else None


ADAPTER = Adapter(
    capability="lora",
    library="peft",
    versions=">=0.14,<0.22",
    module="peft.tuners.lora.layer",
    probe=_probe,
    provides=PeftLora,
    relies_on=(
        # the arithmetic that is spelled out in `_product` and `_expert`, every variant read
        Relies(f"{_LAYER}:Linear.get_delta_weight", fingerprints=("926b4814bc3f", "3fe2e19f59b7")),
        Relies(f"{_LAYER}:Embedding.get_delta_weight", fingerprints=("544b20307c78", "19bc770bacbc")),
        Relies(
            f"{_LAYER}:ParamWrapper.get_delta_weight",
            fingerprints=("2ed0caeb4a18", "fc97b3e61f3d"),
            versions=">=0.17",
        ),
        Relies("peft.tuners.lora.bnb:Linear4bit.get_delta_weight", fingerprints=("acba1545a1c2",)),
        *(
            Relies(f"{_LAYER}:ParamWrapper.{name}", versions=">=0.17")
            for name in ("num_experts", "parameter_name", "get_param")
        ),
        Relies(f"{_LAYER}:ParamWrapper._did_swap_in_out_features", versions=">=0.19"),
        Relies(f"{_LAYER}:Linear.fan_in_fan_out"),
        *(
            Relies(f"{_LAYER}:LoraLayer.{name}")
            for name in (
                "active_adapters", "disable_adapters", "merged_adapters", "merged", "lora_A", "lora_B", "scaling",
                "lora_embedding_A", "lora_embedding_B", "use_dora", "lora_bias", "get_base_layer",
            )
        ),
        Relies(f"{_LAYER}:LoraLayer.lora_variant", versions=">=0.16"),
        *(
            Relies(f"peft.utils.other:ModulesToSaveWrapper.{name}")
            for name in ("modules_to_save", "original_module", "disable_adapters", "active_adapter")
        ),
        Relies("peft.utils.other:ModulesToSaveWrapper.active_adapters", versions=">=0.15"),
        Relies("peft.utils.other:TrainableTokensWrapper", versions=">=0.15"),
        Relies("peft.tuners.tuners_utils:BaseTunerLayer"),
        Relies("peft.tuners.lora.model:LoraModel.model"),
        *(Relies(f"peft.peft_model:PeftModel.{name}") for name in ("base_model", "get_base_model", "peft_config")),
    ),
)  # fmt: skip
