"""One training run of TRL's GRPO or RLOO on a tiny model, measured; the same code for plain and patched runs.

Used by the demo (in a fresh process: ``python -m rlpatch.demo.worker``, a JSON job on standard input, JSON lines out) and
by the tests. Plain on CPU still needs one adapter, ``cpu_weights``: without it vLLM's CPU backend packs its weights and
even TRL's own push fails.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import rlpatch
from rlpatch.patching import Patch, PatchSet
from rlpatch.versions import dtype_argument

METRICS = {
    "loss": "loss",
    "reward": "reward",
    "grad_norm": "grad_norm",
    "logp_difference": "sampling/sampling_logp_difference/mean",
}


@dataclass
class Job:
    """What to run.

    Attributes:
        model: Checkpoint folder.
        patched: With rlpatch in full, or plain TRL.
        steps: Optimizer steps.
        seed: Of everything.
        dtype: Trainer's and engine's dtype.
        trainer: ``"grpo"`` or ``"rloo"``.
        config: Changes to the trainer's config.
        engine: Defaults for arguments of ``vllm.LLM``.
        apply: Arguments of ``rlpatch.apply`` for a patched run.
        lora: Arguments of ``peft.LoraConfig``; empty: full fine-tuning.
        from_path: The trainer gets the checkpoint's path, as in plain scripts, instead of a model object in `dtype`.
    """

    model: str
    patched: bool
    steps: int = 10
    seed: int = 0
    dtype: str = "float32"
    trainer: str = "grpo"
    output: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    apply: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    from_path: bool = False


def engine_defaults(**defaults: Any) -> PatchSet:
    """A patch set that fills in arguments of ``vllm.LLM`` that the caller left out (TRL has no way to pass them)."""

    def init(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return wrapped(*args, **{**kwargs, **{k: v for k, v in defaults.items() if kwargs.get(k) in (None, "auto")}})

    return PatchSet("engine defaults", [Patch("vllm.entrypoints.llm", "LLM.__init__", init)])


def reward_target_words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Share of a completion's tokens that are even: easy to raise for any model that can tell its own tokens apart."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class DeviceMonitor:
    """Peak device memory used, in bytes, polled from the driver (torch's counters miss vLLM's pool); None on CPU."""

    def __init__(self, interval: float = 0.02) -> None:
        import torch

        self._cuda = torch.cuda.is_available()
        self._interval = interval
        self._stop = threading.Event()
        self.peak = 0

    def __enter__(self) -> DeviceMonitor:
        if self._cuda:
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()
        return self

    def _poll(self) -> None:
        import torch

        while not self._stop.wait(self._interval):
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free)

    def __exit__(self, *_: object) -> None:
        self._stop.set()


def run(job: Job, progress: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Train as `job` says.

    Args:
        progress: Called with ``{"step": n, …metrics}`` after each optimizer step.

    Returns:
        ``steps`` (one dict of `METRICS` per step), seconds in weight sync, bytes of weights resident twice, KV bytes
        resident while training, peak RSS and peak device memory in bytes, and rlpatch's status.
    """
    if job.patched:
        rlpatch.apply(**{"defaults": False, **job.apply})  # the plain run has TRL's
    else:
        rlpatch.apply(include=["cpu_weights"])
    trainer = make_trainer(job)
    return train(trainer, job, progress)


def make_trainer(job: Job) -> Any:
    """Build TRL's trainer for `job` (rlpatch is applied already, or not)."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, set_seed

    on_cpu = not torch.cuda.is_available()
    defaults = {
        "dtype": job.dtype,
        "enforce_eager": True,
        **({"kv_cache_memory_bytes": 32 << 20} if on_cpu else {}),
        **job.engine,
    }
    patch_set = engine_defaults(**defaults)
    patch_set.apply()
    try:
        set_seed(job.seed)
        model: Any = job.model
        if not job.from_path:
            model = AutoModelForCausalLM.from_pretrained(job.model, **{dtype_argument(): getattr(torch, job.dtype)})
        import trl

        kind = {"grpo": "GRPO", "rloo": "RLOO"}[job.trainer]
        settings: dict[str, Any] = dict(
            output_dir=job.output or tempfile.mkdtemp(prefix="rlpatch-demo-"),
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.3,
            vllm_max_model_length=96,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=16,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=job.steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=job.seed,
            bf16=job.dtype == "bfloat16" and not on_cpu,
            use_cpu=on_cpu,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        settings.update(job.config)
        config_class = getattr(trl, f"{kind}Config")
        known = {field.name for field in fields(config_class)}
        if "vllm_max_model_length" not in known:  # TRL before 0.26 adds the two lengths up
            settings["max_prompt_length"] = settings.pop("vllm_max_model_length") - settings["max_completion_length"]
        config = config_class(**settings)
        extra: dict[str, Any] = {}
        if job.lora:
            from peft import LoraConfig

            extra["peft_config"] = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **job.lora})
        prompts = [" ".join(f"w{(7 * i + 3 * j) % 58}" for j in range(3 + i % 5)) for i in range(64)]
        return getattr(trl, f"{kind}Trainer")(
            model=model,
            args=config,
            reward_funcs=reward_target_words,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            eval_dataset=Dataset.from_dict({"prompt": prompts[:8]}),
            **extra,
        )
    finally:
        patch_set.revert()


def engine_of(trainer: Any) -> Any:
    """The ``vllm.LLM`` of a TRL trainer: its ``VLLMGeneration``'s (0.28 and later), or its own."""
    generation = getattr(trainer, "vllm_generation", None)
    for holder, attribute in ((generation, "llm"), (trainer, "llm"), (trainer, "vllm_engine")):
        if getattr(holder, attribute, None) is not None:
            return getattr(holder, attribute)
    raise AttributeError(f"{type(trainer).__name__} has no colocated engine")


