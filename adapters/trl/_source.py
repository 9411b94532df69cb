"""TRL's source text, for probes: importing its modules would import transformers long before the script wants that."""

from __future__ import annotations

from pathlib import Path


def text(relative: str) -> str:
    """The text of one file of the installed TRL, e.g. ``"trainer/grpo_config.py"``; empty when it has none."""
    import trl

    file = Path(next(iter(trl.__path__)), relative)
    return file.read_text(encoding="utf-8") if file.is_file() else ""
