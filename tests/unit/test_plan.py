"""From copies to one view: hypothesis builds fused engine tensors and checks the derived view element by element."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from rlpatch.sharing.plan import NotAffine, affine_view  # noqa: E402
from rlpatch.sharing.trace import CopyTrace  # noqa: E402


def trace(source, copies):
    with CopyTrace(source) as recorded:
        for target, view in copies:
            target.copy_(view)
    return recorded


def check(source, engine, recorded) -> None:
    geometry = affine_view(source, recorded.pieces)
    view = engine.as_strided(geometry.size, geometry.stride, geometry.offset)
    assert torch.equal(view, source)
    view.copy_(torch.rand_like(source))  # injective: writing through the view changes as many elements as it has
    assert view.unique().numel() >= source.unique().numel() - 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 6), st.data())
def test_row_blocks_of_a_fused_matrix(rows, columns, data) -> None:
    engine = torch.zeros(sum(rows) + 3, columns)
    at = 0
    for n in rows:
        source = torch.rand(n, columns)
        check(source, engine, trace(source, [(engine.narrow(0, at, n), source)]))
        at += n


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_whole_fused_tensor_in_parts(q, k, v, columns) -> None:
    source, engine = torch.rand(q + k + v, columns), torch.zeros(q + k + v + 2, columns)
    copies = []
    for start, n in ((0, q), (q, k), (q + k, v)):
        copies.append((engine.narrow(0, start, n), source.narrow(0, start, n)))
    check(source, engine, trace(source, copies))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_experts_one_by_one(experts, inner, columns, halves) -> None:
    source, engine = torch.rand(experts, 2 * inner, columns), torch.zeros(experts, 2 * inner, columns)
    copies = []
    for e in range(experts):
        if halves:
            copies += [(engine[e, :inner], source[e, :inner]), (engine[e, inner:], source[e, inner:])]
        else:
            copies.append((engine[e], source[e]))
    check(source, engine, trace(source, copies))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5))
def test_transposed(rows, columns) -> None:
    source, engine = torch.rand(rows, columns), torch.zeros(columns, rows)
    check(source, engine, trace(source, [(engine, source.t())]))


def test_source_that_is_itself_a_strided_view() -> None:
    source = torch.rand(4, 6).t()[1:4]
    engine = torch.zeros(3, 4)
    check(source, engine, trace(source, [(engine, source)]))


def test_flattened_dimensions() -> None:
    source, engine = torch.rand(3, 4, 5), torch.zeros(60)
    check(source, engine, trace(source, [(engine, source.view(-1))]))


def refused(source, recorded, why: str) -> None:
    with pytest.raises(NotAffine, match=why):
        affine_view(source, recorded.pieces)


def test_what_cannot_be_one_view_is_refused_with_the_reason() -> None:
    source = torch.rand(4, 3)
    engine = torch.zeros(4, 3)
    refused(source, trace(source, []), "copied nothing")
    refused(source, trace(source, [(engine[:2], source[:2])]), "6 of its 12")
    refused(source, trace(source, [(engine[:2], source[2:]), (engine[2:], source[:2])]), "reordered")
    refused(source, trace(source, [(engine[:2], source[:2]), (engine[2:], source[:2])]), "overlap")
    refused(source, trace(source, [(engine[:2], source[:2]), (torch.zeros(2, 3), source[2:])]), "several tensors")
    refused(source, trace(source, [(engine.bfloat16(), source)]), "dtype")
    refused(source, trace(source, [(engine[:2], source[::2]), (engine[2:], source[1::2])]), "step")
    refused(source[:1], trace(source[:1], [(engine, source[:1])]), "broadcasts")
    interleaved = torch.zeros(4, 3)
    refused(source, trace(source, [(interleaved[::2], source[:2]), (interleaved[1::2], source[2:])]), "reordered")


def test_values_computed_by_the_loader_are_seen_as_indirect() -> None:
    source, engine = torch.rand(4, 4), torch.zeros(4, 4)
    recorded = trace(source, [(engine, source.t().contiguous())])
    assert recorded.indirect and not recorded.pieces
