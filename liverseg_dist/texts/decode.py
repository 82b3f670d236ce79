"""Decode a text file to text with `\\n` line ends, or raise a `UserError` that names the line.

UTF-8 is read with and without byte order mark, UTF-16 and UTF-32 (Excel's "Unicode text",
PowerShell's `>`) with one. Other encodings cannot be recognised with certainty and are refused.
"""

import codecs
from pathlib import Path

from liverseg_dist.errors import UserError, printable

MAX_TEXT_BYTES = 64 << 20
# The mark of UTF-32-LE begins with that of UTF-16-LE, so UTF-32 is tried first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class TextDecodeError(ValueError):
    """The bytes are not text in a supported encoding."""


def decode_text(raw: bytes) -> str:
    """Decode by the byte order mark, else as UTF-8. Line ends become `\\n`.

    Raises:
        TextDecodeError: Its message names the line and what to do.
    """
    encoding, mark_length = "utf-8", 0
    for mark, name in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            encoding, mark_length = name, len(mark)
            break
    body = raw[mark_length:]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextDecodeError(_describe_decode_error(body, error)) from None
    # One kind of line end, so that line numbers are right in all messages.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, purpose: str = "") -> str:
    """Read a text file of a user.

    Args:
        path: The file.
        max_bytes: Size limit; a larger file is not read completely.
        purpose: What the file is for, appended to error messages: "; configs/ holds examples".

    Raises:
        UserError: The file is missing, unreadable, too large, or in another encoding.
    """
    try:
        with path.open("rb") as file:
            # One byte more than allowed shows that a file is too large, also for pipes.
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{printable(path)}: no such file{purpose}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{printable(path)}: cannot be read: {reason}{purpose}") from None
    except ValueError:
        # The name holds a zero byte.
        raise UserError(f"{printable(path)}: cannot name a file{purpose}") from None
    if len(raw) > max_bytes:
        raise UserError(f"{printable(path)}: longer than {max_bytes >> 20} MiB{purpose}")
    try:
        return decode_text(raw)
    except TextDecodeError as error:
        raise UserError(f"{printable(path)}: {error}") from None


def _describe_decode_error(body: bytes, error: UnicodeDecodeError) -> str:
    """Name the line for UTF-8; in other encodings the line ends before the error are unknown."""
    before = body[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if error.encoding != "utf-8":
        name = error.encoding.upper()
        return f"damaged {name} text after {len(before)} bytes; save the file again as UTF-8"
    line = before.count(b"\n") + 1
    byte = body[error.start]
    return (
        f"line {line}: byte 0x{byte:02X} is not UTF-8 (was the file saved as Latin-1 or "
        "Windows-1252?); save it as UTF-8 (in Excel: CSV UTF-8)"
    )
