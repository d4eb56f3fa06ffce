"""Ports for servers that benchmarks and tests start."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of 127.0.0.1 for a server that starts later.

    It lies below those that systems hand out (from 32768 on Linux): one of these may be another's before the server
    starts.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
