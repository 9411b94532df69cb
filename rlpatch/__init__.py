"""rlpatch: one GPU does the work of two in RL post-training.

``import rlpatch; rlpatch.apply()`` above an ordinary TRL script makes the trainer and a colocated vLLM share one copy of
the weights and lets the KV cache exist only while tokens are generated. Importing rlpatch imports neither torch nor vLLM
nor TRL, and neither does `apply`: what is not imported yet is patched when it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from contextlib import AbstractContextManager

    import torch

    from rlpatch.control import Report

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "load", "patched", "revert", "status"]


def apply(
    *,
    standby: bool | None = None,
    share_weights: bool | None = None,
    defaults: bool | Iterable[str] | str | None = None,
    lora: str | None = None,
    precision: str | None = None,
    compile: str | None = None,
    memory_plan: bool | int | str | None = None,
    one_forward: bool | None = None,
    park_optimizer: bool | str | None = None,
    expandable_segments: bool | str | None = None,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
    strict: bool | None = None,
) -> Report:
    """Patch the installed vLLM and TRL, now or when they are imported. Applying twice is once.

    Args:
        standby: Release the KV cache's memory whenever no tokens are generated. None: ``RLPATCH_STANDBY``, then
            ``UNSLOTH_VLLM_STANDBY``, then True.
        share_weights: One copy of the weights for trainer and engine. None: ``RLPATCH_SHARE_WEIGHTS``, then True.
        defaults: Better defaults for the config fields of GRPO and its kin that were left alone, and batches that divide
            (docs/config.md); False for none of it, or the names of those wanted, e.g. ``{"optim", "divisibility"}``. What
            was changed is logged once per config. None: ``RLPATCH_DEFAULTS`` (yes, no, or names), then True.
        lora: How a LoRA reaches the engine. ``"fold"``: folded into the shared weights for each rollout and taken out
            again bit for bit; ``"slots"``: through vLLM's own LoRA kernels; ``"merge"``: TRL's merge, push and unmerge;
            ``"auto"``: the fold where it is exact, else slots, else merge. None: ``RLPATCH_LORA``, then ``"auto"``.
        precision: Of the trainer's weights. ``"auto"``: a model that the trainer loads from a path under ``bf16=True`` gets
            the engine's bfloat16, so that the two can share; trained weights keep float32 masters in the optimizer, a
            base frozen under adapters needs none, and whatever the script chose itself (a model object, a ``dtype``)
            stays. ``"masters"``: this for objects and given dtypes, too, and an error where it is not possible.
            ``"as-is"``: TRL's precision. None: ``RLPATCH_PRECISION``, then ``"auto"``.
        compile: How the engine is compiled, warmed up and captured: ``"default"`` leaves vLLM alone, ``"fast-start"`` and
            ``"throughput"`` are sets of the settings in docs/compilation.md, which can also be named one by one
            (``"workers,capture-sizes"``). What the script gives the engine itself wins. None: ``RLPATCH_COMPILE``, then
            ``"default"``.
        memory_plan: Where a GRPO or RLOO config leaves ``vllm_gpu_memory_utilization`` alone, standby is on and the
            weights are shared, the KV cache gets all that a memory plan leaves for it (docs/memory.md); a plan that does
            not fit is an error before the engine is built. False: TRL's utilization. A size, ``"40GiB"`` or a number of
            bytes: trainer and engine take no more of the device than that. None: ``RLPATCH_MEMORY_PLAN`` (yes, no, or a
            size), then True.
        one_forward: GRPO's loss takes the log-probs that scoring computed from the same weights instead of a second forward
            pass, where each completion is used for one optimizer step. None: ``RLPATCH_ONE_FORWARD``, then True.
        park_optimizer: The optimizer's state lies in host memory except while it steps: room for activations and for the KV
            cache, at the price of a copy out and one back per step. ``"auto"``: if the memory plan does not fit otherwise.
            None: ``RLPATCH_PARK_OPTIMIZER`` (yes, no or auto), then ``"auto"``.
        expandable_segments: torch's allocator gives back what is free in its segments instead of whole ones, and grows
            them: room for long contexts, at the price of some milliseconds a step per GiB of gradients. ``"auto"``: if the
            memory plan does not fit otherwise, or only just. What ``PYTORCH_CUDA_ALLOC_CONF`` says of them wins. None:
            ``RLPATCH_EXPANDABLE_SEGMENTS`` (yes, no or auto), then ``"auto"``.
        include: Only these capabilities (names as in `status`). None: ``RLPATCH_INCLUDE`` (comma-separated), then all.
        exclude: Never these. None: ``RLPATCH_EXCLUDE``.
        strict: Releases that no adapter serves are an error. None: ``RLPATCH_STRICT``, then False (a warning).

    Returns:
        What became of each capability, as data; the same that `status` returns.

    Raises:
        rlpatch.errors.UsageError: unknown capability or unusable value; nothing is patched.
        rlpatch.errors.UnsupportedError: under `strict`, or for a capability named in `include`; nothing stays patched.
    """
    from rlpatch import control

    return control.apply(
        standby=standby,
        share_weights=share_weights,
        defaults=defaults,
        lora=lora,
        precision=precision,
        compile=compile,
        memory_plan=memory_plan,
        one_forward=one_forward,
        park_optimizer=park_optimizer,
        expandable_segments=expandable_segments,
        include=include,
        exclude=exclude,
        strict=strict,
    )


def load(
    model: str | os.PathLike[str],
    *,
    max_seq_length: int,
    load_in_4bit: bool = False,
    max_lora_rank: int = 64,
    gpu_memory_utilization: float | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model_arguments: Mapping[str, Any] | None = None,
    **engine: Any,
) -> tuple[Any, Any]:
    """Load a causal language model for training, with a vLLM engine attached that shares its weights from the start.

    `apply` is called with its defaults when it is not in force. The model is an ordinary transformers model: train all of
    it, or ``peft.get_peft_model(model, …)``, and hand it to a TRL trainer (``use_vllm=True, vllm_mode="colocate"``), which
    then generates with this engine and builds no second one. It has three functions more, which a ``PeftModel`` around it
    forwards (see `rlpatch.loading.Attachment`): ``fast_generate(prompts, sampling_params, lora=…)``, ``save_lora(path)``
    and ``load_lora(path)``.

    Args:
        model: A folder or a hub id; transformers and vLLM both read it.
        max_seq_length: Prompt and completion together, in tokens: vLLM's ``max_model_len``.
        load_in_4bit: Quantize to 4 bits (nf4, double quantization) with bitsandbytes; GPUs only. Adapters are then served
            from vLLM's LoRA slots, because folding them into 4 bits would lose them.
        max_lora_rank: Largest rank that the LoRA slots hold, where slots are used: under ``load_in_4bit`` and
            ``apply(lora="slots")``. The fold knows no limit, and no memory is reserved for it.
        gpu_memory_utilization: Share of the device, between 0 and 1, that vLLM may fill with weights, activations and KV
            cache; the weights in it are the trainer's too. None: 0.5. (On a CPU: of the machine's memory.)
        dtype: Of trainer and engine alike: ``"bfloat16"``, ``"float16"``, ``"float32"`` or torch's. None: the checkpoint's;
            under `load_in_4bit` that of the computations, ``"bfloat16"`` unless the checkpoint is in 16 bits.
        revision: Of a hub id.
        trust_remote_code: For transformers and vLLM.
        model_arguments: Further arguments of ``AutoModelForCausalLM.from_pretrained``, e.g. ``attn_implementation``.
        engine: Further arguments of ``vllm.LLM``, e.g. ``max_num_seqs``, ``enforce_eager``, ``seed``.

    Returns:
        The model, on this process's device, and its tokenizer (padding on the left, as TRL wants it).

    Raises:
        rlpatch.errors.UsageError: an argument has an unusable value, or contradicts the settings of `apply`.
        rlpatch.errors.UnsupportedError: no adapter shares weights with this vLLM, or it has no bitsandbytes.
        rlpatch.errors.SharingError: this model cannot share its weights with an engine (says why).
    """
    from rlpatch import loading

    return loading.load(
        model,
        max_seq_length=max_seq_length,
        load_in_4bit=load_in_4bit,
        max_lora_rank=max_lora_rank,
        gpu_memory_utilization=gpu_memory_utilization,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        model_arguments=model_arguments,
        **engine,
    )


def revert() -> Report:
    """Take every patch out again (the original objects are put back) and part what running trainers share.

    A running trainer gets weights of its own again and its engine's KV cache is restored, so that plain TRL can go on.
    """
    from rlpatch import control

    return control.revert()


def status() -> Report:
    """What was done and why: one outcome per capability, and what each live trainer/engine pair shares."""
    from rlpatch import control

    return control.status()


def patched(**settings: Any) -> AbstractContextManager[Report]:
    """``with rlpatch.patched(...):`` is `apply` on entry and `revert` on exit, with the same arguments as `apply`."""
    from rlpatch import control

    return control.patched(**settings)
