"""GOLD generates through ``VLLMGeneration`` (1.0 and later), which the ``generation`` adapters serve: nothing to do here.

Delete when: the oldest supported TRL is 1.0.
"""

from __future__ import annotations

from rlpatch.registry import Adapter

_MODULE = "trl.experimental.gold.gold_trainer"


def _probe() -> str | None:
    import sys

    return None if hasattr(sys.modules[_MODULE], "VLLMGeneration") else "GOLD does not use VLLMGeneration"


ADAPTER = Adapter(capability="gold", library="trl", versions=">=1.0,<1.17", module=_MODULE, probe=_probe, native=True)
