"""A real but tiny trainer/engine pair in a process of its own: does sharing work here, does standby?

``run()`` starts ``python -m rlpatch.probe``, which makes a two-layer checkpoint, loads it as the trainer's model, builds
a ``vllm.LLM`` on the same memory and looks, step by step, whether what rlpatch promises is so. Each step is one JSON
line on standard output; whatever ends the process (exception, signal, time) is told with the step it happened in and
what to do about it. Only the child imports torch and vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 300.0  # seconds: a first import of vLLM from a cold network disk takes minutes
TOKENS = 16
_KV_BYTES = 32 << 20
_PROMPT = [5, 17, 42, 9, 30]  # ids of ordinary words in the tiny tokenizer

# Said by the child before it starts the step of that name.
STEPS = {
    "import": "import torch, transformers and vLLM",
    "trainer": "load a tiny model as the trainer's",
    "engine": "build a tiny engine on the trainer's weights",
    "sharing": "one copy of the weights",
    "agreement": "the engine's log-probs are the trainer's",
    "write": "a write by the trainer is seen by the engine",
    "undo": "undone, everything is as before",
    "standby": "a standby cycle frees the KV cache and keeps the tokens",
    "adapters": "the trainer's side is patched when it is imported",
}

# What ends a probe, told from its last words -> what to do. The first that matches counts.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"torchvision::nms",
        "torchvision was built for another torch; uninstall it, or install the one that belongs to this torch",
    ),
    (
        r"undefined symbol|GLIBCXX|cannot open shared object file",
        "a compiled library was built against another torch or system; reinstall vLLM and torch together, in one command, "
        "so that vLLM's own torch pin decides",
    ),
    (
        r"NCCLTrainerSendWeightsArgs|cannot import name",
        "these releases do not go together; `python -m rlpatch matrix` lists pairs that do",
    ),
    (r"No module named|ModuleNotFoundError", "install the missing package, or reinstall the library that asks for it"),
    (
        r"Failed to infer device type|No CUDA GPUs are available|no NVIDIA driver",
        "this vLLM is built for an accelerator and finds none; make the device visible (CUDA_VISIBLE_DEVICES, driver, "
        "container runtime), or install a CPU build of vLLM",
    ),
    (
        r"expandable_segments|[Ee]xpandable segments",
        "take expandable_segments out of PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF",
    ),
    (
        r"Free memory on device|out of memory|OutOfMemory|Cannot allocate memory|std::bad_alloc",
        "free memory on this machine (other processes?) and probe again; the probe itself needs about 2 GiB",
    ),
    (r"No space left on device", "free disk space in the temporary folder (TMPDIR)"),
    (
        r"process of its own|VLLM_ENABLE_V1_MULTIPROCESSING",
        "the engine must live in the trainer's process: set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported",
    ),
)
_SIGNALS = {
    signal.SIGKILL: "it was killed, most likely for memory; free memory on this machine and probe again",
    signal.SIGILL: "this CPU lacks instructions that the vLLM or torch build uses; install a build for this CPU",
    signal.SIGSEGV: "compiled code crashed; reinstall torch and vLLM together, in one command, so that their builds match",
    signal.SIGABRT: "compiled code gave up; the last lines above say why, often torch and vLLM builds that do not match",
    signal.SIGBUS: "shared memory ran out or a file on disk is truncated; enlarge /dev/shm, or reinstall torch and vLLM",
}


@dataclass(frozen=True)
class Check:
    """One step of the probe.

    Attributes:
        name: Key of `STEPS`.
        ok: Whether it held.
        detail: What was seen, in one line.
        seconds: How long the step took.
    """

    name: str
    ok: bool
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        ok: Every step was reached and held.
        checks: The steps reached, in order.
        error: What failed, in one line; None when `ok`.
        remedy: What to do about it; None when `ok`.
        device: The engine's device, e.g. ``"cpu"``, or None when it was not built.
        sharing: `rlpatch.sharing.share.SharingReport.as_dict` of the pair, or None.
        outcomes: What became of each capability in the probe's process.
        seconds: The whole probe, start of the process included.
        tail: The last lines that the process wrote to standard error, when it failed.
    """

    ok: bool
    checks: tuple[Check, ...] = ()
    error: str | None = None
    remedy: str | None = None
    device: str | None = None
    sharing: dict[str, Any] | None = None
    outcomes: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0
    tail: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class ProbeFailed(Exception):
    """A step's promise did not hold.

    Args:
        error: What was seen, in one line.
        remedy: What to do.
    """

    def __init__(self, error: str, remedy: str) -> None:
        super().__init__(error)
        self.remedy = remedy


