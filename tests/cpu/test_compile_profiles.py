"""Engines under each compile profile, beside a real trainer: the same tokens, and `status` says what was set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import rlpatch  # noqa: E402
from rlpatch.adapters.vllm import _compilation as era  # noqa: E402
from rlpatch.bench import compile as bench  # noqa: E402
from rlpatch.compilation import workers  # noqa: E402
from rlpatch.compilation.profiles import MOST_WORKERS  # noqa: E402
from rlpatch.demo import tiny, worker  # noqa: E402

pytestmark = [pytest.mark.cpu, pytest.mark.timeout(600)]

PROMPTS = [[5, 9, 14, 22], [7, 7, 31], [40, 3, 11, 12, 13, 50]]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One layer: there is less to compile."""
    return str(tiny.write_model(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=1))


def greedy(trainer: Any) -> list[list[int]]:
    from vllm import SamplingParams

    outputs = worker.engine_of(trainer).generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def described() -> dict[str, Any]:
    return dict(rlpatch.status().pairs[-1]["compile"])


@pytest.fixture(scope="module")
def expected(shallow: str) -> list[list[int]]:
    """Tokens of an engine that computes without compilation, from an unpatched constructor's arguments."""
    rlpatch.apply(compile="default")
    try:
        trainer = worker.make_trainer(worker.Job(shallow, True))
        assert rlpatch.status()["compile"].reason == "switched off"
        assert rlpatch.status().pairs[-1]["compile"] is None
        return greedy(trainer)
    finally:
        rlpatch.revert()


SINGLE = "workers,capture-sizes,static-size"


@pytest.mark.parametrize("profile", ["fast-start", "default", "throughput", "decode-graphs", SINGLE])
def test_same_tokens_under_every_profile(
    trainer_of: Any, shallow: str, expected: list[list[int]], profile: str, collected: None
) -> None:
    import torch._inductor.config as inductor

    variables = dict(os.environ)
    threads = inductor.compile_threads
    frozen = era.surface().variables_read
    with inductor.patch(compile_threads=1):  # vLLM's pin, which depends on what was imported first
        trainer = trainer_of(apply={"compile": profile}, model=shallow, engine={"enforce_eager": False})
        assert inductor.compile_threads == 1
    assert greedy(trainer) == expected
    assert inductor.compile_threads == threads
    assert {name for name in os.environ if name.startswith(("VLLM_USE", "VLLM_ENABLE_IND"))} <= set(variables)
    if profile == "default":
        return
    found = described()
    what = {entry["what"]: entry for entry in found["set"]}
    assert found["profile"] == profile
    assert str(rlpatch.status()["compile"].state) == "applied"
    config = worker.engine_of(trainer).llm_engine.vllm_config.compilation_config
    if profile in ("decode-graphs", "fast-start") and "decode-graphs" not in found["left"]:
        assert (config.mode if hasattr(config, "mode") else config.level).name.startswith("NO")
        assert what["compilation_config.mode"]["new"] == "NONE"
    if profile == "decode-graphs":
        return
    sizes = what["compilation_config.cudagraph_capture_sizes"]  # TRL's max_num_seqs is the batch
    assert sizes["new"] == "[1, 2, 4, 8]" and sizes["became"] == "[]"  # a CPU captures nothing, and this is said
    if profile != SINGLE:
        assert what["model inspection"]["new"] == "in this process"
        assert "plain-sampling" in {entry["why"].partition(":")[0] for entry in found["set"]} | set(found["left"])
    if profile == "throughput":
        assert "mega-aot" in {entry["why"].partition(":")[0] for entry in found["set"]} | set(found["left"])
        return
    if profile == "fast-start":
        assert what["enable_flashinfer_autotune"]["new"] == "False"
        assert worker.engine_of(trainer).llm_engine.vllm_config.kernel_config.enable_flashinfer_autotune is False
        assert found["left"]["lora-graphs"] == "the engine has no LoRA slots"
        return
    if workers.cores() > 1:
        assert what["compile_threads"]["new"] == str(min(MOST_WORKERS, workers.cores()))
    if frozen:
        assert "for good" in found["left"]["static-size"]
    else:
        assert config.compile_sizes == [8]


