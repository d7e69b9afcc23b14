"""Writing files so that an interrupted run leaves no half file."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdlab.errors import SvdlabError, short

MaybePath = str | os.PathLike[str] | None


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` with the same suffix; renamed to it on success, removed on any failure.

    Raises:
        SvdlabError: the folder does not exist or cannot be written.
        OSError: the disk is full; it names ``path``.
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other file.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, str(temporary)) and not isinstance(error, BrokenPipeError):
            error.filename = str(target)  # a full disk does not say of which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    """A new empty file in the same folder, with the same suffix."""
    try:
        # A short stem: a name that is just short enough for the file system stays so.
        handle, name = tempfile.mkstemp(prefix=f".{target.stem[:8]}-", suffix=target.suffix[-8:], dir=target.parent)
    except OSError as error:
        raise SvdlabError(f"{target}: cannot be written ({error.strerror}), allowed: a writable folder") from None
    os.close(handle)
    return Path(name)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write a folder of files, whole and on the disk, or not at all; one that is there already stays as it is.

    Raises:
        OSError: the disk is full, the folder above cannot be written.
    """
    with atomic_folder(path) as temporary:
        for name, data in files.items():
            with (temporary / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``path``; renamed to it on success, removed on any failure.

    A folder with something in it that is there already stays as it is.

    Raises:
        OSError: the disk is full, the folder above cannot be written.
    """
    target = Path(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
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


def json_value(value: Any) -> Any:
    """What JSON can hold: None for infinity and NaN, also inside mappings and lists."""
    if isinstance(value, Mapping):
        return {name: json_value(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_outputs(*files: MaybePath, folders: Sequence[MaybePath] = (), inputs: Sequence[MaybePath] = ()) -> None:
    """Refuse, before any work, what could not be written at its end, or what would overwrite an input.

    Args:
        files: that are going to be written, each whole; None is left out, here and below.
        folders: that are going to be made, or filled where they exist.
        inputs: files and folders that are read.

    Raises:
        SvdlabError: a file that is a folder or a device, a folder that is a file, a name that the file system does not
            take, a folder above that is missing or cannot be written, two outputs at one place, an output that is an
            input, also by another path.
    """
    outputs = [Path(path) for path in files if path is not None]
    made = [Path(path) for path in folders if path is not None]
    given = [Path(path) for path in inputs if path is not None]
    for path in (*outputs, *made):
        _check_place(path, folder=path in made)
    for n, path in enumerate(both := [*outputs, *made]):
        for other in both[:n]:
            if _same(path, other):
                raise SvdlabError(f"{path}: is given for two outputs, allowed: one path for each")
    for path in both:
        for source in given:
            if _same(path, source) or (path.is_file() and source.is_dir() and _inside(path, source)):
                raise SvdlabError(f"{path}: is an input, too, and would be overwritten, allowed: another path")


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that is there already, or that cannot be made.

    Raises:
        SvdlabError: of either.
    """
    if os.path.lexists(path):
        raise SvdlabError(f"{path}: is there already, allowed: a new folder")
    check_outputs(folders=[path])


def _check_place(path: Path, folder: bool) -> None:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise SvdlabError(f"{short(str(path))}: cannot be written ({reason}), allowed: a name the disk takes") from None
    if mode is not None and folder and not stat.S_ISDIR(mode):
        raise SvdlabError(f"{path}: is a file, allowed: a folder")
    if mode is not None and not folder and not stat.S_ISREG(mode):
        raise SvdlabError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, allowed: a file")
    above = path if folder and mode is not None else path.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise SvdlabError(f"{path}: {above} is no folder that can be written")
    _beside(above / path.name).unlink()  # what else there may be: a full disk, a quota


def _same(one: Path, other: Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return one.exists() and other.exists() and one.samefile(other)


def _inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
