"""What the adapters rely on in vLLM releases that CI does not run, looked up in the released sources.

vLLM 0.9.2 to 0.26 want an older torch each, so each assumption is a row of `CLAIMS`: a symbol, its parameters, statements
that must or must not be in it, and the releases. Where logic can be tried, the released code
itself runs against a stand-in of what lies below it (the CUDA driver, the engine around a layer).
Set RLPATCH_TEST_SOURCES to a folder with ``v<release>/vllm`` unpacked from vLLM's wheels or sdists.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import os
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from rlpatch import registry
from rlpatch.versions import Installed, within

SOURCES = Path(os.environ.get("RLPATCH_TEST_SOURCES") or "/nonexistent")
READ = (
    *("0.9.2", "0.10.0", "0.10.1", "0.10.1.1", "0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.13.0", "0.14.0"),
    *("0.14.1", "0.15.0", "0.15.1", "0.16.0", "0.17.0", "0.17.1", "0.18.0", "0.19.1", "0.20.0", "0.20.1", "0.22.1"),
    *("0.25.1", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.33.0"),
)
OLD = tuple(release for release in READ if Version(release) < Version("0.17"))


@dataclass(frozen=True)
class Claim:
    """One assumption about released sources.

    Attributes:
        adapters: Adapter files (or cores) that rely on it.
        releases: Version specifier.
        files: Path below ``vllm/``; several where it moved: the first that has the symbol counts.
        symbol: Dotted path of a class, function or assignment; empty for the whole file.
        parameters: Its parameters without ``self``, as a prefix; None: not looked at.
        has: Statements or expressions in it, compared as ``ast.unparse`` writes them, without spaces and quotes.
        lacks: The same, that must not be in it.
        there: False: the symbol must not exist.
    """

    adapters: str
    releases: str
    files: str
    symbol: str
    parameters: tuple[str, ...] | None = None
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    there: bool = True


LLM, CORE, FRONT = "entrypoints/llm.py", "v1/engine/core.py", "v1/engine/llm_engine.py"
CLIENT = "v1/engine/core_client.py"
WORKER, RUNNER, V2 = "v1/worker/gpu_worker.py", "v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"
V2_LOGPROB = "v1/worker/gpu/sample/logprob.py"
V2_BATCH, FLASH = "v1/worker/gpu/input_batch.py", "v1/attention/backends/flash_attn.py"
EXECUTOR, EXECUTOR_V0 = "v1/executor/abstract.py", "executor/executor_base.py"
CUMEM = "device_allocator/cumem.py"
LOADERS = "model_executor/model_loader/__init__.py"
BASE_LOADER = "model_executor/model_loader/base_loader.py"
BNB = "model_executor/model_loader/bitsandbytes_loader.py"
BNB_LAYER = "model_executor/layers/quantization/bitsandbytes.py"
LINEAR, EMBEDDING = "model_executor/layers/linear.py", "model_executor/layers/vocab_parallel_embedding.py"
LORA_LAYERS = "lora/layers.py lora/layers/base.py lora/layers/base_linear.py lora/layers/column_parallel_linear.py"
LORA_MANAGER = "lora/models.py lora/model_manager.py"
OVERRIDE, MODELS = "env_override.py", "model_executor/models/registry.py"
COMPILATION, INTERFACE = "config/compilation.py config.py", "compilation/compiler_interface.py"
LAYER_UTILS = "model_executor/layers/utils.py"
SAMPLING = "sampling_params.py"
WARM_UP = "model_executor/warmup/kernel_warmup.py"

CLAIMS = (
    # ---- engine: construction and the way to the model ----
    Claim("engine_v0_9", ">=0.9.2", LLM, "LLM.__init__", has=("**kwargs",)),
    Claim("engine_v0_9", "<0.10.2", LLM, "LLM.generate",
          ("prompts", "sampling_params", "prompt_token_ids", "use_tqdm", "lora_request")),
    Claim("engine_v0_9", ">=0.10.2", LLM, "LLM.generate", ("prompts", "sampling_params", "*", "use_tqdm", "lora_request")),
    Claim("engine_v0_9", ">=0.9.2", LLM, "LLM.chat", ("messages", "sampling_params", "use_tqdm", "lora_request")),
    Claim("engine_v0_9", ">=0.9.2", "platforms/interface.py", "Platform.is_sleep_mode_available"),
    Claim("engine", ">=0.9.2", FRONT, "LLMEngine.__init__",
          has=("self.model_executor = self.engine_core.engine_core.model_executor", "self.output_processor = ",
               "self.model_config = ", "self.vllm_config = ")),
    Claim("engine", ">=0.9.2", CLIENT, "InprocClient.__init__", has=("self.engine_core = EngineCore(",)),
    Claim("engine", ">=0.9.2", FRONT, "LLMEngine.abort_request", ("request_ids",)),
    Claim("engine", ">=0.14", FRONT, "LLMEngine.abort_request", ("request_ids", "internal")),
    Claim("engine", ">=0.9.2", FRONT, "LLMEngine.reset_mm_cache", ()),
    Claim("engine", ">=0.9.2", FRONT, "LLMEngine.reset_prefix_cache"),
    Claim("engine", ">=0.16", FRONT, "LLMEngine.reset_encoder_cache", ()),
    Claim("engine", ">=0.9.2", "v1/engine/output_processor.py", "OutputProcessor.__init__", has=("self.request_states",)),
    Claim("engine", ">=0.9.2", "v1/core/sched/interface.py", "SchedulerInterface.has_requests", ()),
    Claim("engine", ">=0.11", CORE, "EngineCore.__init__", has=("self.step_fn = ",)),
    Claim("engine", "<0.11", EXECUTOR, "Executor.max_concurrent_batches", has=("return 1",)),  # no batch_queue in process
    Claim("engine", "<0.11.1", "executor/uniproc_executor.py", "UniProcExecutor", has=("self.driver_worker = ",)),
    Claim("engine", ">=0.11.1", "v1/executor/uniproc_executor.py", "UniProcExecutor", has=("self.driver_worker = ",)),
    Claim("engine", ">=0.9.2", RUNNER, "GPUModelRunner.get_model", ()),
    Claim("engine", ">=0.9.2,<0.22", RUNNER, "GPUModelRunner.__init__", has=("self.kv_caches", "self.device = ")),
    # ---- share_weights: filling ----
    Claim("weights_v0_9", "<0.10.1", LOADERS, "get_model_loader",
          has=("if isinstance(load_config.load_format, type): return load_config.load_format(load_config)",)),
    Claim("weights_v0_9", "<0.10.1", LOADERS, "register_model_loader", there=False),
    Claim("weights_v0_9", "<0.10.1", "config.py", "LoadConfig",
          has=("BaseModelLoader", "isinstance(self.load_format, str)")),
    Claim("weights_v0_9", "<0.10.1", "engine/arg_utils.py", "EngineArgs.create_load_config",
          has=("load_format=self.load_format",)),
    Claim("weights_v0_10 weights_v0_17", ">=0.10.1", LOADERS, "register_model_loader", ("load_format",)),
    Claim("_weights", ">=0.9.2", BASE_LOADER, "BaseModelLoader.load_model",
          has=("self.load_weights(model, model_config)", "process_weights_after_loading(model, model_config,")),
    Claim("_weights", ">=0.9.2", BASE_LOADER, "BaseModelLoader.download_model", ("model_config",)),
    Claim("_weights", ">=0.9.2", "model_executor/model_loader/default_loader.py", "DefaultModelLoader.load_weights",
          ("model", "model_config")),
    Claim("sharing", ">=0.9.2,<0.17", LINEAR, "MergedColumnParallelLinear.weight_loader",
          has=("param_data.copy_(loaded_weight)",)),
    Claim("sharing", ">=0.9.2,<0.17", LINEAR, "QKVParallelLinear.weight_loader", has=("param_data.copy_(loaded_weight)",)),
    Claim("sharing", ">=0.9.2,<0.17", LINEAR, "RowParallelLinear.weight_loader", has=("param_data.copy_(loaded_weight)",)),
    Claim("sharing", ">=0.9.2,<0.17", EMBEDDING, "VocabParallelEmbedding.weight_loader",
          has=("param[:loaded_weight.shape[0]].data.copy_(loaded_weight)",)),
    Claim("sharing", ">=0.9.2,<0.17", "model_executor/model_loader/weight_utils.py", "default_weight_loader",
          has=("param.data.copy_(loaded_weight)",)),
    Claim("sharing", ">=0.9.2,<0.17", LINEAR, "UnquantizedLinearMethod.process_weights_after_loading",
          has=("if current_platform.is_cpu()",), lacks=("is_cuda",)),  # nothing but the CPU repacks a linear layer
    # ---- share_weights: guards ----
    Claim("_weights", ">=0.9.2,<0.17", LLM, "LLM.sleep", ("level",), lacks=("mode:",)),
    Claim("weights_v0_17", ">=0.17", LLM, "LLM.sleep", ("level", "mode")),
    Claim("_weights", ">=0.9.2", LLM, "LLM.wake_up", ("tags",)),
    Claim("_weights", "<0.17", WORKER, "Worker.sleep",  # any level but 1 discards everything
          ("level",), has=("allocator.sleep(offload_tags=('weights',) if level == 1 else tuple())",)),
    Claim("_weights", "<0.11.1", EXECUTOR_V0, "ExecutorBase.sleep", ("level",)),
    Claim("_weights", "<0.11.1", EXECUTOR, "Executor", has=("class Executor(ExecutorBase)",)),
    Claim("_weights", "<0.11.1", EXECUTOR, "Executor.sleep", there=False),
    Claim("_weights", "<0.11.1", EXECUTOR, "UniProcExecutor", has=("(UniProcExecutorV0, Executor)",)),
    Claim("_weights", "<0.11.1", EXECUTOR, "ExecutorWithExternalLauncher",
          has=("(ExecutorWithExternalLauncherV0, Executor)",)),
    Claim("_weights", "<0.11.1", "executor/uniproc_executor.py", "", lacks=("def sleep(",)),
    Claim("_weights", ">=0.11.1", EXECUTOR, "Executor.sleep", ("level",)),
    Claim("weights_v0_9", "<0.10", WORKER, "Worker.reload_weights", there=False),
    Claim("weights_v0_9", "<0.10", RUNNER, "GPUModelRunner.load_model", has=("model_loader.load_weights(self.model,",)),
    Claim("weights_v0_10 weights_v0_17", ">=0.10", WORKER, "Worker.reload_weights"),
    Claim("weights_v0_9", "<0.10.1", LLM, "LLM.collective_rpc", ("method",)),
    Claim("_weights", "<0.11", "envs.py", "", has=("VLLM_USE_V1",)),
    # ---- standby ----
    Claim("standby_v0_9", "<0.17", CORE, "EngineCore.sleep", ("level",), lacks=("mode:", "pause")),
    Claim("standby_v0_9", "<0.17", CORE, "EngineCore.wake_up", ("tags",)),
    Claim("standby_v0_9 standby_v0_17", ">=0.16,<0.17", CORE, "EngineCore.pause_scheduler"),  # so it is no sign of 0.17
    Claim("standby_v0_17", ">=0.17,<0.31", CORE, "EngineCore.sleep", ("level", "mode")),
    Claim("standby_v0_9", "<0.17", FRONT, "LLMEngine.step", ()),
    Claim("_pool", ">=0.9.2,<0.29", CUMEM, "CuMemAllocator.__init__", has=("self.pointer_to_data",)),
    Claim("_pool", ">=0.9.2,<0.23", CUMEM, "create_and_map", ("allocation_handle",),
          has=("python_create_and_map(*allocation_handle)",)),
    Claim("_pool", ">=0.9.2,<0.23", CUMEM, "unmap_and_release", ("allocation_handle",),
          has=("python_unmap_and_release(*allocation_handle)",)),
    Claim("_pool", "<0.17", CUMEM, "AllocationData", has=("handle", "tag", "cpu_backup_tensor"), lacks=("is_asleep",)),
    Claim("_pool", "<0.17", CUMEM, "CuMemAllocator.sleep",  # unmaps whatever is there, mapped or not
          has=("in self.pointer_to_data.items()", "unmap_and_release(handle)"), lacks=("is_asleep",)),
    Claim("_pool", "<0.17", CUMEM, "CuMemAllocator.wake_up",
          has=("if tags is None or data.tag in tags", "create_and_map(handle)"), lacks=("is_asleep",)),
    Claim("_pool", ">=0.9.2,<0.29", CUMEM, "CuMemAllocator.get_instance", ()),
    Claim("_pool", ">=0.9.2,<0.22", WORKER, "Worker.initialize_from_config",  # the whole of it, siblings included
          has=("use_memory_pool(tag='kv_cache')", "self.model_runner.initialize_kv_cache(kv_cache_config)")),
    Claim("_pool", "<0.20.1", CUMEM, "CuMemAllocator.__init__", has=("Expandable segments are not compatible",)),
    Claim("_pool", ">=0.20.1", CUMEM, "CuMemAllocator.__init__", lacks=("Expandable segments are not compatible",)),
    Claim("_pool", ">=0.12,<0.29", RUNNER, "GPUModelRunner.init_fp8_kv_scales", (), has=("param.fill_(k_scale_val)",)),
    Claim("_pool", "<0.12", RUNNER, "GPUModelRunner.init_fp8_kv_scales", there=False),
    Claim("_pool", ">=0.22,<0.29", RUNNER, "GPUModelRunner.post_kv_cache_wake_up", (), has=("self.init_fp8_kv_scales()",)),
    Claim("_pool", ">=0.22,<0.29", V2, "GPUModelRunner.post_kv_cache_wake_up", (),
          has=("self.block_tables.init_block_table_layout_tensors()",)),
    Claim("_pool", ">=0.22,<0.29", V2, "GPUModelRunner.init_fp8_kv_scales", there=False),
    Claim("standby_v0_9", "<0.17", RUNNER, "GPUModelRunner.__init__", has=("self.encoder_cache",)),
    Claim("compat_matrix", ">=0.14,<0.17", WORKER, "Worker.load_model",  # the first context is never entered
          has=("with self._maybe_get_memory_pool_context(tag='weights') and set_current_vllm_config(",)),
    Claim("compat_matrix", ">=0.10,<0.14", WORKER, "Worker.load_model",
          has=("with self._maybe_get_memory_pool_context(tag='weights'):",)),
    Claim("compat_matrix", ">=0.17", WORKER, "Worker.load_model",
          has=("with self._maybe_get_memory_pool_context(tag='weights'), set_current_vllm_config(",)),
    # ---- expandable_segments ----
    Claim("expandable_segments_v0_9", "<0.20.1", CUMEM, "CuMemAllocator.use_memory_pool",
          lacks=("expandable_was_enabled",)),
    Claim("expandable_segments_v0_9", ">=0.20.1", CUMEM, "CuMemAllocator.use_memory_pool", has=("expandable_was_enabled",)),
    # ---- allocator_options ----
    Claim("allocator_v0_9", "<0.20.1", CUMEM, "CuMemAllocator.use_memory_pool", lacks=("_set_allocator_settings",)),
    Claim("allocator_v0_9", ">=0.20.1,<0.31", CUMEM, "CuMemAllocator.use_memory_pool",
          has=("_set_allocator_settings('expandable_segments:False')",)),
    Claim("allocator_v0_9", ">=0.31", CUMEM, "CuMemAllocator.use_memory_pool",
          lacks=("_set_allocator_settings('expandable_segments:False')",)),
    # ---- lora_slots ----
    Claim("lora_slots_v0_9", "<0.11", LORA_LAYERS, "BaseLayerWithLoRA.set_lora",
          ("index", "lora_a", "lora_b", "embeddings_tensor", "bias")),
    Claim("lora_slots_v0_9", "<0.11", LORA_LAYERS, "BaseLinearLayerWithLoRA.set_lora",
          has=(":lora_a.shape[1], :lora_a.shape[0]].copy_(lora_a.T", ":lora_b.shape[1], :lora_b.shape[0]].copy_(lora_b.T")),
    Claim("lora_slots_v0_9", "<0.11", LORA_MANAGER, "LoRAModel.from_lora_tensors",
          has=("lora_a = tensor.to(device=device, dtype=dtype).t()", "lora_b = tensor.to(device=device, dtype=dtype).t()")),
    Claim("lora_slots_v0_11", ">=0.11,<0.11.1", LORA_LAYERS, "BaseLayerWithLoRA.set_lora",
          ("index", "lora_a", "lora_b", "embeddings_tensor", "bias")),
    Claim("lora_slots_v0_11", ">=0.11.1,<0.12", LORA_LAYERS, "BaseLayerWithLoRA.set_lora",
          ("index", "lora_a", "lora_b", "embeddings_tensor")),
    Claim("lora_slots_v0_12", ">=0.12", LORA_LAYERS, "BaseLayerWithLoRA.set_lora", ("index", "lora_a", "lora_b")),
    Claim("lora_slots_v0_11 lora_slots_v0_12", ">=0.11,<0.17", LORA_LAYERS, "BaseLinearLayerWithLoRA.set_lora",
          has=(":lora_a.shape[0], :lora_a.shape[1]].copy_(lora_a,", ":lora_b.shape[0], :lora_b.shape[1]].copy_(lora_b,"),
          lacks=("lora_a.T",)),
    Claim("lora_slots_v0_9 lora_slots_v0_11", "<0.10.2", "config.py config/__init__.py", "LoRAConfig",
          has=("possible_max_ranks = (8, 16, 32, 64, 128, 256, 320, 512)",)),
    Claim("lora_slots_v0_9 lora_slots_v0_11", ">=0.10.2,<0.11.1", "config/lora.py", "LoRAConfig",
          has=("possible_max_ranks = (8, 16, 32, 64, 128, 256, 320, 512)",)),
    Claim("lora_slots_v0_11", ">=0.11.1,<0.12", "config/lora.py", "MaxLoRARanks",
          has=("Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]",)),
    Claim("lora_slots_v0_12", ">=0.12", "config/lora.py", "MaxLoRARanks", has=("Literal[",)),
    Claim("_lora_slots", ">=0.9.2", "lora/utils.py", "parse_fine_tuned_lora_name", ("name", "weights_mapper")),
    Claim("_lora_slots", ">=0.9.2", "lora/worker_manager.py", "", has=("import LoRAModel", "LoRAModelManager")),
    Claim("_lora_slots", ">=0.9.2", "lora/worker_manager.py", "LRUCacheWorkerLoRAManager.create_lora_manager",
          has=("self._adapter_manager = ",)),
    Claim("_lora_slots", ">=0.9.2", "v1/worker/lora_model_runner_mixin.py", "LoRAModelRunnerMixin.load_lora_model",
          has=("self.lora_manager = LRUCacheWorkerLoRAManager(",)),
    Claim("_lora_slots", ">=0.9.2,<0.17", LORA_MANAGER, "LoRAModelManager.activate_adapter",
          has=("enumerate(self.lora_index_to_id)", "self.lora_index_to_id[index] = ", "module.reset_lora(index)")),
    Claim("_lora_slots", ">=0.9.2,<0.17", LORA_MANAGER, "LoRAModelManager.list_adapters", ()),
    Claim("_lora_slots", ">=0.9.2,<0.17", LORA_MANAGER, "LRUCacheLoRAModelManager.pin_adapter", ("lora_id",)),
    Claim("_lora_slots", ">=0.9.2", FRONT, "LLMEngine.add_lora", ("lora_request",)),
    Claim("_lora_slots", ">=0.9.2", FRONT, "LLMEngine.pin_lora", ("lora_id",)),
    Claim("_lora_slots", ">=0.9.2", FRONT, "LLMEngine.remove_lora", ("lora_id",)),
    Claim("_lora_slots", ">=0.9.2,<0.17", "lora/request.py", "LoRARequest",
          has=("lora_name: str lora_int_id: int lora_path",)),
    # ---- quantized_weights ----
    Claim("bitsandbytes_v0_9", "<0.28", BNB, "BitsAndBytesModelLoader.load_weights", ("model", "model_config")),
    Claim("bitsandbytes_v0_9", "<0.10", BNB, "BitsAndBytesModelLoader.load_weights",
          has=("set_weight_attrs(param, {'bnb_quant_state': quant_states})", "{'bnb_shard_offsets': offsets}",
               "math.prod(quant_state.shape) // pack_ratio")),
    Claim("bitsandbytes_v0_9", ">=0.10,<0.28", BNB, "BitsAndBytesModelLoader._bind_quant_states_to_params",
          has=("set_weight_attrs(param, {'bnb_quant_state': quant_states})", "{'bnb_shard_offsets': offsets}",
               "math.prod(quant_state.shape) // pack_ratio")),
    Claim("bitsandbytes_v0_9", "<0.28", BNB_LAYER, "BitsAndBytesLinearMethod._apply_4bit_weight",
          has=("quant_states = qweight.bnb_quant_state", "offsets = qweight.bnb_shard_offsets")),
    Claim("bitsandbytes_v0_9", "<0.18", BNB_LAYER, "BitsAndBytesLinearMethod.create_weights",
          has=("torch.empty(total_size // quant_ratio, 1, dtype=torch.uint8)", "'pack_factor': quant_ratio")),
    Claim("bitsandbytes_v0_28", ">=0.28", BNB, "", there=False),
    # ---- rollout_gc ----
    Claim("rollout_gc_v0_9", ">=0.9.2", LLM, "LLM.generate", lacks=("gc.disable",)),
    # ---- logprob_kernels ----
    Claim("logprob_kernels_v0_12", "<0.12", V2_LOGPROB, "", there=False),
    Claim("logprob_kernels_v0_12", ">=0.12", V2_LOGPROB, "compute_token_logprobs", ("logits", "token_ids")),
    *(Claim("logprob_kernels_v0_12", ">=0.12", V2_LOGPROB, kernel, ("output_ptr", "logits_ptr", "logits_stride"),
            has=("for i in range(0, vocab_size, BLOCK_SIZE)", "block = i + tl.arange(0, BLOCK_SIZE)"))
      for kernel in ("_topk_log_softmax_kernel", "_ranks_kernel")),
    # ---- skinny_linear ----
    Claim("skinny_linear_v0_17", ">=0.17", LINEAR, "RowParallelLinear.forward",
          has=("self.quant_method.apply(self, input_parallel, bias_)",)),
    Claim("skinny_linear_v0_17", ">=0.17", WORKER, "Worker.load_model", has=("self.model_runner.load_model(",)),
    # ---- decode_attention ----
    Claim("decode_attention_v0_17", ">=0.17", FLASH, "FlashAttentionBackend",
          has=("forward_includes_kv_cache_update: bool = False",)),  # written before
    Claim("decode_attention_v0_17", ">=0.30", FLASH, "FA4DenseAttentionKernel.kernel",
          has=("return flash_attn_varlen_func(*args, **kwargs)",)),
    Claim("decode_attention_v0_17", ">=0.17", V2_BATCH, "_prepare_pos_seq_lens_kernel",
          has=("tl.store(seq_lens_ptr + block, 0, mask=mask)",)),  # rows that only fill a graph up
    Claim("decode_attention_v0_17", ">=0.17,<0.19", RUNNER, "GPUModelRunner._prepare_inputs",
          has=("self.seq_lens.np[num_reqs:].fill(0)",)),
    Claim("decode_attention_v0_17", ">=0.19", RUNNER, "GPUModelRunner._prepare_inputs",
          has=("self.seq_lens[num_reqs:].fill_(0)",)),
    # ---- graph_capture_gc ----
    Claim("collector_v0_9", "<0.10", RUNNER, "GPUModelRunner.capture_model", lacks=("gc.",)),
    Claim("collector_v0_9 collector_v0_12", ">=0.10,<0.18", RUNNER, "GPUModelRunner.capture_model",
          has=("def freeze_gc()", "gc.freeze()"), lacks=("gc.disable",)),
    Claim("collector_v0_12", ">=0.18,<0.28", RUNNER, "GPUModelRunner._freeze_gc", has=("gc.freeze()",),
          lacks=("gc.disable",)),
    Claim("collector_v0_12", ">=0.28,<0.30", RUNNER, "GPUModelRunner._freeze_gc", has=("gc.disable()",)),
    Claim("collector_v0_9", "<0.12", V2, "", there=False),
    Claim("collector_v0_12", ">=0.12,<0.30", V2, "GPUModelRunner.capture_model", (), has=("gc.collect()",),
          lacks=("gc.freeze", "gc.disable", "freeze_gc")),
    Claim("collector_v0_12", ">=0.30", "utils/gc_utils.py", "freeze_gc_for_cudagraph_capture",
          has=("gc.disable()", "gc.unfreeze()")),
    Claim("collector_v0_12", ">=0.30", V2, "GPUModelRunner.capture_model", has=("freeze_gc_for_cudagraph_capture()",)),
    Claim("collector_v0_12", ">=0.30", RUNNER, "GPUModelRunner._freeze_gc", has=("freeze_gc_for_cudagraph_capture",)),
    Claim("_collector", ">=0.11.1", CORE, "EngineCore.__init__", has=("freeze_gc_heap()",)),
    Claim("_collector", "<0.11.1", CORE, "EngineCore.__init__", lacks=("freeze_gc_heap",)),
    # ---- the CPU backend's packed weights ----
    Claim("cpu_weights_v0_9", "<0.10.2", LAYER_UTILS, "dispatch_cpu_unquantized_gemm", there=False),
    Claim("cpu_weights_v0_9", "<0.10.2", LINEAR, "UnquantizedLinearMethod.process_weights_after_loading",
          has=("current_platform.is_cpu() and envs.VLLM_CPU_SGL_KERNEL",)),
    Claim("cpu_weights_v0_10", ">=0.10.2", LAYER_UTILS, "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
    Claim("cpu_weights_v0_10", ">=0.10.2", LAYER_UTILS, "cpu_unquantized_gemm",
          has=("layer.cpu_linear(x, weight, bias)",)),
    # ---- compile: how the engine is compiled and warmed up ----
    Claim("compile_v0_9 compile_v0_11_1 compile_v0_16 compile_v0_17 compile_v0_26", ">=0.9.2", OVERRIDE, "",
          has=("os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'",)),
    Claim("compile_v0_9 compile_v0_11_1", "<0.20", OVERRIDE, "",
          has=("torch._inductor.config.compile_threads = 1",)),
    Claim("compile_v0_17 compile_v0_26", ">=0.20", OVERRIDE, "", lacks=("config.compile_threads = 1",)),
    Claim("compile_v0_9", "<0.10.1", COMPILATION, "CompilationConfig", has=("level: int", "use_inductor: bool"),
          lacks=("cudagraph_mode",)),
    Claim("compile_v0_9", ">=0.10.1,<0.11.1", COMPILATION, "CompilationConfig",
          has=("use_inductor: bool", "cudagraph_mode:", "level:"), lacks=("cudagraph_specialize_lora",)),
    Claim("compile_v0_9", "<0.11", INTERFACE, "set_inductor_config", has=("config['max_autotune'] = True",)),
    Claim("compile_v0_11_1", ">=0.11.1", INTERFACE, "set_inductor_config",
          has=("config['max_autotune'] = envs.VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE",)),
    Claim("compile_v0_11_1", ">=0.11.1", COMPILATION, "CompilationConfig",
          has=("mode: CompilationMode", "cudagraph_mode:", "cudagraph_specialize_lora: bool = True"),
          lacks=("full_cuda_graph",)),
    Claim("compile_v0_11_1", ">=0.11.1", COMPILATION, "CompilationConfig.__post_init__",
          has=("'combo_kernels' not in self.inductor_compile_config",
               "'benchmark_combo_kernel' not in self.inductor_compile_config")),
    Claim("compile_v0_9", "<0.11.1", COMPILATION, "CompilationConfig.__post_init__",
          lacks=("combo_kernels",)),
    Claim("compile_v0_16", ">=0.16", WARM_UP, "kernel_warmup",
          has=("worker.vllm_config.kernel_config.enable_flashinfer_autotune",)),
    Claim("compile_v0_9 compile_v0_11_1 compile_v0_16", "<0.17", SAMPLING, "SamplingParams.for_sampler_warmup",
          there=False),
    Claim("compile_v0_17 compile_v0_26", ">=0.17", SAMPLING, "SamplingParams.for_sampler_warmup",
          has=("top_p=0.9", "top_k=50", "min_p=0.1", "repetition_penalty=1.2", "logprobs=5", "prompt_logprobs=1")),
    Claim("compile_v0_26", ">=0.26", "v1/worker/startup_plan.py", "maybe_apply_startup_plan",
          has=("envs.VLLM_ENABLE_STARTUP_PLAN",)),
    Claim("compile_v0_9", ">=0.9.2", MODELS, "_LazyRegisteredModel.inspect_model_cls",
          has=("_run_in_subprocess(lambda: _ModelInfo.from_model_cls(self.load_model_cls()))",)),
    Claim("compile_v0_9", "<0.11", MODELS, "_LazyRegisteredModel", lacks=("modelinfos",)),
    Claim("compile_v0_11_1", ">=0.11", MODELS, "_LazyRegisteredModel", has=("modelinfos",)),
)  # fmt: skip


# ---- reading ---------------------------------------------------------------------------------------------------------


@functools.cache
def tree(release: str, file: str) -> ast.Module | None:
    path = SOURCES / f"v{release}" / "vllm" / file
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def find(release: str, files: str, symbol: str) -> ast.AST | None:
    """The node of `symbol` in the first of `files` that has it."""
    for file in files.split():
        node: Any = tree(release, file)
        for part in symbol.split(".") if symbol else ():
            body = reversed(getattr(node, "body", ()))  # the last of them: overloads come first
            node = next((n for n in body if part in _names(n)), None)
        if node is not None:
            return node
    return None


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def bare(text: str) -> str:
    return "".join(text.replace('"', "'").split())


def parameters(node: Any) -> list[str]:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return [name for name in [*names, "*", *(a.arg for a in node.args.kwonlyargs)] if name not in ("self", "cls")]


def code(node: ast.AST) -> str:
    """Source without docstrings and comments."""
    node = ast.parse(ast.unparse(node))
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return bare(ast.unparse(node))


@functools.cache
def code_of(release: str, files: str, symbol: str) -> str:
    node = find(release, files, symbol)
    assert node is not None
    return code(node)


def misfit(claim: Claim, release: str) -> str | None:
    """How the release's sources differ from the claim, or None."""
    node = find(release, claim.files, claim.symbol)
    if (node is not None) != claim.there:
        return f"{claim.files} {claim.symbol} is {'there' if node is not None else 'not there'}"
    if node is None:
        return None
    if claim.parameters is not None and parameters(node)[: len(claim.parameters)] != list(claim.parameters):
        return f"{claim.symbol} takes {parameters(node)}, not {claim.parameters}"
    text = code_of(release, claim.files, claim.symbol)
    wrong = [f"lacks {part!r}" for part in claim.has if bare(part) not in text]
    wrong += [f"has {part!r}" for part in claim.lacks if bare(part) in text]
    return f"{claim.symbol} {', '.join(wrong)}" if wrong else None


