"""One variant of the bench in a process of its own: ``python -m rlpatch.bench.run``, a JSON job in, JSON lines out.

Phases, each wrapped where every variant passes through (``synchronize`` at both ends)::

    step                                    from one on_step_end to the next
    ├─ sync      VLLMGeneration.sync_weights (TRL's push, waking the engine's weights included)
    ├─ rollout   VLLMGeneration.generate
    │  ├─ put       the adapters: FoldPolicy.put (the fold) or SlotPolicy.put (the copy into the slots)
    │  ├─ restore   KVStandby.restore (inside of put), or LLM.wake_up of the KV cache
    │  ├─ generate  LLM.generate
    │  ├─ release   KVStandby.rest and release (the latter inside of take out), or LLM.sleep
    │  └─ take out  FoldPolicy.take_out (the unfold)
    └─ train     everything else: forward, backward, optimizer, rewards, logging

A phase's seconds and memory are its own: what an inner phase takes is not counted in the outer one, so that the columns
of one step add up to it. Waiting for the device at every edge takes away what overlaps in training (restore beside the
fold, release beside the unfold): ``--no-phase-sync`` shows whole steps as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rlpatch.allocator import expandable
from rlpatch.settings import Settings

PHASES = ("sync", "empty cache", "put", "restore", "generate", "release", "take out", "rollout", "train")
METRICS = {
    "loss": "loss",
    "reward": "reward",
    "grad_norm": "grad_norm",
    "completion_length": "completions/mean_length",
    "logp_difference": "sampling/sampling_logp_difference/mean",
}
TOO_LONG = "length"  # the stage in which a completion is refused that the KV cache cannot hold
OUT_OF_MEMORY = (
    "out of memory",
    "cannot be restored",
    "no available memory for the cache",
    "less than desired gpu memory utilization",
    "larger than the maximum number of tokens",
    "is needed, which is larger than the available kv cache memory",
    "cannot allocate memory",
)


@dataclass(frozen=True)
class Variant:
    """How one column of the bench is set up.

    Attributes:
        apply: Arguments of ``rlpatch.apply``, or None for plain TRL.
        config: Changes to the trainer's config.
        sleep: Needs vLLM's sleep mode; skipped where the platform has none.
        lora: Only means something with a LoRA.
        text: For ``--help``.
        environment: rlpatch's own variables.
    """

    apply: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    sleep: bool = False
    lora: bool = False
    text: str = ""
    environment: dict[str, str] = field(default_factory=dict)


_SAME = {"defaults": False}  # the other variants have TRL's
VARIANTS = {
    "trl": Variant(text="plain TRL, its engine resident all the time"),
    "trl-sleep": Variant(config={"vllm_enable_sleep_mode": True}, sleep=True, text="plain TRL with its sleep mode"),
    "rlpatch": Variant(apply=_SAME, text="rlpatch.apply(), nothing else changed"),
    "rlpatch-fold": Variant(apply={**_SAME, "lora": "fold"}, lora=True, text="the LoRA folded into the shared weights"),
    "rlpatch-slots": Variant(apply={**_SAME, "lora": "slots"}, lora=True, text="the LoRA in vLLM's slots"),
}


def variant_of(name: str) -> Variant:
    """One of `VARIANTS`, or one of rlpatch's with settings of its own: ``rlpatch:one_forward=no:compile=fast-start``.

    Raises:
        ValueError: there is no such variant or setting.
    """
    base, *changes = name.split(":")
    if base not in VARIANTS:
        raise ValueError(f"unknown {base!r}; known are {', '.join(VARIANTS)}")
    found = VARIANTS[base]
    if not changes:
        return found
    if found.apply is None:
        raise ValueError(f"{name!r}: settings are for rlpatch's variants")
    pairs = dict(change.partition("=")[::2] for change in changes)
    known = {setting.name for setting in fields(Settings)}
    for setting, value in pairs.items():
        if setting not in known or not value:
            raise ValueError(f"{name!r}: {setting}={value} is no setting; known are {', '.join(sorted(known))}")
    # apply's own arguments would win over the environment
    rest = {key: value for key, value in found.apply.items() if key not in pairs}
    return replace(found, apply=rest, environment={f"RLPATCH_{key.upper()}": value for key, value in pairs.items()})


@dataclass
class BenchJob:
    """What one process measures.

    Attributes:
        variant: See `variant_of`.
        model: Checkpoint folder.
        random_weights: `model` holds a config and a tokenizer; the trainer's weights are made in its memory.
        precision: ``"object"``: a bf16 model object (fp32 on CPU); ``"script"``: the path, as plain scripts give it.
        steps: Optimizer steps.
        warmup: Leading steps left out of medians and of memory by phase.
        completions: Completions per step, all of one prompt.
        micro_batch: Completions per forward pass; gradients are accumulated over the rest.
        prompt_tokens: Tokens of each prompt.
        completion_tokens: Tokens of every completion (the end-of-sequence token is ignored).
        step_tokens: Instead, the tokens of each step's completions, one number per step, `completion_tokens` at most.
        rollout_tokens: So many of them are generated, and repeated up to that number (for how much memory training
            takes; the engine's does not depend on the length); None: all.
        utilization: vLLM's gpu_memory_utilization; 0: left alone.
        kv_bytes: Size of the KV cache in bytes, or None: what `utilization` gives.
        eager: No CUDA graphs, no torch.compile.
        phase_sync: Wait for the device at the edges of phases, so that each pays for its own work; without, only steps
            do, and work of one phase may overlap the next as it does in ordinary training.
        lora: Rank of a LoRA on all linear layers; 0 is full fine-tuning.
        optim: transformers' name of the optimizer, or None for its default.
        learning_rate: Constant.
        gradient_checkpointing: None for TRL's default.
        emulate_gib: The card's seeming size; a ballast process holds the rest.
        interval: Seconds between samples of memory.
        check_base: Compare every frozen weight before and after the training, element by element.
        profile: Two steps more, in no other figure: one with a look at Python's stack every millisecond
            (`rlpatch.bench.host_profile`), one under torch's profiler (`rlpatch.bench.step_profile`), which would be in
            the first one's way.
        in_turn: A capability that is off in every other step (`rlpatch.bench.in_turn`), or None.
        output: The trainer's output folder, or None for one under the system's temporary folder.
    """

    variant: str
    model: str
    random_weights: bool = False
    precision: str = "object"
    steps: int = 6
    warmup: int = 2
    seed: int = 0
    completions: int = 8
    micro_batch: int = 8
    prompt_tokens: int = 64
    completion_tokens: int = 256
    step_tokens: list[int] | None = None
    rollout_tokens: int | None = None
    utilization: float = 0.5
    kv_bytes: int | None = None
    eager: bool = False
    phase_sync: bool = True
    lora: int = 0
    optim: str | None = None
    learning_rate: float = 1e-6
    gradient_checkpointing: bool | None = None
    emulate_gib: float | None = None
    interval: float = 0.01
    check_base: bool = False
    profile: bool = False
    in_turn: str | None = None
    output: str | None = None


def _repeated(items: Any, length: int) -> list[Any]:
    """`length` items: `items` one after the other, again and again."""
    return list(itertools.islice(itertools.cycle(items), length))


class Skipped(Exception):
    """This variant does not exist here; the message says why."""


class BenchRun:
    """One job, measured. `stage` says what it was doing when it failed."""

    def __init__(self, job: BenchJob, emit: Callable[[str, Any], None] = lambda kind, value: None) -> None:
        import torch

        from rlpatch.bench.collector_clock import CollectorClock
        from rlpatch.bench.memory_watch import Clock, MemoryWatch

        self.job, self.emit = job, emit
        self.variant = variant_of(job.variant)
        self.cuda = torch.cuda.is_available()
        self.synchronize = torch.cuda.synchronize if self.cuda else lambda: None
        self.clock = Clock(self.synchronize if job.phase_sync else lambda: None)
        self.collector = CollectorClock(self.clock)
        self.stage = "import"
        self.watch = MemoryWatch(job.interval, self.clock)
        self.clock.on_edge = self.watch.sample
        self.seconds: dict[str, float] = {}
        self.kv: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.spans: list[tuple[float, float]] = []
        self.tokens = 0
        self.after_release: dict[str, int] = {}
        self.baseline = 0
        self.engine_held: int | None = None
        self.engine_cached: int | None = None
        self.load: dict[str, int] = {}
        self.resident: dict[str, int] | None = None
        self.profiler: Any = None  # of a step that only tells where its time goes
        self.profile: dict[str, Any] | None = None
        self.without: str | None = None
        self.trainer: Any = None

    # ---- before ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Set up, train, and return the result as plain data.

        Raises:
            Skipped: the variant does not exist on this platform.
        """
        origin = time.perf_counter()
        self._prepare()
        try:
            self._enter("load")
            self._build()
            frozen = self._frozen() if self.job.check_base else {}
            self._enter("train")
            self.training_from = time.perf_counter()
            self.trainer.train()
            self.training_until = time.perf_counter()
            self._enter("settle")
            result = {**self._result(origin), "base": self._changed(frozen) if frozen else None}
        finally:
            self.watch.stop()
        return result

    def _enter(self, stage: str) -> None:
        self.stage = stage
        self.emit("stage", stage)

    def _prepare(self) -> None:
        import torch

        import rlpatch
        from rlpatch.bench.ballast import scale_totals

        job, cuda = self.job, self.cuda
        if self.variant.sleep:
            from vllm.platforms import current_platform

            if not current_platform.is_sleep_mode_available():
                raise Skipped(f"vLLM has no sleep mode on {current_platform.device_name}")
        if cuda:
            if job.emulate_gib:
                scale_totals(job.emulate_gib).apply()
            torch.empty(1, device="cuda")
            torch.cuda.synchronize()
        self.baseline = self.watch.used()
        self.cache: dict[str, bool] = {}
        self.watch.start()
        # Before rlpatch's own wrapper of the constructor, hence inside of it: the KV cache is read before its release.
        loader = "vllm.model_executor.model_loader.base_loader"
        self._patches("engine clock", [
            ("vllm.entrypoints.llm", "LLM.__init__", self._engine_start),
            (loader, "BaseModelLoader.load_model", self._load),
        ])  # fmt: skip
        if self.variant.apply is not None:
            os.environ.update(self.variant.environment)
            rlpatch.apply(**self.variant.apply)
        elif not cuda:  # plain TRL cannot push weights into the packed ones of vLLM's CPU backend
            rlpatch.apply(include=["cpu_weights"])
        import trl.generation.vllm_generation

        from rlpatch import standby as standby_module
        from rlpatch.lora import policy as policy_module

        # After rlpatch's, hence around them: what its wrappers cost is counted.
        self._patches("bench clock", [
            (trl.generation.vllm_generation.__name__, "VLLMGeneration._init_vllm", self._init_vllm),
            (trl.generation.vllm_generation.__name__, "VLLMGeneration.sync_weights", self._as_phase("sync")),
            (trl.generation.vllm_generation.__name__, "VLLMGeneration.generate", self._rollout),
            ("vllm.entrypoints.llm", "LLM.generate", self._generate),
            ("vllm.entrypoints.llm", "LLM.sleep", self._sleep),
            ("vllm.entrypoints.llm", "LLM.wake_up", self._wake_up),
            (standby_module.__name__, "KVStandby.rest", self._as_phase("release")),
            (standby_module.__name__, "KVStandby.release", self._as_phase("release")),
            (standby_module.__name__, "KVStandby.restore", self._as_phase("restore")),
            (policy_module.__name__, "FoldPolicy.put", self._as_phase("put")),
            (policy_module.__name__, "FoldPolicy.take_out", self._as_phase("take out")),
            (policy_module.__name__, "SlotPolicy.put", self._as_phase("put")),
            ("torch.cuda", "empty_cache", self._empty_cache),
        ])  # fmt: skip
        if self.job.profile:
            from rlpatch.bench.step_profile import PARTS

            self._patches("profile clock", [(module, path, self._as_part(name)) for name, module, path in PARTS])

    @staticmethod
    def _patches(name: str, targets: list[tuple[str, str, Any]]) -> None:
        from rlpatch.patching import Patch, PatchSet

        PatchSet(name, [Patch(*target) for target in targets]).apply()

    # ---- clocks ------------------------------------------------------------------------------------------------

    def _as_phase(self, name: str) -> Any:
        def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self.clock.phase(name):
                return wrapped(*args, **kwargs)

        return wrapper

    def _as_part(self, name: str) -> Any:
        """A phase in the profiled steps alone, so that the others are timed as ever."""

        def wrapper(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self.clock.phase(name) if self.profiler is not None else contextlib.nullcontext():
                return wrapped(*args, **kwargs)

        return wrapper

    def _engine_start(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from rlpatch.bench.memory_watch import ENGINE_START
        from rlpatch.engine import Engine

        self._enter("engine start")
        before = _compiled()
        start = time.perf_counter()
        with self.clock.phase(ENGINE_START):
            result = wrapped(*args, **kwargs)
        self.seconds["engine_start"] = time.perf_counter() - start
        self.cache = {"was_empty": not before, "grew": bool(_compiled() - before)}
        cache = instance.llm_engine.vllm_config.cache_config
        try:
            tensors = Engine(instance).kv_tensors()
        except AttributeError as error:  # the figures are worth having without it
            print(f"the KV cache's size is unknown: {error}", file=sys.stderr)
            tensors = []
        blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
        self.kv = {
            "bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors) or None,
            "allocations": len(tensors),
            "blocks": blocks,
            "block_size": size,
            "tokens": blocks * size if blocks and size else None,
        }
        facts = {"seconds": self.seconds["engine_start"], "expandable_segments": expandable()}
        self.emit("engine", {**facts, **self.kv})
        return result

    def _load(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from rlpatch.bench.memory_watch import LOAD
        from rlpatch.sharing.account import resident_bytes

        before = self.watch.used()
        with self.clock.phase(LOAD):
            model = wrapped(*args, **kwargs)
        self.load = {"before": before, "weights": resident_bytes(model.parameters())}
        return model

    def _load_memory(self, samples: Any, intervals: Any) -> dict[str, Any] | None:
        """Bytes while the engine's weights were loaded: used before, peak above that, and the weights themselves."""
        from rlpatch.bench.memory_watch import LOAD

        spans = [(i.start, i.end) for i in intervals if i.name == LOAD]
        if not self.load or not spans:
            return None
        inside = [used for moment, used in samples for start, end in spans if start <= moment <= end]
        seconds = sum(end - start for start, end in spans)
        return {**self.load, "peak_above": max(inside, default=0) - self.load["before"], "seconds": seconds}

    def _init_vllm(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the engine holds once it is built and, where the variant does that, asleep or in standby.

        Beside it: how much more of torch's own memory lies idle, in pieces that a live neighbour keeps from being given
        back. The trainer gets these pieces first, so that they are not the engine's.
        """
        before, idle = self._settled(), self._reading().get("torch_cached", 0)
        result = wrapped(*args, **kwargs)
        self.engine_held = self._settled() - before
        self.engine_cached = self._reading().get("torch_cached", 0) - idle
        return result

    def _settled(self) -> int:
        """Bytes used with garbage collected and torch's cached blocks given back."""
        import gc

        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return self.watch.used()

    def _rollout(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stage = "rollout"
        with self.clock.phase("rollout"):
            result = wrapped(*args, **kwargs)
        self.stage = "train"
        self.after_release = self._reading()
        return result

    def _generate(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        job = self.job
        most = (
            job.step_tokens[min(self.clock.step, len(job.step_tokens) - 1)]
            if job.step_tokens
            else job.completion_tokens
        )
        holds = self.kv.get("tokens")
        if holds and most + job.prompt_tokens > holds:  # shortened rollouts would hide it
            self.stage = TOO_LONG
            raise MemoryError(f"{most} tokens after {job.prompt_tokens} are more than the KV cache's {holds}")
        short = min(most, job.rollout_tokens if job.rollout_tokens is not None else most)
        if short < job.completion_tokens:
            prompts, params, *others = *args, *([kwargs.pop("sampling_params")] if len(args) == 1 else [])
            params = params.clone()
            params.max_tokens = short
            args = (prompts, params, *others)
        with self.clock.phase("generate"):
            outputs = wrapped(*args, **kwargs)
        if self.clock.step == job.steps - 1:
            self.resident = self._resident(instance)
        ends = [one for output in outputs for one in output.outputs]
        self.tokens += sum(len(one.token_ids) for one in ends)
        for one in ends if short < most else ():
            one.token_ids = _repeated(one.token_ids, most)
            one.logprobs = _repeated(one.logprobs, most) if one.logprobs else one.logprobs
        return outputs

    def _resident(self, llm: Any) -> dict[str, int] | None:
        """Bytes on the device behind the tensors of both sides while tokens are generated, each address counted once.

        ``parameters`` is a number: of what both hold together. None, with a line in the log: they cannot be counted.
        """
        from rlpatch.engine import Engine
        from rlpatch.parking import tensors_in
        from rlpatch.sharing.account import resident_bytes

        try:
            trainer, engine = list(self.trainer.model.parameters()), list(Engine(llm).model.parameters())
            optimizer, own = self.trainer.optimizer, {id(parameter) for parameter in trainer}
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            state = tensors_in(optimizer.state)
            return {
                "parameters": sum(parameter.numel() for parameter in trainer),
                "trainer": resident_bytes(trainer),
                "engine": resident_bytes(engine),
                "both": resident_bytes([*trainer, *engine]),
                "masters": resident_bytes(p for p in stepped if id(p) not in own),
                "optimizer_state": resident_bytes(t for t in state if t.device == trainer[0].device),
            }
        except (AttributeError, TypeError) as error:
            print(f"what is resident is unknown: {error}", file=sys.stderr)
            return None

    def _empty_cache(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A phase of its own: where the KV cache's restore and TRL's own calls make room for what comes."""
        if self.stage not in ("rollout", "train"):
            return wrapped(*args, **kwargs)
        with self.clock.phase("empty cache"):
            return wrapped(*args, **kwargs)

    def _sleep(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if int(kwargs.get("level", args[0] if args else 1)) < 1:
            return wrapped(*args, **kwargs)
        with self.clock.phase("release"):
            return wrapped(*args, **kwargs)

    def _wake_up(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tags = kwargs.get("tags", args[0] if args else None)
        if tags is not None and "kv_cache" not in tags:  # waking the weights belongs to the sync that asks for it
            return wrapped(*args, **kwargs)
        with self.clock.phase("restore"):
            return wrapped(*args, **kwargs)

    def _reading(self) -> dict[str, int]:
        """Bytes used right now, and what torch has allocated and keeps cached on the device."""
        import torch

        reading = {"used": self.watch.used()}
        if self.cuda:
            allocated = torch.cuda.memory_allocated()
            reading["torch_allocated"] = allocated
            reading["torch_cached"] = torch.cuda.memory_reserved() - allocated
        return reading

    # ---- the trainer -------------------------------------------------------------------------------------------

    def _build(self) -> None:
        import tempfile

        import torch
        import trl
        from datasets import Dataset
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

        from rlpatch.bench import shapes
        from rlpatch.demo.worker import engine_defaults, reward_target_words

        job = self.job
        set_seed(job.seed)
        prompts, longest = make_prompts(AutoTokenizer.from_pretrained(job.model), job.prompt_tokens)
        length = -(-(longest + job.completion_tokens) // 16) * 16
        start = time.perf_counter()
        model: Any = job.model
        if job.random_weights:
            config = AutoConfig.from_pretrained(job.model)
            if not self.cuda:
                config.dtype = torch.float32
            model = shapes.random_model(config, job.seed)
            model.config._name_or_path = model.name_or_path = job.model
        elif job.precision == "object":
            model = AutoModelForCausalLM.from_pretrained(
                job.model, dtype=torch.bfloat16 if self.cuda else torch.float32
            )
        self.seconds["load"] = time.perf_counter() - start
        if job.step_tokens and self.variant.apply is None and _fits_length():
            length = -1  # what the KV cache of this utilization can hold; shorter completions train all the same
        settings: dict[str, Any] = dict(
            output_dir=job.output or tempfile.mkdtemp(prefix="rlpatch-bench-"),
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=length,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=job.completions // job.micro_batch,
            num_generations=job.completions,
            max_completion_length=job.completion_tokens,
            generation_kwargs={"ignore_eos": True},
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            max_steps=job.steps + 2 * job.profile,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=job.seed,
            bf16=self.cuda,
            use_cpu=not self.cuda,
            disable_tqdm=True,
        )  # fmt: skip
        if job.utilization:
            settings["vllm_gpu_memory_utilization"] = job.utilization
        if job.optim:
            settings["optim"] = job.optim
        if job.gradient_checkpointing is not None:
            settings["gradient_checkpointing"] = job.gradient_checkpointing
        settings.update(self.variant.config)
        arguments: dict[str, Any] = {}
        if job.lora:
            from peft import LoraConfig

            arguments["peft_config"] = LoraConfig(
                r=job.lora, lora_alpha=2 * job.lora, target_modules="all-linear", task_type="CAUSAL_LM"
            )
        engine: dict[str, Any] = {"enforce_eager": job.eager}
        if job.kv_bytes:
            engine["kv_cache_memory_bytes"] = job.kv_bytes
        if not self.cuda:  # dtype "auto" would make bf16 of an fp32 checkpoint there
            engine["dtype"] = "float32"
        elif job.precision == "object":
            engine["dtype"] = "bfloat16"
        defaults = engine_defaults(**engine)
        defaults.apply()
        start = time.perf_counter()
        try:
            self.trainer = trl.GRPOTrainer(
                model=model,
                args=trl.GRPOConfig(**settings),
                reward_funcs=reward_target_words,
                train_dataset=Dataset.from_dict({"prompt": prompts}),
                callbacks=[self._callback()],
                **arguments,
            )
        finally:
            defaults.revert()
        self.seconds["trainer"] = time.perf_counter() - start

    def _callback(self) -> Any:
        from transformers import TrainerCallback

        run = self

        class Steps(TrainerCallback):
            """A step lasts from one on_step_end to the next."""

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                run.synchronize()
                run.clock.step = 0
                run.collector.start()
                run.take_turn(0)
                self.began = time.perf_counter()
                self.tokens = run.tokens

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                if run.profiler is not None:  # schedulers wrap the optimizer's step past whoever wrapped it before
                    self.stepping = run.clock.phase("optimizer")
                    self.stepping.__enter__()

            def on_optimizer_step(self, *_: Any, **__: Any) -> None:
                if run.profiler is not None:
                    self.stepping.__exit__(None, None, None)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                run.synchronize()
                now = time.perf_counter()
                if run.profiler is not None:
                    self.began = run.profiled(self.began, now)
                    return
                run.rows.append(run.row(now - self.began, run.tokens - self.tokens))
                run.spans.append((self.began, now))
                peak = max((used for moment, used in run.watch.samples if moment >= self.began), default=None)
                row = {"seconds": now - self.began, "generated": run.rows[-1]["tokens"], "memory_peak": peak}
                run.emit("progress", {"step": len(run.rows), **row})
                run.clock.step += 1
                run.take_turn(len(run.rows))
                if run.job.profile and len(run.rows) == run.job.steps:
                    from rlpatch.bench.host_profile import HostProfile

                    run.profiler = HostProfile()
                    now = time.perf_counter()
                self.began, self.tokens = now, run.tokens

            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
                if "loss" in logs:
                    run.emit("trained", logs.get(METRICS["completion_length"]))

        return Steps()

    def take_turn(self, step: int) -> None:
        """Switch what is on and off in turn; on behind the last step, for the profile."""
        if self.job.in_turn is None or self.variant.apply is None:
            return
        from rlpatch import control
        from rlpatch.bench.in_turn import is_without

        self.without = self.job.in_turn if step < self.job.steps and is_without(step) else None
        control.switch(self.job.in_turn, self.without is None)

    def row(self, step_seconds: float, tokens: int) -> dict[str, Any]:
        """One step's figures; the phases' seconds add up to the step's."""
        own = self.clock.seconds(self.clock.step)
        seconds = {name: own.get(name, 0.0) for name in PHASES if name != "train"}
        seconds["train"] = step_seconds - sum(own.values())
        return {
            "seconds": {**seconds, "step": step_seconds},
            "tokens": tokens,
            "tokens_per_second": tokens / seconds["generate"] if seconds["generate"] else None,
            "collector": self.collector.of(self.clock.step),
            "after_release": self.after_release,
            **({"without": self.without} if self.without else {}),
        }

    def profiled(self, begin: float, end: float) -> float:
        """Take down what a profiled step says; the host's comes first, then the device's.

        Returns:
            When the step after it begins.
        """
        from rlpatch.bench import host_profile, step_profile

        intervals = [one for one in self.clock.intervals if one.step == self.clock.step]
        if self.profile is None:
            self.profiler.stop()
            self.profile = {
                "host": host_profile.by_phase(self.profiler.looks, intervals, begin, end),
                "host_seconds": step_profile.phase_seconds(intervals, begin, end),
            }
            self.clock.step += 1
            self.profiler = step_profile.StepProfile(self.synchronize)
            return time.perf_counter()
        events = self.profiler.events()
        model = self.trainer.model
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        unread = 0 if head is embedding else embedding.numel() * head.element_size()  # a few rows of it are
        engine = (self.resident or {}).get("engine")
        self.profile |= {
            **step_profile.by_phase(events, intervals, begin, end),
            "decode_steps": self.job.rollout_tokens or self.job.completion_tokens,
            "weights": engine - unread if engine else None,
            "read_bandwidth": step_profile.read_bandwidth(),
        }
        return time.perf_counter()

    def _frozen(self) -> dict[str, Any]:
        """Host copies of the frozen weights."""
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.trainer.model.named_parameters()
            if not parameter.requires_grad
        }

    def _changed(self, before: dict[str, Any]) -> dict[str, Any]:
        """How many elements of the frozen weights have other bits than before the training, and the worst weight."""
        import torch

        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        elements = changed = 0
        worst: tuple[float, str] = (0.0, "")
        for name, parameter in self.trainer.model.named_parameters():
            if name not in before:
                continue
            kind = integers[parameter.element_size()]
            old = before[name].to(parameter.device).contiguous().view(kind)
            different = int((parameter.detach().contiguous().view(kind) != old).sum())
            elements += old.numel()
            changed += different
            worst = max(worst, (different / max(1, old.numel()), name))
        return {"elements": elements, "changed": changed, "worst_share": worst[0], "worst": worst[1]}

    # ---- after -------------------------------------------------------------------------------------------------

    def _result(self, origin: float) -> dict[str, Any]:
        import torch

        import rlpatch
        from rlpatch.bench.memory_watch import memory_by_phase, timeline

        self.watch.stop()
        self.collector.stop()
        samples, intervals = self.watch.samples, self.clock.intervals
        logged = [row for row in self.trainer.state.log_history if "loss" in row]
        for index, (row, (begin, end)) in enumerate(zip(self.rows, self.spans, strict=True)):
            row["memory_peak"] = max((used for moment, used in samples if begin <= moment <= end), default=None)
            log = logged[index] if index < len(logged) else {}
            row["metrics"] = {name: log.get(key) for name, key in METRICS.items()}
        measured, spans = self.rows[self.job.warmup :], self.spans[self.job.warmup :]
        since, until = (spans[0][0], spans[-1][1]) if spans else (self.training_from, self.training_until)
        status = None if self.variant.apply is None else without_folders(rlpatch.status().as_dict(), self.job.model)
        return {
            "job": told_job(self.job),
            "device": torch.cuda.get_device_name() if self.cuda else "CPU",
            "seconds": {**self.seconds, "training": self.training_until - self.training_from},
            "engine_cache": self.cache,
            "kv": self.kv,
            "steps": self.rows,
            "median": medians([row for row in measured if not row.get("without")], self.kv.get("bytes")),
            "memory": {
                "baseline": self.baseline,
                "engine_start_peak": max((u for t, u in samples if t < self.training_from), default=None),
                "peak": max((u for t, u in samples if t >= self.training_from), default=None),
                "by_phase": memory_by_phase(samples, intervals, since, until),
                "after_release": min((row["after_release"]["used"] for row in measured), default=None),
                "engine_held": self.engine_held,
                "engine_cached": self.engine_cached,
                "load": self._load_memory(samples, intervals),
                "resident": self.resident,
                "watch_error": self.watch.error,
            },
            "timeline": {
                **timeline(samples, intervals, origin, self.training_from),
                "steps": [[round(begin - origin, 4), round(end - origin, 4)] for begin, end in self.spans],
                "warmup": self.job.warmup,
            },
            "profile": self.profile,
            "status": status,
        }


def medians(rows: list[dict[str, Any]], kv_bytes: int | None) -> dict[str, Any]:
    """Medians over steps: seconds per phase and step, tokens/s, logp difference; release and restore in ms per GiB."""
    if not rows:
        return {}

    def middle(values: list[Any]) -> float | None:
        numbers = [value for value in values if value is not None]
        return statistics.median(numbers) if numbers else None

    found: dict[str, Any] = {name: middle([row["seconds"].get(name) for row in rows]) for name in (*PHASES, "step")}
    found["tokens_per_second"] = middle([row["tokens_per_second"] for row in rows])
    found["logp_difference"] = middle([row.get("metrics", {}).get("logp_difference") for row in rows])
    for name in ("release", "restore"):
        seconds = found[name]
        found[f"{name}_ms_per_gib"] = 1e3 * seconds / (kv_bytes / 2**30) if seconds and kv_bytes else None
    return found


def means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """What medians hide because it comes now and then: tokens per second of all rollouts together, and seconds per step
    that the garbage collector took, in all and while generating; None without steps."""
    if not rows:
        return dict.fromkeys(("tokens_per_second", "collector", "collector_generating"))
    generating = sum(row["seconds"]["generate"] for row in rows)
    return {
        "tokens_per_second": sum(row["tokens"] for row in rows) / generating if generating else None,
        "collector": statistics.fmean(row["collector"]["seconds"] for row in rows),
        "collector_generating": statistics.fmean(row["collector"]["generate"] for row in rows),
    }


def make_prompts(tokenizer: Any, tokens: int, count: int = 64) -> tuple[list[str], int]:
    """`count` different texts of `tokens` tokens each, and the longest's real length in tokens.

    With the word tokenizer of `rlpatch.bench.shapes` they are exact; others may merge across the cut.
    """
    known = tokenizer.get_vocab()
    words = [f"w{i}" for i in range(58)] if "w57" in known else ["time", "green", "under", "seven", "paper", "light"]
    prompts = []
    for i in range(count):
        text = " ".join(words[(7 * i + 3 * j + (j // 5) * i) % len(words)] for j in range(tokens))
        prompts.append(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]))
    return prompts, max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)


def told_job(job: BenchJob) -> dict[str, Any]:
    """The job for a result: its model by name, without the folders that this machine happens to use."""
    fields = asdict(job)
    folders = ("output", "caches")
    return {k: Path(v).name if k == "model" else v for k, v in fields.items() if k not in folders}


def without_folders(value: Any, model: str) -> Any:
    """Plain data in which the model's path is its name."""
    if isinstance(value, dict):
        return {key: without_folders(one, model) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(one, model) for one in value]
    return Path(model).name if value == model else value


def _fits_length() -> bool:
    """Whether this vLLM takes a ``max_model_len`` of -1 for as much as its KV cache can hold."""
    from vllm.v1.core import kv_cache_utils

    return hasattr(kv_cache_utils, "_auto_fit_max_model_len")


def _compiled() -> set[str]:
    """Entries of vLLM's compile cache (under ``VLLM_CACHE_ROOT``); new ones after a start mean that it was a cold one."""
    root = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vllm"
    )
    folder = Path(root) / "torch_compile_cache"
    return {str(path) for pattern in ("*", "*/*") for path in folder.glob(pattern)}


def is_out_of_memory(text: str) -> bool:
    """Whether an error's text says that memory did not suffice, in the words of torch, vLLM or rlpatch."""
    return any(phrase in text.lower() for phrase in OUT_OF_MEMORY)


def told(error: BaseException, stage: str, phase: str | None) -> dict[str, Any]:
    """What a bench's process says of the error that ended it; the traceback goes to its log. Call while it is handled."""
    import traceback

    traceback.print_exc()
    text = f"{type(error).__name__}: {error}"
    chain = text + " ".join(f" {e!r}" for e in (error.__cause__, error.__context__) if e is not None)
    return {
        "text": text[:2000],
        "stage": stage,
        "phase": phase,
        "out_of_memory": is_out_of_memory(chain) or isinstance(error, MemoryError),
    }


def read_job() -> dict[str, Any]:
    """The job from standard input. With ``--ahead`` on the command line it comes later: what takes most of a process's
    first seconds is imported by then, none of which touches the device."""
    if "--ahead" in sys.argv:
        for name in ("torch", "transformers", "vllm.entrypoints.llm"):
            with contextlib.suppress(Exception):  # what is missing or broken shows where it is used
                importlib.import_module(name)
        print(json.dumps({"ready": True}), file=sys.__stdout__, flush=True)
    return dict(json.load(sys.stdin))


def main(kind: type[BenchJob] = BenchJob, runs: type[BenchRun] = BenchRun) -> int:
    """Read a job, print JSON lines: ``stage``, ``engine``, ``progress``, then ``result``, ``skipped`` or ``error``."""
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print; the lines below are for the parent
    job = kind(**read_job())

    def emit(kind: str, value: Any) -> None:
        print(json.dumps({kind: value}), file=out, flush=True)

    bench: BenchRun | None = None
    try:
        bench = runs(job, emit)
        emit("result", bench.run())
    except Skipped as reason:
        emit("skipped", str(reason))
    except BaseException as error:
        stage, phase = (bench.stage, bench.clock.failed_in) if bench else ("import", None)
        emit("error", told(error, stage, phase))
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # interpreter shutdown of a colocated engine can hang in NCCL; everything is written already
