"""`torchrun --rdzv-backend=liverseg`: PyTorch's static rendezvous, but open to the job's own network only.

  one node       torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 --nproc-per-node=4 ...
  several        torchrun --rdzv-backend=liverseg --rdzv-endpoint=NODE0:29500 --rdzv-conf=rank=K --nnodes=N ...
                 on each node; K is its number, and node 0, whose name or address stands there, serves

Another word of --rdzv-conf: timeout=SECONDS, how long a node waits for the others (600; alone 60). torchrun finds this
through the entry point `torchrun.handlers` (https://docs.pytorch.org/docs/stable/elastic/rendezvous.html).
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from liverseg_dist.distributed import torchrun_agent
from liverseg_dist.distributed.tcp_store import (
    LOOPBACK,
    PRIVATE_RENDEZVOUS_VARIABLE,
    connection_error_message,
    key_value_store,
)
from liverseg_dist.errors import RunFailed

BACKEND_NAME = "liverseg"
TIMEOUT_S, ONE_NODE_TIMEOUT_S = 600, 60


class PrivateRendezvous(RendezvousHandler):
    """A fixed number of nodes, each with a number it was given. Ranks use the store through which their nodes met."""

    def __init__(
        self, host: str, port: int, rank: int, nodes: int, run_id: str, timeout_s: float
    ) -> None:
        self.host, self.port, self.rank, self.nodes, self.run_id = host, port, rank, nodes, run_id
        self.timeout_s = timeout_s
        self._store: dist.TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        store = self._store = self._store or self._meet()
        at = RendezvousStoreInfo(self.host, store.port)
        return RendezvousInfo(dist.PrefixStore(self.run_id, store), self.rank, self.nodes, at)

    def _meet(self) -> dist.TCPStore:
        timeout = timedelta(seconds=self.timeout_s)
        try:
            return key_value_store(self.host, self.port, self.nodes, timeout, serve=self.rank == 0)
        except RunFailed as error:
            _exit_with_error(str(error))
        except RuntimeError as error:
            _exit_with_error(
                connection_error_message(f"node {self.rank}", f"{self.host}:{self.port}", error)
            )

    def get_backend(self) -> str:
        return BACKEND_NAME

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody joins later, so there is nothing to close."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What the entry point names: torchrun calls it for the function that makes the handler."""
    torchrun_agent.install_signal_handling(sys.argv)
    return create_handler


def create_handler(params: RendezvousParameters) -> PrivateRendezvous:
    """Ends the process with a line where torchrun's words are wrong."""
    nodes = params.max_nodes
    if params.min_nodes != nodes:
        _exit_with_error(f"--nnodes={params.min_nodes}:{nodes}: a fixed number of nodes is needed")
    host, _, port = (params.endpoint.strip() or "localhost:0").rpartition(":")
    if (
        host in ("", "0.0.0.0", "::", "[::]")
        or not port.isdecimal()
        or int(port) > 65535
        or (nodes > 1 and port == "0")
    ):
        _exit_with_error(
            f"--rdzv-endpoint={params.endpoint}: needs HOST:PORT of node 0 (one node: localhost:0)"
        )
    if nodes > 1 and "rank" not in params.config:
        _exit_with_error(
            f"--rdzv-conf=rank=K is needed: which of the {nodes} nodes this is, from 0"
        )
    rank = _read_number(params, "rank", 0)
    if rank >= nodes:
        _exit_with_error(
            f"--rdzv-conf=rank={rank}: numbers of {nodes} nodes run from 0 to {nodes - 1}"
        )
    os.environ[PRIVATE_RENDEZVOUS_VARIABLE] = "1"
    timeout_s = _read_number(params, "timeout", TIMEOUT_S if nodes > 1 else ONE_NODE_TIMEOUT_S)
    own = LOOPBACK if nodes == 1 else host.strip("[]")
    return PrivateRendezvous(own, int(port), rank, nodes, params.run_id, timeout_s)


def _read_number(params: RendezvousParameters, key: str, default: int) -> int:
    value = str(params.config.get(key, default))
    if not value.isdecimal():
        _exit_with_error(f"--rdzv-conf={key}={value}: needs a number from 0")
    return int(value)


def _exit_with_error(why: str) -> NoReturn:
    raise SystemExit(f"liverseg: torchrun: {why}")
