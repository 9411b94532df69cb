"""Which defaults are chosen, what they give way to, and how it is told which settings were given. No TRL here."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from typing import Any

import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rlpatch.config import given, listing
from rlpatch.config.batching import FIELDS, Batching
from rlpatch.config.defaults import DIVISIBILITY, NAMES, Change, fix, table
from rlpatch.errors import UsageError
from rlpatch.settings import resolve

# GRPOConfig's defaults, as far as they matter (1.16.0 over transformers 5)
GRPO: dict[str, Any] = {
    "vllm_mode": "server",
    "vllm_gpu_memory_utilization": 0.3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "optim": "adamw_torch",
    "learning_rate": 1e-6,
    "torch_empty_cache_steps": None,
    "auto_find_batch_size": False,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "per_device_eval_batch_size": 8,
    "num_generations_eval": None,
}
RLOO = {**GRPO, "num_generations": 2}
GOLD = {k: v for k, v in GRPO.items() if k not in ("steps_per_generation", "num_generations_eval")} | {
    "num_generations": 1
}


def fixed(config: dict[str, Any], eight_bit: bool = True, **given: Any) -> dict[str, Any]:
    """Field -> new value, for a config of those defaults with `given` on top."""
    options = {
        name: given.pop(name) for name in ("world_size", "evaluates", "names", "eval_adjustable") if name in given
    }
    found = fix(
        {**config, **given}, config.keys() - given.keys(), given.keys(), defaults=table(eight_bit=eight_bit), **options
    )
    return {change.field: change.new for change in found.changes}


OTHERS = {"vllm_mode": "colocate", "optim": "adamw_8bit", "torch_empty_cache_steps": 250}
BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def test_everything_left_alone() -> None:
    assert fixed(GRPO) == {**OTHERS, **BATCH}
    assert fixed(RLOO) == {**OTHERS, **BATCH, "num_generations": 8}
    assert fixed(GRPO, eight_bit=False)["optim"] == "adamw_torch_fused"


def test_what_was_given_stays() -> None:
    assert fixed(GRPO, **{name: GRPO[name] for name in GRPO}) == {}  # equal to the defaults, but given
    assert fixed(GRPO, num_generations=8, per_device_train_batch_size=8, gradient_accumulation_steps=1) == OTHERS
    assert "optim" not in fixed(GRPO, optim="adafactor")


def test_names_choose() -> None:
    assert fixed(GRPO, names={"optim"}) == {"optim": "adamw_8bit"}
    assert fixed(GRPO, names={"optim"}, num_generations=3) == {"optim": "adamw_8bit"}  # TRL will refuse it
    assert fixed(GRPO, names={DIVISIBILITY}, num_generations=3) == {"per_device_train_batch_size": 3, **{
        "gradient_accumulation_steps": 3}}  # fmt: skip
    assert fixed(GRPO, names={"per_device_train_batch_size"}) == {}  # 4 × 1 holds no 8; alone it does not fit
    assert fixed(GRPO, names=()) == {}


def test_defaults_give_way_before_settings_do() -> None:
    assert fixed(RLOO, per_device_train_batch_size=2, gradient_accumulation_steps=1) == OTHERS  # 2 generations stay
    assert fixed(GRPO, per_device_train_batch_size=1) == {**OTHERS, "gradient_accumulation_steps": 8}
    assert fixed(GRPO, gradient_accumulation_steps=4) == {**OTHERS, "per_device_train_batch_size": 4}
    assert fixed(GRPO, num_generations=6) == {
        **OTHERS,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
    }
    # nothing is free any more: now a setting changes, accumulation first
    assert fixed(GRPO, per_device_train_batch_size=1, gradient_accumulation_steps=1) == {
        **OTHERS,
        "gradient_accumulation_steps": 8,
    }


def test_evaluation() -> None:
    assert fixed(GRPO, num_generations=4, per_device_eval_batch_size=6) == {**OTHERS, **BATCH}
    assert fixed(GRPO, num_generations=4, per_device_eval_batch_size=6, evaluates=True) == {
        **OTHERS,
        **BATCH,
        "num_generations_eval": 3,
    }
    assert fixed(RLOO, per_device_eval_batch_size=4, evaluates=True, eval_adjustable=False) == {**OTHERS, **BATCH}


def test_evaluation_beyond_help_does_not_keep_training_from_being_fixed() -> None:
    settings: dict[str, Any] = dict(num_generations=7, per_device_eval_batch_size=5, evaluates=True)
    changed = fixed(
        GRPO, per_device_train_batch_size=1, gradient_accumulation_steps=1, eval_adjustable=False, **settings
    )
    assert changed == {**OTHERS, "gradient_accumulation_steps": 7}


def test_each_field_has_its_own_reason() -> None:
    values = {**GRPO, "per_device_train_batch_size": 1, "num_generations": 6}
    found = fix(values, (), values.keys(), defaults=(), evaluates=True)
    why = {change.field: change.why for change in found.changes}
    assert set(why) == {"gradient_accumulation_steps", "per_device_eval_batch_size"}
    assert "1 × 1 × 1 = 1 completions per generation" in why["gradient_accumulation_steps"]
    assert "8 completions per evaluation step" in why["per_device_eval_batch_size"]


def test_processes_count() -> None:
    assert fixed(GRPO, num_generations=6, world_size=4)["gradient_accumulation_steps"] == 3
    assert fixed(GRPO, world_size=3) == {**OTHERS, **BATCH}


def test_a_server_that_was_asked_for_stays() -> None:
    assert "vllm_mode" not in fixed({**GRPO, "vllm_server_host": "0.0.0.0"}, vllm_server_host="10.0.0.1")


def test_one_completion_per_prompt_is_meant_where_it_is_the_default() -> None:
    assert fixed(GOLD) == {**OTHERS, **BATCH}
    assert fixed(GOLD, num_generations=3)["per_device_train_batch_size"] == 3


@pytest.mark.parametrize("value", [0, -4, 1, "8", None])
def test_what_is_no_group_is_left_to_trl(value: Any) -> None:
    assert "num_generations" not in fixed(GRPO, num_generations=value)


@hypothesis_settings(max_examples=400)
@hypothesis_given(
    st.sampled_from([GRPO, RLOO, GOLD]),
    st.dictionaries(st.sampled_from([*FIELDS[:2], "num_generations", FIELDS[4]]), st.integers(1, 64)),
    st.dictionaries(st.sampled_from(FIELDS[2:4]), st.integers(1, 64), max_size=1),
    st.integers(1, 16),
    st.booleans(),
)
def test_valid_settings_survive_and_invalid_ones_end_valid(
    config: dict[str, Any], counts: dict[str, int], generation: dict[str, int], world: int, evaluates: bool
) -> None:
    given_counts = {name: value for name, value in {**counts, **generation}.items() if name in config}
    values = {**config, **given_counts}
    options: dict[str, Any] = dict(defaults=table(eight_bit=True), world_size=world, evaluates=evaluates)
    found = fix(values, config.keys() - given_counts.keys(), given_counts.keys(), **options)
    assert found.before is not None and found.after is not None
    wrong = (found.before.train_problem(), found.before.eval_problem())
    if wrong == (None, None):
        assert not {change.field for change in found.changes} & given_counts.keys()
    if found.after.eval_problem() is None:
        assert found.after.train_problem() is None
    again = fix({**values, **{c.field: c.new for c in found.changes}}, (), values.keys(), **options)
    assert again.changes == () or found.after.eval_problem() is not None
    assert found.after.per_device_train_batch_size <= values["per_device_train_batch_size"]


# ---- what was given -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Upstream:
    """Stands for a config of TRL's (its module is made to look like one below)."""

    count: int = 8
    rate: float = 1e-6
    seen: Any = None

    def __post_init__(self) -> None:
        self.seen = (given.given(self), given.left_alone(self, ["trl"]))


