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


@pytest.mark.parametrize("profile", ["fast-start", "default", "throughput", "decode-graphs"])
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
    if profile == "decode-graphs":
        assert (config.mode if hasattr(config, "mode") else config.level).name.startswith("NO")
        assert what["compilation_config.mode"]["new"] == "NONE"
        return
    sizes = what["compilation_config.cudagraph_capture_sizes"]  # TRL's max_num_seqs is the batch
    assert sizes["new"] == "[1, 2, 4, 8]" and sizes["became"] == "[]"  # a CPU captures nothing, and this is said
    if profile == "fast-start":
        if workers.cores() > 1:
            assert what["compile_threads"]["new"] == str(min(MOST_WORKERS, workers.cores()))
        assert what["model inspection"]["new"] == "in this process"
        assert "leaves Inductor's combo_kernels alone" in found["left"]["no-combo-benchmark"]  # not on a CPU
        assert what["enable_flashinfer_autotune"]["new"] == "False"
        assert worker.engine_of(trainer).llm_engine.vllm_config.kernel_config.enable_flashinfer_autotune is False
        assert found["left"]["lora-graphs"] == "the engine has no LoRA slots"
    elif frozen:
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
    assert [len(tokens) for tokens in result["greedy"]] == [16, 16]
    assert "engine start, cold, s" in bench.table(document)
