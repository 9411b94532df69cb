"""Ports for process groups, so that several test runs may share a machine."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
