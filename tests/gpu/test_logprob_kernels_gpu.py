"""vLLM's log-prob kernels with long steps on a real GPU: against float64, and against vLLM's own launch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("triton")
logprob = pytest.importorskip("vllm.v1.worker.gpu.sample.logprob")

from rlpatch.adapters.vllm.logprob_kernels_v0_12 import ADAPTER  # noqa: E402
from rlpatch.patching import PatchSet  # noqa: E402
from rlpatch.registry import Context  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("words", [700, 32000, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("most", [0, 5])
def test_log_probs_and_ranks(words: int, dtype: torch.dtype, most: int) -> None:
    compute = getattr(logprob, "compute_topk_scores", None) or logprob.compute_topk_logprobs
    logits = (torch.randn(9, words, device="cuda") * 3).to(dtype)
    sampled = torch.randint(0, words, (9,), device="cuda")
    theirs = compute(logits, most, sampled)
    patches = PatchSet("test", ADAPTER.patches(Context()))
    patches.apply()
    ours = compute(logits, most, sampled)
    patches.revert()
    expected = logits.double().log_softmax(-1).gather(1, theirs.logprob_token_ids.long())
    assert (ours.logprobs - expected).abs().max() < 1e-5
    assert torch.equal(ours.selected_token_ranks, theirs.selected_token_ranks)
    assert torch.equal(ours.logprob_token_ids, theirs.logprob_token_ids)