def test_eager_engines_are_left_alone(trainer_of: Any, shallow: str, expected: list[list[int]]) -> None:
    trainer = trainer_of(apply={"compile": "workers,capture-sizes"}, model=shallow)  # the job's engine is eager
    assert greedy(trainer) == expected
    found = described()
    assert not found["set"] and all("enforce_eager=True" in why for why in found["left"].values())


FAKE_GPU = """
import sys
import torch

real = torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream, torch.Tensor.pin_memory
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum


class FakeGpu(CpuPlatform):  # stands for a GPU's platform, of which there is none here
    _enum = PlatformEnum.CUDA


vllm.platforms._current_platform = FakeGpu()
import vllm.entrypoints.llm
import rlpatch
from rlpatch.adapters.vllm._platform import on_cpu
from rlpatch.bench.start import TARGETS, not_timed, watch

assert vllm.platforms.current_platform.is_cuda() and not on_cpu()
rlpatch.apply(compile="fast-start")
watched = watch(TARGETS, lambda phase: lambda wrapped, instance, args, kwargs: wrapped(*args, **kwargs))
missing = not_timed({**watched, **watch([("none", "vllm.v1.worker.gone", "x")], lambda phase: print)})
assert not [name for name in sys.modules if "cpu_worker" in name or "cpu_model_runner" in name or "worker.cpu" in name]
assert real == (torch.cuda.Event, torch.cuda.Stream, torch.cuda.current_stream, torch.Tensor.pin_memory)
print(*missing, sep="\\n")
"""


