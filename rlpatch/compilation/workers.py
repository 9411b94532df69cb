"""Inductor's compile processes, for the time in which an engine is built.

``torch/_inductor/async_compile.py``: with ``compile_threads`` above 1 Triton kernels are compiled by a pool of processes
and C++ ones by threads. vLLM's ``env_override.py`` sets ``TORCHINDUCTOR_COMPILE_THREADS=1`` when it is imported, because
its workers used to be daemons that may not have children (vllm-project/vllm#10480, #10619); an engine in the trainer's
process is none. The pool's start method decides whether it is safe there: ``subprocess``, the default, starts a fresh
interpreter with ``Popen`` that neither inherits a CUDA context nor runs the script again; ``fork`` would copy this
process with its threads and its CUDA context.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger("rlpatch")


def cores() -> int:
    """CPU cores for this process: those that it may run on, shared with its neighbours on this host."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        neighbours = 1
    return max(1, mine // max(1, neighbours))


def refusal() -> str | None:
    """Why no workers are started and their number is left as it is, or None."""
    import torch
    import torch._inductor.config as config

    if config.worker_start_method != "subprocess":
        return (
            f"its processes start by {config.worker_start_method}, which is not safe beside CUDA "
            "(TORCHINDUCTOR_WORKER_START)"
        )
    if pinned() or torch.cuda.is_available():
        return None
    return f"torch._inductor.config.compile_threads is {config.compile_threads} already"


def pinned() -> bool:
    """Whether vLLM's pin is in force. From 0.20 on it is the variable alone, which Inductor no longer reads when something
    has imported it before vLLM; then the number is torch's own (one per core, up to 32), or whatever the script set."""
    import torch._inductor.config as config

    threads: Any = config.compile_threads
    return threads in (None, 1)


@contextlib.contextmanager
def compile_workers(count: int) -> Iterator[None]:
    """`count` workers inside, if vLLM's pin was in force; their number and the pool are as before afterwards.

    On a GPU the pool is started at once: its processes take seconds to import torch, and until they are ready Inductor
    compiles in this process. So they get ready while the weights are loaded and Dynamo traces.
    """
    import torch
    import torch._inductor.config as config
    from torch._inductor.async_compile import AsyncCompile, shutdown_compile_workers

    before: Any = config.compile_threads
    raised = pinned()
    had_pool = AsyncCompile.process_pool.cache_info().currsize > 0
    if raised:
        config.compile_threads = count
    try:
        if torch.cuda.is_available():
            AsyncCompile.use_process_pool()
        yield
    finally:
        config.compile_threads = before
        if raised and not had_pool and AsyncCompile.process_pool.cache_info().currsize > 0:
            try:
                shutdown_compile_workers()
            except Exception as error:  # they are idle and end with this process
                logger.info("rlpatch: Inductor's compile processes stay: %s", error)
