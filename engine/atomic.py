"""Files and folders that are there whole or not at all, whenever the process or the machine stops.

What is written goes into a draft beside its place, is forced to the disk, and takes its name by one rename. A draft is
hidden and ends in `.draft`; a process that was killed leaves one behind, which nobody takes for the real thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write or replace a UTF-8 file, which is complete whenever it is there.

    Raises:
        OSError: the disk is full, the folder cannot be written, ...; what was at `path` is untouched.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write or replace a file, which is complete whenever it is there; raises as `write_text`."""
    path = Path(path)
    draft = _draft(path)
    try:
        with draft.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def draft_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its place on leaving, complete; by an error it is gone.

    Raises:
        OSError: nothing was written there, or as `write_text`.
    """
    path = Path(path)
    draft = _draft(path)
    try:
        yield draft
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def draft_folder(parent: str | Path, name: str) -> Iterator[Path]:
    """A new empty folder in `parent` to fill and hand to `publish_folder`; on leaving, what was not handed over goes.

        with draft_folder(folder.parent, folder.name) as draft:
            (draft / "weights").write_bytes(...)
            publish_folder(draft, folder)

    `parent` is made where it is missing.
    """
    draft = _draft(Path(parent) / name)
    if not draft.parent.is_dir():
        draft.parent.mkdir(parents=True, exist_ok=True)
        sync(draft.parent.parent)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish_folder(draft: Path, folder: Path) -> None:
    """Force everything in `draft` to the disk and give it the name `folder`, in the same parent.

    Raises:
        OSError: there is a folder of that name with something in it, which stays as it is.
    """
    for path in [*draft.rglob("*"), draft]:
        sync(path)
    draft.rename(folder)
    sync(folder.parent)


def discard_folder(folder: Path) -> None:
    """Remove a folder, out of sight first, so that nobody meets half of it; nothing where there is none."""
    grave = _draft(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(grave)
        sync(folder.parent)
    shutil.rmtree(grave, ignore_errors=True)


def remove_drafts(parent: Path, name: str = "*") -> None:
    """Remove what killed processes left of `name` (a pattern) in `parent`; no other process may be writing it now."""
    for draft in parent.glob(f".{name}.*.draft"):
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft")