def have(release: str) -> None:
    if not (SOURCES / f"v{release}" / "vllm").is_dir():
        pytest.skip(f"no sources of vLLM {release} (RLPATCH_TEST_SOURCES={os.environ.get('RLPATCH_TEST_SOURCES', '')})")


@pytest.mark.parametrize("release", READ)
def test_the_released_sources_are_what_the_adapters_rely_on(release: str) -> None:
    have(release)
    claims = [claim for claim in CLAIMS if within(Version(release), claim.releases)]
    wrong = [f"{claim.adapters}: {found}" for claim in claims if (found := misfit(claim, release)) is not None]
    tree.cache_clear()  # a release's trees are some hundred MB, which every later collection would walk
    assert not wrong, "\n".join(wrong)


def test_every_adapter_of_an_old_release_has_claims() -> None:
    named = {name for claim in CLAIMS for name in claim.adapters.split()}
    serving = {
        adapter.name.removeprefix("vllm/")
        for adapter in registry.adapters()
        if adapter.library == "vllm" and adapter.broken is None
        if any(within(Version(release), adapter.versions) for release in OLD)
    }
    assert serving <= named, sorted(serving - named)


def test_each_claim_concerns_a_release_that_was_read() -> None:
    assert not [claim for claim in CLAIMS if not any(within(Version(release), claim.releases) for release in READ)]


