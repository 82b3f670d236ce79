"""Where ranks meet: PyTorch's key-value store, behind a door on the job's own network only.

PyTorch alone would listen on every network of the node, and whoever knocks may read and write.
"""

import errno
import ipaddress
import os
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
ALL_HERE = "liverseg/all_here"


def key_value_store(
    host: str, port: int, members: int, timeout: timedelta, *, serve: bool
) -> dist.TCPStore:
    """The store at `host:port`, served by this process or by another; returns when all `members` have come.

    `port` 0: any free one. Raises `RunFailed` where it cannot be served, `RuntimeError` where nobody serves it or some
    member does not come in time.
    """
    if serve:
        door = open_listening_socket(host, port)
        number = door.getsockname()[1]
        store = dist.TCPStore(host, number, members, True, timeout, master_listen_fd=door.detach())
        store.set(ALL_HERE, "")
    else:
        store = dist.TCPStore(host, port, members, False, timeout)
        store.wait([ALL_HERE], timeout)
    return store


def connection_error_message(who: str, where: str, error: RuntimeError) -> str:
    """A line for PyTorch's errors of lost connections and timeouts, which are children of `RuntimeError`."""
    reason = " ".join(str(error).split())[:200]
    return f"{who} cannot meet the others at {where}; has one failed to start, or is the network gone? ({reason})"


def store_of_attempt(store: dist.Store) -> dist.Store:
    """The part of `store` that is this attempt's: torchrun restarts ranks on the store of those before."""
    return dist.PrefixStore(
        f"liverseg/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )


def open_listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket on an address of `host`: not on loopback, unless that is what was asked for.

    On all networks of this node, with a warning, where it has no such address. Raises `RunFailed`.
    """
    try:
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, _, _, _, address in sorted(known, key=lambda entry: entry[0] != socket.AF_INET):
            own = ipaddress.ip_address(address[0])
            asked_for = host in ("localhost", address[0])
            if own.is_unspecified or ((own.is_loopback or own.is_link_local) and not asked_for):
                continue
            try:
                return socket.create_server(address, family=family, backlog=BACKLOG)
            except OSError as error:  # others: not an address of this node, which is reached through another machine
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise
        shown = ", ".join(sorted({str(address[0]) for *_, address in known}))
        print(
            f"warning: {host} ({shown}) is no address of this node by which others could reach it: port {port} is open "
            "on all its networks; name another, or have /etc/hosts mended",
            file=sys.stderr,
        )
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise RunFailed(
            f"{host}:{port}: the ranks cannot meet there: {error.strerror or error}"
        ) from None
