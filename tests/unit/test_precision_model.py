"""What is done to one model: its residual stream, its optimizer, and nothing where nothing was chosen."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from rlpatch.precision.choice import AS_IS, BASE, MASTERS, Choice  # noqa: E402
from rlpatch.precision.model import Prepared, as_is, convert, live, of, undo_all  # noqa: E402


class Model(nn.Module):
    """An embedding under a linear layer, as far as a language model is looked at here."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(8, 4, dtype=dtype)
        self.head = nn.Linear(4, 8, bias=False, dtype=dtype)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, tokens: Any) -> Any:
        self.stream = self.embedding(tokens)
        return self.head(self.stream)


@pytest.mark.parametrize(
    ("mode", "stepped"), [(MASTERS, torch.float32), (BASE, torch.float32), (AS_IS, torch.bfloat16)]
)
def test_masters_only_where_they_were_chosen(mode: str, stepped: Any) -> None:
    model = Model(torch.bfloat16)
    if mode == AS_IS:
        as_is(model, Choice(mode, ""))
        prepared: Any = of(model)
    else:
        prepared = Prepared(model, Choice(mode, ""))
    prepared.watch(model)
    optimizer = torch.optim.AdamW(model.parameters())
    prepared.attach(optimizer)
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {stepped}
    assert ("master_bytes" in prepared.describe()) == (mode != AS_IS)
    assert {t.dtype for t in model.state_dict().values()} == {stepped}
    undo_all()
    assert {p.dtype for p in model.parameters()} == {stepped} and live() == []


def test_the_residual_stream_is_as_wide_as_it_was() -> None:
    tokens = torch.arange(8)
    wide, narrow = Model(torch.bfloat16), Model(torch.bfloat16)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    Prepared(narrow, Choice(MASTERS, "")).keep_residual(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow(tokens), wide(tokens))
        assert narrow.stream.dtype == torch.float32
    narrow(tokens)
    assert narrow.stream.dtype == torch.bfloat16, "outside of autocast there is nobody to narrow it again"
    undo_all()
    assert not narrow.embedding._forward_hooks


@pytest.mark.parametrize("frozen", [False, True])
def test_an_object_is_converted_and_given_back(frozen: bool) -> None:
    model = Model(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    convert(model, Choice(BASE if frozen else MASTERS, ""), frozen=frozen, late=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    undo_all()
    for name, parameter in model.named_parameters():  # nothing keeps what rounding takes from a frozen weight
        expected = before[name].bfloat16() if frozen else before[name]
        assert parameter.dtype == expected.dtype and torch.equal(parameter, expected)
