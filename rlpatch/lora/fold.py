"""A reversible fold: ``W ← round(W + D)`` in place before a rollout, exactly ``W`` again after it.

``D = Σ scale · left @ right`` is recomputed from the adapters with the same instructions in both directions, so
``round(round(W + D) − D)`` gives the same bits whenever it is asked for. Where these differ from W (the sum crossed into
a coarser binade, or D dwarfs W) the fold keeps the element beside its position, and the unfold puts it back: PEFT's
merge and unmerge leave exactly those elements of a frozen base changed for ever. About 0.5 % of a bf16 weight are kept
at ``|D|/|W|`` of 3e-3, 1.4 % at 1e-2.

Each weight has a checksum (`checksum`), taken by the fold and compared by the unfold. It is linear and every element's
factor is odd, so that any single changed element is certain to be noticed.

Two implementations do the passes: `TorchPasses`, for CPU and whatever Triton lacks, and
`rlpatch.lora.fold_kernel.TritonPasses`, one kernel launch per shape of weight and direction.

While the device works the host may do something else (`meanwhile`): the KV cache is mapped and unmapped in that time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rlpatch.errors import FoldError
from rlpatch.interrupts import deferred
from rlpatch.lora.target import Target

logger = logging.getLogger("rlpatch")

_CHUNK = 1 << 24  # elements; the fp32 temporaries of the torch path stay at some 64 MiB each
_SPARE = 0.02  # memory kept by a fold, as a share of the weights, above which it is reported
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Work = Callable[[], None]
Piece = tuple[torch.Tensor, torch.Tensor]  # places within the flattened rows (int32), and the elements lost there

FOLDABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def nothing() -> None:
    """No work for the host."""


class _Once:
    """The host's work: done once, at the first call. What it raises is kept until the weights are whole."""

    def __init__(self, work: Work) -> None:
        self._work: Work | None = work
        self.error: BaseException | None = None
        self.seconds = 0.0

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is None:
            return
        start = time.perf_counter()
        try:
            work()
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - start


@dataclass(frozen=True)
class FoldReport:
    """What one fold took.

    Attributes:
        weights: Number of matrices.
        elements: Their elements.
        kept: Elements that the round trip alone would not restore; of 16 bits on a GPU: pairs of neighbours.
        kept_bytes: Memory that they take until the unfold, in bytes.
        weight_bytes: Memory of the matrices, in bytes.
    """

    weights: int = 0
    elements: int = 0
    kept: int = 0
    kept_bytes: int = 0
    weight_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(self.__dict__)


class Passes(Protocol):
    """One implementation of the passes over some weights. A fold either happens for all of them or for none.

    ``meanwhile`` is called, if at all, when the device has been given its work and before that is waited for.
    """

    def fold(self, targets: Sequence[Target], meanwhile: Work = nothing) -> list[int]:
        """Fold in place; returns each weight's checksum from before. Raises FoldError for values that are not finite."""

    def unfold(self, targets: Sequence[Target], meanwhile: Work = nothing) -> list[int]:
        """The inverse of the last `fold`, in place; returns each weight's checksum."""

    def original(self, index: int, target: Target) -> torch.Tensor:
        """A copy of the unfolded weight of the `index`-th target while it is folded."""

    def kept(self) -> tuple[int, int]:
        """Elements (or pairs, see `FoldReport`) kept by the last fold, and the bytes they take."""

    def forget(self) -> None:
        """Let go of what the last fold kept."""


def checksum(weight: torch.Tensor) -> int:
    """``Σ bits(i, j) · (2i + 1) · (2j + 1)`` modulo 2³² (fp64: 2⁶⁴), with the elements' bits as unsigned integers.

    Args:
        weight: ``[rows, columns]``, any strides; a transposed matrix has the same checksum.
    """
    rows, columns = weight.shape
    size = weight.element_size()
    modulo = (1 << max(32, 8 * size)) - 1  # of int64, which wraps around by itself
    unsigned = (1 << 8 * size) - 1 if size < 8 else -1
    factors = 2 * torch.arange(columns, device=weight.device) + 1
    total = 0
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        bits = weight[start : start + step].contiguous().view(_BITS[size]).to(torch.int64) & unsigned
        lines = (bits * factors).sum(1)
        total += int(((2 * torch.arange(start, start + len(lines), device=weight.device) + 1) * lines).sum())
    return total & modulo


