"""Checkpoints of published shapes with random weights: ``python -m rlpatch.bench.shapes SHAPE FOLDER [--bare]``.

Memory and speed do not depend on what the weights say, so these stand in for the real ones on hosts that reach no model
hub. Made in bfloat16, on the GPU when there is one (8b: under 20 s on an H200); ``--bare`` leaves the weights out. ``tiny``
is the demo's model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 151_936
# The published 40,960 would bound `--sweep-context`; rotary tables are all that grows (34 MB for 132 Ki positions).
POSITIONS = 132 * 1024
TINY = "tiny"
# Qwen3, dense: all have 8 KV heads of 128
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tied=True),
    "1.7b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, tied=True),
    "4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, tied=True),
    "8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, tied=False),
    "14b": dict(hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40, tied=False),
    "32b": dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, tied=False),
}
NAMES = (TINY, *SHAPES)
_MARKER = "rlpatch-shape.json"


def present(shape: str, folder: Path) -> bool:
    """Whether `folder` holds a finished checkpoint of `shape`."""
    try:
        return bool(json.loads((folder / _MARKER).read_text()) == _identity(shape))
    except (OSError, ValueError):
        return False


def _identity(shape: str) -> dict[str, Any]:
    return {"shape": shape, "positions": POSITIONS, "format": 1}


def write(shape: str, folder: str | Path, seed: int = 0, bare: bool = False) -> bool:
    """Make the checkpoint of `shape` in `folder` unless it is there already; `bare`: without weights.

    Returns:
        Whether it was made.

    Raises:
        KeyError: no such shape.
    """
    folder = Path(folder)
    if present(shape, folder):
        return False
    (folder / _MARKER).unlink(missing_ok=True)
    import torch

    from rlpatch.demo import tiny

    if shape == TINY:
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        tiny.write_model(folder, seed=seed, dtype=dtype, max_position_embeddings=POSITIONS)
        for weights in folder.glob("*.safetensors") if bare else ():
            weights.unlink()
    else:
        _write_qwen3(SHAPES[shape], folder, seed, bare)
    (folder / _MARKER).write_text(json.dumps(_identity(shape)))  # last: an unfinished folder is not `present`
    return True


def _write_qwen3(shape: dict[str, Any], folder: Path, seed: int, bare: bool) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlpatch.demo import tiny

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.write_tokenizer(folder, VOCABULARY - 3)
    fields = {k: v for k, v in shape.items() if k != "tied"}
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=POSITIONS,
        rope_theta=1e6,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=shape["tied"],
        dtype="bfloat16",
        **fields,
    )
    config.architectures = [Qwen3ForCausalLM.__name__]
    if bare:
        config.save_pretrained(folder)
    else:
        random_model(config, seed).save_pretrained(folder)


def random_model(config: Any, seed: int = 0) -> Any:
    """The causal language model of `config`, in its dtype, made where it is to be: on the GPU when there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) not in (2, 3) or arguments[0] not in NAMES or arguments[2:] not in ([], ["--bare"]):
        print(f"usage: python -m rlpatch.bench.shapes {{{','.join(NAMES)}}} FOLDER [--bare]", file=sys.stderr)
        return 2
    made = write(arguments[0], arguments[1], bare=bool(arguments[2:]))
    print(f"{arguments[0]}: {'made' if made else 'already'} in {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
