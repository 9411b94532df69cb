"""One face over a ``vllm.LLM`` that runs in this process: its model, its pause, its caches, its KV memory.

Everything here holds for every supported release (attribute paths verified in vLLM 0.9.2 to 0.33.0); what differs
between releases lives in adapters.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from rlpatch.errors import StandbyError

logger = logging.getLogger("rlpatch")

_MOST_DRAIN_STEPS = 64  # two were seen to suffice; more than a queue's depth means that something is stuck


class Engine:
    """A ``vllm.LLM`` built with V1 multiprocessing off (what TRL's colocate mode does).

    Args:
        llm: The ``vllm.LLM``.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    @property
    def core(self) -> Any:
        """vLLM's EngineCore. Raises StandbyError when it lives in another process."""
        client = getattr(self.llm.llm_engine, "engine_core", None)
        if client is None:  # 0.9 and 0.10 still have it, and fall back to it on their own
            raise StandbyError(
                "this is vLLM's V0 engine; unset VLLM_USE_V1, or leave out what made vLLM fall back to V0"
            )
        core = getattr(client, "engine_core", None)
        if core is None:
            raise StandbyError(
                "the vLLM engine runs in a process of its own; set VLLM_ENABLE_V1_MULTIPROCESSING=0 before it is built"
            )
        return core

    @property
    def worker(self) -> Any:
        """The driver worker (unwrapped)."""
        worker = self.llm.llm_engine.model_executor.driver_worker
        return getattr(worker, "worker", None) or worker

    @property
    def runner(self) -> Any:
        """The model runner, whichever class this release uses."""
        return self.worker.model_runner

    @property
    def model(self) -> torch.nn.Module:
        """The engine's module, without the graph wrappers that V1 puts around it."""
        return self.runner.get_model()  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where its weights live."""
        return torch.device(self.runner.device)

    @property
    def sleep_mode(self) -> bool:
        """Whether it was built with vLLM's sleep mode (its memory then comes from vLLM's pool)."""
        return bool(getattr(self.llm.llm_engine.model_config, "enable_sleep_mode", False))

    @property
    def lora_slots(self) -> bool:
        """Whether it was built with vLLM's LoRA engine."""
        return getattr(self.llm.llm_engine.vllm_config, "lora_config", None) is not None

    # ---- the KV cache ------------------------------------------------------------------------------------------

    def kv_tensors(self) -> list[torch.Tensor]:
        """One tensor per distinct storage of the KV cache (several layers may share one)."""
        found: dict[int, torch.Tensor] = {}
        for tensor in self.kv_views():
            found.setdefault(int(tensor.untyped_storage()._cdata), tensor)
        return list(found.values())

    def kv_views(self) -> list[torch.Tensor]:
        """Every tensor of the KV cache, as the layers see it."""
        found = []
        pending = list(self.runner.kv_caches)
        while pending:
            entry = pending.pop()
            if isinstance(entry, torch.Tensor):
                found.append(entry)
            elif isinstance(entry, (list, tuple)):
                pending.extend(entry)
        return found

    # ---- pausing -----------------------------------------------------------------------------------------------

    def abort_requests(self) -> int:
        """Abort whatever is unfinished, in the front end and in the core; returns how many there were.

        After an exception or Ctrl-C inside ``generate`` the front end still tracks its requests, and the next
        ``generate`` would return their outputs too.
        """
        front = self.llm.llm_engine
        tracked = list(getattr(front.output_processor, "request_states", {}))
        if tracked:
            try:
                front.abort_request(tracked, internal=True)
            except TypeError:  # releases that know one kind of id only
                front.abort_request(tracked)
        return len(tracked)

    def drain(self) -> None:
        """Step until nothing is scheduled, finished ids are flushed and no batch is in flight.

        Right after ``generate()`` finished ids are not flushed yet, and with asynchronous scheduling a batch still sits
        in ``batch_queue``; releasing memory then is refused by vLLM ("requires a completed pause first") or races.

        Raises:
            StandbyError: the engine does not come to rest.
        """
        core = self.core
        step = getattr(core, "step_fn", None) or core.step
        for _ in range(_MOST_DRAIN_STEPS):
            if not core.scheduler.has_requests() and not getattr(core, "batch_queue", None):
                return
            step()
        raise StandbyError(f"the engine still has requests after {_MOST_DRAIN_STEPS} steps; they were not aborted")

    def reset_caches(self) -> None:
        """Forget prefix, multimodal and encoder caches: they describe or live in memory that is about to go away."""
        front = self.llm.llm_engine
        front.reset_prefix_cache()
        front.reset_mm_cache()  # both ends: the front end's cache and the core's mirror each other
        reset_encoder = getattr(front, "reset_encoder_cache", None) or getattr(self.core, "reset_encoder_cache", None)
        if reset_encoder is not None:
            reset_encoder()


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish (no-op on CPU)."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
