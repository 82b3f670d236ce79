"""Which errors of a rank are caused by another rank or by the network."""

import re

import torch.distributed as dist

CONNECTION_ERROR_RE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|closed by peer|socket"
    r"|Timed out waiting|recvValue|process group|collective",
    re.IGNORECASE,
)


def is_consequence(error: BaseException) -> bool:
    """Return whether an intact rank raises `error` because another rank or the network failed."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and bool(CONNECTION_ERROR_RE.search(str(error)))
