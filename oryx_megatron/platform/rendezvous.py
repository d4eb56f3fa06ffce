"""torchrun's rendezvous with what `python -m oryx_megatron.agent` says is different."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from oryx_megatron.errors import ConfigError, first_line
from oryx_megatron.platform.store import serve

START = "ORYX_START"
PATIENCE = timedelta(seconds=300)
"""For the first node: agents start as fast as their file system gives them torch."""


def register() -> None:
    """Make --rdzv-backend=oryx known to torchrun in this process."""
    rendezvous_handler_registry.register("oryx", _create)


class StoreBackend(C10dRendezvousBackend):
    """torchrun's, under another name."""

    @property
    def name(self) -> str:
        """See base class."""
        return "oryx"


class Rendezvous(DynamicRendezvousHandler):
    """torchrun's, with the two differences above."""

    def next_rendezvous(self) -> Any:
        """See base class."""
        found = super().next_rendezvous()
        os.environ[START] = str(self._state_holder.state.round)  # the ranks inherit it
        return found

    def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
        return serve(master_addr, master_port, PATIENCE)


def _create(parameters: RendezvousParameters) -> Rendezvous:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=0)
    if parameters.get_as_bool("is_host"):
        store = serve(host, port, PATIENCE, wait_for_workers=False)
    else:
        try:
            store = TCPStore(host, port, is_master=False, timeout=PATIENCE)
        except DistError as error:
            raise ConfigError(
                f"rendezvous: cannot reach the first node at {host}:{port} ({first_line(error)})"
            ) from None
    backend = StoreBackend(store, parameters.run_id)
    return Rendezvous.from_backend(
        parameters.run_id, store, backend, parameters.min_nodes, parameters.max_nodes, parameters.local_addr
    )
