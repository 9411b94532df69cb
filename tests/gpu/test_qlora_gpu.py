"""QLoRA on a real GPU, graphs and compilation on; the tests are `qlora_cases`. Skips itself without CUDA."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from qlora_cases import *  # noqa: E402, F403

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
