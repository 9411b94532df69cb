"""The plan in force: what a trainer's engine is built with, decided from its real arguments just before it is built.

Arithmetic and words; what the device holds is told by a `Room`. Imports no torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlpatch.errors import UsageError
from rlpatch.memory.live import describe
from rlpatch.memory.planning import FILL, TRAINING, Plan, default_margin, first_that_fits, plan
from rlpatch.memory.sizes import show
from rlpatch.memory.training import TILES

logger = logging.getLogger("rlpatch")

SETTING = "vllm_gpu_memory_utilization"  # TRL's
_SIZED = ("kv_cache_memory_bytes", "num_gpu_blocks_override")  # arguments of ``LLM`` that size the KV cache outright
_SPARE = 256  # tokens; vLLM's blocks may be larger than the plan's 16, and the first one is never used
_LEAST = 1e-4  # vLLM refuses a share of 0
_FREE = 0.05  # of the device, where nothing is recomputed: out of memory in a backward pass, nothing can be taken back
# arguments of ``LLM`` -> fields of `rlpatch.memory.Engine`
_FIELDS = {
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_model_len": "max_model_len",
    "enforce_eager": "eager",
    "kv_cache_dtype": "kv_dtype",
    "block_size": "block_size",
    "watermark": "watermark",
}


@dataclass(frozen=True)
class Room:
    """The device as it is found, in bytes.

    Attributes:
        total: Its memory.
        taken: Held, or soon to be held, by others than the trainer's own models: other processes, reward models.
        limit: What trainer and engine may take of it; None: all that is left.
        host: Host memory that is available.
    """

    total: int
    taken: int = 0
    limit: int | None = None
    host: int = 0

    @property
    def others(self) -> int:
        """What the plan may not count on."""
        return max(self.taken, self.total - min(self.total, self.limit or self.total))


@dataclass(frozen=True)
class Release:
    """How this vLLM can be told.

    Attributes:
        takes_bytes: It has ``kv_cache_memory_bytes`` (from 0.10.2); else the plan's utilization has to do.
        counts_graphs: See `rlpatch.memory.Engine`.
        sized_by: What else sizes the KV cache, whatever the arguments say (``VLLM_CPU_KVCACHE_SPACE=4``), or None.
    """

    takes_bytes: bool = True
    counts_graphs: bool = True
    sized_by: str | None = None


@dataclass(frozen=True, eq=False)
class Budget:
    """A trainer about to build its engine.

    Attributes:
        trainer: TRL's; its ``args`` are read.
        model: What it trains, adapters around it or not.
        left_alone: The user left `SETTING` at TRL's default.
        masters, residual, input_casts: See `rlpatch.memory.describe`.
        parking: Whether the optimizer's state waits in host memory between steps; ``"auto"``: if the plan does not fit
            without.
        expanding: Whether torch's allocator expands its segments, likewise.
        head: See `rlpatch.memory.Training`.
        saving: Gradient checkpointing may be left out where memory suffices without.
    """

    trainer: Any
    model: Any
    left_alone: bool
    masters: bool = False
    residual: str | None = None
    head: str = TILES
    input_casts: bool = True
    parking: bool | str = False
    expanding: bool | str = False
    saving: bool = False


@dataclass(frozen=True)
class Decision:
    """What became of the plan for one engine.

    Attributes:
        applied: The engine's KV cache has the plan's size.
        reason: Why, or why not.
        plan: None where none was made.
        arguments: Those of ``LLM`` that follow.
        parked: The optimizer's state is to wait in host memory between steps.
        expanded: torch's allocator is to expand its segments.
        saving: The same plan for passes that save all their activations, where the trainer checkpoints and need not; it
            keeps a twentieth of the device free. None: all passes are as the trainer is configured.
        warnings: To be said once.
    """

    applied: bool
    reason: str
    plan: Plan | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    parked: bool = False
    expanded: bool = False
    saving: Plan | None = None

    def saves(self, rows: int, length: int) -> bool:
        """Whether a forward and backward pass over `rows` sequences of `length` tokens, padding included, is to save all
        its activations, and fits with them."""
        made = self.saving
        return made is not None and rows <= made.rows and length <= made.training_context

    def __str__(self) -> str:
        made = self.plan
        if made is None or not self.applied:
            return f"memory plan: not applied: {self.reason}"
        of = f" of the {show(made.kv_left_bytes)} that are left" if made.sized_by == FILL else ""
        return (
            f"memory plan: {show(made.kv_cache_memory_bytes)} of KV cache ({made.kv_tokens:,} tokens), "
            f"{made.sized_by}{of}; beside it {show(made.generating)} stay resident, and training peaks at "
            f"{show(made.training)}, of {show(made.available)} ({self.reason}){self._saves()}"
        )

    def _saves(self) -> str:
        if self.saving is None:
            return ""
        context = self.saving.training_context
        return f"; up to {context:,} tokens no layer is recomputed (gradient_checkpointing was left alone)"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``status()``; sizes in bytes, by term what is resident in which phase."""
        found: dict[str, Any] = {"applied": self.applied, "reason": self.reason}
        if self.plan is None:
            return found
        made = self.plan
        return {
            **found,
            "arguments": dict(self.arguments),
            "warnings": list(self.warnings),
            "parked": self.parked,
            "expanded": self.expanded,
            "kv_cache_memory_bytes": made.kv_cache_memory_bytes,
            "kv_left_bytes": made.kv_left_bytes,
            "kv_sized_by": made.sized_by,
            "gpu_memory_utilization": made.gpu_memory_utilization,
            "device": made.device,
            "available": made.available,
            "generating": made.generating,
            "training": made.training,
            "rollout_context": made.rollout_context,
            "training_context": made.training_context,
            "passes_beside": made.passes_beside(),
            "saving_context": self.saving.training_context if self.saving is not None else 0,
            "refusal": made.refusal,
            "peak": made.peak,
            "moments": made.moments,
            "terms": [
                {
                    "name": t.name,
                    "bytes": t.bytes,
                    "resident": t.resident,
                    "exact": t.exact,
                    "peak_bytes": t.peak_bytes,
                }
                for t in made.terms
            ],
        }