# ---- the parent ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """The probe's environment: this one, less what belongs to a training run, plus what keeps it small and quiet.

    Allocator settings, device visibility and library paths stay: whether they break anything is what is probed.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        # Settings of rlpatch would change what is probed; a launcher's ranks would make it wait for other processes;
        # the CPU backend's cache size would override the tiny one and fill memory.
        if not name.startswith(("RLPATCH_", "UNSLOTH_", "TORCHELASTIC_"))
        and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        and name != "VLLM_CPU_KVCACHE_SPACE"
    }
    env |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # The child must find the same rlpatch. site-packages must not come first in its path, where backports would shadow
    # the standard library.
    home = str(Path(__file__).parent.parent)
    packages = {*site.getsitepackages(), site.getusersitepackages()}
    if home not in packages:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), home)))
    return env


def run(timeout: float = TIMEOUT, command: Sequence[str] | None = None) -> ProbeResult:
    """Probe in a subprocess and wait for it. Never raises for what the probe does.

    Args:
        timeout: Seconds after which the probe and everything it started is killed.
        command: What to start instead of ``python -m rlpatch.probe``.
    """
    start = time.perf_counter()
    try:
        process = subprocess.Popen(
            [*(command or (sys.executable, "-m", "rlpatch.probe"))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,  # so that a timeout reaches whatever vLLM has started
            text=True,
            errors="replace",
        )
    except OSError as error:
        return ProbeResult(
            False, error=f"the probe could not be started: {error}", remedy="check that this Python can start itself"
        )
    timed_out = False
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
        _kill(process)
        out, err = process.communicate()
    except BaseException:  # Ctrl-C: leave nothing behind
        _kill(process)
        process.wait()
        raise
    seconds = time.perf_counter() - start
    return _judge(out, err, process.returncode, seconds, timeout if timed_out else None)


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()


def _judge(out: str, err: str, code: int, seconds: float, timeout: float | None) -> ProbeResult:
    """The child's lines and how it ended, as a result."""
    checks: list[Check] = []
    step: str | None = None
    result: dict[str, Any] | None = None
    for line in out.splitlines():
        try:
            message = json.loads(line)
        except ValueError:  # a library got hold of the descriptor
            continue
        if not isinstance(message, dict):
            continue
        step = message.get("step", step)
        if "check" in message:
            checks.append(Check(**message["check"]))
        result = message.get("result", result)
    common: dict[str, Any] = {"checks": tuple(checks), "seconds": round(seconds, 2)}
    if result is not None:
        common |= {key: result[key] for key in ("device", "sharing")} | {"outcomes": tuple(result["outcomes"])}
        if result["error"] is None:
            return ProbeResult(True, **common)
    common["tail"] = tuple(line for line in err.splitlines() if line.strip())[-12:]
    where = f"in the step {STEPS[step]!r}" if step in STEPS else "before its first step"
    if result is not None:
        error, remedy = result["error"], result["remedy"] or _remedy(f"{result['error']}\n{err[-4000:]}")
    elif timeout is not None:
        error = f"no end after {timeout:g} s, {where}"
        remedy = (
            "give it longer (--timeout SECONDS); if that does not help, the last lines above show what it waits for"
        )
    elif code < 0:
        error = f"ended by {_signal_name(-code)} {where}"
        remedy = _SIGNALS.get(-code) or _remedy(err[-4000:])  # type: ignore[call-overload]
    else:
        error = f"ended with exit status {code} and no result, {where}"
        remedy = _remedy(err[-4000:])
    return ProbeResult(False, error=error, remedy=remedy, **common)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _remedy(text: str) -> str:
    """What to do about an error, told from what it says."""
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, text):
            return remedy
    return (
        "compare with a pair from `python -m rlpatch matrix`; if yours is one of them, report this with the output of "
        "`python -m rlpatch doctor --probe --json`"
    )


