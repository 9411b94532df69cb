"""Loading in another dtype, and float32 masters behind the Trainer's optimizer.

``PreTrainedModel.from_pretrained`` is where every model of a trainer comes from, whichever way its release of TRL goes
there (``AutoModelForCausalLM``, the architecture's class, ``create_model_from_path``); it is changed only for the models
that `rlpatch.precision.model.loading` names. ``Trainer.create_optimizer`` builds the optimizer over the model's
parameters, once, before accelerate wraps it and before a checkpoint's optimizer state is read: masters take the
parameters' places in between, so that wrapping, schedulers, state and resume know nothing of it. The Trainer clips through
``Accelerator.clip_grad_norm_(model.parameters(), …)``, also to measure the norm that it logs; gradients become float32
when they are stepped, and that call is made as if they were so already. The same in 4.51.3, 4.57.6, 5.5.3, 5.17.0 and
5.23.0.
Delete when: transformers trains half-precision parameters with float32 masters outside of DeepSpeed and FSDP.
"""

from __future__ import annotations

from typing import Any

from rlpatch.patching import Patch
from rlpatch.registry import Adapter, Context
from rlpatch.relies import Relies


def _from_pretrained(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch.precision.model import loading

    plan = loading()
    path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if plan is None or path is None or str(path) != plan.path:
        return wrapped(*args, **kwargs)
    return plan.load(instance, lambda **changed: wrapped(*args, **changed), dict(kwargs))


def _create_optimizer(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch.precision import model

    before = instance.optimizer
    created = wrapped(*args, **kwargs)
    prepared = model.of(instance.model)
    if prepared is not None and before is None and instance.optimizer is not None:
        prepared.attach(instance.optimizer)
    return created


def _clip_norm(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch.precision.masters import clip_norm

    def call(parameters: Any, max_norm: Any, norm_type: Any = 2, **more: Any) -> Any:
        return clip_norm(
            parameters, float(max_norm), float(norm_type), lambda found: wrapped(found, max_norm, norm_type, **more)
        )

    return call(*args, **kwargs)


def _clip_value(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from rlpatch.precision.masters import substitute

    if args:
        return wrapped(substitute(args[0]), *args[1:], **kwargs)
    return wrapped(**{**kwargs, "parameters": substitute(kwargs["parameters"])})


def _patches(context: Context) -> list[Patch]:
    return [
        Patch("transformers.modeling_utils", "PreTrainedModel.from_pretrained", _from_pretrained),
        Patch("transformers.trainer", "Trainer.create_optimizer", _create_optimizer),
        Patch("accelerate.accelerator", "Accelerator.clip_grad_norm_", _clip_norm),
        Patch("accelerate.accelerator", "Accelerator.clip_grad_value_", _clip_value),
    ]


def _probe() -> str | None:
    import inspect

    from transformers.trainer import Trainer

    clips = "accelerator.clip_grad_norm_(" in inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
    return None if clips else "its Trainer does not clip through accelerate"


ADAPTER = Adapter(
    capability="master_weights",
    library="transformers",
    versions=">=4.51,<5.25",
    module="transformers.trainer",
    probe=_probe,
    patches=_patches,
    relies_on=(
        Relies(
            "transformers.trainer:Trainer.create_optimizer",
            contains=("optimizer_cls(optimizer_grouped_parameters, **optimizer_kwargs)",),
        ),
    ),
)
