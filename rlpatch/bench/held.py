"""What one training holds, term by term, against its memory plan: ``python -m rlpatch.bench.held``, a JSON job in, JSON
lines out.

The trainer is `rlpatch.bench.run`'s with vLLM's utilization left alone, so that the plan is in force. Weights, optimizer
state, gradients, adapters, reference model and KV cache are counted from the storages of the very tensors, on any device.
The rest exists on a GPU only: torch's peak above what was allocated when a rollout had ended, split where the LM head's
backward pass ends (a hook on the gradient of the last norm's output), and the driver's count of what is used.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rlpatch.bench.run import BenchJob, BenchRun, Skipped, main

NEAR_SHARE, NEAR_BYTES = 0.05, 1 << 29  # a term is right within this share of what was measured, or these bytes
ON_CPU = "a CPU has no such memory"
GENERATING, TRAINING = "total generating", "total training"
_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm")  # the last one of a decoder, as families call it


@dataclass
class HeldJob(BenchJob):
    """`BenchJob`, and what it leaves out.

    Attributes:
        setting: Name, for people.
        beta: Above 0 without a LoRA: a reference model.
        plan_bytes: Memory that is planned with on a CPU; None: the device's.
    """

    setting: str = ""
    beta: float = 0.0
    plan_bytes: int | None = None


class Peaks:
    """Peaks of torch's allocations on a GPU, section by section, above what was allocated at `start`; in bytes.

    Attributes:
        sections: Section → the highest peak.
        after: Section → the most that was allocated at its end.
        top: The highest of all peaks, in absolute bytes: allocated and reserved.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.counting = False
        self._base = 0
        self.sections: dict[str, int] = {}
        self.after: dict[str, int] = {}
        self.top = {"allocated": 0, "reserved": 0}

    def start(self) -> None:
        """A rollout has ended: what is allocated now is resident."""
        if not self.cuda:
            return
        import torch

        self._base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.counting = True

    def mark(self, section: str) -> None:
        """What happened since the last mark was `section`."""
        if not self.counting:
            return
        import torch

        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        now = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.sections[section] = max(self.sections.get(section, 0), allocated - self._base)
        self.after[section] = max(self.after.get(section, 0), now - self._base)
        self.top = {
            "allocated": max(self.top["allocated"], allocated),
            "reserved": max(self.top["reserved"], reserved),
        }


