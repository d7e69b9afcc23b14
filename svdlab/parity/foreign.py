"""Tensors as ports write them: ``.npy``, ``.npz``, raw ``.bin`` and safetensors with any names and no metadata.

Nothing is unpickled, and nothing is read before it is asked for. A tensor comes as the file has it, in the machine's
byte order: its axes are named by the map (``svdlab.parity.importers``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.tensors import TensorFile

SUFFIXES = (".npy", ".npz", ".bin", ".safetensors")

# What a raw file can hold, little-endian.
RAW_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files among ``paths``, and those inside its folders that can be read, each once and sorted.

    Raises:
        SvdlabError: nothing given, no such file, a suffix that is not read, a folder without a file to read.
    """
    files: dict[Path, None] = {}
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(p for p in given.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise SvdlabError(f"{given}: no file to read in this folder, allowed: {', '.join(SUFFIXES)}")
            files.update(dict.fromkeys(inside))
        elif not given.is_file():
            raise SvdlabError(f"{given}: no such file, allowed: {', '.join(SUFFIXES)}, or a folder of them")
        elif given.suffix not in SUFFIXES:
            raise SvdlabError(f"{given}: suffix {given.suffix!r}, allowed: {', '.join(SUFFIXES)}")
        else:
            files[given] = None
    if not files:
        raise SvdlabError(f"no file given, allowed: {', '.join(SUFFIXES)}, or a folder of them")
    return list(files)


class Source:
    """One file of a port.

    Attributes:
        path: the file.
        keys: names of its tensors; ``("",)`` for the formats that hold one without a name.

    Raises:
        SvdlabError: not a whole file of its kind, or one that would have to be unpickled.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: tuple[str, ...] = ("",)
        self._file: Any = None
        try:
            if path.suffix == ".npz":
                self._file = np.load(path, allow_pickle=False)
                self.keys = tuple(self._file.files)
            elif path.suffix == ".safetensors":
                self._file = TensorFile(path)
                self.keys = tuple(sorted(self._file.entries))
            elif path.suffix == ".npy":
                self._map()
        except SvdlabError:
            raise
        except Exception as error:  # a broken file makes zipfile, numpy and its tokenizer raise almost anything
            raise self._unreadable(error) from None

    def _map(self) -> np.ndarray:
        try:
            return np.load(self.path, allow_pickle=False, mmap_mode="r")
        except ValueError as error:
            if "mmap" not in str(error):  # an empty array cannot be mapped, nor can objects
                raise
            return np.load(self.path, allow_pickle=False)

    def _unreadable(self, error: Exception) -> SvdlabError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return SvdlabError(f"{self.path}: not a whole {self.path.suffix} file of numbers ({reason})")

    def label(self, key: str) -> str:
        """File and tensor, for an error."""
        return f"{self.path}: {key}" if key else str(self.path)

    def load(self, key: str = "", dtype: str | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """One tensor as the file has it.

        Args:
            key: its name in the file.
            dtype: of a ``.bin`` file, a key of ``RAW_DTYPES``; ``shape`` likewise. No other file takes them.

        Raises:
            SvdlabError: no such tensor, a dtype that is no real number, a ``.bin`` of another size.
        """
        if key not in self.keys:
            allowed = "no tensor name, the file holds one" if self.keys == ("",) else listed(self.keys)
            raise SvdlabError(f"{self.path}: tensor: got {key!r}, allowed: {allowed}")
        if self.path.suffix == ".bin":
            return self._raw(dtype, shape)
        if dtype is not None or shape is not None:
            raise SvdlabError(f"{self.label(key)}: dtype and shape are in the file, allowed: for .bin only")
        try:
            if self.path.suffix == ".safetensors":
                tensor = self._file.read(key)
                if tensor.dtype not in RAW_DTYPES.values():
                    raise self._no_number(key, str(tensor.dtype).removeprefix("torch."))
                return tensor
            array = self._map() if self.path.suffix == ".npy" else self._file[key]
        except SvdlabError:
            raise
        except Exception as error:  # as above
            raise self._unreadable(error) from None
        if not isinstance(array, np.ndarray):
            raise SvdlabError(f"{self.label(key)}: no array, allowed: arrays of numbers")
        if array.dtype.name not in RAW_DTYPES:
            raise self._no_number(key, str(array.dtype))
        # A copy in the machine's byte order that owns its memory: torch takes no read-only and no swapped array.
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))

    def _raw(self, dtype: str | None, shape: Sequence[int] | None) -> Tensor:
        if dtype is None or shape is None:
            raise SvdlabError(
                f"{self.path}: a .bin file says nothing about itself: give its dtype and shape in the map"
            )
        kind = RAW_DTYPES[dtype]
        size, wanted = self.path.stat().st_size, math.prod(shape) * kind.itemsize
        if size != wanted:
            raise SvdlabError(f"{self.path}: {size} bytes, allowed: {wanted} for {dtype} of shape {tuple(shape)}")
        data = np.fromfile(self.path, dtype="<u1")
        if torch.tensor([1], dtype=torch.int16).view(torch.uint8)[0] == 0:
            data = data.reshape(-1, kind.itemsize)[:, ::-1].copy().reshape(-1)
        return torch.from_numpy(data).view(kind).reshape(tuple(shape))

    def _no_number(self, key: str, got: str) -> SvdlabError:
        return SvdlabError(f"{self.label(key)}: dtype {got}, allowed: {', '.join(RAW_DTYPES)}")


def listed(names: Sequence[str], limit: int = 8) -> str:
    """The first few of many names."""
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
