"""A trace: every intermediate tensor of one generation under its name, and the settings that made it, in one file.

The file format is open: ``docs/trace-format.md`` says all that a port in another language needs to write one.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from svdlab import tensors
from svdlab.errors import SvdlabError, about, short
from svdlab.parity.digests import check_digests, check_versions
from svdlab.parity.probes import check_order, check_shapes, execution_key, is_tap
from svdlab.reading import Document, checked_as, parse
from svdlab.svd.settings import GenerationSettings
from svdlab.tensors import TensorFile

FORMAT = 1
METADATA_KEY = "svdlab.trace"

# What a trace can hold, by the names of settings and by those of safetensors.
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
CODES = {dtype: code for code, dtype in tensors.CODES.items() if dtype in DTYPES.values()}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


class _Header(Document):
    """The metadata's JSON; a later version may know fields that this one does not."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1]
    implementation: str = Field(max_length=200)
    implementation_version: str = Field(max_length=200)
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    digests: Any = None
    versions: Any = None
    scheduler: str = Field("", max_length=10_000)
    settings: dict[str, Any]
    order: tuple[str, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> "float16".

    Raises:
        SvdlabError: a dtype that a trace cannot hold.
    """
    if dtype not in _NAME_OF:
        raise SvdlabError(f"dtype: got {str(dtype).removeprefix('torch.')}, allowed: {', '.join(DTYPES)}")
    return _NAME_OF[dtype]


class Trace(Mapping[str, Tensor]):
    """Named tensors of one generation in execution order; opened from a file it loads each when it is asked for.

    Attributes:
        order: the names, in execution order.
        settings: what made it, with height, width and number of frames resolved.
        implementation: "diffusers", "svdlab" or a port's own name; ``implementation_version`` its version.
        dtype: the dtype the networks ran in: "float64", "float32", "float16" or "bfloat16".
        digests: sha256 of the "checkpoint" and of the "inputs" (``svdlab.parity.digests``), as far as they are known.
        versions: of the packages that made it, by name; may be empty.
        scheduler: whose rules made the steps, as it is written in Python; "" where the trace does not say.
        path: the file, or None for a trace in memory.
        label: the file's name, or what it is, for tables and errors.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        settings: GenerationSettings,
        implementation: str,
        *,
        implementation_version: str = "",
        dtype: str = "float32",
        digests: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
        scheduler: str = "",
    ) -> None:
        self._tensors: Mapping[str, Tensor] = dict(tensors)
        self._file: TensorFile | None = None
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self.path: Path | None = None
        self.settings = settings
        self.implementation = implementation
        self.implementation_version = implementation_version
        self.dtype = dtype
        self.scheduler = scheduler
        self.label = f"{implementation} {dtype} (in memory)"
        with about(self.label):
            self.digests = check_digests(dict(digests or {}))
            self.versions = check_versions(dict(versions or {}))
            self.order = tuple(sorted(tensors, key=execution_key))
        self._check_contents()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """Open a trace file and check everything about it but the values; tensors load when asked for.

        Raises:
            SvdlabError: no such file, not a safetensors file or a truncated one, not a trace, another format
                version, bad settings, no tensors, an unknown probe or order, a shape
                that contradicts the settings. One line, with the file's and the tensor's name.
        """
        self = cls.__new__(cls)
        self.path = Path(path)
        self.label = str(path)
        self._tensors = {}
        if not self.path.exists():
            raise SvdlabError(f"{path}: no such file, allowed: a trace written by 'svdlab trace'")
        self._file = TensorFile(self.path)
        order = self._read_header(self._file.metadata)
        self._shapes = {}
        for name, entry in self._file.entries.items():
            if entry.dtype not in CODES.values():
                allowed = ", ".join(CODES.values())
                raise SvdlabError(f"{path}: {name}: dtype {entry.dtype}, allowed: {allowed}")
            self._shapes[name] = entry.shape
        self.order = self._read_order(order)
        self._check_contents()
        return self

    def _read_header(self, metadata: Mapping[str, str]) -> tuple[str, ...]:
        """Set what the metadata says; returns its order."""
        if METADATA_KEY not in metadata:
            raise SvdlabError(f"{self.label}: not a trace: its safetensors metadata has no {METADATA_KEY!r}")
        text, what = metadata[METADATA_KEY], f"{self.label}: metadata {METADATA_KEY!r}"
        found = parse(text, what)
        version = found.get("format") if isinstance(found, dict) else found
        if version != FORMAT:
            raise SvdlabError(f"{self.label}: trace format version {short(version)}, allowed: {FORMAT}")
        header = checked_as(_Header, text, self.label)
        with about(f"{self.label}: settings"):
            self.settings = GenerationSettings.from_json(json.dumps(header.settings))
        with about(self.label):
            self.digests = check_digests(header.digests)
            self.versions = check_versions(header.versions)
        self.implementation = header.implementation
        self.implementation_version = header.implementation_version
        self.dtype = header.dtype
        self.scheduler = header.scheduler
        return header.order

    def _read_order(self, order: tuple[str, ...]) -> tuple[str, ...]:
        listed = Counter(order)
        for name, times in listed.items():
            if times > 1:
                raise SvdlabError(f"{self.label}: order: {name} is listed twice, allowed: once")
            if name not in self._shapes:
                raise SvdlabError(f"{self.label}: order: names {name}, which is not in the file")
        for name in self._shapes:
            if name not in listed:
                raise SvdlabError(f"{self.label}: order: leaves out {name}")
        return order

    def _check_contents(self) -> None:
        if not self.order:
            raise SvdlabError(f"{self.label}: an empty trace: it holds no tensor")
        for field in ("height", "width", "num_frames"):
            if getattr(self.settings, field) is None:
                raise SvdlabError(f"{self.label}: settings: {field} is null, allowed: the resolved value")
        with about(self.label):
            check_order(self.order)
            check_shapes(self._shapes, self.settings)

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the tensors that make the verdict, in execution order: all but the taps."""
        return tuple(sorted((n for n in self.order if not is_tap(n)), key=execution_key))

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the inner taps, as ordered in the trace."""
        return tuple(name for name in self.order if is_tap(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without loading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor.

        Raises:
            KeyError: the trace does not hold it.
            SvdlabError: it holds NaN or infinity, or the file was changed after it was opened.
        """
        tensor = self.raw(name)
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise SvdlabError(f"{self.label}: {name}: {bad} of {tensor.numel()} values are NaN or infinite")
        return tensor

    def raw(self, name: str) -> Tensor:
        """Load one tensor as it is: NaN and infinity, which a candidate may hold, included.

        Raises:
            KeyError: the trace does not hold it.
            SvdlabError: the file was changed after it was opened.
        """
        if name not in self._shapes:
            raise KeyError(name)
        return self._tensors[name] if self._file is None else self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __repr__(self) -> str:
        return f"Trace({self.label!r}, {len(self.probes)} probes, {len(self.taps)} taps)"

    def save(self, path: str | os.PathLike[str]) -> Trace:
        """Write to ``path``, one tensor in memory at a time; returns the trace opened from there."""
        from svdlab.parity.writer import TraceWriter  # which makes a Trace

        with TraceWriter(
            self.settings,
            self.implementation,
            implementation_version=self.implementation_version,
            dtype=self.dtype,
            digests=self.digests,
            versions=self.versions,
            scheduler=self.scheduler,
            path=path,
        ) as writer:
            for name in self.order:
                writer.put(name, self.raw(name))
        return writer.trace

    def require(self, names: Sequence[str], purpose: str) -> None:
        """Refuse a trace that lacks any of ``names``.

        Raises:
            SvdlabError: naming the file, the first missing tensor and the purpose.
        """
        for name in names:
            if name not in self:
                raise SvdlabError(f"{self.label}: {name} is missing, needed {purpose}")
