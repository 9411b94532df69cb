"""The first blocks of a KV cache without the others: where they are, on real tensors; and what is mapped when, on a fake
of vLLM's C extension (`fake_cumem`). The released allocators and a real engine do it in tests/cpu/test_partial_kv.py."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cumem import POISON, FakeDriver

torch = pytest.importorskip("torch")

from rlpatch.adapters.vllm import _pieces, _pool  # noqa: E402
from rlpatch.errors import StandbyError  # noqa: E402
from rlpatch.standby import KVStandby  # noqa: E402

GRANULE = 256  # bytes, for tensors that a CPU does not mind
BLOCKS = 24


@pytest.fixture(autouse=True)
def small_granules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pieces, "GRANULE", GRANULE)
    monkeypatch.setattr(_pool, "GRANULE", GRANULE)


def buffer(size: int) -> Any:
    """`size` bytes, rounded up to granules and aligned to them: what an allocation of the pool is."""
    size = -(-size // GRANULE) * GRANULE
    raw = torch.zeros(size + GRANULE, dtype=torch.uint8)
    start = -raw.data_ptr() % GRANULE
    return raw[start : start + size]


# ---- where blocks are ------------------------------------------------------------------------------------------------

HALF = torch.int16  # -1 has no zero byte


def planes(blocks: int) -> tuple[Any, list[Any]]:
    """K and V apart: (2, blocks, tokens, heads, dim)."""
    raw = buffer(2 * blocks * 4 * 2 * 6 * 2)
    return raw, [raw[: 2 * blocks * 96].view(HALF).view(2, blocks, 4, 2, 6)]


def joint(blocks: int) -> tuple[Any, list[Any]]:
    """(blocks, 2, tokens, heads, dim)."""
    raw = buffer(blocks * 2 * 96)
    return raw, [raw[: blocks * 192].view(HALF).view(blocks, 2, 4, 2, 6)]


def heads_first(blocks: int) -> tuple[Any, list[Any]]:
    """The same to the layer, but stored (2, blocks, heads, tokens, dim)."""
    raw = buffer(2 * blocks * 96)
    return raw, [raw[: 2 * blocks * 96].view(HALF).view(2, blocks, 2, 4, 6).permute(0, 1, 3, 2, 4)]


def heads_outermost(blocks: int) -> tuple[Any, list[Any]]:
    """(heads, 2, blocks, tokens, dim), seen as (blocks, 2, tokens, heads, dim)."""
    raw = buffer(2 * blocks * 96)
    return raw, [raw[: 2 * blocks * 96].view(HALF).view(2, 2, blocks, 4, 6).permute(2, 1, 3, 0, 4)]


def kernel_blocks(blocks: int) -> tuple[Any, list[Any]]:
    """Each of the scheduler's blocks is four of the kernel's."""
    raw = buffer(2 * blocks * 96)
    return raw, [raw[: 2 * blocks * 96].view(HALF).view(2, blocks * 4, 1, 2, 6)]


def latent(blocks: int) -> tuple[Any, list[Any]]:
    """Multi-head latent attention: (blocks, tokens, width)."""
    raw = buffer(blocks * 4 * 36 * 2)
    return raw, [raw[: blocks * 288].view(HALF).view(blocks, 4, 36)]


def layers_of_one_storage(blocks: int) -> tuple[Any, list[Any]]:
    """vLLM from 0.31: one allocation, a region for each layer."""
    raw = buffer(5 * blocks * 2 * 96)
    return raw, list(raw[: 5 * blocks * 192].view(HALF).view(5, blocks, 2, 8, 6).unbind(0))


def groups_of_one_storage(blocks: int) -> tuple[Any, list[Any]]:
    """Layers of two kinds over the same bytes: attention, and a state that is stored otherwise."""
    raw = buffer(blocks * 192)
    whole = raw[: blocks * 192]
    return raw, [whole.view(HALF).view(blocks, 2, 4, 2, 6), whole.view(HALF).view(blocks, 96)]


def interleaved(blocks: int) -> tuple[Any, list[Any]]:
    """All layers' pages of a block next to each other."""
    raw = buffer(3 * blocks * 192)
    view = raw[: 3 * blocks * 192].view(HALF).view(blocks, 3, 2, 8, 6)
    return raw, [view[:, layer] for layer in range(3)]