class HeldRun(BenchRun):
    """One job, measured."""

    job: HeldJob

    def __init__(self, job: HeldJob, emit: Callable[[str, Any], None] = lambda kind, value: None) -> None:
        super().__init__(job, emit)
        self.variant = replace(
            self.variant,
            apply={**(self.variant.apply or {}), "memory_plan": True if job.plan_bytes is None else job.plan_bytes},
            config={"beta": job.beta},
        )
        self.peaks = Peaks(self.cuda)
        self.gradients = 0
        self.cached: list[int] = []  # by torch, when the KV cache is back
        self.outside: list[int] = []  # of torch's allocator, likewise
        self.problems: list[str] = []
        self.context: int | None = None
        self.hooks = 0

    def _prepare(self) -> None:
        if self.job.optim and "8bit" in self.job.optim:
            try:
                importlib.import_module("bitsandbytes")
            except Exception as error:  # it fails in many ways where its library does not load
                raise Skipped(f"optim={self.job.optim}: bitsandbytes does not import: {error}") from error
        before = _driver_used() if self.cuda else None
        super()._prepare()
        if before is not None:
            import torch

            after = _driver_used()
            self.context = None if after is None else after - before - torch.cuda.memory_reserved()

    def _try(self, what: str, read: Callable[[], Any]) -> Any:
        """`read()`; an error is noted, and costs this figure only."""
        try:
            return read()
        except Exception as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}"[:500])
            return None

    # ---- while it runs -----------------------------------------------------------------------------------------

    def _build(self) -> None:
        super()._build()
        self._try("sections", self._split)

    def _split(self) -> None:
        """Marks around the forward pass, the LM head's backward pass, the rest of it, and the optimizer's step."""
        trainer = self.trainer
        forward, backward = trainer.compute_loss, trainer.accelerator.backward

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            self.peaks.mark("scoring")
            result = forward(*args, **kwargs)
            self.peaks.mark("forward")
            return result

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            result = backward(*args, **kwargs)
            self.peaks.mark("backward" if self.hooks else "head and backward")
            return result

        trainer.compute_loss, trainer.accelerator.backward = compute_loss, run_backward
        model = trainer.accelerator.unwrap_model(trainer.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        body = getattr(base, base.base_model_prefix, base)
        norm = next((module for name in _NORMS if (module := getattr(body, name, None)) is not None), None)
        if norm is None:
            self.problems.append("sections: the last norm was not found: head and backward pass are not told apart")
            return

        def differentiated(gradient: Any) -> None:
            self.hooks += 1
            self.peaks.mark("head")

        def normed(module: Any, inputs: Any, output: Any) -> None:
            if getattr(output, "requires_grad", False):
                output.register_hook(differentiated)

        norm.register_forward_hook(normed)

    def _callback(self) -> Any:
        run, steps = self, super()._callback()

        class Steps(type(steps)):  # type: ignore[misc]
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                run.peaks.mark("clipping")
                run._try("gradients", run._gradients)

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                run.peaks.mark("step")
                run.peaks.counting = False  # until the next rollout has ended
                super().on_step_end(args, state, control, **more)

        return Steps()

    def _gradients(self) -> None:
        stepped = (
            p for group in self.trainer.optimizer.param_groups for p in group["params"]
        )  # masters, where they are
        found = {
            p.grad.data_ptr(): p.grad.nbytes for p in (*self.trainer.model.parameters(), *stepped) if p.grad is not None
        }
        self.gradients = max(self.gradients, sum(found.values()))

    def _rollout(self, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super()._rollout(wrapped, instance, args, kwargs)
        if self.clock.step >= self.job.warmup:  # the first step makes the optimizer's state
            self.peaks.start()
        return result

    def _as_phase(self, name: str) -> Any:
        timed = super()._as_phase(name)
        if name != "restore":
            return timed

        def restore(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = timed(wrapped, instance, args, kwargs)
            if self.cuda and self.clock.step >= self.job.warmup:
                self._try("allocator", self._restored)
            return result

        return restore

    def _restored(self) -> None:
        """All of the KV cache is mapped, as torch takes it to be all the time."""
        import torch

        reserved = torch.cuda.memory_reserved()
        self.cached.append(reserved - torch.cuda.memory_allocated())
        self.outside.append(self.watch.used() - reserved)

    # ---- after -------------------------------------------------------------------------------------------------

    def _result(self, origin: float) -> dict[str, Any]:
        result = super()._result(origin)
        result.pop("timeline")
        status = result.pop("status") or {}
        pairs = status.get("pairs") or [{}]
        planned = pairs[0].get("memory_plan") or {}
        held = self._held(result["memory"]["by_phase"])
        return {
            **result,
            "in_force": [one["capability"] for one in status.get("outcomes", ()) if one["state"] == "applied"],
            "plan": planned,
            "measured": held,
            "peaks": {"sections": self.peaks.sections, "after": self.peaks.after, **self.peaks.top},
            "rows": compare(planned, held, self.cuda) if planned.get("terms") else [],
            "problems": self.problems,
        }

    def _held(self, by_phase: dict[str, dict[str, int]]) -> dict[str, int | None]:
        """Bytes by name; None: not measured. `by_phase`: what the driver counted, after the warm-up."""
        from rlpatch import phases
        from rlpatch.memory.live import _is_adapter
        from rlpatch.parking import tensors_in
        from rlpatch.sharing.account import resident_bytes

        trainer, cuda = self.trainer, self.cuda
        named = list(trainer.model.named_parameters())
        engine = next(iter(phases.live()), None)

        def weights() -> int:
            own = [p for name, p in named if not (self.job.lora and _is_adapter(name))]
            theirs = list(engine.engine.model.parameters()) if engine is not None and engine.engine is not None else []
            return resident_bytes([*own, *theirs])

        def state() -> int:
            return resident_bytes(tensors_in(trainer.optimizer.state))

        reference = getattr(trainer, "ref_model", None)
        sections = self.peaks.sections
        return {
            "weights": self._try("weights", weights),
            "optimizer state": self._try("optimizer state", state),
            "gradients": self.gradients or None,
            "fp32 masters": (self.resident or {}).get("masters") or None,
            "LoRA": self._try("LoRA", lambda: resident_bytes(p for name, p in named if _is_adapter(name))),
            "reference model": None if reference is None else resident_bytes(reference.parameters()),
            "KV cache": self.kv.get("bytes"),
            "context": self.context,
            "engine": self.engine_held if cuda else None,
            "cached": max(self.cached, default=None),
            "outside torch": max(self.outside, default=None),
            "loss": max((sections[name] for name in ("forward", "head") if name in sections), default=None),
            "backward": sections.get("backward", sections.get("head and backward")),
            "step": sections.get("step"),
            "peak": max(sections.values(), default=None),
            "unused at peak": self.peaks.top["reserved"] - self.peaks.top["allocated"] if sections else None,
            "generating": (by_phase.get("generate") or {}).get("max") if cuda else None,
            "training": (by_phase.get("train") or {}).get("max") if cuda else None,
        }


def _driver_used() -> int | None:
    """Bytes used on device 0, asked without a CUDA context; None: NVML does not answer."""
    try:
        pynvml = importlib.import_module("pynvml")

        pynvml.nvmlInit()
        try:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(visible)) if visible.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(visible)
            )  # fmt: skip
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        finally:
            pynvml.nvmlShutdown()
    except Exception:
        return None


# ---- against the plan ------------------------------------------------------------------------------------------------


def compare(plan: dict[str, Any], held: dict[str, int | None], cuda: bool = True) -> list[dict[str, Any]]:
    """The plan (`rlpatch.status`'s) beside what was measured, a row per term.

    Args:
        cuda: Else some figures do not exist.

    Returns:
        ``name``, ``planned`` and ``measured`` (bytes or None), ``difference``, ``near`` (within 5 % or 0.5 GiB), ``why``
        (nothing was measured), and for totals ``margin`` and ``too_small``: more was used than planned, margin included.
    """
    sizes = {term["name"]: term["bytes"] for term in plan["terms"]}
    moments = plan["moments"]

    def of(*names: str) -> int:
        return sum(sizes.get(name, 0) for name in names)

    rows: list[dict[str, Any]] = []

    def row(name: str, planned: int, measured: int | None, exists: bool = True, **more: Any) -> None:
        if not planned and not measured:
            return
        why = None if measured is not None else "not measured" if cuda or exists else ON_CPU
        difference = None if measured is None else planned - measured
        near = None
        if difference is not None and measured is not None:
            near = abs(difference) <= max(NEAR_SHARE * measured, NEAR_BYTES)
        rows.append(
            {"name": name, "planned": planned, "measured": measured, "difference": difference, "near": near, "why": why}
            | more
        )

    row("weights", of("weights, shared", "weights of the trainer", "weights of the engine"), held["weights"])
    for name in ("fp32 masters", "LoRA", "reference model", "optimizer state", "gradients"):
        row(name, of(name), held[name])
    row("KV cache", plan["kv_cache_memory_bytes"], held["KV cache"])
    row("CUDA context", of("CUDA context"), held["context"], False)
    row("engine beside weights and KV", of("engine buffers", "CUDA graphs", "LoRA slots"), held["engine"], False)
    others = plan["device"] - plan["available"]
    outside = None if held["outside torch"] is None else held["outside torch"] - others
    row("outside of torch's allocator", of("CUDA context", "CUDA graphs"), outside, False)
    row("pinned, generating", of("pinned by the allocator", "pinned between steps"), held["cached"], False)
    row("pinned, training", of("pinned by the allocator", "torn blocks"), held["unused at peak"], False)
    row("training: head and loss", moments["loss"], held["loss"], False)
    row("training: backward pass", max(moments["backward"], moments["embedding"]), held["backward"], False)
    row("training: optimizer's step", moments["step"], held["step"], False)
    row("training: the highest of these", max(moments.values()), held["peak"], False)
    margin = of("margin")
    for name, planned, measured in (
        (GENERATING, plan["generating"] + plan["kv_cache_memory_bytes"], held["generating"]),
        (TRAINING, plan["training"], held["training"]),
    ):
        used = None if measured is None else measured - others
        small = None if used is None else used > planned
        row(name, planned - margin, used, False, margin=margin, too_small=small)
    return rows


if __name__ == "__main__":
    status = main(HeldJob, HeldRun)
    sys.stderr.flush()
    os._exit(status)  # interpreter shutdown of a colocated engine can hang in NCCL; everything is written already