# ---- which adapter serves which release ------------------------------------------------------------------------------

SERVED = {
    "0.9.2": "weights_v0_9 standby_v0_9 lora_slots_v0_9 collector_v0_9",
    "0.10.0": "weights_v0_9 - lora_slots_v0_9 collector_v0_9",
    "0.10.1.1": "weights_v0_10 - lora_slots_v0_9 collector_v0_9",
    "0.10.2": "weights_v0_10 - lora_slots_v0_9 collector_v0_9",
    "0.11.2": "weights_v0_10 standby_v0_9 lora_slots_v0_11 collector_v0_9",
    "0.12.0": "weights_v0_10 standby_v0_9 lora_slots_v0_12 collector_v0_12",
    "0.13.0": "weights_v0_10 standby_v0_9 lora_slots_v0_12 collector_v0_12",
    "0.14.1": "weights_v0_10 - lora_slots_v0_12 collector_v0_12",
    "0.15.1": "weights_v0_10 standby_v0_9 lora_slots_v0_12 collector_v0_12",
    "0.16.0": "weights_v0_10 standby_v0_9 lora_slots_v0_12 collector_v0_12",
    "0.17.0": "weights_v0_17 standby_v0_17 lora_slots_v0_12 collector_v0_12",
    "0.29.0": "weights_v0_17 standby_v0_17 lora_slots_v0_12 collector_v0_12",
    "0.30.0": "weights_v0_17 standby_v0_17 lora_slots_v0_12 collector_v0_12",
    "0.33.0": "weights_v0_17 standby_v0_31 lora_slots_v0_12 collector_v0_12",
}


