"""Writing a trace while a generation runs: in memory, or streamed to a file with little memory."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.files import atomic_path
from svdlab.parity.digests import InputsDigest
from svdlab.parity.probes import check_until, execution_key
from svdlab.parity.trace import CODES, FORMAT, METADATA_KEY, Trace, dtype_name
from svdlab.svd.settings import GenerationSettings

COPY_BYTES = 8 * 2**20


class CaptureComplete(Exception):  # noqa: N818 - it is no error
    """Leaves a run once the last probe that was asked for is recorded."""


class TraceWriter:
    """Collects tensors into a :class:`Trace`: in memory, or streamed to a file.

    To a file, a tensor goes to the host and to disk at once. The bound on host memory is the largest single
    tensor and one copy buffer of ``COPY_BYTES``, however long the run is; the disk holds the data twice while
    the file is put together, because a safetensors file begins with a header that knows every tensor. Use as
    a context manager: an exception or Ctrl-C leaves no file, ``CaptureComplete`` ends the block and is no error.

    Args:
        settings: resolved settings (height, width and number of frames are not None).
        implementation: who made the tensors.
        implementation_version: its version.
        dtype: what the networks ran in.
        digests: of the checkpoint and of the inputs, as far as they are known (``svdlab.parity.digests``).
        versions: of the packages that make the tensors, by name.
        scheduler: whose rules make the steps, see ``scheduling.traced_label``; "" where it is not known.
        path: the file, or None to keep the tensors in memory.
        until: the probe behind which the capture is complete; None records everything.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        implementation: str,
        *,
        implementation_version: str = "",
        dtype: str = "float32",
        digests: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
        scheduler: str = "",
        path: str | os.PathLike[str] | None = None,
        until: str | None = None,
    ) -> None:
        check_until(until, settings)
        self.settings = settings
        self.implementation = implementation
        self.implementation_version = implementation_version
        self.dtype = dtype
        self.digests = dict(digests or {})
        self.versions = dict(versions or {})
        self.scheduler = scheduler
        self._inputs = InputsDigest()
        self.path = None if path is None else Path(path)
        self.until = until
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[tuple[int, ...], torch.dtype, int]]] = {}
        self._memory: dict[str, list[Tensor]] = {}
        self._frames: dict[str, int] = {}
        self._spill: BinaryIO | None = None
        self._trace: Trace | None = None

    def __enter__(self) -> TraceWriter:
        if self.path is not None:
            if not self.path.parent.is_dir():
                raise SvdlabError(f"{self.path}: the folder {self.path.parent} does not exist")
            self._target = self._stack.enter_context(atomic_path(self.path))
            self._spill = self._stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        complete = kind is None or issubclass(kind, CaptureComplete)
        if not complete:
            return bool(self._stack.__exit__(kind, value, traceback))
        with self._stack:
            if self.path is None:
                tensors = {name: self._joined(name) for name in sorted(self._memory, key=execution_key)}
                self._trace = Trace(
                    tensors,
                    self.settings,
                    self.implementation,
                    implementation_version=self.implementation_version,
                    dtype=self.dtype,
                    digests=self.digests,
                    versions=self.versions,
                    scheduler=self.scheduler,
                )
            else:
                self._assemble()
        if self.path is not None:
            self._trace = Trace.open(self.path)
        return complete

    @property
    def trace(self) -> Trace:
        """The finished trace, after the ``with`` block."""
        assert self._trace is not None, "the writer is still open"
        return self._trace

    def digest_input(self, name: str, tensor: Tensor) -> None:
        """Take an input of this run into its digest, before it is recorded; tensors that are no inputs are ignored."""
        self._inputs.add(name, tensor)
        if self._inputs.hex is not None:
            self.digests["inputs"] = self._inputs.hex

    def put(self, name: str, tensor: Tensor) -> None:
        """Record one whole tensor.

        Raises:
            SvdlabError: the name is taken, or it is neither a probe nor a tap, or the dtype is not a float.
            CaptureComplete: this was the last tensor that was asked for.
        """
        if name in self._pieces:
            raise SvdlabError(f"{name}: recorded twice in one trace")
        self.extend(name, tensor)
        if name == self.until:
            raise CaptureComplete

    def extend(self, name: str, tensor: Tensor, frames: int | None = None) -> None:
        """Record a part of a tensor, to be joined with the other parts along the first axis.

        Args:
            name: probe or tap.
            tensor: (rows, ...).
            frames: with it the joined rows are (videos * frames, ...) and become (videos, frames, ...) in the
                trace.
        """
        execution_key(name)
        dtype_name(tensor.dtype)
        tensor = tensor.detach()
        if tensor.dtype.is_floating_point and self._spill is None:
            self._memory.setdefault(name, []).append(tensor.to("cpu", copy=True).contiguous())
        offset = 0
        if self._spill is not None:
            host = tensor.to("cpu").contiguous()
            offset = self._spill.seek(0, os.SEEK_END)
            if host.numel():
                self._spill.write(host.reshape(-1).view(torch.uint8).numpy().data)
        self._pieces.setdefault(name, []).append((tuple(tensor.shape), tensor.dtype, offset))
        if frames is not None:
            self._frames[name] = frames

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def _shape(self, name: str) -> tuple[int, ...]:
        pieces = self._pieces[name]
        first, dtype, _ = pieces[0]
        if len(pieces) == 1 and name not in self._frames:
            return first
        if any(shape[1:] != first[1:] or kind != dtype for shape, kind, _ in pieces):
            raise SvdlabError(f"{name}: its parts have shapes {[p[0] for p in pieces]}, which do not join")
        rows = sum(shape[0] for shape, _, _ in pieces)
        frames = self._frames.get(name)
        if frames and rows % frames == 0:
            return (rows // frames, frames, *first[1:])
        return (rows, *first[1:])

    def _joined(self, name: str) -> Tensor:
        parts = self._memory.pop(name)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self._shape(name))

    def header(self) -> dict[str, Any]:
        """What the metadata's JSON says; digests, versions and the scheduler where they are known."""
        known = {"digests": self.digests, "versions": self.versions, "scheduler": self.scheduler}
        return {
            "format": FORMAT,
            "implementation": self.implementation,
            "implementation_version": self.implementation_version,
            "dtype": self.dtype,
            **{name: value for name, value in known.items() if value},
            "settings": json.loads(self.settings.to_json()),
            "order": sorted(self._pieces, key=execution_key),
        }

    def _assemble(self) -> None:
        """The safetensors file: header length, header, then the data with the widest dtypes first
        (alignment).
        """
        assert self._spill is not None
        names = sorted(self._pieces, key=execution_key)
        names.sort(key=lambda name: -self._pieces[name][0][1].itemsize)
        table: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(self.header())}}
        end = 0
        for name in names:
            shape, dtype = self._shape(name), self._pieces[name][0][1]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        head = json.dumps(table).encode()
        head += b" " * (-len(head) % 8)
        with open(self._target, "wb") as file:
            file.write(len(head).to_bytes(8, "little"))
            file.write(head)
            for name in names:
                for shape, dtype, offset in self._pieces[name]:
                    _copy(self._spill, file, offset, math.prod(shape) * dtype.itemsize)


def _copy(source: BinaryIO, target: BinaryIO, offset: int, count: int) -> None:
    source.seek(offset)
    while count:
        block = source.read(min(count, COPY_BYTES))
        target.write(block)
        count -= len(block)


def versions_of_run() -> dict[str, str]:
    """Of the packages that a result depends on."""
    return {package: version_of(package) for package in ("svdlab", "torch", "diffusers")}


def version_of(package: str) -> str:
    """The installed version of a package, or "unknown"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