def test_no_cpu_worker_is_imported_on_a_gpu() -> None:
    """Importing it replaces torch's events and streams by placeholders, in the whole process."""
    found = subprocess.run([sys.executable, "-c", FAKE_GPU], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.splitlines()
    assert "none: vllm.v1.worker.gone:x" in lines and not any("cpu_worker" in line for line in lines)


def test_bench_measures_a_start(shallow: str, tmp_path: Path) -> None:
    out = tmp_path / "starts.json"
    options = "--settings decode-graphs --cold --sequences 2 --tokens 8 --rollouts 1 --heap 0.1"
    assert bench.main([*options.split(), "--model", shallow, "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    (run,) = document["settings"]["decode-graphs"]["cold"]
    result = run["result"]
    assert result["seconds"]["engine start"] == pytest.approx(sum(result["phases"].values()), rel=0.02)
    assert result["phases"]["weights"] > 0 and result["rollouts"][0]["tokens_per_second"] > 0
    assert result["compile"]["profile"] == "decode-graphs"
    assert result["job"]["heap"] == document["job"]["heap"] == 100_000
    assert result["collector"]["objects"] > 100_000 and set(result["collector"]["phases"]) <= set(result["phases"])
    assert [len(tokens) for tokens in result["greedy"]] == [16, 16]
    assert "engine start, cold, s" in bench.table(document)


# ---- the sampler's warm-up -------------------------------------------------------------------------------------------


@pytest.fixture
def warm_up() -> Any:
    """vLLM's own parameters for it, patched and then put back, of which it has one object per call."""
    import vllm.entrypoints.llm  # noqa: F401 - what the adapter waits for
    from vllm import SamplingParams

    original = vars(SamplingParams).get("for_sampler_warmup")
    if original is None:
        pytest.skip("this vLLM warms up no sampler with every feature")
    yield SamplingParams
    rlpatch.revert()
    assert vars(SamplingParams)["for_sampler_warmup"] is original


class Pair:
    """Stands for the pair whose engine is being built; a real one needs a trainer."""

    def __init__(self, setting: str = "plain-sampling", **sampling: Any) -> None:
        from rlpatch import control
        from rlpatch.compilation.build import decide

        context = control.context()
        assert context is not None
        self.sampling = sampling
        self.compilation = decide(setting, (setting,), context.providers["compile"], {"max_num_seqs": 4})

    def __enter__(self) -> None:
        from rlpatch import phases

        self._token = phases._building.set(self)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        from rlpatch import phases

        phases._building.reset(self._token)


def fields(parameters: Any) -> dict[str, Any]:
    """All of them, but for what vLLM concluded from ``prompt_logprobs`` for the prefix cache, which a warm-up has not."""
    names = (name for name in type(parameters).__struct_fields__ if name != "skip_reading_prefix_cache")
    return {name: getattr(parameters, name) for name in names}


def test_what_the_sampler_is_warmed_up_with(warm_up: Any) -> None:
    upstream = warm_up.for_sampler_warmup()
    rlpatch.apply(compile="plain-sampling")
    assert warm_up.for_sampler_warmup() == upstream  # whoever is not building a pair's engine
    with Pair("capture-sizes"):
        assert warm_up.for_sampler_warmup() == upstream
    with Pair(temperature=1.0, top_p=1.0, top_k=-1, min_p=None, repetition_penalty=1.0, logprobs=0):
        plain = warm_up.for_sampler_warmup()
    assert fields(plain) == fields(warm_up(temperature=1.0, logprobs=0))
    with Pair(temperature=0.7, top_p=0.95, top_k=0, repetition_penalty=1.1, bad_words=["no"], logprobs=3):
        some = warm_up.for_sampler_warmup()
    assert (some.temperature, some.top_p, some.top_k, some.min_p, some.logprobs) == (0.7, upstream.top_p, 0, 0.0, 3)
    assert some.repetition_penalty == upstream.repetition_penalty and some.presence_penalty == 0
    assert some._bad_words_token_ids == upstream._bad_words_token_ids and some.logit_bias is None
    with Pair():  # rlpatch.load: nobody knows the rollouts
        unknown = warm_up.for_sampler_warmup()
    assert fields(unknown) == fields(warm_up(temperature=upstream.temperature, logprobs=0))


def test_vllm_s_sampler_has_nothing_to_do_for_it(warm_up: Any) -> None:
    """The sampler of Model Runner V2 itself, as far as it runs without Triton: which kernels it would launch."""
    pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor")
    from types import SimpleNamespace

    import numpy as np
    import vllm.v1.worker.cpu_worker  # noqa: F401 - buffers on the CPU
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

    device = torch.device("cpu")
    states = RequestState(4, 64, 64, 0, 128, device)
    sampler = Sampler(
        SimpleNamespace(reasoning_config=None), 4, 128, device, states, logprobs_mode="processed_logprobs"
    )
    states.prompt_len.np[:] = 4

    def launched(slot: int, parameters: Any) -> tuple[bool, list[bool], bool]:
        sampler.add_request(slot, parameters)
        uses = [getattr(p, n)[slot] for p in sampler.logits_processors
                for n in ("use_penalty", "use_logit_bias") if hasattr(p, n)]  # fmt: skip
        top = sampler.sampling_states.get_top_k_top_p(torch.tensor([slot]), np.array([slot]))
        return bool(sampler.needs_logits_processing[slot]), list(map(bool, uses)), any(t is not None for t in top)

    assert launched(0, warm_up.for_sampler_warmup()) == (True, [True, True], True)
    rlpatch.apply(compile="plain-sampling")
    with Pair(temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, logprobs=0):
        assert launched(1, warm_up.for_sampler_warmup()) == (False, [False, False], False)
    with Pair(temperature=0.9, top_k=20):
        assert launched(2, warm_up.for_sampler_warmup()) == (True, [False, False], True)
    assert sampler.get_logprobs_dims(np.array([1])) == (0, 0)


def test_a_trainer_s_rollouts_are_known_and_status_claims_no_effect_there_was_not(
    trainer_of: Any, shallow: str
) -> None:
    trainer = trainer_of(apply={"compile": "plain-sampling"}, model=shallow)
    pair = rlpatch.phases.live()[-1]
    assert pair.sampling["temperature"] == trainer.args.temperature
    assert {"top_p", "repetition_penalty"} <= set(pair.sampling)
    found = described()
    from vllm import SamplingParams

    if not hasattr(SamplingParams, "for_sampler_warmup"):
        assert found["left"]["plain-sampling"] == era.NO_WARM_UP
    elif getattr(worker.engine_of(trainer).llm_engine.vllm_config, "use_v2_model_runner", False):
        assert [entry["what"] for entry in found["set"]] == ["sampler's warm-up"]
    else:  # without Triton
        assert "warmed up no sampler" in found["left"]["plain-sampling"] and not found["set"]