Upstream.__module__ = "trl.trainer.somewhere"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Upstream.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given.note(self, original, args, kwargs)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Upstream, "__init__", init)
    monkeypatch.setattr(
        Upstream, "__init_subclass__", classmethod(lambda cls: given.watch_subclass(cls)), raising=False
    )


def test_arguments_are_seen(watched: None) -> None:
    assert Upstream().seen[1] == {"count", "rate", "seen"}
    assert Upstream(8).seen[1] == {"rate", "seen"}  # given, though equal to the default
    assert Upstream(rate=1e-6, count=9).seen[1] == {"seen"}
    assert not vars(Upstream()).keys() - {"count", "rate", "seen"}  # nothing that would end up in a checkpoint


def test_nobody_saw_it() -> None:
    assert Upstream().seen == (None, frozenset())


def test_subclasses(watched: None) -> None:
    @dataclasses.dataclass
    class Mine(Upstream):
        rate: float = 1e-6  # mine now, though equal
        extra: int = 1

    class Handmade(Upstream):
        def __init__(self, width: int = 1, **others: Any) -> None:
            super().__init__(count=width * 8, **others)

    class Late(Upstream):
        def __post_init__(self) -> None:
            self.count = 5
            super().__post_init__()

    assert Mine().seen[1] == {"count", "seen"}
    assert Mine(8).seen[1] == {"seen"} and Mine(count=8).seen[1] == {"seen"}
    assert Handmade().seen[1] == {"rate", "seen"}
    assert Handmade(rate=1e-6).seen[1] == {"seen"}
    assert Late().seen[1] == {"rate", "seen"}