def phase_functions(trainer: Any) -> tuple[tuple[str, str], tuple[str, str]]:
    """Module and path of the function that pushes weights and of the one that generates, in this release of TRL."""
    generation = getattr(trainer, "vllm_generation", None)
    if generation is not None:
        module, name = type(generation).__module__, type(generation).__qualname__
        return (module, f"{name}.sync_weights"), (module, f"{name}.generate")
    owner = next(base for base in type(trainer).__mro__ if "_move_model_to_vllm" in vars(base))
    return (owner.__module__, f"{owner.__qualname__}._move_model_to_vllm"), ("vllm.entrypoints.llm", "LLM.generate")


def train(
    trainer: Any, job: Job, progress: Callable[[dict[str, Any]], None] = lambda row: None, **arguments: Any
) -> dict[str, Any]:
    """Train and measure; `arguments` go to ``trainer.train``."""
    from transformers import TrainerCallback

    from rlpatch.engine import Engine
    from rlpatch.sharing.account import resident_twice

    engine = Engine(engine_of(trainer))
    seconds = {"sync": 0.0, "generate": 0.0}
    syncs = 0
    kv_bytes: list[int] = []
    twice: list[int] = []
    rss: list[int] = []

    def timed(name: str) -> Any:
        def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal syncs
            start = time.perf_counter()
            try:
                return wrapped(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start
                syncs += name == "sync"

        return wrapper

    push, generate = phase_functions(trainer)
    clock = PatchSet("demo clock", [Patch(*push, timed("sync")), Patch(*generate, timed("generate"))])

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            kv_bytes.append(kv_resident(engine))
            twice.append(resident_twice(trainer.model, engine.model))
            rss.append(resident_set())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                progress({"step": state.global_step, **{k: logs.get(name) for k, name in METRICS.items()}})

    trainer.add_callback(Watch())
    clock.apply()
    start = time.perf_counter()
    try:
        with DeviceMonitor() as device:
            trainer.train(**arguments)
    finally:
        clock.revert()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "job": asdict(job),
        "steps": [{k: row.get(name) for k, name in METRICS.items()} for row in rows],
        "seconds": {"total": time.perf_counter() - start, **seconds},
        "syncs": syncs,
        "weights_twice_bytes": max(twice, default=0),
        "kv_training_bytes": max(kv_bytes, default=0),
        "training_rss_bytes": max(rss, default=0),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": device.peak,
        "status": rlpatch.status().as_dict(),
    }


def resident_set() -> int:
    """Bytes of this process that are in memory now (Linux; 0 elsewhere)."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def kv_resident(engine: Any) -> int:
    """Bytes of KV cache that are backed by memory now."""
    from rlpatch import phases

    pair = phases.of_engine(engine.llm)
    if pair is not None and pair.standby is not None:
        return int(pair.standby.mechanism.resident_bytes())
    return sum(tensor.untyped_storage().nbytes() for tensor in engine.kv_tensors())


def main() -> int:
    """Read a job from standard input, print JSON lines: ``{"progress": …}`` per step, then ``{"result": …}``."""
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print; the lines below are for the parent
    job = Job(**json.load(sys.stdin))

    def emit(kind: str, value: Any) -> None:
        print(json.dumps({kind: value}), file=out, flush=True)

    try:
        emit("result", run(job, lambda row: emit("progress", row)))
    except Exception as error:
        import traceback

        traceback.print_exc()
        emit("error", f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
