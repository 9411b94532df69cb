"""What our wrappers cost per call: ``python -m rlpatch.bench.overhead [--out FILE]``.

One tiny trainer/engine pair; every figure is the median over alternating calls in one process. The wrapper's own cost of
``generate`` is measured around an empty function with an empty standby mechanism, because generation itself takes many
times longer than what is to be measured and would drown it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import rlpatch
from rlpatch.demo import tiny, worker
from rlpatch.versions import installed


class _NoMechanism:
    """Releases nothing: leaves the cost of the cycle's own bookkeeping (drain, abort check, synchronize)."""

    def release(self) -> None: ...

    def restore(self) -> None: ...

    def resident_bytes(self) -> int:
        return 0


def median_ms(function: Callable[[], Any], calls: int) -> float:
    """Median seconds of `calls` calls, in milliseconds."""
    spent = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        spent.append(time.perf_counter() - start)
    return 1e3 * statistics.median(spent)


def measure(calls: int = 200) -> dict[str, Any]:
    """Milliseconds per call; see the keys."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny.write_model(folder, "qwen3"))
        rlpatch.apply()
        trainer = worker.make_trainer(worker.Job(model, True))
        generation = trainer.vllm_generation
        pair = generation._rlpatch_pair
        assert pair.standby is not None
        plain_sync = type(generation).sync_weights.__wrapped__

        def push() -> None:
            plain_sync(generation)

        def cycle() -> None:
            pair.standby.restore()
            pair.standby.release()

        def empty_rollout() -> None:
            with pair.rollout():
                pass

        result = {
            "weight sync, shared": median_ms(generation.sync_weights, calls),
            "weight sync, TRL's own push": median_ms(push, calls),
            "standby cycle, 32 MiB": median_ms(cycle, calls),
        }
        mechanism, pair.standby.mechanism = pair.standby.mechanism, _NoMechanism()
        result["wrapper around generate"] = median_ms(empty_rollout, calls)
        pair.standby.mechanism = mechanism
        rlpatch.revert()
    return {
        "unit": "ms",
        "calls": calls,
        **{n: str(installed(n).version) for n in ("vllm", "trl", "torch")},
        "median": result,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlpatch.bench.overhead", description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--out", help="write the JSON there as well")
    options = parser.parse_args(argv)
    text = json.dumps(measure(options.calls), indent=1)
    print(text)
    if options.out:
        with open(options.out, "w") as file:
            file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
