"""``python -m rlpatch <command>``; each command lives in its own module and is imported only when asked for."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "doctor": ("rlpatch.doctor", "what is installed, which adapter serves it, and what would break it"),
    "plan": ("rlpatch.memory.command", "what fits on a GPU: memory by phase, KV cache, longest context; needs no GPU"),
    "demo": ("rlpatch.demo.command", "train a tiny model with plain TRL and patched, side by side"),
    "bench": ("rlpatch.bench.command", "time and memory by phase: plain TRL, its sleep mode and rlpatch, side by side"),
    "matrix": ("rlpatch.matrix", "the table of known version pairs; `check vllm==0.33.0` checks a release's sources"),
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch; exit status 0 fine, 1 problem, 2 usage."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m rlpatch COMMAND [options]\n\ncommands:")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:8} {text}")
        print("\npython -m rlpatch COMMAND --help tells a command's options.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import rlpatch

        print(rlpatch.__version__)
        return 0
    if arguments[0] not in COMMANDS:
        print(f"rlpatch: unknown command {arguments[0]!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
