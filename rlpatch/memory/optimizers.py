"""Bytes that an optimizer keeps beside the weights, and those it needs for a moment in its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rlpatch.errors import UsageError
from rlpatch.memory.model import width

_BLOCK = 256  # bitsandbytes and torchao: elements under one scale
_SMALL = 4096  # both leave tensors with fewer elements in full precision


@dataclass(frozen=True)
class Trainable:
    """`count` tensors that are trained.

    Attributes:
        shape: Of one.
        count: How many of it.
        dtype: The optimizer sees it in this one (float32 with masters).
        embedding: An `nn.Embedding`'s: transformers keeps bitsandbytes from quantizing its state.
    """

    shape: tuple[int, ...]
    count: int = 1
    dtype: str = "float32"
    embedding: bool = False

    @property
    def elements(self) -> int:
        """Of one."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.elements * self.count * width(self.dtype)


def _same(states: int) -> Callable[[Trainable], int]:
    """`states` tensors like the parameter, in its dtype."""
    return lambda t: states * t.elements * width(t.dtype)


def _float(states: int) -> Callable[[Trainable], int]:
    return lambda t: states * t.elements * 4


def _blocks(elements: int) -> int:
    return -(-elements // _BLOCK)


def _bitsandbytes(first: int, second: int) -> Callable[[Trainable], int]:
    """`first` + `second` uint8 states with a float32 ``absmax`` per block of 256, float32 below 4096 elements."""

    def state(t: Trainable) -> int:
        states = first + second
        if t.embedding or t.elements < _SMALL:
            return states * t.elements * 4
        return states * (t.elements + _blocks(t.elements) * 4)

    return state


def _torchao(bits: int, block: int) -> Callable[[Trainable], int]:
    def state(t: Trainable) -> int:
        if t.elements < _SMALL or t.elements % block:
            return 2 * t.elements * width(t.dtype)
        return 2 * (t.elements * bits // 8 + t.elements // block * 4)

    return state


def _adafactor(t: Trainable) -> int:
    if len(t.shape) < 2:
        return 4 * t.elements
    rows = t.elements // t.shape[-1] if t.shape[-1] else 0
    columns = t.elements // t.shape[-2] if t.shape[-2] else 0
    return 4 * (rows + columns)


@dataclass(frozen=True)
class Optimizer:
    """One of transformers' ``optim`` names.

    Attributes:
        state: Bytes of state of one tensor.
        workspace: Copies of all parameters (in their dtype) that a step makes at once.
        largest: Float32 copies of the largest tensor that a step makes.
        source: Where the layout is written.
        note: What else is worth knowing.
        pieces: Masters step it for some of the parameters at a time (`rlpatch.precision.masters`).
    """

    state: Callable[[Trainable], int]
    source: str
    workspace: int = 0
    largest: int = 0
    note: str = ""
    pieces: bool = True

    def state_bytes(self, tensors: Iterable[Trainable]) -> int:
        """State of all tensors."""
        return sum(self.state(tensor) * tensor.count for tensor in tensors)

    def workspace_bytes(self, tensors: Iterable[Trainable]) -> int:
        """What a step needs beyond parameters, gradients and state."""
        tensors = tuple(tensors)
        largest = max((tensor.elements for tensor in tensors), default=0)
        return self.workspace * sum(tensor.bytes for tensor in tensors) + self.largest * largest * 4


_ADAMW = "torch/optim/adamw.py, adam.py: exp_avg, exp_avg_sq like the parameter"
_BNB = (
    "bitsandbytes/optim/optimizer.py: uint8 states, float32 absmax per 256 (embeddings and what is under 4096: float32)"
)
_TORCHAO = "torchao/optim: {}-bit states, float32 scale per {}"
_PAGED = "paged: the driver may move it to the host under pressure; counted as if it stayed"
_MANY = "torch's foreach step holds sqrt(exp_avg_sq) of all parameters at once"

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(_same(2), _ADAMW, workspace=1, note=_MANY),
    "adamw_torch_fused": Optimizer(_same(2), _ADAMW),
    "adamw_torch_8bit": Optimizer(
        _torchao(8, 256), "torchao/optim: 8-bit states, float32 scale per 256", largest=4, pieces=False
    ),
    "adamw_torch_4bit": Optimizer(
        _torchao(4, 128), "torchao/optim: 4-bit states, float32 scale per 128", largest=4, pieces=False
    ),
    "adamw_anyprecision": Optimizer(
        _float(2), "torchdistx AnyPrecisionAdamW with transformers' float32 defaults", largest=2, pieces=False
    ),
    "adafactor": Optimizer(
        _adafactor, "transformers/optimization.py Adafactor: rows and columns in float32", largest=4
    ),
    "sgd": Optimizer(_same(1), "torch/optim/sgd.py: a momentum buffer if optim_args ask for one", workspace=1),
    "adagrad": Optimizer(_same(1), "torch/optim/adagrad.py: sum", workspace=1),
    "rmsprop": Optimizer(
        _same(2), "torch/optim/rmsprop.py: square_avg, and a momentum buffer if asked for", workspace=1
    ),
    "stable_adamw": Optimizer(_same(2), "optimi StableAdamW: exp_avg, exp_avg_sq", workspace=1, pieces=False),
    "adamw_bnb_8bit": Optimizer(_bitsandbytes(1, 1), _BNB),
    "paged_adamw_8bit": Optimizer(_bitsandbytes(1, 1), _BNB, note=_PAGED),
    "paged_adamw_32bit": Optimizer(_float(2), "bitsandbytes: two float32 states", note=_PAGED),
    "ademamix": Optimizer(_float(3), "bitsandbytes/optim/ademamix.py: state1 is twice as large"),
    "ademamix_8bit": Optimizer(_bitsandbytes(2, 1), _BNB),
    "paged_ademamix_32bit": Optimizer(
        _float(3), "bitsandbytes/optim/ademamix.py: state1 is twice as large", note=_PAGED
    ),
    "paged_ademamix_8bit": Optimizer(_bitsandbytes(2, 1), _BNB, note=_PAGED),
    "lion_8bit": Optimizer(_bitsandbytes(1, 0), _BNB),
    "lion_32bit": Optimizer(_float(1), "bitsandbytes: one float32 state"),
    "paged_lion_8bit": Optimizer(_bitsandbytes(1, 0), _BNB, note=_PAGED),
    "paged_lion_32bit": Optimizer(_float(1), "bitsandbytes: one float32 state", note=_PAGED),
    "rmsprop_bnb": Optimizer(_float(1), "bitsandbytes: one float32 state"),
    "rmsprop_bnb_32bit": Optimizer(_float(1), "bitsandbytes: one float32 state"),
    "rmsprop_bnb_8bit": Optimizer(_bitsandbytes(1, 0), _BNB),
}
_ALIASES = {"adamw_8bit": "adamw_bnb_8bit", "paged_adamw": "paged_adamw_32bit", "paged_lion": "paged_lion_32bit"}
UNKNOWN = Optimizer(
    _float(2), "an optimizer that is not known: counted like AdamW in float32", workspace=1, largest=2, pieces=False
)


def optimizer(name: str) -> Optimizer:
    """The optimizer of transformers' ``optim`` name.

    Raises:
        UsageError: it is not known; names those that are.
    """
    found = OPTIMIZERS.get(_ALIASES.get(name, name))
    if found is None:
        raise UsageError(
            f"optim={name!r}: its memory is not known; known are {', '.join(sorted({*OPTIMIZERS, *_ALIASES}))}"
        )
    return found