# ---- the child -------------------------------------------------------------------------------------------------------


class _Steps:
    """Announces steps, times them, collects what they found."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self.result: dict[str, Any] = {"error": None, "remedy": None, "device": None, "sharing": None, "outcomes": []}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """One step; the body appends what it saw and raises what goes wrong."""
        self._emit({"step": name})
        start = time.perf_counter()
        seen: list[str] = []
        try:
            yield seen
        except BaseException as error:
            text = str(error) if isinstance(error, ProbeFailed) else f"{type(error).__name__}: {error}"
            self._check(name, False, " ".join(text.split()), start)
            raise
        self._check(name, True, "; ".join(seen), start)

    def _check(self, name: str, ok: bool, detail: str, start: float) -> None:
        self._emit({"check": asdict(Check(name, ok, detail, round(time.perf_counter() - start, 3)))})


def check(emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Probe in this process; what ``python -m rlpatch.probe`` does.

    rlpatch is applied in full for the while and reverted. ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` must be set already.

    Args:
        emit: Called with ``{"step": name}`` and ``{"check": …}`` as steps begin and end.

    Returns:
        ``error`` and ``remedy`` (None when every step held), ``device``, ``sharing``, ``outcomes``.
    """
    import tempfile

    import rlpatch

    steps = _Steps(emit)
    result = steps.result
    try:
        rlpatch.apply(standby=True, share_weights=True)
        with tempfile.TemporaryDirectory(prefix="rlpatch-probe-") as folder:
            _cycle(steps, Path(folder))
    except ProbeFailed as failure:
        result["error"], result["remedy"] = str(failure), failure.remedy
    except Exception as error:
        import traceback

        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        result["outcomes"] = [outcome.as_dict() for outcome in rlpatch.status().outcomes]
        try:
            rlpatch.revert()
        except Exception as error:
            result["error"] = result["error"] or f"revert() failed: {error}"
    return result


