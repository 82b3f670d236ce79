"""What was noticed about a file or a case: severity, a stable code for scripts, and a sentence for people."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from liverseg_dist.errors import UserError, printable

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """info: worth knowing; warning: look at it; error: the case cannot be used as it is."""

    severity: Severity
    code: str
    message: str

    def to_json(self) -> dict[str, str]:
        return {"severity": self.severity, "code": self.code, "message": self.message}


class ScanFileError(UserError):
    """A scan or label file that cannot be read; `code` tells scripts why (see `nifti`)."""

    def __init__(self, path: Path | str, code: str, reason: str) -> None:
        super().__init__(f"{printable(path)}: {reason}")
        self.path, self.code, self.reason = Path(path), code, reason

    def __reduce__(self) -> tuple[type, tuple[Path, str, str]]:
        return type(self), (
            self.path,
            self.code,
            self.reason,
        )  # crosses process borders in one piece

    def finding(self) -> Finding:
        return Finding("error", self.code, f"{printable(self.path.name)}: {self.reason}")


def is_valid_case_id(name: str) -> bool:
    """Whether `name` may stand for a case in paths: no folder, nothing hidden or reserved, one line."""
    return (
        bool(name.strip())
        and "/" not in name
        and not name.startswith((".", "__"))
        and name.isprintable()
    )
