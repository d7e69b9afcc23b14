"""Reading a safetensors file that may be damaged, crafted, or changed while it is open; writing one bit by bit."""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from svdlab.errors import SvdlabError, short
from svdlab.reading import MAX_BYTES, Document, check_file, parse_as

# The dtypes of safetensors that torch has everywhere.
CODES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Of one read into memory.
_PART = 2**30

_Size = Annotated[int, Field(ge=0, lt=2**63)]


class Entry(Protocol):
    """What a tensor is."""

    @property
    def dtype(self) -> str:
        """As safetensors writes it."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Kind(NamedTuple):
    """What a tensor is that no file holds yet, or not as it is."""

    dtype: str
    shape: tuple[int, ...]


class Tensors(Protocol):
    """Tensors by name, each read when it is asked for."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str) -> Tensor: ...

    def parts(self, name: str) -> Iterable[bytes | memoryview]:
        """A tensor's bytes as stored."""


class _Entry(Document):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


class _Table(Document):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Entry]

    metadata: dict[str, str] = Field({}, alias="__metadata__")


class TensorFile:
    """A safetensors file, open: its table is checked whole, and each tensor is read when it is asked for.

    Read, not mapped into memory: whoever maps a file dies of a signal when another process truncates it.

    Args:
        path: a regular file.

    Attributes:
        path: as given.
        metadata: of the file, text by name.
        entries: dtype (as safetensors writes it), shape and place of every tensor, by name.

    Raises:
        SvdlabError: no such file, no regular file, or no whole safetensors file: a table that is damaged, larger than
            ``reading.MAX_BYTES``, or does not account for every byte of the data.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        check_file(path, "a safetensors file")
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise SvdlabError(f"{path}: cannot be read ({error.strerror})") from None
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self._state = self._look()
        size = self._state[0]
        length = int.from_bytes(self._read(0, 8), "little") if size >= 8 else size
        if length > size - 8:
            raise self._broken(f"{size} bytes, with a header of {length}")
        if length > MAX_BYTES:
            raise self._broken(f"a header of {length} bytes, allowed: at most {MAX_BYTES}")
        try:
            text = self._read(8, length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken("a header that is not text in UTF-8") from None
        table = parse_as(_Table, text, f"{path}: not a whole safetensors file: header")
        self.metadata, self.entries = table.metadata, table.__pydantic_extra__
        self._start = 8 + length
        self._check_places(size - self._start)

    def _check_places(self, size: int) -> None:
        """Tensors lie one behind the other, from the header to the end of the file."""
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].data_offsets):
            first, last = entry.data_offsets
            if first != end or last < first:
                raise self._broken(f"{name}: at bytes {first} to {last} of the data, allowed: from {end}")
            if entry.dtype in CODES and math.prod(entry.shape) * CODES[entry.dtype].itemsize != last - first:
                raise self._broken(f"{name}: {last - first} bytes for {entry.dtype} of shape {entry.shape}")
            end = last
        if end != size:
            raise self._broken(f"{size} bytes of data, allowed: {end}, as its header says")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            KeyError: the file does not hold it.
            SvdlabError: a dtype that is not of ``CODES``, or a file that was changed after it was opened.
        """
        entry = self.entries[name]
        if entry.dtype not in CODES:
            raise SvdlabError(f"{self.path}: {name}: dtype {entry.dtype}, allowed: {', '.join(CODES)}")
        first, last = entry.data_offsets
        tensor = torch.empty(entry.shape, dtype=CODES[entry.dtype])
        if last > first:
            self._read_into(self._start + first, tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def parts(self, name: str, size: int = 2**23) -> Iterator[bytes]:
        """A tensor's bytes as stored, of any dtype, in parts of a size.

        Raises:
            KeyError, SvdlabError: as ``read``.
        """
        first, last = self.entries[name].data_offsets
        for start in range(first, last, size):
            yield self._read(self._start + start, min(size, last - start))

    def _read(self, start: int, count: int) -> bytes:
        data = bytearray(count)
        self._read_into(start, memoryview(data))
        return bytes(data)

    def _read_into(self, start: int, target: memoryview) -> None:
        with self._lock:
            try:
                self._file.seek(start)
                done = 0
                while done < len(target) and (count := self._file.readinto(target[done : done + _PART])):
                    done += count
                whole = done == len(target)
            except OSError as error:
                raise SvdlabError(f"{self.path}: cannot be read ({error.strerror})") from None
        if not whole or self._look() != self._state:
            raise SvdlabError(f"{self.path}: changed by another process while it was read")

    def _look(self) -> tuple[int, int]:
        """Size and time of the last change."""
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def _broken(self, reason: str) -> SvdlabError:
        return SvdlabError(f"{self.path}: not a whole safetensors file ({reason})")


def check_entries(
    where: str,
    found: Mapping[str, Entry],
    wanted: Mapping[str, tuple[int, ...]],
    inert: Collection[str],
    dtypes: Collection[str],
) -> None:
    """Check that there is every weight of an architecture, and nothing else.

    Args:
        where: the file or folder, for the error.
        found: what there is.
        wanted: the architecture's shapes.
        inert: names that may be there and are not read.
        dtypes: that a weight may be stored in.

    Raises:
        SvdlabError: the first weight that is missing, has no place, another shape or another dtype.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        raise SvdlabError(f"{where}: weight {missing[0]!r} is missing ({len(missing)} in all)")
    if extra := sorted(found.keys() - wanted.keys() - set(inert)):
        raise SvdlabError(f"{where}: weight {short(extra[0])} has no place in this architecture ({len(extra)} in all)")
    for key, shape in wanted.items():
        if (entry := found[key]).shape != shape:
            raise SvdlabError(f"{where}: weight {key!r} has shape {short(entry.shape)}, the config wants {shape}")
        if entry.dtype not in dtypes:
            raise SvdlabError(f"{where}: weight {key!r} is {entry.dtype}, allowed: {', '.join(dtypes)}")


def write_tensors(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor: one of them is in memory at a time.

    Args:
        path: of the file; ``files.atomic_path`` makes it whole or not at all.
        entries: of every tensor; dtypes are of ``CODES``.
        read: gives a tensor that is as its entry says.
        metadata: of the file.

    Raises:
        OSError: the disk is full.
    """
    # The widest first: every tensor lies at a multiple of its numbers' size.
    names = sorted(entries, key=lambda name: (-CODES[entries[name].dtype].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = entries[name].dtype, entries[name].shape
        start, end = end, end + math.prod(shape) * CODES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(bytes_of(read(name)))
        file.flush()
        os.fsync(file.fileno())


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
