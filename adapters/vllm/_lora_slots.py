"""LoRA slots: where vLLM keeps an adapter on the device, and its one ordinary registration, in every release.

``LLMEngine.add_lora(LoRARequest)`` → EngineCore → ``Worker.add_lora`` → ``LoRAModelRunnerMixin.add_lora`` →
``LRUCacheWorkerLoRAManager.add_adapter``: ``_load_adapter`` reads a PEFT folder into host memory (cast to
``LoRAConfig.lora_dtype``), ``LRUCacheLoRAModelManager.add_adapter`` packs it (``packed_modules``: q, k, v → qkv_proj) and
multiplies B by the scaling, ``activate_adapter`` takes the first free index of ``lora_index_to_id`` and calls
``set_lora(index, lora_a, lora_b)`` of every layer in ``modules`` (``reset_lora`` where the adapter has nothing). Both
runners (``v1/worker/gpu_model_runner.py`` and V2's ``v1/worker/gpu/model_runner.py``) inherit the mixin and with it
``lora_manager._adapter_manager``. Read in every minor from 0.9.2 to 0.17 and in 0.22.1, 0.25.1, 0.29.0, 0.30.0, 0.33.0,
run on 0.22.1 and later; what differs is looked up on the objects (the mapper that LoRA names go through, text names of
multimodal models) or stands in the eras' own files (the arguments of ``set_lora``, the ranks that are accepted).

Where ``set_lora`` puts what is learnt by watching its copies (`CopyTrace`), so that no layer class has to be known here.
Nothing but a reload of the weights (``reset_lora_state``, 0.29 and later) takes a pinned adapter out of its slot; sleep
level 2 discards the slots' memory all the same (`rlpatch.phases.Colocation.upstream_sleep_stays`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from rlpatch.relies import Relies

if TYPE_CHECKING:
    import torch

    from rlpatch.engine import Engine
    from rlpatch.lora.slots import Place
    from rlpatch.sharing.trace import Geometry

NAME = "rlpatch"
_SET_LORA = ("index", "lora_a", "lora_b")
ID = 7517  # vLLM's own warm-up adapters count from 1, users' do mostly

_Members = dict[str, "int | None"]  # trainer's name -> position in a packed layer, None for the layer itself


class LoraSlots:
    """See `rlpatch.lora.slots.Mechanism`.

    Attributes:
        transposed: ``set_lora`` takes ``A [in, r]`` and ``B [r, out]``.
        ranks: What ``LoRAConfig.max_lora_rank`` accepts; None: vLLM says so in ``MaxLoRARanks``.

    Raises:
        UsageError: the engine was built without LoRA.
    """

    transposed = False
    ranks: tuple[int, ...] | None = None

    def __init__(self, engine: Engine) -> None:
        from rlpatch.errors import UsageError

        self.engine = engine
        worker_manager = getattr(engine.runner, "lora_manager", None)
        if worker_manager is None:
            raise UsageError(
                "the vLLM engine was built with enable_lora=False and has no LoRA slots; build it with enable_lora=True"
            )
        self.manager = worker_manager._adapter_manager
        self.index: int | None = None

    @classmethod
    def accepted_ranks(cls) -> tuple[int, ...]:
        """What ``LoRAConfig.max_lora_rank`` accepts."""
        if cls.ranks is not None:
            return cls.ranks
        from vllm.config.lora import MaxLoRARanks

        return tuple(sorted(get_args(MaxLoRARanks)))

    @classmethod
    def engine_arguments(cls, rank: int) -> dict[str, Any]:
        """Arguments of ``LLM``. ``lora_dtype`` stays "auto": the dtype of the engine's weights."""
        from rlpatch.lora.slots import accepted_rank

        rank = accepted_rank(rank, cls.accepted_ranks())
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}

    # ---- the trainer's names, the engine's layers --------------------------------------------------------------

    def _known(self) -> dict[str, tuple[str, int | None]]:
        """Name as an adapter's file says it (after vLLM's renaming) -> (layer, position in it when it is packed)."""
        known: dict[str, tuple[str, int | None]] = {}
        for module in self.manager.modules:
            known[module] = (module, None)
        for module, parts in self.manager.packed_modules.items():
            for position, part in enumerate(parts):
                known[part] = (module, position)
        text_names = getattr(self.manager, "_get_text_lora_names", None)  # an adapter of a multimodal model's text half
        if text_names is not None:
            for name, found in list(known.items()):
                for alias in text_names(name):
                    known.setdefault(alias, found)
        return known

    def _renamed(self, layer: str) -> str:
        """The engine's name of a trainer's layer, as ``_load_adapter`` computes it."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        mapper = getattr(self.manager.model, "hf_to_vllm_mapper", None)
        for variant in ("get_rename_mapper", "get_unstacked_mapper"):  # without these it renames and does no more
            if hasattr(mapper, variant):
                mapper = getattr(mapper, variant)()
                break
        return parse_fine_tuned_lora_name(_key(layer, "A"), mapper)[0]

    def locate(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Place | str]:
        """See `rlpatch.lora.slots.Mechanism.locate`."""
        from rlpatch.errors import UsageError

        occupied = self.manager.lora_index_to_id
        if None not in occupied:
            raise UsageError(
                f"all {len(occupied)} LoRA slots of the engine are taken (max_loras={len(occupied)}); unload the other "
                "adapters, or build the engine with a larger max_loras"
            )
        self.index = occupied.index(None)  # the one that activate_adapter will take
        known = self._known()
        found: dict[str, Place | str] = {}
        layers: dict[str, _Members] = {}
        for name in shapes:
            module, position = known.get(self._renamed(_layer(name)), ("", None))
            if not module:
                found[name] = "the engine has no LoRA slot for it"
            elif hasattr(self.manager.modules[module], "w13_lora_a_stacked"):
                found[name] = "experts have LoRA slots of another layout, which rlpatch does not write"
            elif hasattr(self.manager.modules[module], "lora_a_stacked_2d"):
                found[name] = "embeddings have LoRA slots of another layout, which rlpatch does not write"
            else:
                layers.setdefault(module, {})[name] = position
        for module, members in layers.items():
            found.update(self._watch(module, members, shapes))
        return found

    def _watch(self, module: str, members: _Members, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Place | str]:
        """Let one layer copy matrices of full rank into the free slot, and note where they go."""
        import torch

        from rlpatch.sharing.trace import CopyTrace

        layer, rank = self.manager.modules[module], int(self.manager.lora_config.max_lora_rank)
        sizes = {name: (rank * shapes[name][1], rank * shapes[name][0]) for name in members}
        source = torch.zeros(
            sum(map(sum, sizes.values())), dtype=self.manager.lora_config.lora_dtype, device=self.manager.device
        )
        offsets: dict[str, tuple[int, int]] = {}
        count = len(self.manager.packed_modules.get(module, ()))
        lora_a: list[torch.Tensor | None] = [None] * count
        lora_b: list[torch.Tensor | None] = [None] * count
        at = 0
        for name, position in members.items():
            (rows, columns), (size_a, size_b) = shapes[name], sizes[name]
            a = source[at : at + size_a].view(rank, columns)
            b = source[at + size_a : at + size_a + size_b].view(rows, rank)
            offsets[name] = (at, at + size_a)
            at += size_a + size_b
            if self.transposed:
                a, b = a.T, b.T
            if position is None:
                whole = (a, b)
            else:
                lora_a[position], lora_b[position] = a, b
        trace = CopyTrace(source)
        try:
            with trace:
                rest = [None] * (len(inspect.signature(layer.set_lora).parameters) - len(_SET_LORA))
                if None in members.values():
                    layer.set_lora(self.index, *whole, *rest)
                else:
                    layer.set_lora(self.index, lora_a, lora_b, *rest)
        except Exception as error:
            return dict.fromkeys(members, f"the LoRA slot of {module} does not take its shape: {error}")
        slots = len(self.manager.lora_index_to_id)
        return {name: _place(module, trace, offsets[name], shapes[name], rank, slots) for name in members}

    # ---- the adapter -------------------------------------------------------------------------------------------

    def register(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> Any:
        """See `rlpatch.lora.slots.Mechanism.register`."""
        import json
        import tempfile
        from pathlib import Path

        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        rank = max(int(a.shape[0]) for a, _ in pairs.values())
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": scale * rank,
            "target_modules": sorted({_layer(name).rpartition(".")[2] for name in pairs}),
            "bias": "none",
        }
        tensors = {}
        for name, (a, b) in pairs.items():
            tensors[_key(_layer(name), "A")], tensors[_key(_layer(name), "B")] = a, b
        with tempfile.TemporaryDirectory(prefix="rlpatch-lora-") as folder:
            Path(folder, "adapter_config.json").write_text(json.dumps(config))
            save_file(tensors, Path(folder, "adapter_model.safetensors"))
            request = LoRARequest(NAME, ID, folder)
            self.engine.llm.llm_engine.add_lora(request)
        self.engine.llm.llm_engine.pin_lora(ID)
        return request

    def active(self) -> bool:
        """See `rlpatch.lora.slots.Mechanism.active`."""
        occupied = self.manager.lora_index_to_id
        return self.index is not None and self.index < len(occupied) and occupied[self.index] == ID

    def remove(self) -> None:
        """See `rlpatch.lora.slots.Mechanism.remove`."""
        if ID in self.manager.list_adapters():
            self.engine.llm.llm_engine.remove_lora(ID)
        self.index = None


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _key(layer: str, matrix: str) -> str:
    """PEFT's name of a tensor in an adapter file."""
    return f"base_model.model.{layer}.lora_{matrix}.weight"


