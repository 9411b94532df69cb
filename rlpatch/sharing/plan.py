"""From recorded copies to one view: can the trainer's parameter live in the engine's memory?

It can when all pieces cover the parameter exactly once, lie in one storage, have the same dtype, and follow one affine
rule: element ``i`` of the parameter sits at ``offset + Σ stride[k]·i[k]``. Row blocks of a fused matrix, whole fused
tensors that arrive in halves, 3-D experts that arrive one by one, and transposed layouts all do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlpatch.sharing.trace import Geometry, Piece, storage_key

_MOST_PIECES = 4096  # the disjointness check is quadratic in the number of pieces


class NotAffine(Exception):
    """The pieces follow no single affine rule; the message says why."""


@dataclass(frozen=True)
class _Box:
    """A piece in the parameter's own indices: where it starts, how far it reaches, and the target's stride per index."""

    start: tuple[int, ...]
    extent: tuple[int, ...]
    target_start: int
    target_stride: dict[int, int]


def affine_view(parameter: torch.Tensor, pieces: list[Piece]) -> Geometry:
    """The one strided view of the engine's storage that holds `parameter`.

    Args:
        parameter: The trainer's tensor, any shape, strided without overlap.
        pieces: What the loader copied out of it (`CopyTrace.pieces`).

    Returns:
        Geometry in elements of the storage of ``pieces[0].storage_of``; its size is the parameter's.

    Raises:
        NotAffine: with the reason in words.
    """
    if not pieces:
        raise NotAffine("the loader copied nothing out of it")
    if len(pieces) > _MOST_PIECES:
        raise NotAffine(f"it arrives in {len(pieces)} pieces")
    engine = pieces[0].storage_of
    if any(storage_key(piece.storage_of) != storage_key(engine) for piece in pieces):
        raise NotAffine("its pieces land in several tensors")
    if engine.dtype != parameter.dtype:
        raise NotAffine(f"trainer dtype {parameter.dtype} differs from the engine's {engine.dtype}")
    if engine.device != parameter.device:
        raise NotAffine(f"trainer device {parameter.device} differs from the engine's {engine.device}")
    own = Geometry.of(parameter)
    boxes = [_box(own, piece) for piece in pieces]
    _check_cover(own, boxes)
    stride = _solve(own, boxes)
    offset = boxes[0].target_start - sum(stride[k] * i for k, i in enumerate(boxes[0].start))
    for box in boxes:
        if box.target_start != offset + sum(stride[k] * i for k, i in enumerate(box.start)):
            raise NotAffine("its pieces are reordered")
    last = offset + sum(s * (n - 1) for s, n in zip(stride, own.size, strict=True))
    if offset < 0 or last >= engine.untyped_storage().nbytes() // engine.element_size():
        raise NotAffine("its view would leave the engine's storage")
    return Geometry(offset, own.size, tuple(stride))


def _unravel(own: Geometry, address: int) -> tuple[int, ...]:
    """Index of the element of `own` at a storage address (in elements)."""
    rest = address - own.offset
    index = [0] * len(own.size)
    for k in sorted((k for k, n in enumerate(own.size) if n > 1), key=lambda k: -own.stride[k]):
        index[k], rest = divmod(rest, own.stride[k])
        if not 0 <= index[k] < own.size[k]:
            raise NotAffine("the loader reads outside of it")
    if rest:
        raise NotAffine("the loader reads between its elements")
    return tuple(index)


def _box(own: Geometry, piece: Piece) -> _Box:
    start = _unravel(own, piece.source.offset)
    extent = [1] * len(own.size)
    target: dict[int, int] = {}
    dims = [
        (n, source, to)
        for n, source, to in zip(piece.source.size, piece.source.stride, piece.target.stride, strict=True)
        if n > 1
    ]
    while dims:
        n, source, to = dims.pop()
        if source == 0:
            raise NotAffine("the loader broadcasts it")
        k = next((k for k, s in enumerate(own.stride) if s == source and own.size[k] > 1), None)
        if k is None or k in target:
            raise NotAffine("the loader reads it with a step")
        if n > own.size[k] - start[k]:  # several dimensions of the parameter were flattened into this one: split it
            if start[k] or n % own.size[k]:
                raise NotAffine("the loader reads across its dimensions")
            dims.append((n // own.size[k], source * own.size[k], to * own.size[k]))
            n = own.size[k]
        extent[k], target[k] = n, to
    return _Box(start, tuple(extent), piece.target.offset, target)


def _check_cover(own: Geometry, boxes: list[_Box]) -> None:
    covered = 0
    for box in boxes:
        count = 1
        for n in box.extent:
            count *= n
        covered += count
    if covered != own.numel:
        raise NotAffine(f"the loader reads {covered} of its {own.numel} elements")
    if len(boxes) > 1:
        start = torch.tensor([box.start for box in boxes])
        end = start + torch.tensor([box.extent for box in boxes])
        overlap = (torch.maximum(start[:, None], start[None]) < torch.minimum(end[:, None], end[None])).all(-1)
        if int(overlap.sum()) != len(boxes):
            raise NotAffine("its pieces overlap")


def _solve(own: Geometry, boxes: list[_Box]) -> list[int]:
    """Target stride of every dimension: from inside the pieces, else from how their starts differ."""
    known: dict[int, int] = {k: 0 for k, n in enumerate(own.size) if n <= 1}
    for box in boxes:
        for k, stride in box.target_stride.items():
            if known.setdefault(k, stride) != stride:
                raise NotAffine("its pieces are laid out differently")
    first = boxes[0]
    while len(known) < len(own.size):
        progress = False
        for box in boxes[1:]:
            differing = [k for k in range(len(own.size)) if k not in known and box.start[k] != first.start[k]]
            if len(differing) != 1:
                continue
            k = differing[0]
            rest = box.target_start - first.target_start
            rest -= sum(known[d] * (box.start[d] - first.start[d]) for d in known)
            stride, remainder = divmod(rest, box.start[k] - first.start[k])
            if remainder or stride <= 0:
                raise NotAffine("its pieces are reordered")
            known[k] = stride
            progress = True
        if not progress:
            raise NotAffine("its pieces do not determine one layout")
    # A dimension of one element may have any stride; keep the parameter's own so that contiguity is not lost.
    return [known[k] if own.size[k] > 1 else own.stride[k] for k in range(len(own.size))]