def decide(budget: Budget, arguments: Mapping[str, Any], room: Room, release: Release) -> Decision:
    """The plan for the engine that is built with `arguments` (of ``vllm.LLM``), and what it changes in them.

    Raises:
        UsageError: the utilization was left alone and the plan does not fit: names the term that is too large, by how
            much, and the remedy. What is too large by estimate alone is a warning.
    """
    sized = next((f"{name}={arguments[name]}" for name in _SIZED if arguments.get(name) is not None), release.sized_by)
    if sized is not None:
        return Decision(False, f"the KV cache is sized by {sized}")
    given = None if budget.left_alone else arguments.get("gpu_memory_utilization")
    try:
        (parked, expanded, positions), made = _planned(budget, arguments, room, release, given)
    except UsageError as error:
        reason = f"no plan can be made: {error}"
        if budget.left_alone:
            reason += f"; {SETTING}={arguments.get('gpu_memory_utilization')} stays"
        return Decision(False, reason, warnings=(f"memory plan: {reason}",) if budget.left_alone else ())
    if not any(term.name == "weights, shared" for term in made.terms):
        return Decision(False, "trainer and engine have different dtypes, and share nothing", made)
    saving = None
    if budget.saving and made.refusal is None:
        saves, _ = _plan(budget, arguments, room, release, given, parked, expanded, saving=True)
        saving = saves if _fits_saving(saves, made, room) else None
    if not budget.left_alone:
        refusal = () if made.refusal is None else (f"{SETTING}={given} was given; by the plan {made.refusal}",)
        warnings = tuple(f"memory plan: {text}" for text in (*made.warnings, *refusal))
        return Decision(False, f"{SETTING}={given} was given", made, {}, warnings, parked, expanded, saving)
    warnings = made.warnings
    if made.refusal is not None and made.estimated:  # too little certainty to keep somebody from trying
        warnings = (*warnings, f"by estimate {made.refusal}")
    elif made.refusal is not None:
        raise UsageError(
            f"the memory plan does not fit: {made.refusal}. {_counted_on(room)}To build the engine all the same, set "
            f"{SETTING}, or rlpatch.apply(memory_plan=False)"
        )
    found: dict[str, Any] = {"gpu_memory_utilization": max(made.gpu_memory_utilization, _LEAST)}
    reason = f"{SETTING} was left alone"
    if parked and budget.parking == "auto":
        reason += "; the optimizer's state waits in host memory between steps, because it would not fit otherwise"
    if expanded and budget.expanding == "auto":
        reason += "; torch's allocator expands its segments, because it would not fit otherwise, or only just"
    if release.takes_bytes:
        found["kv_cache_memory_bytes"] = made.kv_cache_memory_bytes
    held = made.left_blocks * made.block_size
    longest = held - held % _SPARE - _SPARE
    if arguments.get("max_model_len") is None and 0 < longest < positions * _stretch(budget.model):
        # vLLM would take the model's longest sequence, and refuse to start with a KV cache that cannot hold it
        found["max_model_len"] = min(longest, positions)
        reason += (
            f"; max_model_len={min(longest, positions)}, because the KV cache cannot hold the model's longest sequence"
        )
    said = tuple(f"memory plan: {text}" for text in warnings)
    return Decision(True, reason, made, found, said, parked, expanded, saving)


