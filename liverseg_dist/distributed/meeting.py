"""Where ranks meet: PyTorch's key-value store, behind a door on the job's own network only.

PyTorch alone would listen on every network of the node, and whoever knocks may read and write.
"""

import errno
import ipaddress
import socket
import sys
from datetime import timedelta

import torch.distributed as dist

from liverseg_dist.errors import RunFailed

LOOPBACK = "127.0.0.1"
BACKLOG = 1024
"""Ranks that may knock at once."""
PRIVATE = "LIVERSEG_PRIVATE_RENDEZVOUS"
"""In the environment of ranks whose torchrun met through `rendezvous.py`."""


def key_value_store(
    host: str, port: int, members: int, timeout: timedelta, *, serve: bool, several_nodes: bool
) -> dist.TCPStore:
    """The store at `host:port`, served by this process or by another; returns when all `members` have come.

    `port` 0: any free one. Raises `RunFailed` where the port is taken, `RuntimeError` where nobody serves it or some
    member does not come in time.
    """
    door = listen(host, port, several_nodes) if serve else None
    port = port if door is None else int(door.getsockname()[1])
    served = None if door is None else door.detach()
    return dist.TCPStore(host, port, members, serve, timeout, master_listen_fd=served)


def listen(host: str, port: int, several_nodes: bool) -> socket.socket:
    """A listening socket on `host`'s own address; on all of this node's where others could not reach that one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not (several_nodes and ipaddress.ip_address(address[0]).is_loopback):
            try:
                return socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # not of this node: it is reached through another machine
                    raise
        print(
            f"warning: {host} is {address[0]} here, by which other nodes cannot reach it: port {port} is open on all "
            "networks of this node; have /etc/hosts mended, or give its address",
            file=sys.stderr,
        )
        return socket.create_server(("", port), backlog=BACKLOG)
    except OSError as error:
        raise RunFailed(f"{host}:{port}: the ranks cannot meet there: {error.strerror or error}") from None
