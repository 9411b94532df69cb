"""LoRA without a second copy: a reversible fold into the shared weights, or vLLM's own slots, written in place."""
