"""A key-value store for ranks to meet at, which listens where it should."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore

from oryx_megatron.errors import ConfigError, first_line

log = logging.getLogger(__name__)

LISTEN = "ORYX_LISTEN"
"""Environment variable: `any` for all interfaces."""


def serve(address: str, port: int, timeout: timedelta, **options: Any) -> TCPStore:
    """A key-value store that listens on `address` (name or number) and a port (0: a free one).

    It listens on all interfaces, and says so, when the address is none of this machine's, or a name that means the
    machine itself only, by which others could not find it.

    Args:
        timeout: For reading.
        options: More of TCPStore's.

    Raises:
        ConfigError: the port is taken.
    """
    listening = None
    if os.environ.get(LISTEN, "address") != "any":
        try:
            family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            if _loopback(str(place[0])) and not (address == "localhost" or _loopback(address)):
                raise OSError(f"it means {place[0]} here")
            listening = socket.create_server(place, family=family, backlog=4096)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(_taken(address, port)) from None
            log.warning("rendezvous: cannot listen on %s alone (%s): it listens on all interfaces", address, error)
    if listening is not None:
        port = listening.getsockname()[1]
        options["master_listen_fd"] = listening.detach()
    try:
        return TCPStore(address, port, is_master=True, multi_tenant=True, timeout=timeout, **options)
    except DistError as error:
        raise ConfigError(f"{_taken(address, port)} ({first_line(error)})") from None


def _taken(address: str, port: int) -> str:
    return f"rendezvous: port {port} of {address} is taken; start (submit) again, for another"


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
