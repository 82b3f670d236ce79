"""The key-value store of a job, reachable on the job's own network only.

PyTorch's `TCPStore` listens on all networks of the node, and every process that connects can read
and write it. Here the listening socket is opened on one address and passed to the store.
"""

import errno
import ipaddress
import logging
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from liverseg_dist.errors import RunFailed

_logger = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
BACKLOG = 1024
"""Length of the queue of connections: all ranks may connect at the same time."""
PRIVATE_RENDEZVOUS_VARIABLE = "LIVERSEG_PRIVATE_RENDEZVOUS"
"""Environment variable of ranks started by `torchrun --rdzv-backend=liverseg` (`rendezvous.py`)."""
ALL_CONNECTED_KEY = "liverseg/all_here"


def key_value_store(
    host: str, port: int, members: int, timeout: timedelta, *, serve: bool
) -> dist.TCPStore:
    """Open the job's key-value store; returns when all members are connected.

    Args:
        host: address or name of the node that serves the store.
        port: TCP port; 0 lets the system choose one (only with `serve`).
        members: number of processes that connect.
        timeout: how long to wait for the members, and for each later call.
        serve: whether this process serves the store.

    Raises:
        RunFailed: the store cannot be served on `host:port`.
        RuntimeError: no process serves the store, or a member does not connect in time.
    """
    if not serve:
        store = dist.TCPStore(host, port, members, False, timeout)
        # A client is connected before the other members are; the server sets the key when all are.
        store.wait([ALL_CONNECTED_KEY], timeout)
        return store
    server_socket = open_listening_socket(host, port)
    bound_port = server_socket.getsockname()[1]
    store = dist.TCPStore(
        host, bound_port, members, True, timeout, master_listen_fd=server_socket.detach()
    )
    store.set(ALL_CONNECTED_KEY, "")
    return store


def connection_error_message(who: str, where: str, error: RuntimeError) -> str:
    """Describe PyTorch's error of a lost connection or a timeout in one line.

    Args:
        who: the process that reports, for example "rank 3 on node7".
        where: `host:port` of the rendezvous.
    """
    reason = " ".join(str(error).split())[:200]
    return (
        f"{who} cannot connect to the other ranks at {where}; check that all ranks started and "
        f"that the network between the nodes works ({reason})"
    )


def store_of_attempt(store: dist.Store) -> dist.Store:
    """Return the part of the store that belongs to this start of the ranks.

    torchrun restarts ranks on the same store.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"liverseg/attempt_{attempt}", store)


def open_listening_socket(host: str, port: int) -> socket.socket:
    """Open a listening socket on an address of `host`.

    Loopback and link-local addresses are skipped unless `host` names them. If `host` has no address
    on this node, the socket listens on all networks and a warning is printed.

    Raises:
        RunFailed: the port is in use, or it may not be opened.
    """
    try:
        candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # IPv4 first: more clusters route it between nodes.
        candidates.sort(key=lambda entry: entry[0] != socket.AF_INET)
        for family, _, _, _, address in candidates:
            ip = ipaddress.ip_address(address[0])
            is_requested = host in ("localhost", address[0])
            is_local = ip.is_loopback or ip.is_link_local
            if ip.is_unspecified or (is_local and not is_requested):
                continue
            try:
                return socket.create_server(address, family=family, backlog=BACKLOG)
            except OSError as error:
                # Any other error: the address belongs to another machine, for example to a router.
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    raise
        addresses = sorted({str(address[0]) for *_, address in candidates})
        _logger.warning(
            "%s (%s) is not an address of this node that other nodes can reach; port %s is open on "
            "all networks of the node. Use another host, or correct /etc/hosts.",
            host,
            ", ".join(addresses),
            port,
        )
        # No usable address: the job can still start, on all networks, with the warning above.
        has_dualstack = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if has_dualstack else socket.AF_INET
        return socket.create_server(
            ("", port), family=family, backlog=BACKLOG, dualstack_ipv6=has_dualstack
        )
    except OSError as error:
        raise RunFailed(
            f"{host}:{port}: cannot listen for the other ranks there: {error.strerror or error}; "
            "choose another port (MASTER_PORT) or host (MASTER_ADDR)"
        ) from None
