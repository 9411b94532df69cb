"""The trainer's LoRA served by vLLM's own LoRA engine: copied on the device into vLLM's slot buffers before each rollout.

vLLM keeps one LoRA per slot in preallocated buffers, ``lora_a_stacked[i]: [slots, 1, max_lora_rank, in]`` and
``lora_b_stacked[i]: [slots, 1, out, max_lora_rank]`` (``vllm/lora/layers``, `BaseLayerWithLoRA.create_lora_weights`), B
with the scaling multiplied in. An adapter gets there once by a registration, from a folder; from then on `Slots.update`
writes A and ``scale·B`` straight into the buffers. These are never bound anew: kernels and CUDA graphs hold pointers.

Which part of which buffer belongs to which of the trainer's weights is the `Mechanism`'s to say, and is checked: values
that vLLM put into the slots by itself are compared with what `Slots` would have put there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rlpatch.engine import Engine, synchronize
from rlpatch.errors import UsageError
from rlpatch.lora.target import Product, Target

logger = logging.getLogger("rlpatch")

_CHECK_RANK = 2  # of the adapter that is registered: enough to tell rows from columns, and small on disk
_CHECK_SCALE = 2.0  # not 1, so that the check sees whether the scaling is where we think it is
_SHOWN = 4  # refused names in an error message


@dataclass(frozen=True)
class Place:
    """Where the engine keeps the adapter of one of the trainer's weights: views of one slot of its buffers.

    Attributes:
        module: The engine's name of the layer, e.g. ``model.layers.0.self_attn.qkv_proj``.
        right: ``[max_lora_rank, columns]`` each; more than one where the engine splits a weight that is one matrix for
            the trainer: each part has an A of its own, and gets all of it.
        left: ``(first row, [rows, max_lora_rank])`` each; the rows of B, in parts that cover it once.
    """

    module: str
    right: tuple[torch.Tensor, ...]
    left: tuple[tuple[int, torch.Tensor], ...]

    @property
    def rank(self) -> int:
        """Largest rank that fits (the engine's ``max_lora_rank``)."""
        return int(self.right[0].shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight."""
        return sum(int(view.shape[0]) for _, view in self.left), int(self.right[0].shape[1])

    def views(self) -> list[torch.Tensor]:
        """All views."""
        return [*self.right, *(view for _, view in self.left)]


class Mechanism(Protocol):
    """How one era of vLLM keeps its slots. One adapter at a time is registered through it."""

    def __init__(self, engine: Engine) -> None: ...

    @staticmethod
    def accepted_ranks() -> tuple[int, ...]:
        """Values that the engine accepts as ``max_lora_rank``, ascending."""

    @staticmethod
    def engine_arguments(rank: int) -> dict[str, Any]:
        """Arguments of ``LLM`` for slots that hold adapters of `rank`. Raises UsageError when there are none."""

    def locate(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Place | str]:
        """Trainer's name -> its place in a free slot, or why it has none; leaves that slot zeroed in these places.

        Args:
            shapes: Trainer's name of a weight -> (rows, columns). Never called while an adapter is registered.
        """

    def register(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> Any:
        """Have the engine load and pin an adapter the ordinary way; returns the request to generate with.

        Args:
            pairs: Trainer's name -> (A ``[r, columns]``, B ``[rows, r]``), fp32 on the CPU, one r for all.
            scale: PEFT's scaling.
        """

    def active(self) -> bool:
        """Whether the adapter is registered and still in the slot that `locate` looked at."""

    def remove(self) -> None:
        """Unregister the adapter if it is registered."""


def accepted_rank(rank: int, accepted: Sequence[int], *, limit: int | None = None) -> int:
    """The smallest ``max_lora_rank`` that vLLM accepts and that holds `rank`.

    Args:
        rank: The largest rank of any weight (several active adapters: the largest sum).
        accepted: What vLLM accepts (`Mechanism.accepted_ranks`).
        limit: ``max_lora_rank`` of an engine that exists already, or that the user set; None: none is set.

    Raises:
        UsageError: `rank` is not positive, or exceeds `limit` or everything that is accepted.
    """
    if rank < 1:
        raise UsageError(f"LoraConfig.r={rank} is no LoRA rank; set r to 1 or more")
    if limit is not None and rank > limit:
        raise UsageError(
            f"LoraConfig.r={rank} is larger than the engine's max_lora_rank={limit}; build the engine with "
            f"max_lora_rank={min((n for n in accepted if n >= rank), default=rank)}, or train with r={limit} or less"
        )
    fitting = [n for n in accepted if n >= rank]
    if not fitting:
        raise UsageError(
            f"LoraConfig.r={rank} is larger than any max_lora_rank that this vLLM accepts (at most {max(accepted)}); "
            f"train with r={max(accepted)} or less, or serve the adapter folded into the weights"
        )
    return min(fitting)


def rank_of(targets: Iterable[Target]) -> int:
    """The rank that a slot must hold for `targets`: the largest sum of ranks on one weight; 0 without any."""
    return max((_rank(target) for target in targets), default=0)


class Slots:
    """One adapter of one engine, kept equal to the trainer's.

    Until the first `update` the slot holds zeros: generating with `request` is generating with the base model.

    Args:
        engine: Built with `Mechanism.engine_arguments`.
        mechanism: The ``lora_slots`` adapter's class, built with `engine`.
        targets: What the trainer adapts (``Adaptation.targets``); values do not matter yet, names and shapes do.
    """

    def __init__(self, engine: Engine, mechanism: Mechanism, targets: Iterable[Target]) -> None:
        self.engine = engine
        self.mechanism = mechanism
        self.targets = tuple(target for target in targets if target.products)
        self._request: Any = None
        self._places: dict[str, Place] = {}
        self._ranks: dict[str, int] = {}  # what lies in the slot: beyond these ranks it is zero
        self._reasons: dict[str, str] | None = None

    @property
    def request(self) -> Any:
        """vLLM's LoRARequest; pass it with every generation (``LLM.generate(…, lora_request=slots.request)``)."""
        if self._request is None:
            raise UsageError("the LoRA has no slot yet; call Slots.register() before generating")
        return self._request

    # ---- before training ---------------------------------------------------------------------------------------

    def refusals(self) -> dict[str, str]:
        """Trainer's name -> why the engine cannot serve its adapter; empty when `register` will succeed.

        Looks at the engine's slots, and therefore unregisters an adapter that was registered before.
        """
        self.remove()
        reasons: dict[str, str] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for target in self.targets:
            why = unfit(target)
            if why is not None:
                reasons[target.name] = why
            else:
                shapes[target.name] = _shape(target)
        for name, place in self.mechanism.locate(shapes).items():
            if isinstance(place, str):
                reasons[name] = place
            elif place.shape != shapes[name]:
                reasons[name] = f"the engine's slot is for {place.shape}, the trainer's weight is {shapes[name]}"
            else:
                self._places[name] = place
        reasons.update(self._over_rank(self.targets))
        self._reasons = reasons
        return dict(reasons)

    @torch.inference_mode()
    def register(self) -> None:
        """Have vLLM load an adapter for all targets once (through a temporary folder, the only time that host and disk
        take part), pin it, and check that what vLLM wrote is what this class would have written.

        Raises:
            UsageError: a target has no slot, or one that vLLM fills otherwise; all are named, nothing is registered.
        """
        reasons = self.refusals()
        if reasons:
            raise _refused(reasons)
        if not self.targets:
            raise UsageError("no active LoRA adapter changes any weight; activate one, or do not serve a LoRA")
        pairs = self._check_values()
        self._request = self.mechanism.register(pairs, _CHECK_SCALE)
        try:
            reasons = self._compare(pairs)
            if reasons:
                raise _refused(reasons)
            if not self.mechanism.active():
                raise UsageError(
                    "vLLM did not keep the LoRA in the slot that was free; build the engine with max_loras=1"
                )
        except BaseException:
            self.remove()
            raise
        for place in self._places.values():
            for view in place.views():
                view.zero_()
        self._ranks = {}
        logger.info("rlpatch: the LoRA on %d weights is served from vLLM's own slots", len(self._places))

    # ---- at each sync ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def update(self, targets: Iterable[Target]) -> None:
        """Copy the trainer's current adapters into the slot: ``A`` and ``scale·B``, rounded once to the slots' dtype.

        Several adapters on a weight stand side by side along the rank. Weights that were adapted before and are not in
        `targets` get zeros. The engine must be at rest. **The caller resets the prefix cache afterwards**
        (``LLM.reset_prefix_cache()``): vLLM files cached blocks under the adapter's name, which does not change.

        Args:
            targets: ``Adaptation.targets`` as they are now, any floating dtype. Names that were not registered, or an
                adapter that was unregistered meanwhile (vLLM's weight reload does that), cause a new registration.

        Raises:
            UsageError: a target has no slot or too large a rank; the slot keeps its old values.
        """
        targets = tuple(target for target in targets if target.products)
        if not self.mechanism.active() or any(target.name not in self._places for target in targets):
            names = {target.name for target in targets}
            self.targets = (*targets, *(old for old in self.targets if old.name not in names))
            self.register()
        reasons = self._over_rank(targets)
        for target in targets:
            if _shape(target) != self._places[target.name].shape:
                reasons[target.name] = f"its shape became {_shape(target)}, was {self._places[target.name].shape}"
        if reasons:
            raise _refused(reasons)
        self._write(targets)
        synchronize(self.engine.device)

    def remove(self) -> None:
        """Unregister the adapter; `request` is no longer valid."""
        self.mechanism.remove()
        self._request = None
        self._places, self._ranks = {}, {}

    # ---- inside ------------------------------------------------------------------------------------------------

    def _over_rank(self, targets: Iterable[Target]) -> dict[str, str]:
        reasons = {}
        for target in targets:
            place = self._places.get(target.name)
            if place is not None and _rank(target) > place.rank:
                try:
                    accepted_rank(_rank(target), self.mechanism.accepted_ranks(), limit=place.rank)
                except UsageError as error:
                    reasons[target.name] = str(error)
        return reasons

    def _write(self, targets: Iterable[Target]) -> None:
        """Copy; beyond the rank the slot is already zero, except where the rank was larger last time."""
        ranks = {}
        into: list[torch.Tensor] = []
        out_of: list[torch.Tensor] = []
        for target in targets:
            place = self._places[target.name]
            start = 0
            for product in target.products:
                stop = start + product.rank
                for view in place.right:
                    into.append(view[start:stop])
                    out_of.append(product.right.detach())
                for first, view in place.left:
                    rows = product.left.detach()[first : first + view.shape[0]]
                    if rows.device == view.device:
                        torch.mul(rows, product.scale, out=view[:, start:stop])  # rounds once, no temporary
                    else:
                        view[:, start:stop].copy_(rows * product.scale)
                start = stop
            ranks[target.name] = start
        if into:
            torch._foreach_copy_(into, out_of)
        for name, old in self._ranks.items():
            new = ranks.get(name, 0)
            if new < old:
                for view in self._places[name].right:
                    view[new:old].zero_()
                for _, view in self._places[name].left:
                    view[:, new:old].zero_()
        self._ranks = ranks

    def _check_values(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B for the registration: no two weights alike, exact in every floating dtype."""
        generator = torch.Generator().manual_seed(0)  # its own: the global state is the trainer's
        pairs = {}
        for name, place in self._places.items():
            (rows, columns), rank = place.shape, min(_CHECK_RANK, place.rank)
            draw = [torch.randint(-8, 9, size, generator=generator) for size in ((rank, columns), (rows, rank))]
            pairs[name] = (draw[0].float() / 8, draw[1].float() / 8)
        return pairs

    def _compare(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, str]:
        """Slots that vLLM filled otherwise than `_write` does, by name."""
        reasons = {}
        for name, (right, left) in pairs.items():
            place = self._places[name]
            views = place.views()
            theirs = [view.clone() for view in views]
            for view in views:
                view.zero_()
            product = Product(left.to(views[0].device), right.to(views[0].device), _CHECK_SCALE)
            self._ranks = {}
            self._write([Target(name, left, (product,))])
            if not all(torch.equal(view, their) for view, their in zip(views, theirs, strict=True)):
                reasons[name] = f"vLLM fills the LoRA slot of {place.module} otherwise than rlpatch would"
        return reasons


def _rank(target: Target) -> int:
    return sum(product.rank for product in target.products)


def _shape(target: Target) -> tuple[int, int]:
    """(rows, columns) as the adapters say: a quantized base's own shape says nothing."""
    product = target.products[0]
    return int(product.left.shape[0]), int(product.right.shape[1])


def unfit(target: Target) -> str | None:
    """Why no engine has a slot for this target, as far as the trainer's side tells."""
    if target.name.endswith("]") or target.parameter not in ("", target.name):
        return "it is one expert of a 3-D parameter; only LoRAs on linear layers are copied into vLLM's slots"
    if not target.name.endswith(".weight"):
        return "it is no layer's weight; only LoRAs on linear layers are copied into vLLM's slots"
    if len({(p.left.shape[0], p.right.shape[1]) for p in target.products}) > 1:
        return "its adapters have different shapes"
    for product in target.products:
        if _transposed(product.left) and _transposed(product.right):
            return "its weight is stored transposed (Conv1D, embeddings); only linear layers have slots of this layout"
    return None


def _transposed(matrix: torch.Tensor) -> bool:
    """Whether a matrix is the transpose of an ordinary one: PEFT swaps A and B where the weight is transposed."""
    return min(matrix.shape) > 1 and matrix.stride(0) == 1


def _refused(reasons: Mapping[str, str]) -> UsageError:
    """One error for all refusals, each reason once, with the first names."""
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    parts = []
    for why, names in by_reason.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{', '.join(names[:_SHOWN])}{more}: {why}")
    return UsageError(
        f"vLLM cannot serve this LoRA from its slots ({'; '.join(parts)}); leave these out of LoraConfig.target_modules, "
        "or serve the adapter folded into the weights"
    )
