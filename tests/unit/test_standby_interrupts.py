"""Ctrl-C while the KV cache comes or goes: it is there or not, and its standby knows which. Over a stand-in engine."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from rlpatch.standby import KVStandby  # noqa: E402


class Interrupted:
    """A mechanism in whose midst a SIGINT arrives."""

    def __init__(self) -> None:
        self.mapped = True
        self.paused = False

    def release(self) -> None:
        self.paused = True
        os.kill(os.getpid(), signal.SIGINT)
        self.mapped = False

    def restore(self) -> int | None:
        assert not self.mapped, "mapped twice"
        self.mapped = True
        os.kill(os.getpid(), signal.SIGINT)
        self.paused = False
        return None

    def hand_over(self) -> None: ...

    def resident_bytes(self) -> int:
        return int(self.mapped)


@pytest.mark.parametrize("known", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_comes_when_it_is_done(known: Any) -> None:
    engine: Any = SimpleNamespace(kv_tensors=lambda: [], device=torch.device("cpu"))
    before = signal.signal(signal.SIGINT, known)
    try:
        mechanism = Interrupted()
        standby = KVStandby(engine, mechanism)
        for cycle in (1, 2):
            for act, released in ((lambda: standby.release(at_rest=True), True), (standby.restore, False)):
                try:
                    act()
                    assert known is signal.SIG_IGN
                except KeyboardInterrupt:
                    assert known is signal.default_int_handler
                assert standby.released is released is not mechanism.mapped and mechanism.paused is released
                assert signal.getsignal(signal.SIGINT) is known
            assert standby.cycles == cycle
    finally:
        signal.signal(signal.SIGINT, before)
