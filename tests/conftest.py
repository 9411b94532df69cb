"""For every tier."""

from __future__ import annotations

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("rlpatch", deadline=None)  # a busy machine is no failure
    settings.load_profile("rlpatch")