@pytest.mark.parametrize("release", SERVED)
def test_the_adapter_of_each_release(release: str) -> None:
    capabilities = ("share_weights", "standby", "lora_slots", "graph_capture_gc")
    for capability, wanted in zip(capabilities, SERVED[release].split(), strict=True):
        choice = registry.choose(capability, Installed("vllm", "vllm", Version(release)), probing=False)
        assert (choice.adapter.name if choice.adapter else "-").removeprefix("vllm/") == wanted, choice.reason


@pytest.mark.parametrize("release", ["0.10.0", "0.10.2", "0.14.0", "0.14.1"])
@pytest.mark.parametrize("probing", [False, True])
def test_a_broken_release_is_not_taken_over_by_a_neighbours_probe(release: str, probing: bool) -> None:
    willing = [
        registry.Adapter(**{**adapter.__dict__, "probe": None if adapter.broken else lambda: None})
        for adapter in registry.candidates("standby")
    ]
    choice = registry.choose("standby", Installed("vllm", "vllm", Version(release)), probing=probing, options=willing)
    assert choice.adapter is None and "known bad: vllm-01" in choice.reason
    assert not any(within(Version(release), versions) for versions in choice.supported)


# ---- released code on stand-ins ------------------------------------------------------------------------------------


def run_source(release: str, file: str, name: str) -> types.ModuleType:
    """The released file itself, executed as module `name`."""
    have(release)
    path = SOURCES / f"v{release}" / "vllm" / file
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def released(release: str, files: str, symbol: str, *, lazy: bool = True, **names: Any) -> Any:
    """One released function or class, executed alone; `names` stand in for what its module imports.

    Args:
        lazy: Annotations are not evaluated.
    """
    have(release)
    node: Any = find(release, files, symbol)
    assert node is not None, symbol
    module = ast.Module([*(ast.parse("from __future__ import annotations").body if lazy else ()), node], [])
    home = types.ModuleType(f"released_{node.name}")  # pydantic looks names up in it
    space = home.__dict__
    space.update(names)
    sys.modules[home.__name__] = home
    exec(compile(ast.fix_missing_locations(module), f"{release}:{symbol}", "exec", dont_inherit=True), space)
    return space[node.name]