class TorchPasses:
    """The passes in plain torch, some rows at a time; keeps an index of 4 bytes and the element."""

    def __init__(self) -> None:
        self._kept: list[list[Piece | None]] = []  # None: unfolded again

    def fold(self, targets: Sequence[Target], meanwhile: Work = nothing) -> list[int]:
        """See `Passes`."""
        self._kept = []
        sums: list[int] = []
        for number, target in enumerate(targets):
            pieces: list[Piece | None] = []
            self._kept.append(pieces)
            sums.append(checksum(target.weight))
            try:
                for piece, delta in _pieces(target):
                    folded = (piece.to(delta.dtype) + delta).to(piece.dtype)
                    if not bool(torch.isfinite(folded).all()):
                        raise not_finite(target)
                    back = (folded.to(delta.dtype) - delta).to(piece.dtype)
                    places = _bits(back).ne(_bits(piece)).flatten().nonzero().flatten()
                    pieces.append((places.to(torch.int32), piece.flatten()[places]))
                    piece.copy_(folded)
            except BaseException:
                for done in range(number + 1):
                    self._unfold(targets[done], self._kept[done])
                self.forget()
                raise
        return sums

    def unfold(self, targets: Sequence[Target], meanwhile: Work = nothing) -> list[int]:
        """See `Passes`. After an error (out of memory) it can be called again, and goes on where it was."""
        for target, pieces in zip(targets, self._kept, strict=True):
            self._unfold(target, pieces)
        return [checksum(target.weight) for target in targets]

    @staticmethod
    def _unfold(target: Target, kept: list[Piece | None]) -> None:
        # `kept` first: no delta is made beyond the pieces that were folded
        for number, (entry, (piece, delta)) in enumerate(zip(kept, _pieces(target), strict=False)):
            if entry is not None:
                piece.copy_(_unfolded(piece, delta, entry))
                kept[number] = None

    def original(self, index: int, target: Target) -> torch.Tensor:
        """See `Passes`."""
        copy = target.weight.clone()
        self._unfold(Target(target.name, copy, target.products), list(self._kept[index]))
        return copy

    def kept(self) -> tuple[int, int]:
        """See `Passes`."""
        entries = [entry for pieces in self._kept for entry in pieces if entry is not None]
        size = sum(places.nbytes + values.nbytes for places, values in entries)
        return sum(len(places) for places, _ in entries), size

    def forget(self) -> None:
        """See `Passes`."""
        self._kept = []


def _unfolded(piece: torch.Tensor, delta: torch.Tensor, entry: Piece) -> torch.Tensor:
    places, values = entry
    back = (piece.to(delta.dtype) - delta).to(piece.dtype).contiguous()
    back.view(-1)[places.long()] = values
    return back


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def _pieces(target: Target) -> Any:
    """Rows of the weight with their delta, ``([n, columns], [n, columns])``; the same cut in both directions."""
    rows, columns = target.weight.shape
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = tuple(type(p)(p.left[start : start + step], p.right, p.scale, p.adapter) for p in target.products)
        piece = target.weight[start : start + step]
        yield piece, Target(target.name, piece, part).delta()


def not_finite(target: Target) -> FoldError:
    """The error for a weight whose sum with the adapters leaves its dtype's range."""
    where = "the base" if not bool(torch.isfinite(target.weight).all()) else "base + adapter"
    return FoldError(
        f"{target.name}: {where} has values that are not finite in {str(target.weight.dtype).removeprefix('torch.')} "
        f"(scaling {', '.join(f'{p.scale:g}' for p in target.products)}); nothing was folded. Lower lora_alpha or the "
        "learning rate, or apply(lora='merge')"
    )


