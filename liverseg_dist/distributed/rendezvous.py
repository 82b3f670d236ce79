"""`torchrun --rdzv-backend=liverseg`: a static rendezvous that listens on the job's network only.

PyTorch's own rendezvous accepts connections on all networks of the node. On a shared machine, use
this one:

  one node       torchrun --rdzv-backend=liverseg --rdzv-endpoint=localhost:0 \\
                     --nproc-per-node=4 ...
  several nodes  torchrun --rdzv-backend=liverseg --rdzv-endpoint=NODE0:29500 --rdzv-conf=rank=K \\
                     --nnodes=N ...
                 on each node. NODE0 is the name or address of node 0, K the number of this node.

`--rdzv-conf=timeout=SECONDS` sets how long a node waits for the others (default 600; 60 with one
node). torchrun finds this module through the entry point `torchrun.handlers`
(https://docs.pytorch.org/docs/stable/elastic/rendezvous.html).
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
    """Rendezvous of a fixed number of nodes with given numbers.

    The ranks use the same key-value store as their nodes.

    Args:
        host: address of node 0, which serves the store.
        port: TCP port; 0 lets the system choose one (one node only).
        rank: number of this node.
        nodes: number of nodes.
        run_id: torchrun's id of the job.
        timeout_s: how long to wait for the other nodes.
    """

    def __init__(
        self, host: str, port: int, rank: int, nodes: int, run_id: str, timeout_s: float
    ) -> None:
        self.host, self.port, self.rank, self.nodes, self.run_id = host, port, rank, nodes, run_id
        self.timeout_s = timeout_s
        self._store: dist.TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Connect the nodes, or return the open store after a restart of the ranks."""
        # torchrun calls this again when it restarts the ranks.
        store = self._store = self._store or self._connect()
        at = RendezvousStoreInfo(self.host, store.port)
        return RendezvousInfo(dist.PrefixStore(self.run_id, store), self.rank, self.nodes, at)

    def _connect(self) -> dist.TCPStore:
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
        """Do nothing: no node can join later."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Return the function that creates the handler. The entry point names this function."""
    torchrun_agent.install_signal_handling(sys.argv)
    return create_handler


def create_handler(params: RendezvousParameters) -> PrivateRendezvous:
    """Create the rendezvous. Exits with one line if an option of torchrun is wrong."""
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
            f"--rdzv-conf=rank=K is needed: the number of this node, from 0 to {nodes - 1}"
        )
    rank = _read_number(params, "rank", 0)
    if rank >= nodes:
        _exit_with_error(
            f"--rdzv-conf=rank={rank}: numbers of {nodes} nodes run from 0 to {nodes - 1}"
        )
    # Inherited by the ranks, which otherwise warn about an open rendezvous.
    os.environ[PRIVATE_RENDEZVOUS_VARIABLE] = "1"
    timeout_s = _read_number(params, "timeout", TIMEOUT_S if nodes > 1 else ONE_NODE_TIMEOUT_S)
    # With one node no other machine needs to connect.
    own = LOOPBACK if nodes == 1 else host.strip("[]")
    return PrivateRendezvous(own, int(port), rank, nodes, params.run_id, timeout_s)


def _read_number(params: RendezvousParameters, key: str, default: int) -> int:
    value = str(params.config.get(key, default))
    if not value.isdecimal():
        _exit_with_error(f"--rdzv-conf={key}={value}: needs a number from 0")
    return int(value)


def _exit_with_error(why: str) -> NoReturn:
    raise SystemExit(f"liverseg: torchrun: {why}")