def _place(
    module: str, trace: Any, offsets: tuple[int, int], shape: tuple[int, int], rank: int, slots: int
) -> Place | str:
    """Where the copies of one weight's A and B went; a sentence when they are not whole rows that cover it once, or do
    not fill the slot (a smaller matrix is copied into a corner of it without complaint)."""
    from rlpatch.lora.slots import Place

    (at_a, at_b), (rows, columns) = offsets, shape
    right: list[torch.Tensor] = []
    left: list[tuple[int, torch.Tensor]] = []
    odd = False
    for piece in trace.pieces:
        at = piece.source.offset
        if at_a <= at < at_b:
            odd |= at != at_a or not _is_matrix(piece.source, rank, columns)
            right.append(piece.storage_of)
        elif at_b <= at < at_b + rows * rank:
            first, column = divmod(at - at_b, rank)
            odd |= column != 0 or not _is_matrix(piece.source, piece.source.size[0], rank)
            left.append((first, piece.storage_of))
    left.sort(key=lambda part: part[0])
    reached = 0
    for first, view in left:
        odd |= first != reached
        reached = first + int(view.shape[0])
    if odd or not right or reached != rows:
        return f"the LoRA slot of {module} holds other than all of its rows (tensor parallelism, or another layout)"
    for view in (*right, *(view for _, view in left)):
        if view.numel() * slots * view.element_size() != view.untyped_storage().nbytes():
            return f"the LoRA slot of {module} is larger than the trainer's weight of shape {shape}"
    return Place(module, tuple(right), tuple(left))


