"""PEFT's cast of a LoRA's input, left out: the same bits with real PEFT layers, forward and backward, and fewer copies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora import layer as lora  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from rlpatch.adapters.peft.lora_casts_v0_15 import ADAPTER, left_out  # noqa: E402
from rlpatch.patching import PatchSet  # noqa: E402
from rlpatch.registry import Context  # noqa: E402

if not hasattr(lora.Linear, "_cast_input_dtype"):
    pytest.skip("PEFT before 0.15 casts in the line itself", allow_module_level=True)

HALF = [torch.bfloat16, torch.float16]


@contextlib.contextmanager
def without_casts() -> Iterator[None]:
    assert ADAPTER.patches is not None
    patches = PatchSet("lora_casts", ADAPTER.patches(Context()))
    patches.apply()
    try:
        yield
    finally:
        assert patches.revert() == []


class Casts(TorchDispatchMode):
    """Counts casts of tensors of two dimensions and more by (from, to), weights apart."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}
        self.seen: dict[tuple[Any, Any], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata not in self._known:
            key = args[0].dtype, out.dtype
            self.seen[key] = self.seen.get(key, 0) + 1
        return out


def qwen(dtype: Any = torch.bfloat16, **config: Any) -> Any:
    """A real Qwen3 in `dtype`, float32 adapters on all linear layers: q, k and v read one tensor, gate and up another."""
    torch.manual_seed(0)
    made = transformers.Qwen3Config(
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=100,
        num_hidden_layers=2,
    )  # fmt: skip
    base = transformers.Qwen3ForCausalLM(made).to(dtype)
    return adapted(base, target_modules="all-linear", task_type="CAUSAL_LM", **config)


def adapted(base: Any, **config: Any) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **config}))
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    return model.train()


def stack(**config: Any) -> Any:
    """Linear layers alone, where every activation's cast is PEFT's or autocast's."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3))).to(torch.bfloat16)
    return adapted(base, target_modules=["0", "1", "2"], **config)


def one(model: Any) -> Any:
    return next(m for m in model.modules() if isinstance(m, lora.Linear))


def trained(model: Any, autocast: Any, steps: int = 2, seed: int = 7) -> dict[str, Any]:
    """Outputs and every gradient of some steps; those of the embedding's output, too, where many gradients meet."""
    found: dict[str, Any] = {}
    torch.manual_seed(seed)
    for step in range(steps):
        if hasattr(model, "config") and hasattr(model.config, "vocab_size"):
            ids = torch.randint(0, 100, (3, 17))
            inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
            call: dict[str, Any] = {"inputs_embeds": inputs}
        else:
            inputs = torch.randn(5, 32, dtype=torch.bfloat16, requires_grad=True)
            call = {"input": inputs}
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = model(**call)
        out = getattr(out, "logits", out)
        found[f"{step} output"] = out.detach().clone()
        if out.requires_grad:
            out.float().square().mean().backward()
            found[f"{step} input"] = inputs.grad
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{step} {name}"] = parameter.grad.clone()
                with torch.no_grad():
                    parameter -= 0.1 * parameter.grad.to(parameter.dtype)
                parameter.grad = None
    return found


def same(make: Callable[[], Any], autocast: Any, gradients: bool = True, **how: Any) -> None:
    """Bit for bit, dtypes included, with and without the adapter."""
    expected = trained(make(), autocast, **how)
    with without_casts():
        found = trained(make(), autocast, **how)
    assert list(found) == list(expected)
    assert not gradients or any("lora_A" in name for name in found)
    off = [n for n, t in expected.items() if t.dtype != found[n].dtype or not torch.equal(t, found[n])]
    assert not off
    assert all(t.isfinite().all() for t in expected.values())


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("autocast", HALF)
def test_a_model_trains_bit_for_bit_the_same(autocast: Any, checkpointing: bool | None) -> None:
    def make() -> Any:
        model = qwen(autocast)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        return model

    assert left_out(make())
    same(make, autocast)


def dropping() -> Any:
    return qwen(lora_dropout=0.3)


def evaluated() -> Any:
    return qwen(lora_dropout=0.3).eval()


def dora() -> Any:
    return qwen(use_dora=True)


def several() -> Any:
    model = qwen()
    torch.manual_seed(2)
    model.add_adapter(
        "more", peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "up_proj"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "more"])
    return model.train()


def merged() -> Any:
    model = qwen()
    model.merge_adapter()
    return model


@pytest.mark.parametrize("make", [dropping, evaluated, dora, several, merged])
@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
def test_whatever_is_between_the_casts_stays_the_same(make: Callable[[], Any], autocast: Any) -> None:
    same(make, autocast, gradients=make is not merged)
    if make is not merged:
        assert not left_out(make())  # an evaluated model will be trained


def test_without_autocast_the_adapter_computes_in_float32() -> None:
    same(qwen, None)
    same(lambda: qwen(torch.float32), torch.bfloat16)  # whose inputs are float32 as they come
    with without_casts(), Casts(*(model := stack()).parameters()) as casts:
        trained(model, None, steps=1)
    assert casts.seen[torch.bfloat16, torch.float32] >= 3


def test_a_disabled_adapter_is_the_base() -> None:
    def run() -> Any:
        model = qwen()
        with model.disable_adapter():
            base = trained(model, torch.bfloat16, steps=1)["0 output"]
        return base, trained(model, torch.bfloat16, steps=1)["0 output"]

    expected = run()
    with without_casts():
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(*found)