def _planned(
    budget: Budget, arguments: Mapping[str, Any], room: Room, release: Release, utilization: float | None
) -> tuple[tuple[bool, bool, int], Plan]:
    """What is done in order to fit (state parked, segments expanded; and the model's positions), and its plan."""

    def make(parked: bool, expanded: bool) -> tuple[tuple[bool, bool, int], Plan] | None:
        made, positions = _plan(budget, arguments, room, release, utilization, parked, expanded)
        state = sum(term.bytes for term in made.terms if term.name == "optimizer state")
        if parked and budget.parking == "auto" and not 0 < state <= room.host // 2:
            return None
        return (parked, expanded, positions), made

    return first_that_fits(budget.parking, budget.expanding, make)


def _plan(
    budget: Budget,
    arguments: Mapping[str, Any],
    room: Room,
    release: Release,
    utilization: float | None,
    parked: bool,
    expanded: bool,
    saving: bool = False,
) -> tuple[Plan, int]:
    """The plan, and the positions that the model was made for. `saving`: for passes that save all their activations."""
    fields = {ours: arguments[name] for name, ours in _FIELDS.items() if arguments.get(name) is not None}
    if arguments.get("enable_lora"):
        fields |= {"lora_slots": arguments.get("max_loras") or 1, "lora_rank": arguments.get("max_lora_rank") or 16}
    dtype = arguments.get("dtype")
    shape, training, engine = describe(
        budget.trainer,
        budget.model,
        masters=budget.masters,
        residual=budget.residual,
        input_casts=budget.input_casts,
        parked=parked,
        expanded=expanded or None,
        head=budget.head,
        engine_dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
        engine={
            **fields,
            "counts_graphs": release.counts_graphs,
            "told_block_size": "block_size" in fields,
            "unbounded": _unbounded(arguments, release),
        },
    )
    if "max_model_len" not in fields:  # vLLM takes the model's
        engine = replace(engine, longest=math.ceil(shape.positions * _stretch(budget.model)))
    margin = None
    if saving:
        training = replace(training, checkpointing=False)
        margin = max(int(_FREE * room.total), default_margin(room.total))
    made = plan(shape, training, engine, room.total, margin=margin, others=room.others, utilization=utilization)
    return made, shape.positions


def _fits_saving(saves: Plan, made: Plan, room: Room) -> bool:
    """Whether there is a length that `saves` has room for, and the KV cache of `made` fits beside what its passes leave."""
    beside = sum(t.bytes for t in saves.terms if t.resident != TRAINING and t.name != "margin")
    stays = made.kv_cache_memory_bytes + beside + default_margin(room.total)
    return saves.training_context > 0 and stays <= saves.available


def _unbounded(arguments: Mapping[str, Any], release: Release) -> str:
    """See `rlpatch.memory.Engine`."""
    if not release.takes_bytes:
        return "this vLLM takes no size of the KV cache, only a share of the device"
    if arguments.get("max_num_seqs") is None:
        return "vLLM is given no max_num_seqs"
    if arguments.get("kv_transfer_config"):
        return "a KV connector keeps blocks for longer than their requests"
    return "speculative_config adds layers" if arguments.get("speculative_config") else ""


def _stretch(model: Any) -> float:
    """By how much the config's rotary embedding stretches its positions, at most."""
    config = getattr(model, "config", None)
    configs = (config, getattr(config, "text_config", None))
    scaled = [getattr(one, name, None) for one in configs for name in ("rope_scaling", "rope_parameters")]
    entries = [entry for entry in scaled if isinstance(entry, Mapping)]
    entries += [each for entry in entries for each in entry.values() if isinstance(each, Mapping)]  # by kind of layer
    factors = [entry.get("factor") for entry in entries]
    return max([1.0, *(float(factor) for factor in factors if isinstance(factor, (int, float)))])


def _counted_on(room: Room) -> str:
    if not room.others:
        return ""
    why = "the limit" if room.limit is not None and room.total - room.limit >= room.taken else "others"
    return f"({show(room.total - room.others)} of the device's {show(room.total)} count; {why} take the rest.) "
