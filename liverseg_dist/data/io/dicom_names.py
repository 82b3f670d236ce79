"""Pseudonymous names of DICOM scans: `scan_` and ten digits of a keyed hash of their UIDs.

Folders and file names of DICOM often contain the name of a patient, so results are not named after
them. The same scan has the same name in every call on this account. Without the key nobody can
compute the name from a UID. The key is `LIVERSEG_NAME_KEY`, or a random one that is made at first
use in `$XDG_CONFIG_HOME/liverseg_dist/name.key` (readable by its owner only). Groups that want the
same names share the key.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from liverseg_dist.errors import RunFailed

KEY_VARIABLE = "LIVERSEG_NAME_KEY"
KEY_FILE = "liverseg_dist/name.key"
DIGITS = 10


def make_pseudonym(prefix: str, *parts: str) -> str:
    """The name for identifying texts, such as UIDs. Equal parts give equal names.

    Args:
        prefix: what is named, such as `scan`.
        parts: the texts.
    """
    message = "\0".join((prefix, *parts)).encode("utf-8", "surrogateescape")
    digest = hmac.new(_load_key(), message, hashlib.sha256).hexdigest()
    return f"{prefix}_{digest[:DIGITS]}"


def _load_key() -> bytes:
    value = os.environ.get(KEY_VARIABLE)
    if value:
        return value.encode("utf-8", "surrogateescape")
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    file = Path(base) / KEY_FILE
    with contextlib.suppress(FileNotFoundError):
        return file.read_bytes()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Several ranks may start at once: the first file stays, all read it.
        staging = file.with_name(f".{file.name}.{os.getpid()}")
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(staging, file)
        staging.unlink()
        return file.read_bytes()
    except OSError as error:
        raise RunFailed(
            f"the key for names of DICOM scans cannot be stored ({error.strerror}); set "
            f"{KEY_VARIABLE} to a secret text"
        ) from None