def _is_matrix(geometry: Geometry, rows: int, columns: int) -> bool:
    """Whether it is `rows` whole rows of a row-major matrix."""
    strides = zip(geometry.size, geometry.stride, (columns, 1), strict=False)
    return geometry.size == (rows, columns) and all(n == 1 or stride == want for n, stride, want in strides)


def probe(set_lora: tuple[str, ...], *, transposed: bool = False, ranks: bool = True) -> str | None:
    """What this release lacks of what `LoraSlots` relies on, or None.

    Args:
        set_lora: What ``set_lora`` takes beyond `_SET_LORA`.
        transposed: Whether it takes A and B transposed.
        ranks: Whether ``MaxLoRARanks`` lists the ranks.
    """
    try:
        from vllm.lora.layers import BaseLayerWithLoRA, ColumnParallelLinearWithLoRA
        from vllm.lora.request import LoRARequest
        from vllm.lora.utils import parse_fine_tuned_lora_name
        from vllm.lora.worker_manager import LoRAModelManager, LRUCacheWorkerLoRAManager
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    except ImportError as error:
        return str(error)
    if ranks:
        try:
            from vllm.config.lora import MaxLoRARanks
        except ImportError as error:
            return str(error)
        if not all(isinstance(rank, int) for rank in get_args(MaxLoRARanks)) or not get_args(MaxLoRARanks):
            return "vllm.config.lora.MaxLoRARanks lists no ranks"
    wanted = (*_SET_LORA, *set_lora)
    if tuple(inspect.signature(BaseLayerWithLoRA.set_lora).parameters)[1:] != wanted:
        return f"set_lora takes other arguments than ({', '.join(wanted)})"
    if ("lora_a.T" in inspect.getsource(ColumnParallelLinearWithLoRA.set_lora)) != transposed:
        return f"set_lora takes {'no ' if transposed else ''}transposed matrices"
    if list(inspect.signature(parse_fine_tuned_lora_name).parameters)[:2] != ["name", "weights_mapper"]:
        return "parse_fine_tuned_lora_name takes other arguments than (name, weights_mapper)"
    if getattr(LoRARequest, "__struct_fields__", ())[:3] != ("lora_name", "lora_int_id", "lora_path"):
        return "LoRARequest has other fields than lora_name, lora_int_id, lora_path"
    for owner, method in ((LLMEngine, "add_lora"), (LLMEngine, "pin_lora"), (LLMEngine, "remove_lora")):
        if not hasattr(owner, method):
            return f"{owner.__name__} has no {method}"
    # instance attributes: the code that sets them names them
    managers = [c for c in LoRAModelManager.__mro__ if "__init__" in vars(c)]  # up to 0.10 a base class sets the model
    for functions, names in (
        ([LoRAModelRunnerMixin.load_lora_model], ("lora_manager",)),
        ([LRUCacheWorkerLoRAManager.create_lora_manager], ("_adapter_manager",)),
        (
            [c.__init__ for c in managers if c is not object],
            ("lora_index_to_id", "modules", "packed_modules", "lora_config", "device", "model"),
        ),
    ):
        known = {name for function in functions for name in function.__code__.co_names}
        missing = [name for name in names if name not in known]
        if missing:
            return f"{functions[0].__qualname__} sets no {', '.join(missing)}"
    return None if hasattr(LoRAModelManager, "list_adapters") else "LoRAModelManager has no list_adapters"