def padded(blocks: int) -> tuple[Any, list[Any]]:
    """Pages that end before the next one begins."""
    raw = buffer(blocks * 320)
    return raw, [raw[: blocks * 320].view(HALF).view(blocks, 160)[:, :96].unflatten(1, (2, 4, 12))]


def with_a_stranger(blocks: int) -> tuple[Any, list[Any]]:
    """Something else behind the cache, in its allocation."""
    raw = buffer(2 * blocks * 96 + 1000)
    return raw, [raw[: 2 * blocks * 96].view(HALF).view(2, blocks, 4, 2, 6)]


TIGHT = (planes, joint, heads_first, heads_outermost, kernel_blocks, latent, layers_of_one_storage,
         groups_of_one_storage, interleaved, with_a_stranger)  # fmt: skip
Layout = Callable[[int], tuple[Any, list[Any]]]


def touched(raw: Any, views: list[Any], blocks: int, total: int) -> set[int]:
    """Granules that these blocks have a byte in: they are written and looked up."""
    raw.zero_()
    for view in views:
        dimension = 0 if view.shape[0] % total == 0 else 1
        view.narrow(dimension, 0, blocks * (view.shape[dimension] // total)).fill_(-1)
    return {byte // GRANULE for byte in raw.nonzero().flatten().tolist()}


def prefixes_of(raw: Any, views: list[Any], total: int) -> _pieces.Prefixes:
    return _pieces.Prefixes(views, [(raw.data_ptr(), raw.numel())], total)


def granules(raw: Any, spans: list[tuple[int, int]]) -> list[int]:
    base, size = raw.data_ptr(), raw.numel()
    assert all(base <= start < end <= base + size and not (start - base) % GRANULE and not (end - base) % GRANULE
               for start, end in spans)  # fmt: skip
    return [n for start, end in spans for n in range((start - base) // GRANULE, (end - base) // GRANULE)]


@pytest.mark.parametrize("layout", [*TIGHT, padded], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("total", [3, BLOCKS, 40])
def test_the_spans_of_a_prefix_are_the_granules_that_its_blocks_are_in(layout: Layout, total: int) -> None:
    raw, views = layout(total)
    prefixes = prefixes_of(raw, views, total)
    strangers = set(range(raw.numel() // GRANULE))
    if layout is not padded:  # there the gaps between pages are nobody's, and are left out with the pages
        raw.zero_()
        for view in views:
            view.fill_(-1)
        strangers = {byte // GRANULE for byte in (raw == 0).nonzero().flatten().tolist()}
    sizes = []
    for blocks in range(total + 1):
        found = granules(raw, prefixes.spans(blocks))
        assert len(found) == len(set(found))
        wanted = touched(raw, views, blocks, total)
        assert wanted <= set(found)
        assert set(found) == wanted | strangers or layout is padded
        sizes.append(prefixes.size(blocks))
        assert sizes[-1] == len(found) * GRANULE
    assert sizes == sorted(sizes) and sizes[-1] == raw.numel()
    assert sizes[total // 2] <= raw.numel() // 2 + GRANULE * 2 * len(prefixes.spans(total // 2)) + 1000
    for room in range(0, raw.numel() + GRANULE, max(GRANULE // 2, raw.numel() // 20)):
        most = prefixes.most(room)
        assert most == max([n for n, size in enumerate(sizes) if size <= room], default=0)


def test_several_allocations() -> None:
    made = [planes(BLOCKS), layers_of_one_storage(BLOCKS)]
    allocations = [(raw.data_ptr(), raw.numel()) for raw, _ in made]
    together = _pieces.Prefixes([view for _, views in made for view in views], allocations, BLOCKS)
    for blocks in (2, 7, BLOCKS):
        apart = [span for raw, views in made for span in prefixes_of(raw, views, BLOCKS).spans(blocks)]
        assert together.spans(blocks) == apart


@pytest.mark.parametrize(
    ("shape", "total"), [((96,), 24), ((2, 25, 4), 24), ((24, 2, 4), 48), ((2, 2, 4), 2), ((3, 2, 24), 24)]
)
def test_a_tensor_that_does_not_tell_where_its_blocks_are(shape: tuple[int, ...], total: int) -> None:
    with pytest.raises(RuntimeError, match=f"does not tell where its {total} blocks are"):
        _pieces.extent(torch.zeros(shape), 1, total)


def test_granules_of_another_size() -> None:
    with pytest.raises(RuntimeError, match="not made of granules"):
        _pieces.Prefixes([], [(GRANULE, GRANULE + 8)], 4)


# ---- what is mapped --------------------------------------------------------------------------------------------------


class Rig:
    """`PoolAllocations` over the fake driver, a KV cache of four allocations and an engine around it (stand-ins)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dtype: Any = torch.bfloat16) -> None:
        self.driver = FakeDriver()
        self.raws = [buffer(2 * BLOCKS * 1024) for _ in range(4)]
        width = torch.empty(0, dtype=dtype).element_size()
        views = [raw.view(dtype).view(2, BLOCKS, 4, 2, 128 // width) for raw in self.raws]
        self.total = sum(raw.numel() for raw in self.raws)
        self.data = {raw.data_ptr(): SimpleNamespace(
            handle=self.driver.allocate(raw.data_ptr(), raw.numel()), tag="kv_cache", is_asleep=False
        ) for raw in self.raws}  # fmt: skip
        self.kept = 40 * GRANULE
        module = types.ModuleType("vllm.device_allocator.cumem")
        allocator = SimpleNamespace(pointer_to_data=self.data)
        module.__dict__.update(
            CuMemAllocator=SimpleNamespace(get_instance=lambda: allocator),
            create_and_map=lambda handle: self.driver.create_and_map(*handle),
            unmap_and_release=lambda handle: self.driver.unmap_and_release(*handle),
        )
        for name in ("vllm", "vllm.device_allocator"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        self.config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=1), kv_transfer_config=None, model_config=SimpleNamespace()
        )
        scheduler = SimpleNamespace(kv_cache_config=SimpleNamespace(num_blocks=BLOCKS))
        # a storage of its own for each: the buffers are aligned parts of theirs
        storages = [SimpleNamespace(untyped_storage=lambda raw=raw: SimpleNamespace(
            data_ptr=raw.data_ptr, nbytes=raw.numel), element_size=lambda: width) for raw in self.raws]  # fmt: skip
        self.engine: Any = SimpleNamespace(
            device=torch.device("cuda"),
            core=SimpleNamespace(scheduler=scheduler),
            llm=SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=self.config)),
            runner=SimpleNamespace(),
            kv_tensors=lambda: storages,
            kv_views=lambda: views,
        )
        monkeypatch.setattr(_pool, "synchronize", lambda device: None)
        monkeypatch.setattr(_pool, "make_room", lambda device: None)
        monkeypatch.setattr(_pieces, "memory", lambda device: (self.driver.free(), self.driver.capacity or 1 << 50))
        monkeypatch.setattr(_pieces, "kept_free", lambda engine, device: self.kept)
        self.memory = _pool.PoolAllocations(self.engine)
        self.driver.capacity = self.total + self.kept

    def asleep(self) -> set[bool]:
        return {data.is_asleep for data in self.data.values()}


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_all_of_it_as_before_where_it_fits(rig: Rig) -> None:
    rig.driver.taken = rig.kept  # exactly: what is kept free counts in a partial restore alone
    for _ in range(3):
        rig.memory.free()
        assert not rig.driver.mapped and rig.memory.resident_bytes() == 0 and rig.asleep() == {True}
        rig.driver.log.clear()
        assert rig.memory.back() is None and rig.memory.backed() is None
        assert sorted(rig.driver.log) == sorted(("map", raw.data_ptr(), raw.numel()) for raw in rig.raws)
        assert rig.memory.resident_bytes() == rig.total and rig.asleep() == {False}


def test_large_allocations_come_in_pieces(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pieces, "PIECE", 5 * GRANULE)
    assert rig.raws[0].numel() % (5 * GRANULE)  # the last one is smaller
    for taken in (0, rig.total // 2):
        rig.memory.free()
        rig.driver.taken = taken
        blocks = rig.memory.back()
        assert (blocks is None) is (taken == 0)
        assert max(held for held, _ in rig.driver.mapped.values()) == 5 * GRANULE
        assert rig.driver.used() == rig.memory.resident_bytes() <= rig.total - taken
    rig.memory.free()
    assert not rig.driver.mapped


def test_the_pool_can_let_go_of_what_is_handed_over(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the handles in its own books, which pieces do not have."""
    monkeypatch.setattr(_pieces, "PIECE", 5 * GRANULE)
    rig.memory.hand_over()  # as the pool made it: nothing to do
    assert len(rig.driver.log) == len(rig.raws)
    rig.memory.free()
    rig.memory.hand_over()
    assert not rig.driver.mapped
    rig.memory.back()
    assert len(rig.driver.mapped) > len(rig.raws)
    rig.memory.hand_over()
    rig.memory.hand_over()
    assert rig.memory.resident_bytes() == rig.total and rig.asleep() == {False}
    for data in rig.data.values():
        rig.driver.unmap_and_release(*data.handle)
        rig.driver.create_and_map(*data.handle)
    rig.memory.free()
    rig.driver.taken = rig.total // 2
    assert rig.memory.back() == BLOCKS // 2
    before = dict(rig.driver.mapped)
    rig.memory.hand_over()
    assert rig.driver.mapped == before, "what is there in part stays"
    rig.memory.free()
    assert not rig.driver.mapped


def end(rig: Rig) -> None:
    """What the C extension does when the pool's allocations are freed: it asks the callback for the handle, and unmaps."""
    pool = SimpleNamespace(pointer_to_data=rig.data)

    def free_callback(address: int) -> Any:
        return rig.data.pop(address).handle

    for address in list(rig.data):
        handle = _pieces._freed(free_callback, pool, (address,), {})
        rig.driver.unmap_and_release(*handle)


@pytest.mark.parametrize("state", ["as made", "out", "back", "in part", "handed over"])
def test_an_engine_may_end_at_any_time(rig: Rig, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """Its pool unmaps by the handles in its own books, whatever is mapped; nothing stays behind."""
    monkeypatch.setattr(_pieces, "PIECE", 5 * GRANULE)
    if state != "as made":
        rig.memory.free()
    if state == "in part":
        rig.driver.taken = rig.total // 2
    if state in ("back", "in part", "handed over"):
        rig.memory.back()
    if state == "handed over":
        rig.memory.hand_over()
    others = [data.handle[2] for data in rig.data.values()]
    del rig.memory  # an engine's parts go in any order
    end(rig)
    assert not rig.driver.mapped and not set(others) & set(_pieces._taken)


def test_an_address_that_an_earlier_engine_had(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Its allocation may have been freed while nothing was patched."""
    _pieces._taken.update(dict.fromkeys(rig.data))
    rig.memory = _pool.PoolAllocations(rig.engine)
    end(rig)
    assert not rig.driver.mapped and not caplog.records, "mapped twice"


def test_an_engine_ends_where_its_kv_cache_has_no_room(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.memory.free()
    rig.driver.taken = rig.driver.capacity
    with pytest.raises(KeyError):  # the driver's own complaint
        end(rig)
    assert "an engine ended while its KV cache was released" in caplog.text


def test_chunked_handles_come_as_they_are(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm builds; a piece of ours would have no chunks."""
    rig.memory.free()
    for data in rig.data.values():
        data.handle = (*data.handle[:3], [(data.handle[3], data.handle[1])])
    monkeypatch.setattr(_pieces, "PIECE", 5 * GRANULE)
    assert rig.memory.back() is None and len(rig.driver.mapped) == len(rig.raws)
    rig.memory.free()
    assert not rig.driver.mapped


def test_as_many_blocks_as_there_is_room_for(rig: Rig) -> None:
    rig.memory.free()
    rig.driver.taken = rig.total // 2
    blocks = rig.memory.back()
    assert blocks == BLOCKS // 2 and rig.asleep() == {False}
    assert rig.driver.used() == rig.memory.resident_bytes() <= rig.driver.capacity - rig.driver.taken - rig.kept
    for view in rig.engine.kv_views():
        for block in range(BLOCKS):
            for plane in range(2):
                page = view[plane, block]
                backed = rig.driver.backed(page.data_ptr(), page.numel() * page.element_size())
                assert all(backed) if block < blocks else not any(backed)
    rig.memory.free()
    assert not rig.driver.mapped and rig.memory.resident_bytes() == 0 and rig.asleep() == {True}
    rig.driver.taken = 3 * rig.total // 4  # fewer still
    assert rig.memory.back() == BLOCKS // 4
    rig.memory.free()
    rig.driver.taken = 0
    assert rig.memory.back() is None and rig.memory.resident_bytes() == rig.total
    assert len(rig.driver.mapped) == len(rig.raws)


def test_nothing_is_left_when_not_even_two_blocks_fit(rig: Rig) -> None:
    rig.memory.free()
    rig.driver.taken = rig.driver.capacity - rig.kept - 1024
    with pytest.raises(RuntimeError, match=f"there is room for 0 of {BLOCKS} blocks"):
        rig.memory.back()
    assert not rig.driver.mapped and rig.asleep() == {True}
    rig.memory.free()  # released still
    rig.driver.taken = 0
    assert rig.memory.back() is None


def test_memory_that_another_process_takes_meanwhile(rig: Rig) -> None:
    """All of it, then a half: each attempt ends with nothing mapped, and the last one takes what is left."""
    rig.memory.free()
    maps = 0

    def take() -> None:
        nonlocal maps
        maps += 1
        rig.driver.taken = {2: rig.total // 2, 6: 3 * rig.total // 4}.get(maps, rig.driver.taken)

    rig.driver.before_map = take
    rig.driver.log.clear()
    blocks = rig.memory.back()
    assert blocks is not None and 0 < blocks <= BLOCKS // 4
    assert rig.driver.used() == rig.memory.resident_bytes()
    ups = sum(kind == "unmap" for kind, _, _ in rig.driver.log)
    assert ups and sum(kind == "map" for kind, _, _ in rig.driver.log) - ups == len(rig.driver.mapped) == 8
    rig.driver.before_map = lambda: None
    rig.memory.free()
    assert not rig.driver.mapped


def test_an_error_that_stays(rig: Rig) -> None:
    rig.memory.free()
    rig.driver.taken = rig.total // 2
    attempts = 0

    def fail() -> None:
        nonlocal attempts
        attempts += 1
        if attempts % 3 == 0:
            raise RuntimeError("CUDA Error: out of memory")

    rig.driver.before_map = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        rig.memory.back()
    assert attempts == 6 and not rig.driver.mapped and rig.asleep() == {True}
    rig.driver.before_map = lambda: None
    assert rig.memory.back() == BLOCKS // 2


def test_a_restore_that_failed_behind_the_mapping_can_be_tried_again(rig: Rig) -> None:
    """Upstream's part of a restore raised: the mechanism was never told to free."""
    rig.memory.free()
    rig.driver.taken = rig.total // 2
    assert rig.memory.back() == BLOCKS // 2 == rig.memory.back()
    rig.driver.taken = 0
    assert rig.memory.back() is None and rig.driver.used() == rig.total


@pytest.mark.parametrize("why", ["ranks", "connector", "chunks", "shape"])
def test_what_comes_back_whole_or_not_at_all(rig: Rig, why: str) -> None:
    rig.memory.free()
    rig.driver.taken = rig.total // 2
    if why == "ranks":
        rig.config.parallel_config.world_size = 2
    elif why == "connector":
        rig.config.kv_transfer_config = object()
    elif why == "chunks":
        for data in rig.data.values():
            data.handle = (*data.handle[:3], [(data.handle[3], data.handle[1])])
    else:
        rig.engine.kv_views = lambda: list(rig.raws)
    rig.driver.log.clear()
    with pytest.raises(RuntimeError, match="as a whole or not at all") as caught:
        rig.memory.back()
    assert not rig.driver.mapped and rig.asleep() == {True}
    assert (why == "shape") is (rig.driver.log == [])  # else the driver has the last word
    assert why == "shape" or "CUDA Error: out of memory" in str(caught.value)


def test_a_quantized_cache_is_zeroed_where_it_is_backed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeroing a whole storage would touch what is not mapped."""
    rig = Rig(monkeypatch, torch.uint8)
    # real tensors over whole storages, as settle takes them
    rig.engine.kv_tensors = lambda: list(rig.raws)
    rig.memory.free()
    rig.driver.taken = rig.total // 2
    rig.memory.back()
    for raw in rig.raws:
        backed = torch.frombuffer(rig.driver.backed(raw.data_ptr(), raw.numel()), dtype=torch.uint8).bool()
        raw[backed] = 7
    _pool.settle(rig.engine, rig.memory)
    for raw in rig.raws:
        backed = torch.frombuffer(rig.driver.backed(raw.data_ptr(), raw.numel()), dtype=torch.uint8).bool()
        assert backed.any() and not raw[backed].any() and (raw[~backed] == POISON).all()


# ---- how much is kept ------------------------------------------------------------------------------------------------


def test_what_a_partial_restore_leaves_to_the_engine() -> None:
    fields = dict(model_type="qwen3", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=16, intermediate_size=128, vocab_size=1000, tie_word_embeddings=True)  # fmt: skip
    model: Any = SimpleNamespace(dtype=torch.bfloat16, hf_config=SimpleNamespace(to_dict=lambda: fields))
    scheduler = SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=4096)
    front = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model, scheduler_config=scheduler))
    engine: Any = SimpleNamespace(llm=SimpleNamespace(llm_engine=front), worker=SimpleNamespace())
    device = 80 << 30
    assert _pieces.kept_free(engine, device) == int(0.01 * device) + 4096 * 512 * 2 + 8 * 1000 * 22
    fields.clear()  # a model that cannot be planned
    assert _pieces.kept_free(engine, device) == int(0.01 * device) + (1 << 30)
    engine.worker.peak_activation_memory = 5 << 20
    assert _pieces.kept_free(engine, device) == int(0.01 * device) + (5 << 20)


def test_the_error_names_the_numbers(rig: Rig) -> None:
    """As `KVStandby` tells it."""
    rig.memory.free()
    rig.driver.taken = rig.driver.capacity
    standby = object.__new__(KVStandby)
    standby.engine, standby.mechanism, standby.released, standby._bytes = rig.engine, SimpleNamespace(), True, rig.total
    standby.mechanism.restore = rig.memory.back  # type: ignore[assignment]
    free = {"mem_get_info": lambda: (0, rig.driver.capacity)}
    original, torch.get_device_module = torch.get_device_module, lambda device: SimpleNamespace(**free)
    try:
        with pytest.raises(StandbyError) as caught:
            standby.restore()
    finally:
        torch.get_device_module = original
    text = str(caught.value)
    assert "cannot be restored" in text and "room for 0 of 24 blocks" in text and "0 MiB are free" in text
    assert "intact" in text and standby.released
