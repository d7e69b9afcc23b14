"""Writing files so that an interrupted run leaves no half file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdlab.errors import SvdlabError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` with the same suffix; renamed to it on success, removed on any failure.

    Raises:
        SvdlabError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise SvdlabError(f"{target}: cannot be written ({error.strerror}), allowed: a writable folder") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other file.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write a folder of files, whole and on the disk, or not at all; one that is there already stays as it is.

    Raises:
        OSError: the disk is full, the folder above cannot be written.
    """
    target = Path(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, data in files.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o777 & ~_umask())
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():  # another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_folder(path: str | os.PathLike[str] | None) -> None:
    """Raises: SvdlabError when the folder that a result is to go to does not exist or cannot be written."""
    if path is not None and not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise SvdlabError(f"{path}: {Path(path).parent} is no folder that can be written")