def test_a_batch_that_mixes_adapters_is_the_same() -> None:
    model = several().eval()
    ids = torch.arange(12).reshape(3, 4)

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, adapter_names=["default", "more", "__base__"]).logits

    expected = run()
    with without_casts():
        assert torch.equal(run(), expected)


def test_no_copy_of_an_input_is_made_or_saved() -> None:
    """Two casts a layer in the forward pass and as many in the backward pass are gone, and what autograd saves is one
    tensor."""

    def run() -> tuple[dict[Any, int], set[int]]:
        model, inputs = stack(), torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True)
        saved: set[int] = set()
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: Any) -> Any:
            if tensor.shape == inputs.shape and tensor.untyped_storage()._cdata not in weights:
                saved.add(tensor.untyped_storage()._cdata)
            kept.append(tensor)
            return tensor

        kept: list[Any] = []
        with Casts(*model.parameters()) as casts, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = [layer(inputs) for layer in model.modules() if isinstance(layer, lora.Linear)]
            torch.stack(outputs).sum().backward()
        return casts.seen, saved

    before, many = run()
    with without_casts():
        after, few = run()
    narrow, wide = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)
    assert before[wide] - after.get(wide, 0) == before[narrow] - after.get(narrow, 0) == 3 * 2
    assert (len(many), len(few)) == (3, 1)


def hooked() -> Any:
    model = stack()
    one(model).lora_A["default"].register_forward_pre_hook(lambda module, inputs: None)
    return model


def undisturbed() -> Any:
    model = stack(lora_dropout=0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


X = torch.randn(4, 32).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "x", "autocast", "leaves"),
    [
        (stack, X, torch.bfloat16, True),
        (stack, X.half(), torch.float16, True),
        (undisturbed, X, torch.bfloat16, True),
        (lambda: stack(lora_dropout=0.3).eval(), X, torch.bfloat16, True),
        (lambda: stack(lora_dropout=0.3), X, torch.bfloat16, False),
        (lambda: stack(use_dora=True), X, torch.bfloat16, False),
        (stack, X, torch.float16, False),
        (stack, X.half(), torch.bfloat16, False),
        (stack, X, None, False),
        (stack, X.double(), torch.bfloat16, False),
        (stack, torch.randn(32, 32).to(torch.bfloat16).T, torch.bfloat16, False),
        (stack, torch.cat([X, X])[4:], torch.bfloat16, False),
        (stack, X.to("meta"), torch.bfloat16, False),
        (hooked, X, torch.bfloat16, False),
    ],
)  # fmt: skip
def test_exactly_where_it_changes_nothing(make: Any, x: Any, autocast: Any, leaves: bool) -> None:
    layer = one(make())
    with without_casts(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found = layer._cast_input_dtype(x, torch.float32)
        assert (found is x) is leaves
        assert leaves or found.dtype == torch.float32
        assert layer._cast_input_dtype(x, torch.float64).dtype == torch.float64
        assert layer._cast_input_dtype(x, dtype=torch.float32).dtype == torch.float32  # nobody calls it so: PEFT's way
        with torch.autocast("cpu", enabled=False):
            assert layer._cast_input_dtype(x, torch.float32).dtype == torch.float32


def test_a_user_s_own_switch_still_works() -> None:
    layer = one(stack())
    layer.cast_input_dtype_enabled = False
    with without_casts():
        assert layer._cast_input_dtype(X, torch.float32) is X


def test_other_layers_keep_their_casts() -> None:
    class Mine(lora.Linear):
        pass

    layer = one(stack())
    torch.manual_seed(0)
    conv = adapted(torch.nn.Sequential(torch.nn.Conv1d(32, 32, 1)).to(torch.bfloat16), target_modules=["0"])
    others = [next(m for m in conv.modules() if isinstance(m, lora.LoraLayer))]
    layer.__class__ = Mine
    with without_casts(), torch.autocast("cpu", torch.bfloat16):
        assert all(other._cast_input_dtype(X, torch.float32).dtype == torch.float32 for other in (layer, *others))
    assert not left_out(conv)


def test_the_plan_asks_for_all_layers_of_a_model() -> None:
    assert left_out(stack()) and left_out(undisturbed()) and not left_out(torch.nn.Linear(2, 2))
    assert not left_out(several()) and not left_out(stack(lora_dropout=0.1).eval())
    model = qwen()
    embedding = adapted(model.unload(), target_modules=["embed_tokens", "q_proj"])
    assert left_out(embedding)  # an embedding's rows are no input that could be cast


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_computes_the_same() -> None:
    """torch.compile looks through the wrapper: one graph, PEFT's cast in it."""
    model, inputs = stack(), X.clone().requires_grad_()
    with without_casts(), torch.autocast("cpu", torch.bfloat16):
        expected = model(inputs)
        found = torch.compile(model, backend="eager", fullgraph=True)(inputs)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(out.sum(), inputs)[0] for out in (expected, found)]
        assert torch.equal(*gradients)


def test_revert_leaves_nothing() -> None:
    before = lora.Linear.__dict__.get("_cast_input_dtype"), lora.Linear._cast_input_dtype
    with without_casts():
        assert lora.Linear._cast_input_dtype is not before[1]
    assert (lora.Linear.__dict__.get("_cast_input_dtype"), lora.Linear._cast_input_dtype) == before
    assert ADAPTER.probe is not None and ADAPTER.probe() is None