def test_copies_make_nothing_new(watched: None) -> None:
    config = Upstream(count=9)
    before = config.seen
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(dataclasses.asdict(config)))):
        assert (again["seen"] if isinstance(again, dict) else again.seen) == before
    assert dataclasses.replace(config).seen[1] == frozenset()  # passes every field


def test_parsers_pass_everything(watched: None) -> None:
    with given.parsing() as named:
        named.add("count")
        assert Upstream(count=8, rate=1e-6, seen=None).seen[1] == {"rate", "seen"}
    assert given.named_by_parser() is None


# ---- settings and the listing -------------------------------------------------------------------------------------

RESOLVE: dict[str, Any] = dict.fromkeys(
    ("standby", "share_weights", "defaults", "lora", "include", "exclude", "strict")
)
RESOLVE |= {"known": ("defaults",), "known_defaults": NAMES}


def test_the_defaults_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLPATCH_DEFAULTS", raising=False)
    assert resolve(**RESOLVE).defaults is True
    assert resolve(**{**RESOLVE, "defaults": {"optim", DIVISIBILITY}}).defaults == (DIVISIBILITY, "optim")
    assert not resolve(**{**RESOLVE, "defaults": False}).wants("defaults")
    assert not resolve(**{**RESOLVE, "defaults": ()}).wants("defaults")
    monkeypatch.setenv("RLPATCH_DEFAULTS", "optim, num_generations")
    assert resolve(**RESOLVE).defaults == ("num_generations", "optim")
    assert resolve(**{**RESOLVE, "defaults": True}).defaults is True
    monkeypatch.setenv("RLPATCH_DEFAULTS", "off")
    assert resolve(**RESOLVE).defaults is False
    monkeypatch.setenv("RLPATCH_DEFAULTS", "nonsense")
    with pytest.raises(UsageError, match="RLPATCH_DEFAULTS: unknown default 'nonsense'; known are auto_find"):
        resolve(**RESOLVE)
    with pytest.raises(UsageError, match="expected True, False, names"):
        resolve(**{**RESOLVE, "defaults": 3})


def test_one_listing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    listing.clear()
    entry = listing.Listing(
        "GRPOConfig",
        (Change("optim", "adamw_torch", "adamw_8bit", "smaller"), Change("num_generations", 2, 8, "more")),
        listing.batch_line(Batching(1, 1, 1, 8), Batching(1, 1, 8, 8)),
    )
    with caplog.at_level(logging.WARNING, "rlpatch"):
        listing.add(entry)
        monkeypatch.setenv("RANK", "1")
        listing.add(entry)
    assert len(caplog.records) == 1 and len(listing.listings()) == 2
    text = caplog.records[0].getMessage()
    assert "GRPOConfig: 2 settings changed" in text and "adamw_torch → adamw_8bit  smaller" in text
    assert "1 completions per optimizer step, 1 per generation → 8 completions per optimizer step, 8 per" in text
    assert entry.as_dict()["changes"][1] == {"field": "num_generations", "old": 2, "new": 8, "why": "more"}
    listing.clear()
    assert listing.listings() == ()
