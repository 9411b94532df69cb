"""Tiny real models of several families, made locally: a checkpoint folder with config, weights and a tokenizer.

No model hub is needed. Sizes obey what vLLM's CPU attention accepts (head_dim 32).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = 61  # with the three special tokens the vocabulary has 64 entries
_COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
)
# family -> (config class, model class, what differs from _COMMON)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 32, "sliding_window": 64}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"head_dim": None, "pad_token_id": 1}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "tie_word_embeddings": False}),
}


def write_tokenizer(folder: Path, words: int = WORDS) -> Any:
    """A word-level tokenizer of `words` words ``w0 w1 …`` plus ``<unk> <pad> <eos>``, saved into `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {"<unk>": 0, "<pad>": 1, "<eos>": 2} | {f"w{i}": i + 3 for i in range(words)}
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(
    folder: str | Path,
    family: str = "qwen3",
    *,
    words: int = WORDS,
    seed: int = 0,
    dtype: str = "float32",
    **changes: Any,
) -> Path:
    """Write a randomly initialised checkpoint of `family` with its tokenizer.

    Args:
        folder: Where to; created.
        family: A key of `FAMILIES`.
        words: Vocabulary size less 3.
        seed: Of the weights.
        dtype: Of the saved weights and of the config, e.g. ``"bfloat16"``.
        changes: Config fields to change.

    Returns:
        The folder.
    """
    import torch
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, words)
    config_name, model_name, special = FAMILIES[family]
    fields = {**_COMMON, **special, **changes, "vocab_size": words + 3, "eos_token_id": 2, "bos_token_id": None}
    fields.setdefault("pad_token_id", 1)
    config = getattr(transformers, config_name)(
        **{k: v for k, v in fields.items() if v is not None or k == "bos_token_id"}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).to(getattr(torch, dtype))
    with torch.no_grad():  # random norms and a livelier head: agreement on constant tensors would prove little
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif parameter.dim() >= 2:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    return folder
