"""What a profiled step says, from made-up kernels."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from rlpatch.bench import host_profile
from rlpatch.bench.memory_watch import Interval
from rlpatch.bench.report import profile_lines
from rlpatch.bench.step_profile import KINDS, OTHER, Event, StepProfile, busy, by_phase, kind_of


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matrix products"),
        ("skinny_kernel", "matrix products"),
        ("triton_red_fused_fused_add_rms_norm_skinny_linear_2", "norms, rotary, activations"),
        ("void flash::FlashAttnFwdSm90<...>", "attention"),
        ("decode_kernel", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel<...>", "attention"),
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>", "norms, rotary, activations"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", OTHER),
        ("void at::native::cunn_SoftMaxForward<...>", "sampling, log-probs"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ],
)
def test_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind and kind in {*dict(KINDS), OTHER}


def test_what_runs_at_once_counts_once() -> None:
    assert busy([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
    assert busy([]) == 0


def test_kernels_belong_to_the_innermost_phase_in_which_they_start() -> None:
    intervals = [
        Interval("restore", 10.5, 11, 0.5, 1, 3), Interval("generate", 11, 14, 3, 1, 3),
        Interval("rollout", 10, 15, 1.5, 0, 3), Interval("backward", 16, 18, 2, 0, 3),
    ]  # fmt: skip
    events = [
        Event("before gemm", 9.0, 9.5), Event("gemm", 11.5, 12), Event("gemm", 12, 13), Event("flash", 12.5, 13.5),
        Event("Memcpy HtoD", 14.5, 14.6), Event("gemm", 16.5, 18.2), Event("adam", 19, 19.5), Event("after", 20, 21),
    ]  # fmt: skip
    made = by_phase(events, intervals, 10, 20)
    phases = made["phases"]
    assert {name: found["seconds"] for name, found in phases.items()} == pytest.approx(
        {"restore": 0.5, "generate": 3, "rollout": 1.5, "backward": 2, "train": 3}
    )
    assert phases["generate"]["busy"] == 2 and phases["generate"]["kinds"] == {"matrix products": 1.5, "attention": 1}
    assert phases["generate"]["kernels"][0] == {"name": "gemm", "kind": "matrix products", "seconds": 1.5, "count": 2}
    assert phases["rollout"]["kinds"] == {"copies": pytest.approx(0.1)}
    assert phases["train"]["kinds"] == {"optimizer": 0.5} and phases["restore"]["busy"] == 0

    text = "\n".join(
        profile_lines("trl", {**made, "decode_steps": 2, "weights": 3 << 30, "read_bandwidth": float(3 << 40)})
    )
    assert "a step of 10,000 ms" in text
    assert "a decode step: 1500.00 ms, the device at work for 1000.00; reading 3.00 GiB of weights at 3.30 TB/s" in text
    assert "takes 0.98" in text and "750.000 ms,    1.0 ×  gemm" in text


def test_a_slow_mark_does_not_move_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    zeros, delays = torch.zeros, iter([0.2])

    def slow_at_first(*arguments: object, **options: object) -> object:
        time.sleep(next(delays, 0))
        return zeros(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", slow_at_first)
    profile = StepProfile(lambda: None)
    one, other = torch.ones(256, 256), torch.ones(256, 256)
    began = time.perf_counter()
    torch.mm(one, other)
    ended = time.perf_counter()
    (product,) = [event for event in profile.events() if event.name == "aten::mm"]
    assert began - 0.01 < product.start < product.end < ended + 0.01


# ---- the host --------------------------------------------------------------------------------------------------------


def waits(seconds: float) -> None:
    time.sleep(seconds)


def counts(until: float) -> None:
    while time.perf_counter() < until:
        pass


def called() -> None:
    counts(time.perf_counter() + 0.1)


def outer() -> float:
    """How long the waiting took."""
    called()
    began = time.perf_counter()
    waits(0.3)
    return time.perf_counter() - began


def test_the_host_is_where_its_stack_was() -> None:
    before, armed = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]  # pytest's timeout
    profile = host_profile.HostProfile()
    waited = outer()
    middle = time.perf_counter()
    counts(middle + 0.1)
    end = time.perf_counter()
    profile.stop()
    assert signal.getsignal(signal.SIGALRM) is before and (signal.getitimer(signal.ITIMER_REAL)[0] > 1) is (armed > 1)
    intervals = [Interval("generate", profile.began, middle, middle - profile.began, 0, 3)]
    made = host_profile.by_phase(profile.looks, intervals, profile.began, end)
    generate = {one["function"].partition(":")[2]: one for one in made["generate"]}
    # a call into C is interrupted when it returns, and counts for who made it
    assert generate["waits"]["own"] == pytest.approx(waited, abs=0.08)
    assert generate["counts"]["own"] == pytest.approx(0.1, abs=0.08)
    assert generate["called"]["called"] == pytest.approx(0.1, abs=0.08) and generate["called"]["own"] < 0.05
    assert "outer" not in generate or generate["outer"]["own"] < 0.05  # all the time
    assert made["generate"][0]["function"] == f"{__name__}:waits"
    assert "waits" not in {one["function"].partition(":")[2] for one in made["train"]}
    total = sum(one["own"] for found in made.values() for one in found)
    assert total == pytest.approx(end - profile.began, abs=0.08)
    assert not any("_look" in one["function"] for found in made.values() for one in found)

    document = {"seconds": 1.0, "phases": {"generate": {"seconds": 0.4, "busy": 0.1, "kinds": {}, "kernels": []}}}
    text = profile_lines("trl", {**document, "host": made, "decode_steps": 4, "weights": None, "read_bandwidth": None})
    shown = [line.split() for line in text]
    assert sum(line[-1] == f"{__name__}:waits" and 50 < float(line[0]) < 250 * waited + 25 for line in shown) == 2
    assert not any("host" in line for line in profile_lines(
        "trl", {**document, "decode_steps": 4, "weights": None, "read_bandwidth": None}
    ))  # fmt: skip


def test_a_look_that_interrupts_another_does_not_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the timer fires again before a look has returned."""
    frames = []

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            frames.append(sys._getframe(1))
            return 1.0

    profile = host_profile.HostProfile()
    profile.stop()
    monkeypatch.setattr(host_profile, "time", Clock)
    monkeypatch.setattr(host_profile.signal, "setitimer", lambda *_: None)
    profile.looks.clear()
    profile._look(0, sys._getframe())
    profile._look(0, frames[0])  # the frame of the first look
    assert frames[0].f_code.co_name == "_look"
    (_, first), (_, second) = profile.looks
    assert first[0][0].co_name == second[0][0].co_name == "test_a_look_that_interrupts_another_does_not_see_it"


def test_a_function_that_calls_itself_counts_once() -> None:
    def here() -> None: ...

    code = here.__code__
    looks = [(1.0, ((code, "m"), (code, "m"))), (3.0, ((code, "m"),)), (9.0, ((code, "m"),))]  # the last: after the end
    made = host_profile.by_phase(looks, [], 0.0, 5.0)
    assert [(one["own"], one["called"]) for one in made["train"]] == [(3.0, 3.0)]
