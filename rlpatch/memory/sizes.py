"""Sizes of memory as people write them, and cards by name."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from rlpatch.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)")
_DIGITS = 30  # more would be no size, and costs time to work out

# Total memory as CUDA reports it (`cudaMemGetInfo`), in GiB, rounded down; it is less than the name says and moves by
# some hundred MiB with ECC and the driver. H200: measured (150109880320 bytes, bench/results); the
# others are commonly seen values, not measured here: give bytes where it matters.
_CARDS = {
    "b200": 178.3, "h200": 139.80, "h100": 79.10, "h100-80gb": 79.10, "a100": 79.10, "a100-80gb": 79.10, "a100-40gb": 39.38,
    "h800": 79.10, "a800": 79.10, "l40s": 44.39, "l40": 44.39, "a40": 44.33, "a6000": 47.53,
    "rtx6000ada": 47.50, "l4": 22.03,
    "a10": 21.98, "a10g": 21.98, "v100": 15.76, "v100-16gb": 15.76, "v100-32gb": 31.73, "t4": 14.56, "p100": 15.88,
    "5090": 31.35, "4090": 23.52, "3090": 23.56,
}  # fmt: skip
_FILLING = re.compile(r"^(?:nvidia|geforce|tesla|rtx(?=\d{4}$|-\d{4}$))-?")


def parse_size(text: str | int, name: str = "size") -> int:
    """Bytes of ``"80GiB"``, ``"80GB"``, ``"1.5 g"`` or ``"85899345920"``; a fraction of a byte is dropped.

    ``KiB MiB GiB TiB`` and the bare letters ``K M G T`` are powers of 1024, ``KB MB GB TB`` powers of 1000.

    Args:
        name: What the size is of, for the error.

    Raises:
        UsageError: no size, or less than a byte.
    """
    match = _SIZE.fullmatch(str(text).strip()) if not isinstance(text, bool) else None
    if match is None or match[2].lower() not in _UNITS or len(match[1]) > _DIGITS:
        raise UsageError(f"{name} {text!r}: no size; write it like 80GiB, 80GB, 512MiB or as a number of bytes")
    size = math.floor(Fraction(match[1] if match[1][-1] != "." else match[1] + "0") * _UNITS[match[2].lower()])
    if size < 1:
        raise UsageError(f"{name} {text!r}: more than 0 bytes are needed")
    return size


def parse_device(text: str, name: str = "gpu") -> int:
    """Bytes of device memory: a size (`parse_size`) or the name of a card, e.g. ``"H100"``, ``"A100-80GB"``, ``"4090"``.

    A bare number is a card if one has that name (``"4090"``), else bytes.

    Raises:
        UsageError: neither.
    """
    key = re.sub(r"[\s_]+", "-", text.strip().lower())
    key = _FILLING.sub("", _FILLING.sub("", key))
    if key in _CARDS:
        return int(_CARDS[key] * GIB)
    try:
        return parse_size(text, name)
    except UsageError:
        cards = ", ".join(sorted({card.upper() for card in _CARDS}))
        raise UsageError(
            f"{name} {text!r}: neither a size (80GiB, 80GB, 85899345920) nor a known card ({cards})"
        ) from None


def show(size: int) -> str:
    """``"1.50 GiB"``, ``"12.0 MiB"``, ``"512 B"``: for people."""
    sign, size = ("-", -size) if size < 0 else ("", size)
    for unit, scale, digits in (("GiB", GIB, 2), ("MiB", MIB, 1), ("KiB", KIB, 1)):
        if size >= scale or (unit == "GiB" and size > 1000 * MIB):
            return f"{sign}{size / scale:.{digits}f} {unit}"
    return f"{sign}{size} B"
