"""The bytes of a text file as text with `\\n` line ends, or a `UserError` that names the line.

UTF-8 with and without byte order mark, and UTF-16 and UTF-32 with one (Excel's "Unicode text",
PowerShell's `>`) are read. Other encodings cannot be recognised with certainty, so they are
refused.
"""

import codecs
from pathlib import Path

from liverseg_dist.errors import UserError, printable

MAX_TEXT_BYTES = 64 << 20
# UTF-32-LE begins with the mark of UTF-16-LE, so it is tried first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class TextDecodeError(ValueError):
    """Bytes that are no text in an encoding we read."""


def decode_text(raw: bytes) -> str:
    """Decode by the byte order mark, else as UTF-8; line ends become `\\n`.

    Raises:
        TextDecodeError: naming the line and the remedy.
    """
    encoding, skipped = "utf-8", 0
    for mark, name in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            encoding, skipped = name, len(mark)
            break
    body = raw[skipped:]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        raise TextDecodeError(_describe_decode_error(body, error)) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, *, max_bytes: int = MAX_TEXT_BYTES, purpose: str = "") -> str:
    """The text of a file that a user gave.

    Args:
        path: The file.
        max_bytes: A larger file is refused before it is read.
        purpose: What the file is for, as the end of a message: "; configs/ holds examples".

    Raises:
        UserError: No such file, unreadable, too large, or in another encoding.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{printable(path)}: no such file{purpose}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{printable(path)}: cannot be read: {reason}{purpose}") from None
    except ValueError:  # a zero byte in the name
        raise UserError(f"{printable(path)}: cannot name a file{purpose}") from None
    if len(raw) > max_bytes:
        raise UserError(f"{printable(path)}: longer than {max_bytes >> 20} MiB{purpose}")
    try:
        return decode_text(raw)
    except TextDecodeError as error:
        raise UserError(f"{printable(path)}: {error}") from None


def _describe_decode_error(body: bytes, error: UnicodeDecodeError) -> str:
    before = body[: error.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if error.encoding != "utf-8":
        name = error.encoding.upper()
        return f"damaged {name} text after {len(before)} bytes; save the file again as UTF-8"
    line = before.count(b"\n") + 1
    byte = body[error.start]
    return (
        f"line {line}: byte 0x{byte:02X} is not UTF-8 (was the file saved as Latin-1 or Windows-1252?); "
        "save it as UTF-8 (in Excel: CSV UTF-8)"
    )
