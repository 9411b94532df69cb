"""Compile profiles: what they name, what they come down to, what is refused; against the installed CompilationConfig."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

import rlpatch
from rlpatch import control, doctor
from rlpatch.adapters.vllm import _compilation as era
from rlpatch.adapters.vllm import compile_v0_9, compile_v0_11_1, compile_v0_16, compile_v0_17, compile_v0_26
from rlpatch.compilation import build, profiles, workers
from rlpatch.compilation.dialect import Changes, Dialect, Hook, Surface
from rlpatch.compilation.profiles import PROFILES, REFUSED, SETTINGS, Reach, capture_sizes, few_sizes, named
from rlpatch.errors import UnsupportedError, UsageError

REACH = Reach(sequences=12, lora=True, cores=4, tokens=1024)


@dataclass
class Config:
    """Stands for a release's CompilationConfig where none is installed."""

    cudagraph_capture_sizes: list[int] | None = None
    cudagraph_specialize_lora: bool = True
    compile_sizes: list[int] | None = None
    inductor_compile_config: dict[str, Any] = field(default_factory=dict)
    computed: int = field(default=0, init=False)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of ours or vLLM's, and workers that need no torch."""
    for name in list(os.environ):
        if name.startswith(("RLPATCH_COMPILE", "VLLM_USE_", "VLLM_ENABLE_INDUCTOR")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(workers, "refusal", lambda: None)
    monkeypatch.setattr(workers, "pinned", lambda: True)
    monkeypatch.setattr(workers, "cores", lambda: 4)


def dialect(terms: dict[str, Callable[[Any], Changes]] | None = None, config: Any = Config, **surface: Any) -> Dialect:
    found = Surface(
        config,
        surface.pop("arguments", frozenset({"enable_flashinfer_autotune", "kernel_config"})),
        surface.pop("variables", frozenset({*era.AUTOTUNE_VARIABLES})),
        **surface,
    )
    chosen = {
        "capture sizes": era.capture_sizes,
        "graphs without adapter": era.graphs_without_adapter,
        "static sizes": era.static_sizes,
        "kernel autotune": era.kernel_autotune,
    }
    return Dialect(lambda: found, chosen if terms is None else terms, {"memory plan": era.NO_PLAN})


def decide(*names: str, given: dict[str, Any] | None = None, speech: Dialect | None = None) -> build.Compilation:
    return build.decide(",".join(names), names, speech or dialect(), {"max_num_seqs": 12, **(given or {})})


# ---- names -----------------------------------------------------------------------------------------------------------


def test_profiles_are_settings_that_agree() -> None:
    for name, settings in PROFILES.items():
        assert named(name, "compile") == settings
        if settings:
            assert named(",".join(settings), "compile") == settings
    assert PROFILES["default"] == ()
    assert named("fast-start,startup-plan,capture-sizes", "compile") == (*PROFILES["fast-start"], "startup-plan")
    assert named("throughput,mega-aot,workers", "compile") == (*PROFILES["throughput"], "workers")
    assert not set(SETTINGS) & (set(PROFILES) | set(REFUSED))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_known_bad_settings_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is refused: ") as caught:
        named(f"workers,{name}", "apply(compile=…)")
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("fastest", "neither a profile"),
        ("workers,capture_sizes", "'capture_sizes' is neither"),
        (",", "expected a profile"),
        ("capture-sizes,few-sizes", "contradict each other over capture sizes"),
        ("no-combo-kernels,no-combo-benchmark", "contradict each other over combo kernels"),
        ("decode-graphs,workers", "torch.compile compiles nothing, so 'workers' has no use"),
        ("fast-start,no-combo-benchmark", "under 'decode-graphs' .* 'no-combo-benchmark' has no use"),
        ("fast-start,throughput", "under 'decode-graphs'"),
        ("mega-aot,decode-graphs", "'mega-aot' has no use"),
        ("no-inductor,decode-graphs", "under 'decode-graphs' .* 'no-inductor' has no use"),
        ("no-inductor,static-size", "'static-size' has no use"),
    ],
)
def test_names_that_cannot_be(value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        named(value, "apply(compile=…)")


def test_setting_of_apply_and_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = dict.fromkeys(("standby", "share_weights", "defaults", "lora", "include", "exclude"))

    def resolved(value: Any = None) -> Any:
        from rlpatch.settings import resolve

        return resolve(**arguments, strict=None, compile=value, known=["compile"])

    monkeypatch.delenv("RLPATCH_DEFAULTS", raising=False)  # tests/cpu sets it
    assert resolved().compile == "default" and not resolved().wants("compile")
    assert resolved("fast-start").wants("compile") and resolved("fast-start").explicit == {"compile"}
    assert resolved(" workers , capture-sizes").compile == "workers,capture-sizes"
    monkeypatch.setenv("RLPATCH_COMPILE", "throughput")
    assert resolved().compile == "throughput"
    assert resolved("default").compile == "default"  # the argument wins
    monkeypatch.setenv("RLPATCH_COMPILE", "max-autotune")
    with pytest.raises(UsageError, match="RLPATCH_COMPILE=max-autotune: 'max-autotune' is refused"):
        resolved()
    with pytest.raises(UsageError, match="as text"):
        resolved(True)
    with pytest.raises(UsageError, match="expected a profile"):
        resolved("")


def test_apply_refuses_and_leaves_nothing() -> None:
    with pytest.raises(UsageError, match="coordinate-descent"):
        rlpatch.apply(compile="coordinate-descent")
    assert control.context() is None


def test_doctor_shows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPATCH_COMPILE", "fast-start")
    (finding,) = [f for f in doctor.diagnose().findings if "RLPATCH_COMPILE" in f.title]
    assert finding.severity == "info" and "capture-sizes" in finding.detail
    monkeypatch.setenv("RLPATCH_COMPILE", "multi-kernel")
    found = [f for f in doctor.diagnose().findings if f.severity == "problem" and "multi-kernel" in f.detail]
    assert found


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "ladder", "few"),
    [
        (1, [1], [1]),
        (2, [1, 2], [1, 2]),
        (8, [1, 2, 4, 8], [1, 2, 4, 8]),
        (12, [1, 2, 4, 8, 12], [1, 2, 4, 8, 12]),
        (64, [1, 2, 4, *range(8, 65, 8)], [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_sizes_end_with_the_full_batch(sequences: int, ladder: list[int], few: list[int]) -> None:
    assert capture_sizes(sequences) == ladder
    assert few_sizes(sequences) == few


@pytest.mark.parametrize("choose", [capture_sizes, few_sizes])
def test_every_batch_finds_a_size(choose: Callable[[int], list[int]]) -> None:
    for sequences in (*range(1, 300), 511, 512):
        sizes = choose(sequences)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == sequences
        for batch in range(1, sequences + 1):
            padded = min(size for size in sizes if size >= batch)
            assert padded <= 2 * batch
    assert choose(2000)[-1] == 512


def test_settings_say_why_they_have_no_use() -> None:
    nothing = Reach(sequences=None, lora=False, cores=1)
    for name in ("workers", "capture-sizes", "few-sizes", "static-size", "lora-graphs"):
        assert isinstance(SETTINGS[name].wants(nothing), str)
        assert isinstance(SETTINGS[name].wants(REACH), dict)
    assert SETTINGS["workers"].wants(Reach(None, False, 64)) == {"workers": profiles.MOST_WORKERS}


# ---- translation -----------------------------------------------------------------------------------------------------


def test_profile_comes_down_to_fields_arguments_and_workers() -> None:
    made = decide("workers", "capture-sizes", "lora-graphs", "no-kernel-autotune", given={"enable_lora": True})
    assert made.workers == 4
    config = made.arguments.pop("compilation_config")
    assert isinstance(config, Config)
    assert config.cudagraph_capture_sizes == [1, 2, 4, 8, 12] and config.cudagraph_specialize_lora is False
    assert made.arguments == {"enable_flashinfer_autotune": False}
    assert not made.left
    assert [(e.setting, e.old, e.new) for e in made.acted] == [
        ("workers", "1", "4"),
        ("capture-sizes", "None", "[1, 2, 4, 8, 12]"),
        ("lora-graphs", "True", "False"),
        ("no-kernel-autotune", "None", "False"),
    ]
    assert "cudagraph_capture_sizes None → [1, 2, 4, 8, 12] (capture-sizes)" in str(made)


def test_nothing_is_given_where_nothing_acts() -> None:
    made = decide("lora-graphs", "startup-plan")
    assert not made.arguments and not made.environment and made.workers is None
    assert made.left == {"lora-graphs": "the engine has no LoRA slots", "startup-plan": era.NO_PLAN}


@pytest.mark.parametrize(
    ("terms", "surface", "words"),
    [
        ({"capture sizes": lambda v: Changes(config={"cudagraph_sizes": v})}, {}, "field of .* 'cudagraph_sizes'"),
        ({"capture sizes": lambda v: Changes(config={"computed": 1})}, {}, "field of .* 'computed'"),
        ({"capture sizes": lambda v: Changes(arguments={"capture": v})}, {}, "argument 'capture'"),
        ({"capture sizes": lambda v: Changes(environment={"VLLM_NO": "1"})}, {}, "variable 'VLLM_NO'"),
    ],
)
def test_an_unknown_name_is_an_error_that_says_it(terms: Any, surface: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'capture-sizes': this release has no {words}") as caught:
        decide("capture-sizes", speech=dialect(terms, **surface))
    assert "compile='default'" in str(caught.value)


def test_an_unknown_option_of_inductor_is_an_error() -> None:
    pytest.importorskip("torch")
    terms = {"combo kernels": lambda v: Changes(inductor={"combo_kernel": v})}
    with pytest.raises(UnsupportedError, match="option of Inductor 'combo_kernel'"):
        decide("no-combo-kernels", speech=dialect(terms))


@pytest.mark.parametrize(("setting", "kept"), [("no-combo-benchmark", True), ("no-combo-kernels", False)])
def test_combo_kernels_only_where_vllm_has_switched_them_on(setting: str, kept: bool) -> None:
    pytest.importorskip("torch")

    @dataclass
    class Switched(Config):
        def __post_init__(self) -> None:
            for option in ("combo_kernels", "benchmark_combo_kernel"):
                self.inductor_compile_config.setdefault(option, True)

    terms: dict[str, Any] = {"combo kernels": era.combo_kernels}
    made = decide(setting, speech=dialect(terms, config=Switched))
    options = {"combo_kernels": kept, "benchmark_combo_kernel": False}
    assert made.arguments["compilation_config"].inductor_compile_config == options
    given = {"compilation_config": {"inductor_compile_config": {"combo_kernels": True}}}
    made = decide(setting, speech=dialect(terms, config=Switched), given=given)
    assert made.left == {setting: "Inductor's 'combo_kernels' was given"} and not made.arguments
    made = decide(setting, speech=dialect(terms))  # torch before 2.9, or a CPU
    assert "leaves Inductor's combo_kernels alone" in made.left[setting] and not made.arguments


# ---- what the user gave wins -----------------------------------------------------------------------------------------


def test_given_fields_win_and_the_others_are_filled_in() -> None:
    own = {"cudagraph_capture_sizes": [3]}
    made = decide("capture-sizes", "lora-graphs", given={"compilation_config": own, "enable_lora": True})
    assert made.left == {"capture-sizes": "compilation_config['cudagraph_capture_sizes'] was given"}
    config = made.arguments["compilation_config"]
    assert config.cudagraph_capture_sizes == [3] and config.cudagraph_specialize_lora is False
    assert own == {"cudagraph_capture_sizes": [3]}


def test_a_given_field_that_vllm_would_drop_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"'cudagraph_sizes'.* no such field"):
        decide("capture-sizes", given={"compilation_config": {"cudagraph_sizes": [3]}})


@pytest.mark.parametrize("own", [Config(cudagraph_capture_sizes=[3]), 3])
def test_a_given_object_or_number_stays(own: Any) -> None:
    made = decide("capture-sizes", given={"compilation_config": own})
    assert not made.arguments and "was given as" in made.left["capture-sizes"]


def test_eager_leaves_nothing_to_compile() -> None:
    made = decide("workers", "capture-sizes", "no-kernel-autotune", given={"enforce_eager": True})
    assert made.workers is None and set(made.left) == {"workers", "capture-sizes"}
    assert made.arguments == {"enable_flashinfer_autotune": False}  # kernels are warmed up all the same


@pytest.mark.parametrize("argument", ["enable_flashinfer_autotune", "kernel_config"])
def test_given_arguments_win(argument: str) -> None:
    made = decide("no-kernel-autotune", given={argument: True})
    assert made.left == {"no-kernel-autotune": f"{argument}= was given"} and not made.arguments


def test_set_variables_win_and_the_setting_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING", "1")
    made = decide("static-size")
    assert made.left == {"static-size": "VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING=1 was given"}
    assert not made.arguments and not made.environment  # not compiled for one size with what takes minutes


def test_variables_that_were_read_for_good_are_not_set() -> None:
    made = decide("static-size", speech=dialect(variables_read=True))
    assert "has read VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE for good" in made.left["static-size"]


def test_variables_are_set_while_the_engine_is_built_only() -> None:
    made = decide("static-size")
    assert made.environment == dict(zip(era.AUTOTUNE_VARIABLES, ("1", "0"), strict=True))
    with pytest.raises(RuntimeError, match="no engine"), made.in_force():
        assert {name: os.environ[name] for name in era.AUTOTUNE_VARIABLES} == made.environment
        raise RuntimeError("no engine")
    assert not set(era.AUTOTUNE_VARIABLES) & set(os.environ)


def test_what_vllm_made_of_it_is_said() -> None:
    made = decide("capture-sizes", "lora-graphs", given={"enable_lora": True})
    made.settled(SimpleNamespace(cudagraph_capture_sizes=[], cudagraph_specialize_lora=False))
    sizes, lora = made.describe()["set"]
    assert sizes["became"] == "[]" and lora["became"] is None
    assert sizes["why"].startswith("capture-sizes: ")


# ---- patches that act while the engine is built ----------------------------------------------------------------------

HOOK = Hook("sampler's warm-up", "every feature", "what the rollouts ask for", "nothing was warmed up")


def hooked(**changes: Any) -> Dialect:
    return dialect({"sampler warmup": lambda value: Changes(hooks={"plain": HOOK}, **changes)})


def test_a_patch_that_was_asked_about_is_told() -> None:
    made = decide("plain-sampling", speech=hooked())
    assert not made.arguments and not made.environment and not made.asks("something else")
    assert made.asks("plain")
    made.settled(SimpleNamespace())
    (entry,) = made.describe()["set"]
    assert (entry["what"], entry["old"], entry["new"]) == (HOOK.what, HOOK.old, HOOK.new) and not made.left
    assert not decide("capture-sizes").asks("plain")


def test_a_patch_that_the_engine_never_came_by_changed_nothing() -> None:
    speech = hooked()
    made = decide("plain-sampling", "capture-sizes", speech=dataclasses.replace(
        speech, terms={**speech.terms, "capture sizes": era.capture_sizes}))  # fmt: skip
    made.settled(SimpleNamespace(cudagraph_capture_sizes=[1]))
    assert made.left == {"plain-sampling": "nothing was warmed up"}
    (entry,) = made.describe()["set"]
    assert entry["what"] == "compilation_config.cudagraph_capture_sizes" and entry["became"] == "[1]"


@pytest.mark.parametrize(
    "given", [{"jit_monitor_mode": "error"}, {"speculative_config": {"method": "ngram"}}], ids=lambda g: next(iter(g))
)
def test_engines_in_which_a_late_kernel_would_be_an_error_are_warmed_up_whole(given: dict[str, Any]) -> None:
    pytest.importorskip("vllm")
    if not hasattr(pytest.importorskip("vllm.sampling_params").SamplingParams, "for_sampler_warmup"):
        pytest.skip("this vLLM warms up no sampler")
    made = decide("plain-sampling", speech=dialect({"sampler warmup": era.plain_warm_up}), given=given)
    assert made.left == {"plain-sampling": f"{next(iter(given))}= was given"}
    assert not made.asks(era.PLAIN_SAMPLING)


# ---- workers ---------------------------------------------------------------------------------------------------------


def test_workers_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    import torch._inductor.config as config

    with config.patch(compile_threads=1):
        with pytest.raises(KeyError), workers.compile_workers(3):
            assert config.compile_threads == 3
            raise KeyError
        assert config.compile_threads == 1
    monkeypatch.setattr(workers, "pinned", lambda: False)
    with config.patch(compile_threads=5):
        with workers.compile_workers(3):
            assert config.compile_threads == 5  # the script's own number
        assert config.compile_threads == 5


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_would_fork_beside_cuda_are_left(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    pytest.importorskip("torch")
    import torch._inductor.config as config

    monkeypatch.undo()
    with config.patch(worker_start_method=method):
        assert f"start by {method}" in (workers.refusal() or "")


def test_cores_are_shared_with_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert workers.cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers.cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert workers.cores() == 1


# ---- the installed vLLM ----------------------------------------------------------------------------------------------


def installed() -> Any:
    pytest.importorskip("vllm")
    from rlpatch import registry, versions

    return registry.choose("compile", versions.installed("vllm"), probing=True).adapter


def test_every_setting_of_the_installed_release_is_a_real_config() -> None:
    adapter = installed()
    assert adapter is not None and adapter.probe() is None
    real = era.surface().config
    for name in SETTINGS:
        made = build.decide(name, (name,), adapter.provides, {"max_num_seqs": 12, "enable_lora": True})
        config = made.arguments.get("compilation_config")
        if config is not None:
            assert isinstance(config, real)
        for entry in made.acted:
            field_name = entry.what.removeprefix("compilation_config.")
            if field_name != entry.what:
                assert build._text(getattr(config, field_name)) == entry.new
        assert made.acted or made.left, name


def test_the_installed_release_names_what_it_would_drop() -> None:
    adapter = installed()
    with pytest.raises(UsageError, match=r"'capture_sizes'.* no such field.*cudagraph_capture_sizes"):
        build.decide("x", ("workers",), adapter.provides, {"compilation_config": {"capture_sizes": [1]}})
    broken = dataclasses.replace(
        adapter.provides, terms={"capture sizes": lambda v: Changes(config={"cudagraph_sizes": v})}
    )
    with pytest.raises(UnsupportedError, match="'cudagraph_sizes'"):
        build.decide("x", ("capture-sizes",), broken, {"max_num_seqs": 4})


def test_a_probe_names_what_is_missing() -> None:
    pytest.importorskip("vllm")
    missing = era.probe({"capture sizes": lambda v: Changes(config={"gone": v})})()
    assert missing == "capture sizes: vLLM has no gone"
    newer = installed()
    if newer.provides.terms.get("compiled") is not None:
        assert compile_v0_9.ADAPTER.probe is not None
        assert "use_inductor" in (compile_v0_9.ADAPTER.probe() or "")


def test_fast_start_says_what_an_old_release_lacks() -> None:
    """No vLLM of that age is installed: its adapter's own words, over the fields that it had."""

    @dataclass
    class Old(Config):
        use_inductor: bool = True

    speech = dataclasses.replace(compile_v0_9.ADAPTER.provides, surface=lambda: Surface(Old, frozenset(), frozenset()))
    made = decide(*PROFILES["fast-start"], given={"enable_lora": True}, speech=speech)
    assert set(made.left) == {"decode-graphs", "lora-graphs", "no-kernel-autotune", "plain-sampling"}
    assert "without compilation" in made.left["decode-graphs"] and made.left["plain-sampling"] == era.NO_WARM_UP
    assert made.inspects_here and made.arguments["compilation_config"].cudagraph_capture_sizes == [1, 2, 4, 8, 12]


def test_attention_is_in_one_piece_for_many_sequences_or_short_ones() -> None:
    wants = SETTINGS["one-split"].wants
    whole = {"attention splits": 1}
    for sequences, tokens in ((32, None), (64, 100_000), (8, 3072), (31, 320)):
        assert wants(Reach(sequences, False, 4, tokens)) == whole
    for sequences, tokens in ((31, None), (8, 3073), (7, 320), (None, None), (None, 320)):
        why = wants(Reach(sequences, False, 4, tokens))
        assert isinstance(why, str) and f"max_num_seqs={sequences}" in why and f"max_model_len={tokens}" in why
    seen: list[int] = []
    speech = dialect({"attention splits": lambda value: seen.append(value) or Changes(arguments={"kernel_config": 1})})
    assert decide("one-split", speech=speech).left and not seen  # 12 sequences of who knows what length
    assert decide("one-split", given={"max_model_len": 320}, speech=speech).arguments == {"kernel_config": 1}


def test_a_term_that_comes_to_nothing_on_this_machine_says_why() -> None:
    made = decide("launch-overlap", speech=dialect({"launch overlap": lambda value: "no such GPU"}))
    assert made.left == {"launch-overlap": "no such GPU"} and not made.acted and not made.arguments


def test_overlap_and_splits_are_left_alone_beside_a_cpu() -> None:
    config = pytest.importorskip("vllm.config")
    if not hasattr(config, "AttentionConfig"):
        pytest.skip("this vLLM has no such config")
    assert era.launch_overlap(True) == era.attention_splits(1) == era.NO_CUDA


def test_every_term_is_translated_or_said_to_be_lacking() -> None:
    wanted = {
        term for setting in SETTINGS.values() if isinstance(terms := setting.wants(REACH), dict) for term in terms
    } - {"workers", "inspect here"}
    for module in (compile_v0_9, compile_v0_11_1, compile_v0_16, compile_v0_17, compile_v0_26):
        speech = module.ADAPTER.provides
        unknown = wanted - set(speech.terms) - set(speech.lacks) - {"whole artifact"}
        assert not unknown, (module.__name__, unknown)
        assert not set(speech.terms) & set(speech.lacks)
