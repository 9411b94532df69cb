"""Attention of decode steps: which launch is planned, and the kernel in Triton's interpreter, where Triton is installed.

On a GPU: tests/gpu/test_decoding_gpu.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_interpreter import agrees

pytest.importorskip("torch")

from rlpatch.bench.attention import candidates
from rlpatch.decoding.attention import plan

H200 = 132  # multiprocessors


def test_a_plan_covers_every_context() -> None:
    planned = 0
    for sequences in (1, 7, 8, 16, 17, 32, 49, 64, 256):
        for kv_heads in (1, 2, 8):
            for head in (64, 128):
                for longest in (16, 320, 512, 528, 1024, 2176, 4096, 8192):
                    how = plan(sequences, kv_heads, head, longest, H200)
                    if how is None:
                        continue
                    planned += 1
                    assert how.piece % how.tile == 0
                    assert how.piece * how.pieces >= longest > how.piece * (how.pieces - 1)
                    assert how.pieces == 1 or longest > 512
    assert planned > 100


def test_what_was_not_measured_has_no_plan() -> None:
    def pieces(sequences: int, longest: int) -> int | None:
        how = plan(sequences, 8, 128, longest, H200)
        return how and how.pieces

    assert [pieces(sequences, 320) for sequences in (7, 8, 16, 17, 64, 256)] == [None, 1, 1, 1, 1, 1]
    assert [pieces(sequences, 2176) for sequences in (7, 8, 16, 17, 47, 48, 64)] == [None, 9, 9, 5, 5, 2, 2]
    assert [pieces(sequences, 4096) for sequences in (8, 32, 64)] == [None, None, 2]
    assert pieces(64, 8192) == 4 and pieces(64, 8208) is None


def test_what_the_bench_compares_covers_every_context_and_has_what_is_taken() -> None:
    for longest in (320, 2176, 4096):
        compared = candidates(longest, 128)
        assert len(set(compared)) == len(compared) > 5
        for how in compared:
            assert how.piece % how.tile == 0 and how.piece * how.pieces >= longest > how.piece * (how.pieces - 1)
        for sequences in (8, 32, 64):
            taken = plan(sequences, 8, 128, longest, H200)
            assert taken is None or taken in compared


CASE = """
    import torch
    from attention_reference import exact
    from rlpatch.decoding import attention
    from rlpatch.decoding.attention import Plan, attend

    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 15, 32, 33, 97, 128], dtype=torch.int32)
    count, page, pages = len(lengths), 16, 8
    for heads, kv_heads, head in ((8, 2, 64), (7, 1, 64), (4, 2, 128)):
        table = torch.randperm(count * pages).view(count, pages).int() + 1
        whole = torch.randn(count * pages + 1, kv_heads, page, 2 * head).half()
        for keys, values in (
            torch.randn(count * pages + 1, 2, page, kv_heads, head).half().unbind(1),  # vLLM 0.25
            whole.transpose(1, 2).split(head, dim=-1),  # 0.31
        ):
            keys[0] = values[0] = float("nan")  # nobody's
            for row, length in enumerate(lengths.tolist()):
                if length < page * pages:  # whatever lies behind the last token
                    keys[table[row, length // page], length % page :] = float("nan")
                    values[table[row, length // page], length % page :] = float("nan")
            query = torch.randn(count, heads + 1, head).half()[:, :heads]
            scale = head**-0.5
            for how in (Plan(32, 2, 128), Plan(32, 2, 32, 4), Plan(16, 2, 64, 2)):
                out = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
                assert attend(query, keys, values, table, lengths, scale, out, how)
                found = (out - exact(query, keys, values, table, lengths, scale)).abs().max()
                assert found < 1e-3, (heads, how, found)  # a rounding of fp16
                assert not any(left.any() for left in attention._arrived.values())
    assert [plan["pieces"] for plan in attention.launched()] == [1, 4, 2]
    assert len(attention._launched) == 3 * 2 * 3  # each layout is compiled for itself, and none while a graph is captured
    print("agreed")
"""


def test_the_kernel_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    agrees(CASE, tmp_path)
