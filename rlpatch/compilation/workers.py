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
    """Why the number of workers is left as it is, or None."""
    import torch._inductor.config as config

    threads: Any = config.compile_threads
    if threads not in (None, 1):  # set after vLLM's import, or Inductor was imported before
        return f"torch._inductor.config.compile_threads is {threads} already"
    if config.worker_start_method != "subprocess":
        return (
            f"its processes start by {config.worker_start_method}, which is not safe beside CUDA "
            "(TORCHINDUCTOR_WORKER_START)"
        )
    return None


@contextlib.contextmanager
def compile_workers(count: int) -> Iterator[None]:
    """`count` workers inside; afterwards the number that was, and no process that was not there before."""
    import torch
    import torch._inductor.config as config
    from torch._inductor.async_compile import AsyncCompile, shutdown_compile_workers

    before: Any = config.compile_threads
    had_pool = AsyncCompile.process_pool.cache_info().currsize > 0
    config.compile_threads = count
    try:
        if torch.cuda.is_available():
            # They take seconds to import torch. Until they are ready Inductor compiles in this process: start them now,
            # while the weights are loaded and Dynamo traces.
            AsyncCompile.use_process_pool()
        yield
    finally:
        config.compile_threads = before
        if not had_pool and AsyncCompile.process_pool.cache_info().currsize > 0:
            try:
                shutdown_compile_workers()
            except Exception as error:  # they are idle and end with this process
                logger.info("rlpatch: Inductor's compile processes stay: %s", error)
