"""Findings about a file or a case: severity, a stable code for scripts, and a message for people.

Readers (`data.io`) and the audit (`data.audit`) return them; the store keeps them as JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from liverseg_dist.errors import UserError, printable

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One observation about a file or a case.

    Severity `info` needs no action, `warning` should be looked at, and with `error` the case cannot
    be used.
    """

    severity: Severity
    code: str
    message: str

    def to_json(self) -> dict[str, str]:
        return {"severity": self.severity, "code": self.code, "message": self.message}


class ScanFileError(UserError):
    """A scan or label file cannot be read; `code` is the reason for scripts (see `nifti`)."""

    def __init__(self, path: Path | str, code: str, reason: str) -> None:
        # The message is for people; path, code and reason are for programs.
        super().__init__(f"{printable(path)}: {reason}")
        self.path = Path(path)
        self.code = code
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[Path, str, str]]:
        # The default would pass the message only, and unpickling in another process would fail.
        return type(self), (self.path, self.code, self.reason)

    def to_finding(self) -> Finding:
        return Finding("error", self.code, f"{printable(self.path.name)}: {self.reason}")


def is_valid_case_id(name: str) -> bool:
    """Whether `name` can be a path component: printable, no folder, not hidden, not reserved."""
    if not name.strip() or not name.isprintable():
        return False
    return "/" not in name and not name.startswith((".", "__"))
