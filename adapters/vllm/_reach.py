"""What `rlpatch.engine` and the cores above it touch of a ``vllm.LLM``; declared by the adapters that they serve."""

from __future__ import annotations

from rlpatch.relies import Relies

_CORE = "vllm.v1.engine.core:EngineCore"
_FRONT = "vllm.v1.engine.llm_engine:LLMEngine"
_RUNNERS = ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner")

# Model Runner V2 came with 0.12; before, its module does not exist.
_EITHER_RUNNER = tuple(
    Relies(f"{runner}.{name}", versions="" if runner is _RUNNERS[0] else ">=0.12")
    for runner in _RUNNERS
    for name in ("get_model", "device", "kv_caches")
)

# Engine.core, .worker, .runner, .model, .device, .sleep_mode, .lora_slots
REACHED = (
    Relies("vllm.entrypoints.llm:LLM.llm_engine"),
    Relies("vllm.entrypoints.llm:LLM.reset_prefix_cache"),
    Relies(f"{_FRONT}.engine_core"),
    Relies("vllm.v1.engine.core_client:InprocClient.engine_core"),
    Relies(f"{_FRONT}.model_executor"),
    Relies(
        "vllm.v1.executor.uniproc_executor:ExecutorWithExternalLauncher.driver_worker",
        otherwise=(Relies("vllm.executor.uniproc_executor:ExecutorWithExternalLauncher.driver_worker"),),
    ),
    Relies(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.worker",
        otherwise=(Relies("vllm.worker.worker_base:WorkerWrapperBase.worker"),),
    ),
    Relies("vllm.v1.worker.gpu_worker:Worker.model_runner"),
    Relies("vllm.v1.worker.cpu_worker:CPUWorker.model_runner"),
    *_EITHER_RUNNER,
    Relies(f"{_FRONT}.model_config"),
    Relies(f"{_FRONT}.vllm_config"),
    Relies("vllm.config:ModelConfig.enable_sleep_mode"),
    Relies("vllm.config:ModelConfig.max_model_len"),
    Relies("vllm.config:VllmConfig.lora_config"),
    Relies("vllm.config:VllmConfig.cache_config"),
    Relies("vllm.config:CacheConfig.gpu_memory_utilization"),
)

# Engine.abort_requests, .drain, .reset_caches: what `rlpatch.standby` does before memory goes
AT_REST = (
    Relies(f"{_FRONT}.output_processor"),
    Relies("vllm.v1.engine.output_processor:OutputProcessor.request_states"),
    Relies(f"{_FRONT}.abort_request", positional=("request_ids",)),
    Relies(f"{_CORE}.step_fn", otherwise=(Relies(f"{_CORE}.step"),)),
    Relies(f"{_CORE}.scheduler"),
    Relies(f"{_CORE}.batch_queue"),
    Relies("vllm.v1.core.sched.scheduler:Scheduler.has_requests"),
    Relies(f"{_FRONT}.reset_prefix_cache"),
    Relies(f"{_FRONT}.reset_mm_cache"),
    Relies(f"{_FRONT}.reset_encoder_cache", versions=">=0.16"),
)

# How level 0 pauses and "scheduling" resumes, and nothing else with them: every variant since 0.17 was read.
PAUSED = (
    Relies(f"{_FRONT}.sleep", parameters=("level",), contains=("self.engine_core.sleep(level, mode)",)),
    Relies(f"{_FRONT}.wake_up", parameters=("tags",), contains=("self.engine_core.wake_up(tags)",)),
    Relies(f"{_CORE}.sleep", fingerprints=("923c53599256",)),
    Relies(f"{_CORE}.wake_up", fingerprints=("44d04935efc1", "145dae511654", "d72105ac4724", "2b96f4ef7f00")),
    Relies(f"{_CORE}.pause_scheduler", fingerprints=("e15f7a66297a", "82531c12644b")),
)

# `_pieces`: on CUDA, a restore that the device has no room for, and an engine that ends while its KV cache is out
IN_PART = (
    Relies(
        "vllm.device_allocator.cumem:CuMemAllocator._python_free_callback",
        positional=("ptr",),
        contains=("self.pointer_to_data.pop(ptr)",),
        otherwise=(Relies("vllm.device_allocator.cumem:CuMemAllocator.python_free_callback", positional=("ptr",)),),
    ),
    Relies("vllm.device_allocator.cumem:create_and_map", fingerprints=("f528aa7653c5",)),
    Relies("vllm.device_allocator.cumem:unmap_and_release", fingerprints=("0c582300268b",)),
    Relies("vllm.v1.core.sched.scheduler:Scheduler.kv_cache_config"),
    Relies("vllm.v1.kv_cache_interface:KVCacheConfig.num_blocks"),
    Relies("vllm.config:VllmConfig.scheduler_config"),
    Relies("vllm.config:VllmConfig.parallel_config"),
    Relies("vllm.config:VllmConfig.kv_transfer_config"),
    Relies("vllm.config:ParallelConfig.world_size"),
    Relies("vllm.config:SchedulerConfig.max_num_seqs"),
    Relies("vllm.config:SchedulerConfig.max_num_batched_tokens"),
)

_POOL = "vllm.v1.core.block_pool:BlockPool"
_QUEUE = "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue"

# `rlpatch.blocks`
BLOCKS = (
    Relies("vllm.v1.core.sched.scheduler:Scheduler.add_request", positional=("request",)),
    Relies("vllm.v1.core.sched.scheduler:Scheduler.kv_cache_manager"),
    Relies("vllm.v1.core.sched.scheduler:Scheduler.kv_cache_config"),
    Relies("vllm.v1.core.kv_cache_manager:KVCacheManager.block_pool"),
    Relies(f"{_POOL}.num_gpu_blocks"),
    Relies(f"{_POOL}.blocks"),
    Relies(f"{_POOL}.free_block_queue"),
    Relies(f"{_POOL}.get_num_free_blocks", contains=("return self.free_block_queue.num_free_blocks",)),
    Relies(f"{_POOL}.get_new_blocks", contains=("num_blocks > self.get_num_free_blocks()",)),
    Relies(f"{_POOL}.reset_prefix_cache", contains=("self.num_gpu_blocks - self.get_num_free_blocks()",)),
    Relies(f"{_QUEUE}.remove", positional=("block",)),
    Relies(f"{_QUEUE}.append", positional=("block",)),
    Relies("vllm.v1.request:Request.num_prompt_tokens"),
    Relies("vllm.v1.request:Request.max_tokens"),
)