def _cycle(steps: _Steps, folder: Path) -> None:
    """The probe itself. Raises ProbeFailed, or whatever a library raises."""
    with steps.step("import") as seen:
        import torch
        import transformers
        import vllm

        seen.append(f"torch {torch.__version__}, transformers {transformers.__version__}, vllm {vllm.__version__}")
        _require_outcomes("engine", "share_weights", "standby")

    from rlpatch import control, phases
    from rlpatch.demo.tiny import write_model
    from rlpatch.sharing.account import resident_twice
    from rlpatch.sharing.share import trainer_slots

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, tolerance = ("bfloat16", 0.1) if device.type == "cuda" else ("float32", 1e-3)
    with steps.step("trainer") as seen:
        path = write_model(folder / "model", "qwen3", dtype=dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
        seen.append(f"{sum(p.numel() for p in model.parameters())} parameters, {dtype}, on {device}")

    with steps.step("engine") as seen:
        context = control.context()
        if context is None:
            raise ProbeFailed("rlpatch.apply() is not in force any more", "report this")
        pair = phases.Colocation(context, trainer_slots(model))
        with pair.build():
            llm = vllm.LLM(model=str(path), dtype=dtype, enforce_eager=True, max_model_len=64, **_small_engine(device))
        engine = pair.engine
        if engine is None:
            raise ProbeFailed(
                "the engine was built but rlpatch was not told",
                "check that nothing else replaces vllm.LLM in this process",
            )
        steps.result["device"] = str(engine.device)
        seen.append(f"on {engine.device}")

    with steps.step("sharing") as seen:
        if pair.sharing is None:
            raise ProbeFailed(
                f"trainer and engine share nothing: {pair.refusal}",
                "plain TRL weight sync is used for this pair of releases; `python -m rlpatch matrix` lists tried pairs",
            )
        report = pair.sharing.report()
        steps.result["sharing"] = report.as_dict()
        twice = resident_twice(model, engine.model)
        if report.copied or report.absent or twice:
            why = "; ".join(sorted({*report.copied.values(), *report.absent.values()}))
            raise ProbeFailed(
                f"{len(report.copied) + len(report.absent)} of {len(pair.sharing.slots)} tensors are not shared, "
                f"{twice} bytes are resident twice: {why}",
                "an engine that repacks its weights cannot share them; `python -m rlpatch matrix` lists tried pairs",
            )
        seen.append(str(report))

    prompt = {"prompt_token_ids": _PROMPT}
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)

    def generate() -> tuple[list[int], list[float]]:
        completion = llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0]
        ids = list(completion.token_ids)
        return ids, [place[token].logprob for place, token in zip(completion.logprobs, ids, strict=True)]

    def rollout() -> tuple[list[int], list[float]]:
        with pair.rollout():
            return generate()

    def difference(tokens: list[int], found: list[float]) -> float:
        """Largest distance between the engine's log-probs of `tokens` and those of the trainer's own forward pass."""
        ids = torch.tensor([_PROMPT + tokens], device=device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(_PROMPT) - 1 : -1].float().log_softmax(-1)
        mine = logits.gather(1, ids[0, len(_PROMPT) :, None])[:, 0]
        return float((mine - torch.tensor(found, device=device)).abs().max())

    wrong_policy = "rollouts would not come from the current policy: do not train with sharing here; report this"
    with steps.step("agreement") as seen:
        tokens, logprobs = rollout()
        far = difference(tokens, logprobs)
        if not far <= tolerance:
            raise ProbeFailed(f"trainer and engine differ by {far:.2g} in log-probs of {TOKENS} tokens", wrong_policy)
        seen.append(f"{TOKENS} tokens, largest difference {far:.1g}")

    head = model.get_output_embeddings().weight
    old, other = tokens[0], (tokens[0] + 7) % 64
    original = head.detach().clone()
    with steps.step("write") as seen:
        theirs = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
        with torch.no_grad():  # the two words change places, so the greedy choice must move from one to the other
            head[[old, other]] = head[[other, old]].clone()
        # Before sync(), which would copy what is not shared any more: the bytes themselves must have changed.
        changed = [n for n, p in engine.model.named_parameters() if not torch.equal(p.detach(), theirs[n])]
        if not changed:
            raise ProbeFailed("two rows written by the trainer did not reach the engine's parameters", wrong_policy)
        if len(changed) > 1:
            raise ProbeFailed(
                f"writing one tensor of the trainer changed {', '.join(changed)} in the engine", wrong_policy
            )
        pair.sync()
        moved, probabilities = rollout()
        far = difference(moved, probabilities)
        if moved[0] != other:
            raise ProbeFailed(f"after the write the engine chose token {moved[0]} where {other} was due", wrong_policy)
        if not far <= tolerance:
            raise ProbeFailed(f"after the write log-probs differ by {far:.2g}", wrong_policy)
        seen.append(f"{changed[0]} changed; first token {old} became {moved[0]}; largest difference {far:.1g}")

    with steps.step("undo") as seen:
        with torch.no_grad():
            head[[old, other]] = head[[other, old]].clone()
        unequal = [n for n, p in engine.model.named_parameters() if not torch.equal(p.detach(), theirs[n])]
        if unequal or not torch.equal(head, original):
            raise ProbeFailed(f"undoing the write left {', '.join(unequal) or 'the trainer'} changed", wrong_policy)
        pair.sync()
        if rollout()[0] != tokens:
            raise ProbeFailed("with the old weights back the engine generates other tokens than before", wrong_policy)
        seen.append("weights bit for bit, tokens equal")

    with steps.step("standby") as seen:
        keep = "set RLPATCH_STANDBY=0 to train with the KV cache resident, and report this"
        if pair.standby is None:
            raise ProbeFailed(f"the KV cache stays resident: {pair.standby_refusal}", keep)
        mechanism = pair.standby.mechanism
        asleep, free = mechanism.resident_bytes(), _free_bytes(device)
        pointers = [parameter.data_ptr() for parameter in engine.model.parameters()]
        with pair.rollout():
            awake, taken = mechanism.resident_bytes(), free - _free_bytes(device)
            inside = generate()[0]
        again, left = rollout()[0], mechanism.resident_bytes()
        if asleep or left or not awake:
            raise ProbeFailed(f"KV bytes resident were {asleep} before, {awake} in, {left} after a rollout", keep)
        if device.type == "cuda" and taken < awake // 2:
            raise ProbeFailed(f"restoring {awake} bytes of KV cache took {taken} bytes from the device", keep)
        if inside != tokens or again != tokens:
            raise ProbeFailed("greedy tokens differ after a standby cycle", keep)
        if pointers != [parameter.data_ptr() for parameter in engine.model.parameters()]:
            raise ProbeFailed("the engine's weights moved in a standby cycle", keep)
        seen.append(
            f"KV cache {awake >> 20} MiB in a rollout, 0 outside; tokens equal after {pair.standby.cycles} cycles"
        )

    with steps.step("adapters") as seen:
        _import_waiting(control)
        _require_outcomes("generation")
        seen.append(", ".join(outcome.adapter for outcome in control.status().outcomes if outcome.adapter))