@dataclass
class ReversibleFold:
    """Folds the active adapters of one model into its weights and takes them out again, bit for bit.

    Args:
        recover: name -> the weight as it was loaded, or None: asked when an unfold finds a wrong checksum.
        passes_for: Chooses the implementation for a weight; None: Triton on CUDA, else torch.

    Attributes:
        folded: Whether the weights hold the folded policy right now.
        broken: Names of weights that could not be brought back; every further fold is refused.
        checksums: name -> checksum of the unfolded weight, as of the last fold.
        report: Of the last fold.
        cycles: Completed unfolds.
        seconds: Spent folding and unfolding, in total, beside what the host did meanwhile.
    """

    recover: Callable[[str], torch.Tensor | None] | None = None
    passes_for: Callable[[Target], str] | None = None
    folded: bool = False
    broken: tuple[str, ...] = ()
    checksums: dict[str, int] = field(default_factory=dict)
    report: FoldReport = field(default_factory=FoldReport)
    cycles: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"fold": 0.0, "unfold": 0.0})
    _passes: dict[str, Passes] = field(default_factory=dict)
    _groups: list[tuple[Passes, list[Target]]] = field(default_factory=list)
    _wrong: list[Target] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    @torch.no_grad()
    def fold(self, targets: Sequence[Target], meanwhile: Work = nothing) -> FoldReport:
        """Fold in place. Either all of `targets` are folded afterwards or, after an error, none.

        Args:
            meanwhile: Done once by the host, while the device folds where that is possible; not done if an error came
                before. What it raises is raised here.

        Raises:
            FoldError: folded already, broken before, or a value that is not finite (names the weight).
        """
        if self.folded:
            raise FoldError("the adapters are folded already; unfold() before folding again")
        if self.broken:
            raise FoldError(self._refusal())
        start, once = time.perf_counter(), _Once(meanwhile)
        grouped: dict[str, list[Target]] = {}
        for target in targets:
            grouped.setdefault((self.passes_for or kind_of)(target), []).append(target)
        try:
            with deferred():
                self._fold(targets, grouped, once)
                once()
            if once.error is not None:
                raise once.error
        except BaseException:  # a Ctrl-C that waited comes when all is folded
            self.unfold()
            raise
        self.seconds["fold"] += time.perf_counter() - start - once.seconds
        return self.report

    def _fold(self, targets: Sequence[Target], grouped: dict[str, list[Target]], meanwhile: Work) -> None:
        done: list[tuple[Passes, list[Target]]] = []
        sums: dict[str, int] = {}
        try:
            for kind, group in grouped.items():
                passes = self._passes.setdefault(kind, _implementation(kind))
                found = passes.fold(group, meanwhile)
                done.append((passes, group))
                sums.update(zip((t.name for t in group), found, strict=True))
        except BaseException:
            for passes, group in reversed(done):
                passes.unfold(group)
                passes.forget()
            raise
        self._groups, self.folded = done, True
        self._compare_with_last(targets, sums)
        self.checksums.update(sums)
        kept = [passes.kept() for passes, _ in done]
        self.report = FoldReport(
            len(targets),
            sum(t.weight.numel() for t in targets),
            sum(count for count, _ in kept),
            sum(size for _, size in kept),
            sum(t.weight.numel() * t.weight.element_size() for t in targets),
        )
        self._report_spare()

    @torch.no_grad()
    def unfold(self, meanwhile: Work = nothing) -> None:
        """Bring the unfolded weights back, bit for bit; where nothing is folded only `meanwhile` happens.

        Args:
            meanwhile: Done once by the host, while the device unfolds where that is possible, whatever becomes of the
                unfold. What it raises is raised here, when the weights are whole.

        After any other error than FoldError (out of memory) some may still be folded; another call goes on from there.

        Raises:
            FoldError: a checksum differs and the checkpoint has not that weight either; names it. Further folds are
                refused, because training would go on from a damaged base.
        """
        if not self.folded:
            meanwhile()
            return
        once = _Once(meanwhile)
        try:
            try:
                self._unfold(once)
            except torch.OutOfMemoryError:  # the KV cache is what takes the room: it goes first, then
                once()
                self._unfold(once)
        except BaseException as error:
            once()
            raise error from once.error
        once()
        if once.error is not None:
            raise once.error

    def _unfold(self, meanwhile: _Once) -> None:
        start = time.perf_counter()
        with deferred():  # the verdict included: an interrupt must not hide a damaged base
            while self._groups:
                passes, group = self._groups[0]
                for target, found in zip(group, passes.unfold(group, meanwhile), strict=True):
                    if found != self.checksums[target.name]:
                        self._wrong.append(target)
                passes.forget()
                self._groups = self._groups[1:]
            self.folded = False
            self.cycles += 1
            self.seconds["unfold"] += time.perf_counter() - start - meanwhile.seconds
            wrong, self._wrong = self._wrong, []
            lost = [target.name for target in wrong if not self._recovered(target)]
            if lost:
                self.broken = tuple(lost)
                raise FoldError(self._refusal())

    def original(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A copy of the unfolded values of `tensor` if it is one of the folded weights, else None.

        For whoever looks at the base in the middle of a rollout, e.g. a checkpoint saved by a signal handler.

        Args:
            tensor: A parameter of two dimensions, or of three: then each of its matrices is unfolded.
        """
        if not self.folded or tensor.dim() not in (2, 3):
            return None
        matrices = {_place(m): i for i, m in enumerate(tensor if tensor.dim() == 3 else tensor[None])}
        copy = None
        with torch.no_grad():
            for passes, group in self._groups:
                for index, target in enumerate(group):
                    i = matrices.get(_place(target.weight))
                    if i is not None:
                        copy = tensor.detach().clone() if copy is None else copy
                        (copy if tensor.dim() == 3 else copy[None])[i].copy_(passes.original(index, target))
        return copy

    def _compare_with_last(self, targets: Sequence[Target], sums: dict[str, int]) -> None:
        changed = [t.name for t in targets if t.frozen and self.checksums.get(t.name, sums[t.name]) != sums[t.name]]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            logger.warning(
                "rlpatch: %s%s changed between two rollouts although its LoRA's base should be frozen", changed[0], more
            )

    def _report_spare(self) -> None:
        report = self.report
        if report.kept_bytes > _SPARE * report.weight_bytes and "spare" not in self._said:
            self._said.add("spare")
            logger.warning(
                "rlpatch: folding the LoRA keeps %d MiB (%.1f %% of the weights) until the rollout ends: its delta is "
                "large beside the weights; apply(lora='slots') keeps nothing",
                report.kept_bytes >> 20, 100 * report.kept_bytes / report.weight_bytes,
            )  # fmt: skip

    def _recovered(self, target: Target) -> bool:
        """Restore one weight from the checkpoint, if that has the very values that were there before the fold."""
        saved = self.recover(target.name) if self.recover is not None else None
        if saved is None or saved.shape != target.weight.shape:
            return False
        saved = saved.to(target.weight)
        if checksum(saved) != self.checksums[target.name]:
            return False
        target.weight.copy_(saved)
        logger.warning("rlpatch: %s did not unfold to its old values and was restored from the checkpoint", target.name)
        return True

    def _refusal(self) -> str:
        more = f" and {len(self.broken) - 1} more" if len(self.broken) > 1 else ""
        return (
            f"{self.broken[0]}{more} did not unfold to its old values (something wrote to it or to its adapter during the "
            "rollout), and the checkpoint does not have them either; training would go on from a damaged base. Start "
            "again from the last checkpoint; apply(lora='slots') never writes to the base"
        )


def _place(matrix: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return matrix.data_ptr(), tuple(matrix.shape), tuple(matrix.stride())


def kind_of(target: Target) -> str:
    """``"triton"`` where its kernels serve this weight, else ``"torch"``."""
    if target.weight.device.type != "cuda" or target.weight.dtype == torch.float64:
        return "torch"
    from rlpatch.lora import fold_kernel

    return "triton" if fold_kernel.available() else "torch"


def _implementation(kind: str) -> Passes:
    if kind == "triton":
        from rlpatch.lora.fold_kernel import TritonPasses

        return TritonPasses()
    return TorchPasses()