class Driver:
    """Stand-in for vLLM's C extension ``cumem_allocator`` and the CUDA driver below it: what is mapped where."""

    def __init__(self) -> None:
        self.mapped: set[int] = set()
        self.maps: list[int] = []
        self.unmaps: list[int] = []
        self.capacity: int | None = None

    def create_and_map(self, device: int, size: int, address: int, handle: int) -> None:
        assert address not in self.mapped, f"{address:#x} is mapped twice"
        if self.capacity is not None and len(self.mapped) >= self.capacity:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")
        self.mapped.add(address)
        self.maps.append(address)

    def unmap_and_release(self, device: int, size: int, address: int, handle: int) -> None:
        assert address in self.mapped, f"{address:#x} is not mapped"
        self.mapped.remove(address)
        self.unmaps.append(address)


GRANULE = 2 << 20
KV = {0x1000_0000_0000: 6 * GRANULE, 0x2000_0000_0000: 6 * GRANULE, 0x3000_0000_0000: 4 * GRANULE}
SIBLINGS = {0x4000_0000_0000: GRANULE, 0x5000_0000_0000: 10 * GRANULE}  # block tables; a segment that KV shares
WEIGHTS = {0x6000_0000_0000: 40 * GRANULE}


@pytest.fixture
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The released CuMemAllocator with weights, KV cache and its siblings in it, and an engine around it (stand-ins)."""
    torch = pytest.importorskip("torch")
    release = request.param
    have(release)
    from rlpatch.adapters.vllm import _pieces, _pool

    driver = Driver()

    def stub(name: str, **attributes: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        module.__path__ = []  # a package
        monkeypatch.setitem(sys.modules, name, module)

    for name in ("vllm", "vllm.device_allocator", "vllm.distributed", "vllm.distributed.device_communicators"):
        stub(name)
    stub("vllm.logger", init_logger=lambda name: SimpleNamespace(debug=lambda *a: None, info=lambda *a: None))
    stub("vllm.utils", is_pin_memory_available=lambda: False)
    stub("vllm.utils.platform_utils", is_pin_memory_available=lambda: False)
    stub("vllm.utils.system_utils", find_loaded_library=lambda name: None)
    stub("vllm.distributed.device_communicators.cuda_wrapper", CudaRTLibrary=SimpleNamespace)
    stub(
        "vllm.cumem_allocator",
        init_module=None,
        python_create_and_map=driver.create_and_map,
        python_unmap_and_release=driver.unmap_and_release,
    )
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", types.ModuleType("placeholder"))
    module = run_source(release, CUMEM, "vllm.device_allocator.cumem")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    allocator = module.CuMemAllocator.get_instance()
    for tag, allocations in (("weights", WEIGHTS), ("kv_cache", {**KV, **SIBLINGS})):
        allocator.current_tag = tag
        for address, size in allocations.items():
            driver.mapped.add(address)
            allocator.python_malloc_callback((0, size, address, address + 1))

    def tensor(address: int, size: int) -> Any:
        storage = SimpleNamespace(data_ptr=lambda: address, nbytes=lambda: size)
        return SimpleNamespace(untyped_storage=lambda: storage, element_size=lambda: 2)

    tensors = [tensor(address, size) for address, size in KV.items()]
    tensors.append(tensor(0x5000_0000_0000, 4 * GRANULE))  # a layer's cache that does not fill its allocation
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=2), kv_transfer_config=None
    )  # so it comes back as a whole or not at all
    engine = SimpleNamespace(
        device=torch.device("cuda"),
        kv_tensors=lambda: tensors,
        runner=SimpleNamespace(),
        llm=SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)),
    )
    monkeypatch.setattr(_pieces, "memory", lambda device: (1 << 50, 1 << 50))
    monkeypatch.setattr(_pool, "synchronize", lambda device: None)
    monkeypatch.setattr(_pool, "make_room", lambda device: None)
    return SimpleNamespace(release=release, driver=driver, allocator=allocator, engine=engine)


# one of each text of cumem.py
POOLS = ("0.9.2", "0.10.2", "0.11.0", "0.13.0", "0.16.0", "0.17.1", "0.20.1")


@pytest.mark.parametrize("pool", POOLS, indirect=True)
def test_cycles_on_the_released_allocator_map_each_kv_allocation_once_and_leave_the_rest(pool: Any) -> None:
    from rlpatch.adapters.vllm._pool import PoolAllocations

    everything = set(pool.driver.mapped)
    memory = PoolAllocations(pool.engine)
    assert memory.resident_bytes() == sum(KV.values())
    for cycle in range(1, 4):
        memory.free()
        assert pool.driver.mapped == everything - set(KV) and memory.resident_bytes() == 0
        memory.back()
        assert pool.driver.mapped == everything and memory.resident_bytes() == sum(KV.values())
        assert len(pool.driver.maps) == len(pool.driver.unmaps) == cycle * len(KV)
    pool.allocator.sleep(())  # upstream's own whole sleep still finds a consistent pool
    assert not pool.driver.mapped
    pool.allocator.wake_up()
    assert pool.driver.mapped == everything


@pytest.mark.parametrize("pool", POOLS, indirect=True)
def test_the_released_allocator_frees_a_kv_cache_that_is_out(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlpatch.adapters.vllm import _pieces
    from rlpatch.adapters.vllm._pool import PoolAllocations
    from rlpatch.patching import PatchSet

    monkeypatch.setattr(_pieces, "on_cpu", lambda: False)
    PoolAllocations(pool.engine).free()
    patches = PatchSet("end", _pieces.patches())
    patches.apply()
    try:
        for address in KV:  # what the C extension does
            callback = getattr(pool.allocator, "_python_free_callback", None) or pool.allocator.python_free_callback
            pool.driver.unmap_and_release(*callback(address))
    finally:
        patches.revert()
    assert pool.driver.mapped == {*WEIGHTS, *SIBLINGS} and not set(KV) & set(pool.allocator.pointer_to_data)


@pytest.mark.parametrize("pool", POOLS, indirect=True)
def test_a_restore_that_runs_out_of_memory_maps_nothing_and_can_be_tried_again(pool: Any) -> None:
    from rlpatch.adapters.vllm._pool import PoolAllocations

    everything = set(pool.driver.mapped)
    memory = PoolAllocations(pool.engine)
    memory.free()
    pool.driver.capacity = len(everything) - 1
    with pytest.raises(RuntimeError, match="out of memory"):
        memory.back()
    assert pool.driver.mapped == everything - set(KV) and memory.resident_bytes() == 0
    pool.driver.capacity = None
    memory.back()
    assert pool.driver.mapped == everything


@pytest.mark.parametrize("pool", POOLS, indirect=True)
def test_upstreams_own_sleep_and_wake_up_are_no_way_to_release_kv_alone(pool: Any) -> None:
    """Why none of them is called: by tag the siblings go too, and what is out is unmapped, what is in mapped, again."""
    from rlpatch.adapters.vllm._pool import PoolAllocations

    memory = PoolAllocations(pool.engine)
    memory.free()
    with pytest.raises(AssertionError, match="is not mapped"):
        pool.allocator.sleep(("nothing",))
    pool.driver.mapped = {*WEIGHTS, *SIBLINGS}
    with pytest.raises(AssertionError, match="is mapped twice"):
        pool.allocator.wake_up(["kv_cache", "weights"])


@pytest.mark.parametrize("pool", ["0.9.2", "0.16.0", "0.20.0", "0.20.1"], indirect=True)
def test_expandable_segments_skip_standby_where_the_released_allocator_asserts_against_them(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlpatch.adapters.vllm import _platform, _pool

    monkeypatch.setattr(_platform, "on_cpu", lambda: False)
    assert _pool.expandable_segments_refused() is None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    refused = Version(pool.release) < Version("0.20.1")
    assert (_pool.expandable_segments_refused() is not None) is refused
    with pytest.raises(AssertionError) if refused else contextlib.nullcontext():
        type(pool.allocator)()


# ---- encoder cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["0.9.2", "0.10.2", "0.11.2", "0.12.0", "0.15.1", "0.16.0"])
def test_the_encoder_cache_is_as_new_after_a_release(release: str) -> None:
    pytest.importorskip("torch")
    from rlpatch.adapters.vllm.standby_v0_9 import RestingStandby

    logger = SimpleNamespace(debug=lambda *a: None)
    kind = released(
        release, "v1/core/encoder_cache_manager.py", "EncoderCacheManager", OrderedDict=OrderedDict, logger=logger
    )
    manager = kind(cache_size=100)
    new = dict(vars(kind(cache_size=100)))
    mechanism = object.__new__(RestingStandby)
    mechanism._core = SimpleNamespace(scheduler=SimpleNamespace(encoder_cache_manager=manager))
    mechanism.engine = SimpleNamespace(runner=SimpleNamespace(encoder_cache={"picture": object()}))  # type: ignore[assignment]
    if "freeable" in new:  # from request to request
        manager.cached["picture"] = set()
        manager.freeable["picture"] = 40
        manager.num_free_slots -= 40
    mechanism._forget_encoder_outputs()
    if release in ("0.9.2", "0.16.0"):  # nothing outlives a request; has a reset that Engine.reset_caches calls
        assert "picture" in mechanism.engine.runner.encoder_cache
    else:
        assert vars(manager) == new and not mechanism.engine.runner.encoder_cache


# ---- loaders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["0.9.2", "0.10.0"])
def test_a_class_is_a_load_format_before_loaders_can_be_registered(release: str) -> None:
    dataclasses = pytest.importorskip("pydantic.dataclasses")
    import dataclasses as standard
    from typing import Any as Anything
    from typing import Optional, Union

    class Loader:
        def __init__(self, load_config: Any) -> None:
            self.load_config = load_config

    formats = released(release, "config.py", "LoadFormat", enum=__import__("enum"))
    names = {"Union": Union, "Optional": Optional, "Any": Anything, "BaseModelLoader": Anything, "LoadFormat": formats}
    config = released(
        release,
        "config.py",
        "LoadConfig",
        lazy=False,
        **names,
        config=lambda cls: cls,
        dataclass=dataclasses.dataclass,
        field=standard.field,
        TensorizerConfig=dict,
        logger=SimpleNamespace(info=lambda *a: None),
        hashlib=__import__("hashlib"),
    )
    pick = released(release, LOADERS, "get_model_loader", LoadFormat=formats)
    chosen = pick(config(load_format=Loader))
    assert type(chosen) is Loader and chosen.load_config.load_format is Loader
    from_disk = standard.replace(chosen.load_config, load_format="auto")
    assert from_disk.load_format is formats.AUTO


# ---- LoRA slots --------------------------------------------------------------------------------------------------------

RANK, COLUMNS, ROWS = 8, 24, (16, 8, 8)
SLOTTED = [release for release in OLD if release not in ("0.10.1", "0.10.1.1", "0.14.0", "0.15.0")]


def era_of(release: str) -> Any:
    return registry.choose("lora_slots", Installed("vllm", "vllm", Version(release)), probing=False).adapter


def slot_layer(release: str, rows: tuple[int, ...], torch: Any) -> Any:
    """A layer with the released ``reset_lora`` and ``set_lora`` on buffers as ``create_lora_weights`` makes them."""
    kind = "MergedColumnParallelLinearWithLoRA" if len(rows) > 1 else "BaseLinearLayerWithLoRA"
    layer: Any = SimpleNamespace(tp_size=1, n_slices=len(rows), lora_config=SimpleNamespace(bias_enabled=False))
    layer.lora_a_stacked = tuple(torch.full((1, 1, RANK, COLUMNS), float("nan")) for _ in rows)
    layer.lora_b_stacked = tuple(torch.full((1, 1, n, RANK), float("nan")) for n in rows)
    from typing import Optional, cast

    for name in ("reset_lora", "set_lora"):
        holder = kind if find(release, LORA_LAYERS, f"{kind}.{name}") else "BaseLinearLayerWithLoRA"
        function = released(release, LORA_LAYERS, f"{holder}.{name}", torch=torch, Optional=Optional, cast=cast)
        setattr(layer, name, types.MethodType(function, layer))
    return layer


def slots_on(release: str, mechanism: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """`Slots` over a stand-in engine whose layers run released code, and what ``activate_adapter`` does to register."""
    torch = pytest.importorskip("torch")
    from rlpatch.lora.slots import Slots
    from rlpatch.lora.target import Product, Target

    utils = types.ModuleType("vllm.lora.utils")
    utils.parse_fine_tuned_lora_name = released(release, "lora/utils.py", "parse_fine_tuned_lora_name")  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.utils", utils)
    fused, single = slot_layer(release, ROWS, torch), slot_layer(release, (ROWS[0],), torch)
    manager = SimpleNamespace(
        modules={"m.qkv_proj": fused, "m.o_proj": single},
        packed_modules={"m.qkv_proj": ["m.q_proj", "m.k_proj", "m.v_proj"]},
        lora_config=SimpleNamespace(max_lora_rank=RANK, lora_dtype=torch.float32),
        lora_index_to_id=[None],
        device="cpu",
        model=None,
    )
    transposed = Version(release) < Version("0.11")  # what LoRAModel.from_lora_tensors does with what it reads

    def register(pairs: Any, scale: float) -> str:
        a, b = ({n: (m.T if transposed else m) for n, m in part.items()} for part in (
            {n: a for n, (a, _) in pairs.items()}, {n: b * scale for n, (_, b) in pairs.items()}))  # fmt: skip
        extra = [None] * (len(parameters(find(release, LORA_LAYERS, "BaseLayerWithLoRA.set_lora"))) - 4)
        parts = [f"m.{part}_proj.weight" for part in "qkv"]
        fused.set_lora(0, [a[n] for n in parts], [b[n] for n in parts], *extra)
        single.set_lora(0, a["m.o_proj.weight"], b["m.o_proj.weight"], *extra)
        return "request"

    machine = object.__new__(mechanism)
    machine.manager, machine.index = manager, None
    machine.register, machine.active, machine.remove = register, lambda: True, lambda: None
    weights = dict(zip(("q", "k", "v", "o"), (*ROWS, ROWS[0]), strict=True))
    product = lambda n: Product(torch.randn(n, 4), torch.randn(4, COLUMNS), 0.5)  # noqa: E731
    targets = [Target(f"m.{part}_proj.weight", torch.zeros(n, COLUMNS), (product(n),)) for part, n in weights.items()]
    slots = Slots(SimpleNamespace(device=torch.device("cpu")), machine, targets)  # type: ignore[arg-type]
    return slots, SimpleNamespace(targets=targets, fused=fused, single=single)


@pytest.mark.parametrize("release", SLOTTED)
def test_slots_are_written_as_the_released_set_lora_writes_them(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    slots, engine = slots_on(release, era_of(release).provides, monkeypatch)
    slots.register()  # compares what set_lora wrote with what Slots writes
    slots.update(engine.targets)
    *qkv, out = engine.targets
    for position, target in enumerate(qkv):
        product = target.products[0]
        assert torch.equal(engine.fused.lora_a_stacked[position][0, 0, :4], product.right)
        assert torch.equal(engine.fused.lora_b_stacked[position][0, 0, :, :4], product.left * 0.5)
        assert not engine.fused.lora_a_stacked[position][0, 0, 4:].any()
    assert torch.equal(engine.single.lora_b_stacked[0][0, 0, :, :4], out.products[0].left * 0.5)


@pytest.mark.parametrize("release", ["0.9.2", "0.10.2", "0.11.0", "0.16.0"])
def test_slots_of_another_era_are_refused(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from rlpatch.errors import UsageError

    class Wrong(era_of(release).provides):  # type: ignore[misc]
        transposed = Version(release) >= Version("0.11")

    slots, _ = slots_on(release, Wrong, monkeypatch)
    with pytest.raises(UsageError, match="slot"):
        slots.register()


def test_the_ranks_of_releases_that_do_not_list_them() -> None:
    pytest.importorskip("torch")
    for release in ("0.9.2", "0.11.0"):
        provider = era_of(release).provides
        assert provider.accepted_ranks()[0] == 8
        assert provider.engine_arguments(5) == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
