"""QLoRA on the CPU; the tests are `qlora_cases`."""

from __future__ import annotations

import pytest
from qlora_cases import *  # noqa: F403

pytestmark = pytest.mark.cpu
