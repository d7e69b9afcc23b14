"""The JSON files of a sweep's folder, typed: whatever else is in them is refused when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field

from svdlab.errors import SvdlabError
from svdlab.reading import Document, parse_as, read_as
from svdlab.sweep.code import Code

FORMAT = 4
Identity = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Value = int | float | str | bool | None


@dataclass(frozen=True)
class Model:
    """A checkpoint.

    Attributes:
        name: as it was given.
        revision: the commit on the hub that it was found to be; None for a folder.
        fingerprint: of its configs and weights, SHA-256.
    """

    name: str
    revision: str | None
    fingerprint: str


class PlannedPoint(Document):
    """A point in ``sweep.json``."""

    point: Identity
    settings: dict[str, Any]
    rules: list[str]
    approximation: list[str]


class PlanFile(Document):
    """``sweep.json``."""

    format: int
    svdlab: str
    code: Code
    model: Model
    image: Digest
    device: str
    threads: Annotated[int, Field(ge=1)] | None
    divergence: bool
    environment: dict[str, str]
    axes: dict[str, list[Value | list[int | float]]]
    points: Annotated[list[PlannedPoint], Field(min_length=1)]


class Neighbour(Document):
    """How far a point's frames are from those of the next point on one axis."""

    axis: str
    value: Value | list[int | float]
    point: Identity
    difference: float | None


class Divergence(Document):
    """How far a point is from diffusers; only a reason where diffusers fails."""

    verdict: str
    reason: str | None = None
    first_divergence: str | None = None
    ratio: float | None = None
    probe: str | None = None
    frames_mse: float | None = None


class Metrics(Document):
    """A point's ``metrics.json``.

    Attributes:
        files: SHA-256 of the other files in the folder.
        sha256: of all the rest of this file.
    """

    format: int
    point: Identity
    settings: dict[str, Any]
    rules: list[str]
    approximation: list[str]
    model: Model
    image: Digest
    svdlab: str
    code: Code
    files: dict[str, Digest]
    frames_sha256: Digest
    motion: float
    motion_per_frame: list[float]
    divergence: Divergence | None
    neighbours: list[Neighbour]
    seconds: float
    peak_memory_mib: float
    device: str
    threads: int
    host: str
    process: int
    sha256: Digest

    @classmethod
    def sealed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the file is to hold: the values, and the digest of them.

        Raises:
            SvdlabError: a value that is not allowed.
        """
        plain = parse_as(cls, json.dumps({**values, "sha256": "0" * 64}), "metrics").model_dump()
        return {**plain, "sha256": _digest_of(plain)}

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """The file's values.

        Raises:
            SvdlabError: it is missing, or is not what was written.
        """
        values = read_as(cls, path).model_dump()
        if values["sha256"] != _digest_of(values):
            raise SvdlabError(f"{path}: is not what was written")
        return values


class FailureFile(Document):
    """The error of a point that failed."""

    type: str
    message: str
    traceback: str


def _digest_of(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sha256(file: BinaryIO) -> str:
    """Of what is left to read in a file, which may be larger than the memory."""
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()