def _free_bytes(device: Any) -> int:
    """Free memory of the device in bytes; 0 on CPU, where others come and go."""
    import torch

    if device.type == "cpu":
        return 0
    torch.accelerator.synchronize()
    return int(torch.cuda.mem_get_info(device)[0])


def _small_engine(device: Any) -> dict[str, Any]:
    """Arguments of ``LLM`` that keep its KV cache at some MiB, as far as this release knows them."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    known = {entry.name for entry in fields(EngineArgs)}
    arguments: dict[str, Any] = {"gpu_memory_utilization": 0.05} if device.type == "cuda" else {}
    if "kv_cache_memory_bytes" in known:
        arguments["kv_cache_memory_bytes"] = _KV_BYTES
    else:
        arguments["num_gpu_blocks_override"] = 4096
    return arguments


def _import_waiting(control: Any) -> None:
    """Import the module of every adapter that still waits for it, so that its probe decides."""
    import importlib

    from rlpatch import registry

    waiting = {o.adapter for o in control.status().outcomes if o.state is registry.State.WAITING}
    for adapter in registry.adapters():
        if adapter.name in waiting:
            importlib.import_module(adapter.module)


def _require_outcomes(*capabilities: str) -> None:
    """Raises ProbeFailed unless each of `capabilities` is applied, is upstream's own, or still waits for its import."""
    import importlib

    from rlpatch import control, registry

    for capability in capabilities:
        adapter = next(iter(registry.candidates(capability)), None)
        if adapter is not None and adapter.library == "vllm":
            importlib.import_module(adapter.module)
        outcome = control.status()[capability]
        if outcome.state not in (registry.State.APPLIED, registry.State.NATIVE):
            served = f"{outcome.library} {' or '.join(outcome.supported)}" if outcome.supported else "none"
            absent = outcome.found is None
            raise ProbeFailed(
                str(outcome),
                f"install {outcome.library}" if absent else f"install a release that an adapter serves: {served}",
            )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rlpatch.probe``: JSON lines on standard output, everything else on standard error.

    Returns:
        0: every step held; 1: one did not; 2: usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rlpatch.probe",
        description="Build a tiny trainer/engine pair and check that sharing and standby work; prints JSON lines. "
        "`python -m rlpatch doctor --probe` runs it and explains what it found.",
    )
    try:
        parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    # Compiled code prints to the descriptor, Python code to sys.stdout: both go to standard error from here on.
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    result = check(emit)
    emit({"result": result})
    sys.stderr.flush()
    # Exit handlers of half a dozen compiled libraries may hang or crash; that is not what was asked.
    os._exit(0 if result["error"] is None else 1)


if __name__ == "__main__":
    raise SystemExit(main())
