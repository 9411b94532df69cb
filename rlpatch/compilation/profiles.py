"""What the compile settings and profiles mean, in terms that no release of vLLM owns.

A setting wants *terms* ("capture these sizes", "compile in so many processes"); an adapter's `Dialect` says what a term is
called in its releases. `FAST_START` and `THROUGHPUT` are meant to be edited: a setting stays in a profile only if
``python -m rlpatch.bench.compile`` shows that it earns its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlpatch.errors import UsageError

MOST_WORKERS = 8  # each is a process that has imported torch; a dense model has a few dozen kernels
_LARGEST_CAPTURE = 512  # vLLM's own limit
# With so many sequences, or a few that are short, attention in one piece fills the device as well, and nothing has to join
# pieces (docs/steps.md: 8 sequences of 2,048 tokens).
_MANY, _FEW, _SHORT = 32, 8, 3072


@dataclass(frozen=True)
class Reach:
    """What an engine's rollouts can reach.

    Attributes:
        sequences: Sequences that can run at once (``max_num_seqs``), or None when nobody said.
        lora: Whether the engine has LoRA slots.
        cores: CPU cores for this process.
        tokens: Of prompt and completion together at most (``max_model_len``), or None when nobody said.
    """

    sequences: int | None
    lora: bool
    cores: int
    tokens: int | None = None


@dataclass(frozen=True)
class Setting:
    """One compile setting.

    Attributes:
        text: What it does and what for, in one line.
        wants: Term -> value for an engine of that reach; or why it has no use there.
    """

    text: str
    wants: Callable[[Reach], dict[str, Any] | str]


def capture_sizes(sequences: int) -> list[int]:
    """vLLM's own ladder (1, 2, 4, then every 8, from 256 every 16) up to `sequences`, and that number itself.

    vLLM goes on to twice as many, for batches in which prompts and decodes mix, and before 0.31 rounds an odd number up.
    """
    most = min(sequences, _LARGEST_CAPTURE)
    ladder = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16), most]
    return sorted({size for size in ladder if size <= most})


def few_sizes(sequences: int) -> list[int]:
    """Powers of two below `sequences`, and that number itself: a batch that has shrunk is padded to at most twice."""
    most = min(sequences, _LARGEST_CAPTURE)
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power < most), most})


def _sizes(choose: Callable[[int], list[int]]) -> Callable[[Reach], dict[str, Any] | str]:
    def wants(reach: Reach) -> dict[str, Any] | str:
        return {"capture sizes": choose(reach.sequences)} if reach.sequences else "max_num_seqs is not given"

    return wants


def _workers(reach: Reach) -> dict[str, Any] | str:
    count = min(MOST_WORKERS, reach.cores)
    return {"workers": count} if count > 1 else "there is one core for this process"


def _static(reach: Reach) -> dict[str, Any] | str:
    return {"static sizes": [reach.sequences]} if reach.sequences else "max_num_seqs is not given"


def _one_split(reach: Reach) -> dict[str, Any] | str:
    sequences = reach.sequences or 0
    short = reach.tokens is not None and reach.tokens <= _SHORT
    if sequences >= _MANY or (sequences >= _FEW and short):
        return {"attention splits": 1}
    return (
        f"max_num_seqs={reach.sequences} with max_model_len={reach.tokens}: pieces fill the device, unless there are "
        f"{_MANY} sequences, or {_FEW} of at most {_SHORT:,} tokens"
    )


def _always(**terms: Any) -> Callable[[Reach], dict[str, Any] | str]:
    return lambda reach: {name.replace("_", " "): value for name, value in terms.items()}


SETTINGS: dict[str, Setting] = {
    "workers": Setting(
        f"Inductor compiles kernels in up to {MOST_WORKERS} processes; importing vLLM pins it to one thread", _workers
    ),
    "capture-sizes": Setting(
        "CUDA graphs for the batch sizes that rollouts decode with: vLLM's ladder up to max_num_seqs, and that itself",
        _sizes(capture_sizes),
    ),
    "few-sizes": Setting(
        "CUDA graphs for powers of two and max_num_seqs only: fewest captures, shrunken batches are padded",
        _sizes(few_sizes),
    ),
    "lora-graphs": Setting(
        "no second set of CUDA graphs for batches without an adapter: with LoRA slots every rollout has one",
        lambda reach: {"graphs without adapter": False} if reach.lora else "the engine has no LoRA slots",
    ),
    "no-kernel-autotune": Setting(
        "no FlashInfer autotuning during warm-up; dense 16-bit models use none of the kernels that it tunes",
        _always(kernel_autotune=False),
    ),
    "no-combo-benchmark": Setting(
        "combo kernels without the benchmark that Inductor runs for each of them while it compiles",
        _always(combo_kernels="unbenchmarked"),
    ),
    "no-combo-kernels": Setting(
        "no combo kernels (several small kernels in one launch)", _always(combo_kernels="none")
    ),
    "model-info": Setting(
        "the model's class is looked at in this process; with nothing cached vLLM starts a Python of its own for that",
        _always(inspect_here=True),
    ),
    "plain-sampling": Setting(
        "the sampler is warmed up with what this trainer's rollouts ask for, not with every feature it has",
        _always(sampler_warmup="plain"),
    ),
    "decode-graphs": Setting(
        "no torch.compile at all; CUDA graphs of whole decode steps over vLLM's own kernels", _always(compiled=False)
    ),
    "no-inductor": Setting(
        "Dynamo and CUDA graphs as usual, but no Inductor: vLLM's own kernels in its place", _always(inductor=False)
    ),
    "quick": Setting(
        "vLLM's optimization level 1: compiled, CUDA graphs piecewise only, fewer fusions", _always(optimization=1)
    ),
    "static-size": Setting(
        "one more compilation for exactly max_num_seqs tokens; of matrix products that skinny_linear leaves, Inductor "
        "chooses the kernels",
        _static,
    ),
    "one-split": Setting(
        "attention in one piece while decoding, without the kernel that joins pieces: for many sequences, or short ones",
        _one_split,
    ),
    "launch-overlap": Setting(
        "Inductor's kernels are launched while the ones before them end (programmatic dependent launch; Hopper and later)",
        _always(launch_overlap=True),
    ),
    "aot": Setting("what Dynamo traced is cached, too (the default with torch >= 2.10)", _always(aot=True)),
    "mega-aot": Setting(
        "the cached model is loaded whole, without splitting its graph again (the default with torch >= 2.12)",
        _always(aot=True, whole_artifact=True),
    ),
    "startup-plan": Setting(
        "the KV cache's size is remembered under VLLM_CACHE_ROOT, so that warm starts measure no memory",
        _always(memory_plan=True),
    ),
}  # fmt: skip

# docs/compilation.md says why each is in and the others are not. `throughput` keeps all of torch.compile, and what it
# leaves out costs nothing per token.
FAST_START = ("decode-graphs", "model-info", "capture-sizes", "lora-graphs", "no-kernel-autotune", "plain-sampling")
THROUGHPUT = (
    "model-info", "capture-sizes", "lora-graphs", "plain-sampling", "mega-aot", "one-split", "launch-overlap",
)  # fmt: skip
PROFILES: dict[str, tuple[str, ...]] = {"default": (), "fast-start": FAST_START, "throughput": THROUGHPUT}

REFUSED = {
    "max-autotune": "Inductor would choose the kernels of all matrix products for the size that it traces with, and "
    "keep them for all; 'static-size' chooses them for the size that rollouts decode with",
    "coordinate-descent": "coordinate_descent_tuning has taken an engine's compilation from under 1 to over 13 minutes",
    "multi-kernel": "multi_kernel misbehaved under vLLM 0.10 with torch 2.8 and 2.9",
    "no-cache": "VLLM_DISABLE_COMPILE_CACHE=1 makes every start a cold one",
    "no-jit-warmup": "enable_jit_warmup=False leaves kernels to be compiled in the first rollout, and a workspace that "
    "grows after the capture frees memory that the CUDA graphs point at",
    "no-graph-estimate": "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=0 saves nothing (the estimate is made anyway and then "
    "ignored) and leaves no memory for the graphs",
}  # fmt: skip


def named(value: str, origin: str) -> tuple[str, ...]:
    """The settings that `value` stands for: a profile's, or names of settings and profiles with commas between.

    Raises:
        UsageError: an unknown or refused name, or two settings that contradict each other; names `origin`.
    """
    if value in PROFILES:
        return PROFILES[value]
    parts = [part.strip() for part in value.split(",") if part.strip()]
    names = tuple(dict.fromkeys(name for part in parts for name in PROFILES.get(part, (part,))))
    for name in names:
        if name in REFUSED:
            raise UsageError(f"{origin}: {name!r} is refused: {REFUSED[name]}")
        if name not in SETTINGS:
            raise UsageError(
                f"{origin}: {name!r} is neither a profile ({', '.join(PROFILES)}) nor a setting ({', '.join(SETTINGS)})"
            )
    if not names:
        raise UsageError(f"{origin}: expected a profile ({', '.join(PROFILES)}) or settings with commas between")
    _agree(names, origin)
    return names


def _agree(names: tuple[str, ...], origin: str) -> None:
    seen: dict[str, tuple[str, Any]] = {}
    for name in names:
        wanted = SETTINGS[name].wants(Reach(sequences=96, lora=True, cores=MOST_WORKERS))
        for term, value in wanted.items() if isinstance(wanted, dict) else ():
            other, before = seen.setdefault(term, (name, value))
            if before != value:
                raise UsageError(f"{origin}: {other!r} and {name!r} contradict each other over {term}; leave one out")
    inductors = {"workers", "static-size", "launch-overlap", "no-combo-benchmark", "no-combo-kernels", "quick"}
    for name, compiler, useless in (
        ("decode-graphs", "torch.compile", inductors | {"no-inductor", "aot", "mega-aot"}),
        ("no-inductor", "Inductor", inductors),
    ):
        pointless = sorted(useless & set(names))
        if name in names and pointless:
            raise UsageError(f"{origin}: under {name!r} {compiler} compiles nothing, so {pointless[0]!r} has no use; "
                             "leave one out")  # fmt: skip
