"""DICOM UIDs that follow from texts, so that a repeated call writes the same objects."""

import hashlib


def derive_uid(*parts: object) -> str:
    """A UID in the branch 2.25 (128-bit numbers); equal parts give equal UIDs."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big') | 1 << 127}"