RELIES = (
    Relies("vllm.config:LoRAConfig", parameters=("max_lora_rank", "lora_dtype", "max_loras")),
    Relies("vllm.engine.arg_utils:EngineArgs", parameters=("enable_lora", "max_loras", "max_lora_rank")),
    Relies("vllm.lora.request:LoRARequest", positional=("lora_name", "lora_int_id", "lora_path")),
    Relies("vllm.lora.utils:parse_fine_tuned_lora_name", positional=("name", "weights_mapper")),
    Relies("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.lora_manager"),
    Relies("vllm.v1.worker.gpu_model_runner:GPUModelRunner.lora_manager"),
    Relies("vllm.v1.worker.gpu.model_runner:GPUModelRunner.lora_manager", versions=">=0.17"),
    Relies("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager._adapter_manager"),
    *(
        Relies(f"vllm.lora.model_manager:LoRAModelManager.{name}", versions=">=0.13")
        for name in ("lora_config", "device", "model", "list_adapters", "modules", "packed_modules")
    ),
    Relies(
        "vllm.lora.model_manager:LoRAModelManager.activate_adapter",
        versions=">=0.13",
        contains=("self.lora_index_to_id[index] = lora_model.id", "module.reset_lora(index)"),
    ),
    # the names that LoRA keys go through: without these it renames and does no more
    Relies(
        "vllm.model_executor.models.utils:WeightsMapper.get_rename_mapper",
        versions=">=0.25",
        otherwise=(Relies("vllm.model_executor.models.utils:WeightsMapper.get_unstacked_mapper"),),
    ),
    *(
        Relies(f"vllm.v1.engine.llm_engine:LLMEngine.{name}", positional=(argument,))
        for name, argument in (("add_lora", "lora_request"), ("pin_lora", "lora_id"), ("remove_lora", "lora_id"))
    ),
)
