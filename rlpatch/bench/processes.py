"""The bench's processes: a fresh one per measurement, one at a time, and the ballast that makes a card seem smaller."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlpatch.bench import shapes
from rlpatch.bench.run import BenchJob, is_out_of_memory

LOG_LINES = 60


class BenchError(Exception):
    """The bench cannot go on; the message says why."""


class Runner:
    """Runs jobs in fresh processes, one at a time (a context manager, which ends those that still wait for a job).

    Args:
        scratch: Folder for logs and trainers' output.
        logs: Folder in which logs are kept, or None. Several benches may share it: names end in this process's number.
        timeout: Seconds until a process is killed, from when it has its job.
        module: What a process runs; its ``main`` reads the job with `read_job`.
        ahead: While one process is at work the next one imports what it will need: for figures that are no seconds.
    """

    def __init__(
        self, scratch: Path, logs: Path | None, timeout: float, module: str = "rlpatch.bench.run", ahead: bool = False
    ) -> None:
        self.scratch, self.timeout, self.module, self.ahead = scratch, timeout, module, ahead
        self.logs = logs or scratch
        self.logs.mkdir(parents=True, exist_ok=True)
        self.count = self._made = 0
        self._waiting: list[tuple[subprocess.Popen[str], Path]] = []

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()

    def dismiss(self) -> None:
        """End the processes that wait."""
        for process, log in self._waiting:
            _end(process)
            log.unlink()
        self._waiting.clear()

    @property
    def waiting(self) -> int:
        """Processes that wait for a job."""
        return len(self._waiting)

    def prepare(self, environments: Sequence[Mapping[str, str]], title: str) -> None:
        """Start the processes of the next jobs, all at once, each with these variables, and let them import what they will
        need: where seconds count, they then do so while nothing is measured."""
        with Progress(title) as progress:
            made = [self._start(extra) for extra in environments]
            for process, _log in made:
                assert process.stdout is not None
                while (line := process.stdout.readline()) and "ready" not in _message(line):
                    pass
            progress.end("done")

    def _start(self, extra: Mapping[str, str], ahead: bool = True) -> tuple[subprocess.Popen[str], Path]:
        """A process that waits for its job, the last of those that do; `ahead`: and imports meanwhile."""
        self._made += 1
        log = self.logs / f"process-{self._made:02d}.{os.getpid()}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", self.module, *(["--ahead"] if ahead else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**_environment(), **extra},
                start_new_session=True,  # what it starts (compile workers) ends with it
            )
        self._waiting.append((process, log))
        return process, log

    def run(self, job: BenchJob, title: str, timeout: float | None = None) -> dict[str, Any]:
        """``{"result": …}``, ``{"skipped": reason}`` or ``{"error": {text, stage, phase, out_of_memory}, "log": […]}``,
        each with ``seconds``, ``engine`` and ``rows`` (a step's seconds and tokens) as far as it came."""
        self.count += 1
        outcome: dict[str, Any] = {}
        stage = "import"
        start = time.monotonic()
        if not self._waiting:
            self._start({}, ahead=False)
        process, started = self._waiting.pop(0)
        log = started.rename(self.logs / f"{self.count:02d}-{job.variant.replace(':', '-')}.{os.getpid()}.log")
        with Progress(title) as progress:
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(timeout or self.timeout, _kill, [process])
            timer.start()
            try:
                process.stdin.write(json.dumps(asdict(replace(job, output=str(self.scratch / f"out-{self.count}")))))
                process.stdin.close()
                if self.ahead:
                    self._start({})
                for line in process.stdout:
                    message = _message(line)
                    if "stage" in message:
                        stage = message["stage"]
                        progress.say(stage)
                    elif "progress" in message:
                        row = message["progress"]
                        progress.say(f"step {row['step']}/{job.steps}")
                        outcome.setdefault("rows", []).append({k: v for k, v in row.items() if k != "step"})
                    elif "trained" in message and outcome.get("rows"):
                        outcome["rows"][-1]["trained"] = message["trained"]
                    elif "engine" in message:
                        outcome["engine"] = message["engine"]
                    outcome.update({k: v for k, v in message.items() if k in ("result", "skipped", "error")})
                _ended(process)
            except BrokenPipeError:
                _ended(process)
            finally:
                late = not timer.is_alive()
                timer.cancel()
                _end(process)
            if "result" not in outcome and "skipped" not in outcome:
                outcome["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                if "error" not in outcome:  # it could not say itself
                    error = _death(process.returncode, late, timeout or self.timeout, stage)
                    error["out_of_memory"] |= is_out_of_memory("\n".join(outcome["log"]))
                    outcome["error"] = error
            progress.end("failed: " + failure(outcome["error"]) if "error" in outcome else
                         "skipped: " + outcome["skipped"] if "skipped" in outcome else "done")  # fmt: skip
        outcome["seconds"] = time.monotonic() - start
        return outcome


def _message(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {}
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _death(status: int, late: bool, timeout: float, stage: str) -> dict[str, Any]:
    if late:
        text = f"no result after {timeout:.0f} s"
    elif status < 0:
        try:
            text = f"killed by {signal.Signals(-status).name}"
        except ValueError:
            text = f"killed by signal {-status}"
    else:
        text = f"the process ended with status {status}"
    # the kernel's way of saying that host memory is full
    return {"text": text, "stage": stage, "phase": None, "out_of_memory": status == -signal.SIGKILL and not late,
            "late": late}  # fmt: skip


def _ended(process: subprocess.Popen[str]) -> None:
    """Wait for the process's end without reaping it, so that its process group's id stays taken."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill the process, unless it has been reaped, and all that it started."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _end(process: subprocess.Popen[str]) -> None:
    """Kill and reap."""
    _kill(process)
    process.wait()


def _environment() -> dict[str, str]:
    from rlpatch.demo.command import _environment, _free_port

    return {**_environment(_free_port()), "PYTHONUNBUFFERED": "1"}


class Progress:
    """A line per process on standard error; rewritten in place on a terminal, else printed again now and then."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.note = "starting"
        self.terminal = sys.stderr.isatty()
        self._stop = threading.Event()
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        self._print()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()
        return self

    def say(self, note: str) -> None:
        """What it is doing now."""
        self.note = note

    def _tick(self) -> None:
        while not self._stop.wait(0.5 if self.terminal else 30):
            self._print()

    def _print(self, end: bool = False) -> None:
        line = f"{self.title}: {self.note} ({time.monotonic() - self._start:.0f} s)"
        if self.terminal:
            print(f"\r\x1b[K{line[:160]}", end="\n" if end else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self, note: str) -> None:
        """The last word."""
        self.note = note

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._print(end=True)


@contextmanager
def ballast(gib: float | None) -> Iterator[dict[str, Any] | None]:
    """Hold all but `gib` GiB of the device in a process of its own meanwhile; nothing when `gib` is None."""
    if gib is None:
        yield None
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "rlpatch.bench.ballast", str(gib)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        while not answer and (line := process.stdout.readline()):
            answer = _message(line)
        if "free" not in answer:
            raise BenchError(answer.get("error", "the ballast process died"))
        yield answer
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            _end(process)


def device_facts() -> dict[str, Any]:
    """Name and size of the device, asked in a process of its own so that torch and its context stay out of this one."""
    code = (
        "import json, torch; c = torch.cuda.is_available(); "
        "print(json.dumps({'cuda': c, 'name': torch.cuda.get_device_name() if c else 'CPU', "
        "'total_bytes': torch.cuda.get_device_properties(0).total_memory if c else None, "
        "'cuda_version': torch.version.cuda}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [message for line in answer.stdout.splitlines() if (message := _message(line))]
    if not found:
        raise BenchError(f"torch does not import: {answer.stderr.strip().splitlines()[-1:]}")
    return found[-1]


def failure(error: dict[str, Any]) -> str:
    """One line: what failed where, e.g. ``out of memory in train``."""
    where = error.get("phase") or error.get("stage") or "start"
    return f"{'out of memory' if error.get('out_of_memory') else error['text'].splitlines()[0][:160]} in {where}"


def checkpoint(options: argparse.Namespace, shape: str | None, device: dict[str, Any], bare: bool = False) -> str:
    """The folder of `--model` or of `shape`, made if need be; `bare`: config and tokenizer without weights."""
    if shape is None:
        return str(options.model)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent = Path(options.models) if options.models else cache / "rlpatch" / "models"
    folder = parent / f"{shape}-{'bf16' if device['cuda'] else 'cpu'}{'-bare' if bare else ''}"
    if not shapes.present(shape, folder):
        with Progress(f"making {shape} in {folder}") as progress:
            command = [sys.executable, "-m", "rlpatch.bench.shapes", shape, str(folder), *(["--bare"] if bare else [])]
            made = subprocess.run(command, capture_output=True, text=True, env=_environment())
            progress.end("failed" if made.returncode else "done")
        if made.returncode:
            raise BenchError(f"{shape} could not be made:\n{made.stderr[-2000:]}")
    return str(folder)
