"""How vLLM's log-prob kernels are launched, with a stand-in for Triton's kernel object.

And that any step gives the same values: vLLM's own code under Triton's interpreter, where Triton is installed.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton_interpreter import agrees

from rlpatch.adapters.vllm.logprob_kernels_v0_12 import ADAPTER, KERNELS, MODULE, STEP, WARPS
from rlpatch.patching import PatchSet
from rlpatch.registry import Context


class Kernel:
    """Launches like ``triton.runtime.jit.JITFunction``: ``kernel[grid](…)`` is ``kernel.run(…, grid=grid)``."""

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(grid=grid, warmup=False, *args, **kwargs)  # noqa: B026

    def run(self, *args: Any, **kwargs: Any) -> int:
        self.launched.append((args, kwargs))
        return len(self.launched)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType(MODULE)
    for name in (*KERNELS, "other"):
        setattr(made, name, Kernel())
    monkeypatch.setitem(sys.modules, MODULE, made)
    return made


def test_launches_get_long_steps_and_the_warps_for_them(module: types.ModuleType) -> None:
    patches = PatchSet("test", ADAPTER.patches(Context()))
    patches.apply()
    given = {"grid": (8,), "warmup": False}
    for name in KERNELS:
        kernel = getattr(module, name)
        assert kernel[(8,)]("out", 7, BLOCK_SIZE=1024, TOPK_BLOCK_SIZE=1) == 1
        assert kernel.launched == [
            (("out", 7), {**given, "BLOCK_SIZE": STEP, "TOPK_BLOCK_SIZE": 1, "num_warps": WARPS})
        ]
        own = (
            {"BLOCK_SIZE": 2 * STEP},  # longer ones
            {"BLOCK_SIZE": 1024, "num_warps": 4},  # a release that has chosen
            {},  # a step that is not given by name
        )
        for number, chosen in enumerate(own, start=2):
            assert kernel[(8,)](**chosen) == number
            assert kernel.launched[-1] == ((), {**given, **chosen})
    module.other[(8,)](BLOCK_SIZE=8)
    assert module.other.launched == [((), {**given, "BLOCK_SIZE": 8})]
    patches.revert()
    for name in KERNELS:
        kernel = getattr(module, name)
        kernel[(8,)](BLOCK_SIZE=1024)
        assert kernel.launched[-1] == ((), {**given, "BLOCK_SIZE": 1024}) and list(vars(kernel)) == ["launched"]


CASE = """
    import types, sys
    import torch, triton, triton.language as tl
    from rlpatch.adapters.vllm import logprob_kernels_v0_12 as adapter
    from rlpatch.patching import PatchSet
    from rlpatch.registry import Context

    for name, parts in {  # all that vLLM's file imports of vLLM
        "vllm": {}, "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.sampling_params": {"MAX_LOGPROB_TOKEN_IDS": 128, "SamplingParams": None},
        "vllm.v1": {}, "vllm.v1.outputs": {"LogprobsTensors": dict}, "vllm.v1.worker": {}, "vllm.v1.worker.gpu": {},
        "vllm.v1.worker.gpu.buffer_utils": {"StagedWriteTensor": None, "UvaBackedTensor": None},
    }.items():
        made = sys.modules[name] = types.ModuleType(name)
        vars(made).update(parts)
    logprob = sys.modules[adapter.MODULE] = types.ModuleType(adapter.MODULE)
    logprob.__file__ = FILE
    exec(compile(open(FILE).read(), FILE, "exec"), vars(logprob))
    compute = getattr(logprob, "compute_topk_scores", None) or logprob.compute_topk_logprobs

    for rows, words in ((3, 700), (2, 20000), (1, 40000)):  # less than a step, one and a half, two and a half
        logits = torch.randn(rows, words) * 3
        sampled = torch.randint(0, words, (rows,))
        patches = PatchSet("test", adapter.ADAPTER.patches(Context()))
        theirs = compute(logits, 0, sampled)
        patches.apply()
        ours = compute(logits, 0, sampled)
        patches.revert()
        expected = logits.double().log_softmax(-1).gather(1, sampled[:, None])
        assert (ours["logprobs"] - expected).abs().max() < 1e-5
        assert (theirs["logprobs"] - expected).abs().max() < 1e-5
        assert torch.equal(ours["selected_token_ranks"], theirs["selected_token_ranks"])
        assert torch.equal(ours["selected_token_ranks"], (logits >= logits.gather(1, sampled[:, None])).sum(1))
    print("agreed")
"""


def test_any_step_gives_the_same_log_probs_and_ranks(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.submodule_search_locations is None:
        pytest.skip("needs vLLM's code")
    file = Path(next(iter(vllm.submodule_search_locations)), *MODULE.split(".")[1:]).with_suffix(".py")
    agrees(f"FILE = {str(file)!r}\n" + textwrap.dedent(CASE), tmp_path)
