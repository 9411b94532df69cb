"""One engine start in a process of its own, for ``python -m rlpatch.bench.compile``: a JSON job in, JSON lines out.

The engine is built by `rlpatch.load`, out of the trainer's memory, and its constructor is timed. Phases, each wrapped where
vLLM passes through, a phase's seconds without those of the phases inside of it::

    engine start          vllm.LLM.__init__ (what is left over: tokenizer, config, process groups, KV cache)
    ├─ model info         the model's class imported in a process of its own, when that is not cached
    ├─ weights            BaseModelLoader.load_model (building the model and filling it from the trainer)
    ├─ profile            Worker.determine_available_memory: the largest batch, once
    │  ├─ dynamo          tracing the model (TorchCompileWithNoGuardsWrapper.aot_compile; else within profile)
    │  ├─ backend         VllmBackend.__call__: splitting the graph, vLLM's passes
    │  ├─ inductor        InductorStandaloneAdaptor.compile, InductorAdaptor.compile
    │  ├─ cache           the same classes' load
    │  └─ graph estimate  profile_cudagraph_memory: a few graphs captured and dropped
    └─ warm-up            Worker.compile_or_warm_up_model
       ├─ kernels         kernel_warmup
       │  └─ autotune     flashinfer_autotune
       ├─ dummy rollout   warmup_kernels (Model Runner V2)
       └─ capture         capture_model

Beside them stand torch's own compile timers (`torch._dynamo.utils.compilation_time_metrics`), which overlap, and what the
garbage collector takes in each phase (part of its seconds).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpatch.bench.collector_clock import CollectorClock
from rlpatch.bench.run import BenchJob, read_job, told, told_job
from rlpatch.bench.triton_clock import PHASE as TRITON
from rlpatch.errors import PatchError
from rlpatch.patching import Patch, PatchSet, Wrapper

START = "engine start"
ESTIMATE = "graph estimate"
CAPTURE = "capture"
OTHER = "other"
PHASES = (
    "model info", "weights", "profile", "dynamo", "backend", "inductor", "cache", ESTIMATE, "warm-up", "kernels",
    "autotune", "dummy rollout", CAPTURE, TRITON,
)  # fmt: skip
_GPU = "vllm.v1.worker.gpu_worker"
_CPU = "vllm.v1.worker.cpu_worker"
_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
_ADAPTORS = ("InductorStandaloneAdaptor", "InductorAdaptor")
TARGETS: tuple[tuple[str, str, str], ...] = (
    ("model info", "vllm.model_executor.models.registry", "_LazyRegisteredModel.inspect_model_cls"),
    ("weights", "vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_model"),
    ("profile", _GPU, "Worker.determine_available_memory"),
    ("profile", _CPU, "CPUWorker.determine_available_memory"),
    ("dynamo", "vllm.compilation.wrapper", "TorchCompileWithNoGuardsWrapper.aot_compile"),
    ("backend", "vllm.compilation.backends", "VllmBackend.__call__"),
    *(("inductor", "vllm.compilation.compiler_interface", f"{name}.compile") for name in _ADAPTORS),
    *(("cache", "vllm.compilation.compiler_interface", f"{name}.load") for name in _ADAPTORS),
    *((ESTIMATE, runner, "GPUModelRunner.profile_cudagraph_memory") for runner in _RUNNERS),
    ("warm-up", _GPU, "Worker.compile_or_warm_up_model"),
    ("warm-up", _CPU, "CPUWorker.compile_or_warm_up_model"),
    ("kernels", _GPU, "kernel_warmup"),
    ("autotune", "vllm.model_executor.warmup.kernel_warmup", "flashinfer_autotune"),
    ("dummy rollout", _GPU, "warmup_kernels"),
    *((CAPTURE, runner, "GPUModelRunner.capture_model") for runner in _RUNNERS),
)
GREEDY = 16  # tokens of each of two prompts, to compare settings by


@dataclass
class StartJob(BenchJob):
    """What one process measures; of `BenchJob` it uses the model, the engine's size, `lora` (slots of that rank), `eager`.

    Attributes:
        caches: Folder for vLLM's, Inductor's and Triton's caches; an empty one makes the start a cold one.
        sequences: Sequences per rollout, each measured.
        lengths: Completion tokens per sequence, each measured; none: the start alone is.
        max_num_seqs: The engine's, as a trainer's batch would set it.
        rollouts: Rollouts of each size; the median counts. 0: none, though the engine is made for `lengths`.
        heap: So many objects that the garbage collector walks are alive before, as in a trainer's process.
    """

    caches: str = ""
    sequences: tuple[int, ...] = (8,)
    lengths: tuple[int, ...] = (256,)
    max_num_seqs: int = 8
    rollouts: int = 2
    heap: int = 0


def caches_in(folder: str | Path) -> dict[str, str]:
    """Variables that point every cache of compiled code into `folder`; for before torch and vLLM are imported."""
    names = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {variable: str(Path(folder, name)) for variable, name in names.items()}


Target = tuple[str, str, str]  # phase, module, path inside of it


def watch(targets: Iterable[Target], wrapper: Callable[[str], Wrapper]) -> dict[Target, PatchSet]:
    """Wrap each target with ``wrapper(phase)`` as soon as its module is imported, and import none.

    Importing vLLM's CPU worker puts placeholders in place of torch's events, streams and pinned memory
    (``v1/worker/cpu/shm.py``), whatever the platform is: on a GPU no engine could start in this process any more.
    """
    sets = {}
    for target in targets:
        phase, module, path = target
        sets[target] = PatchSet(f"start clock: {phase}", [Patch(module, path, wrapper(phase))])
        with contextlib.suppress(PatchError):  # `not_timed` says so
            sets[target].apply()
    return sets


def not_timed(watched: Mapping[Target, PatchSet]) -> list[str]:
    """Targets that this vLLM does not have. One that is there and that no engine of this process has imported is none."""
    return [
        f"{phase}: {module}:{path}"
        for (phase, module, path), patches in watched.items()
        if patches.state == "failed" or (module not in sys.modules and not _exists(module))
    ]


def _exists(module: str) -> bool:
    """Whether its file is there. ``find_spec`` would import the packages around it."""
    library, *inner = module.split(".")
    spec = importlib.util.find_spec(library)
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    places = [Path(folder, *inner) for folder in folders]
    return any(place.with_suffix(".py").is_file() or (place / "__init__.py").is_file() for place in places)


class Start:
    """One job, measured. `stage` says what it was doing when it failed."""

    def __init__(self, job: StartJob, emit: Any) -> None:
        from rlpatch.bench.memory_watch import Clock
        from rlpatch.bench.triton_clock import TritonClock

        self.job, self.emit = job, emit
        self.clock = Clock()  # a start is the host's work; waiting for the device would add to it
        self.triton = TritonClock(self.clock)
        self.stage = "import"
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Build the engine, roll out; the result as plain data."""
        import torch

        import rlpatch

        job, cuda = self.job, torch.cuda.is_available()
        began = time.perf_counter()
        rlpatch.apply(compile=job.variant, defaults=False, lora="slots" if job.lora else None)
        import vllm.entrypoints.llm  # noqa: F401

        self.seconds["import"] = time.perf_counter() - began
        watched = watch(TARGETS, self._phase)
        PatchSet(START, [Patch("vllm.entrypoints.llm", "LLM.__init__", self._start)]).apply()
        deaf = self.triton.start()
        self.heap = [[number] for number in range(job.heap)]  # alive until the process ends
        began = time.perf_counter()
        gc.collect()
        walk = {"objects": len(gc.get_objects()), "full_collection_seconds": time.perf_counter() - began}
        collector = CollectorClock(self.clock)
        collector.start()
        self._enter("load")
        began = time.perf_counter()
        engine: dict[str, Any] = {"max_num_seqs": job.max_num_seqs, "enforce_eager": job.eager}
        if job.kv_bytes:
            engine["kv_cache_memory_bytes"] = job.kv_bytes
        model, tokenizer = rlpatch.load(
            job.model,
            max_seq_length=-(-(job.prompt_tokens + 16 + max((*job.lengths, GREEDY))) // 16) * 16,
            max_lora_rank=job.lora or 64,
            gpu_memory_utilization=job.utilization,
            dtype="bfloat16" if cuda else "float32",
            **engine,
        )
        self.seconds["load"] = time.perf_counter() - began
        if job.lora:
            import peft

            model = peft.get_peft_model(
                model, peft.LoraConfig(r=job.lora, target_modules="all-linear", task_type="CAUSAL_LM")
            )
        collector.stop()
        phases, kernels = self._phases(), self.triton.take()
        timers = _compile_timers()
        self._enter("rollout")
        rollouts = self._rollouts(model, tokenizer)
        from rlpatch.versions import installed

        (pair,) = rlpatch.status().pairs
        return {
            "job": told_job(job),
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "versions": {n: str(installed(n).version) for n in ("vllm", "torch", "triton")},
            "seconds": self.seconds,
            "phases": phases,
            "not_timed": [*not_timed(watched), *([f"{TRITON}: {deaf}"] if deaf else [])],
            "triton": kernels,
            "collector": {**walk, **collector.of(self.clock.step), "phases": _renamed(collector.by_phase)},
            "torch_timers": timers,
            "compile": pair["compile"],
            "outcome": rlpatch.status()["compile"].as_dict(),
            "cache_bytes": sum(path.stat().st_size for path in Path(job.caches).rglob("*") if path.is_file()),
            **rollouts,
        }

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self.emit("stage", stage)

    def _phase(self, name: str) -> Any:
        def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if name == CAPTURE and self.clock.innermost == ESTIMATE:
                return wrapped(*args, **kwargs)
            with self.clock.phase(name):
                return wrapped(*args, **kwargs)

        return wrapper

    def _start(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._enter(START)
        began = time.perf_counter()
        with self.clock.phase(START):
            result = wrapped(*args, **kwargs)
        self.seconds[START] = time.perf_counter() - began
        return result

    def _phases(self) -> dict[str, float]:
        own = self.clock.seconds(self.clock.step)
        found = {name: own[name] for name in PHASES if name in own}
        found[OTHER] = own.get(START, 0.0)
        return found

    def _rollouts(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        import torch
        from vllm import SamplingParams

        from rlpatch.bench.run import make_prompts

        job = self.job
        texts, _ = make_prompts(tokenizer, job.prompt_tokens, max((*job.sequences, 2)))
        prompts = [{"prompt_token_ids": tokenizer(text)["input_ids"]} for text in texts]

        def roll(count: int, tokens: int, temperature: float) -> tuple[float, list[list[int]]]:
            # what TRL asks for: the log-prob of the sampled token, and no seed of a request's own
            settings = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, logprobs=0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            outputs = model.fast_generate(prompts[:count], settings, use_tqdm=False)
            seconds = time.perf_counter() - began  # tokens are on the host: the device is done
            return seconds, [list(output.outputs[0].token_ids) for output in outputs]

        first, greedy = roll(2, GREEDY, 0.0)  # pays for kernels that nobody warmed up
        kernels = self.triton.take()
        sizes = []
        for count in job.sequences if job.rollouts else ():
            for length in job.lengths:
                self.emit("stage", f"{count} × {length} tokens")
                roll(count, min(length, GREEDY), 1.0)
                runs = [roll(count, length, 1.0) for _ in range(job.rollouts)]
                rates = [sum(map(len, tokens)) / seconds for seconds, tokens in runs]
                sizes.append({
                    "sequences": count, "tokens": length, "seconds": [seconds for seconds, _ in runs],
                    "tokens_per_second": statistics.median(rates),
                })  # fmt: skip
        return {
            "first_rollout_seconds": first, "first_rollout_triton": kernels, "greedy": greedy, "rollouts": sizes,
            "rollouts_triton": self.triton.take(),
        }  # fmt: skip


def _renamed(seconds: Mapping[str, float]) -> dict[str, float]:
    """What lies in no inner phase, as `Start._phases` calls it; what lies outside of the constructor is left out."""
    return {OTHER if name == START else name: value for name, value in seconds.items() if name in (START, *PHASES)}


def _compile_timers() -> dict[str, float]:
    """Seconds that torch itself counted while compiling; inner ones are part of outer ones."""
    from torch._dynamo import utils

    metrics: Any = getattr(utils, "compilation_time_metrics", {})
    sums = {name: float(sum(values)) for name, values in metrics.items()}
    return {name: seconds for name, seconds in sorted(sums.items(), key=lambda one: -one[1]) if seconds >= 0.05}


def main() -> int:
    """Read a job, print JSON lines: ``stage``, then ``result`` or ``error``."""
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print; the lines below are for the parent
    read = read_job()
    given: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
    job = StartJob(**given)
    os.environ.update(caches_in(job.caches))

    def emit(kind: str, value: Any) -> None:
        print(json.dumps({kind: value}), file=out, flush=True)

    start: Start | None = None
    try:
        start = Start(job, emit)
        emit("result", start.run())
    except BaseException as error:
        emit("error", told(error, *((start.stage, start.clock.failed_in) if start else ("import", None))))
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # interpreter shutdown of a colocated engine can hang in NCCL; everything is written already
