"""Reads the root of a store: the one file that is read when a store is opened.

The root may come from an untrusted source: its names are checked before one becomes part of a path.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from pydantic_core import from_json

from liverseg_dist.data.findings import is_valid_case_id
from liverseg_dist.data.store.layout import ATTRIBUTE, FIRST_SCHEMA, PRIVATE_DIR, SCHEMA
from liverseg_dist.data.store.metadata_checks import check_root
from liverseg_dist.errors import UserError, printable
from liverseg_dist.texts.paths import quote_path

MAX_MESSAGE_CHARACTERS = 160


def read_root(path: str) -> dict[str, Any]:
    """The checked root attribute of a store.

    Args:
        path: Folder or fsspec URL.

    Raises:
        UserError: There is no finished store, or its root is damaged or of another schema.
    """
    if "://" in path:
        _check_url(path)
    root = _parse_root(path, _read_root_file(path))
    # Before any other entry: another schema may have other entries.
    schema = root.get("schema")
    if schema not in (FIRST_SCHEMA, SCHEMA):
        is_newer = isinstance(schema, int) and schema > SCHEMA
        remedy = "install a newer liverseg_dist" if is_newer else "convert the data again"
        raise UserError(
            f"{path}: store schema {schema}, this version reads {FIRST_SCHEMA} and {SCHEMA}; {remedy}"
        )
    _check_case_names(path, root)
    with wrap_metadata_errors(f"{path}: zarr.json is damaged"):
        check_root(root)
    return root


@contextmanager
def wrap_metadata_errors(message: str) -> Iterator[None]:
    """Turn errors of missing or wrong metadata into a `UserError` of one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{message} ({type(error).__name__}: {short_message(error)}); "
            "liverseg verify lists all damage"
        ) from None


def short_message(error: BaseException) -> str:
    """The message of an error in one line of limited length; its type if it has no message."""
    return " ".join(str(error).split())[:MAX_MESSAGE_CHARACTERS] or type(error).__name__


def _read_root_file(path: str) -> bytes:
    try:
        if "://" not in path:
            return (Path(path) / "zarr.json").read_bytes()
        file_system, folder = fsspec.core.url_to_fs(path)
        return bytes(file_system.cat_file(f"{folder.rstrip('/')}/zarr.json"))
    except (FileNotFoundError, NotADirectoryError):
        state = "no Zarr store found"
        if (Path(path) / PRIVATE_DIR).is_dir():
            state = "its conversion has not finished; run it again"
        raise UserError(f"{path}: {state} (tools/to_zarr SOURCE {quote_path(path)})") from None
    except Exception as error:
        # Remote file systems raise their own types; for a folder only OSError is expected.
        if "://" not in path and not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path}: cannot be read ({short_message(error)}); check that this machine can reach it"
        ) from None


def _parse_root(path: str, text: bytes) -> dict[str, Any]:
    """The root group's attribute `liverseg`."""
    try:
        with _garbage_collection_paused():
            # pydantic's parser needs a third of the time of the json module.
            content = from_json(text)
        is_group = isinstance(content, dict) and content["node_type"] == "group"
        if not is_group or content["zarr_format"] != 3:
            raise ValueError("not the metadata of a Zarr v3 group")
        root = content.get("attributes", {}).get(ATTRIBUTE)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: zarr.json is damaged ({reason})") from None
    if not isinstance(root, dict):
        raise UserError(f"{path}: a Zarr group, but not written by liverseg convert")
    return root


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause the collector while a large root is parsed.

    The parser creates a million objects, none of them garbage. Python would search them again and
    again: two thirds of the time to open 10,000 cases.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_case_names(path: str, root: Mapping[str, Any]) -> None:
    """Check names that become paths of this program: none may lead out of a folder."""
    cases = root.get("cases")
    if not isinstance(cases, dict):
        raise UserError(f"{path}: zarr.json is damaged (cases is not a mapping)")
    for case_id, case in cases.items():
        parent = case.get("parent") if isinstance(case, dict) else None
        for name in (case_id, parent):
            if not isinstance(name, str) or not is_valid_case_id(name):
                raise UserError(
                    f"{path}: '{printable(name)[:80]}' cannot name a case; "
                    "the store is damaged or manipulated"
                )


def _check_url(url: str) -> None:
    """Raises `UserError` when this installation cannot read such URLs."""
    try:
        fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{url}: {short_message(error)}, then it can be read (pip install)"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{url}: {short_message(error)}; "
            "give a folder, or a URL that fsspec supports (s3://, http://)"
        ) from None
