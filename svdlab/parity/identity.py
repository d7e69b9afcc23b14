"""The identity test of a trace's writer: it writes tensors whose every value is known, and what went wrong is named.

A port that dumps its tensors in the wrong order looks like a port with a wrong model. So its writer is tried alone, on
small tensors whose sizes all differ and whose values say where they belong (``docs/trace-format.md``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.parity.foreign import listed
from svdlab.parity.importers import base_of, letters_of
from svdlab.parity.trace import CODES, DTYPES, METADATA_KEY, Trace
from svdlab.reading import parse
from svdlab.svd.settings import GenerationSettings
from svdlab.tables import Cell, Table

# No two axes of a tensor have one size, but for the single token, so that every exchange of axes shows in the shape.
SETTINGS = GenerationSettings(height=16, width=24, num_frames=7, num_inference_steps=4, num_videos_per_prompt=5)
SHAPES: Mapping[str, tuple[int, ...]] = {
    "image_embeddings": (5, 1, 6),
    "image_latents": (5, 4, 2, 3),
    "added_time_ids": (5, 3),
    "sigmas": (5,),
    "guidance_scale": (5, 7),
    "model_input.000": (10, 7, 8, 2, 3),
    "latents.000": (5, 7, 4, 2, 3),
    "frames": (5, 7, 3, 16, 24),
}
# Values by which data may be shifted for the shift to be named.
SHIFTS = 64
_INTEGERS = "its bytes are integers, allowed: floats"


def expected(name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the test: value i, counted row-major, of the k-th tensor is i + k / 16.

    In float16 and bfloat16, which do not hold that, it is (i + 31 k) mod 251 - 125.
    """
    shape, k = SHAPES[name], list(SHAPES).index(name)
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    values = index + k / 16 if dtype.itemsize > 2 else (index + 31 * k) % 251 - 125
    return values.to(dtype).reshape(shape)


@dataclass(frozen=True)
class TensorCheck:
    """What the writer made of one tensor: ``why`` says what is wrong, and is empty where nothing is."""

    name: str
    status: Literal["right", "wrong", "missing", "unexpected"]
    why: str = ""


@dataclass(frozen=True)
class WriterCheck:
    """What the identity test says.

    Attributes:
        path: the file.
        header: what is wrong with the metadata, or empty.
        tensors: one for every tensor of the test and of the file.
    """

    path: str
    header: str
    tensors: tuple[TensorCheck, ...]

    @property
    def right(self) -> bool:
        """Whether the writer is."""
        return not self.header and all(check.status == "right" for check in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        tensors = [asdict(check) for check in self.tensors]
        verdict = "right" if self.right else "wrong"
        return {"verdict": verdict, "path": self.path, "header": self.header, "tensors": tensors}

    def table(self) -> Table:
        """For a terminal."""
        rows: list[list[str | Cell]] = [
            ["metadata", Cell("wrong" if self.header else "right", "bad" if self.header else "good"), self.header]
        ]
        for check in self.tensors:
            rows.append([check.name, Cell(check.status, "good" if check.status == "right" else "bad"), check.why])
        return Table(("tensor", "is", "why"), rows)


def check_writer(path: str | os.PathLike[str]) -> WriterCheck:
    """Judge a file that a port's writer made of the test's tensors.

    Raises:
        SvdlabError: no such file, or not a safetensors file that can be read at all.
    """
    label = str(path)
    if not Path(path).is_file():
        raise SvdlabError(f"{label}: no such file, allowed: the test tensors of docs/trace-format.md")
    try:
        file = safe_open(os.fspath(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        reason = _swapped_length(Path(path)) or (str(error).splitlines() or [type(error).__name__])[0]
        raise SvdlabError(f"{label}: not a whole safetensors file ({reason})") from None
    header, dtype = _header(label, file.metadata() or {})
    checks = []
    for name in SHAPES:
        if name not in file.keys():
            checks.append(TensorCheck(name, "missing"))
            continue
        why = _wrong(name, file.get_tensor(name), dtype)
        checks.append(TensorCheck(name, "wrong" if why else "right", why))
    for name in sorted(set(file.keys()) - set(SHAPES)):
        checks.append(TensorCheck(name, "unexpected", f"allowed: {listed(tuple(SHAPES))}"))
    # What is said about a tensor is not said again about the metadata.
    if any(header.startswith(f"{check.name}: ") for check in checks if check.status != "right"):
        header = ""
    return WriterCheck(label, header, tuple(checks))


def _swapped_length(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) == 8 and int.from_bytes(start, "little") > size >= int.from_bytes(start, "big"):
        return "the length of its header is big-endian, allowed: little-endian"
    return ""


def _header(label: str, metadata: Mapping[str, str]) -> tuple[str, torch.dtype]:
    """What is wrong with the metadata, and the dtype that the tensors should have; float32 where it does not say."""
    try:
        held = parse(metadata.get(METADATA_KEY, "{}"), METADATA_KEY)
    except SvdlabError:
        held = {}
    held = held if isinstance(held, dict) else {}
    dtype = DTYPES.get(str(held.get("dtype")), torch.float32)
    wanted = {name: getattr(SETTINGS, name) for name in sorted(SETTINGS.model_fields_set)}
    given = held.get("settings")
    if isinstance(given, dict) and any(given.get(name) != value for name, value in wanted.items()):
        got = {name: given[name] for name in wanted if name in given}
        return f"settings: got {json.dumps(got)}, allowed: {json.dumps(wanted)}", dtype
    try:
        Trace.open(label)
    except SvdlabError as error:
        return str(error).removeprefix(f"{label}: "), dtype
    return "", dtype


def _wrong(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a tensor, or the empty text."""
    code = CODES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())
    right = expected(name, dtype)
    if tensor.dtype == dtype and tensor.shape == right.shape and torch.equal(tensor, right):
        return ""
    for how, read in _readings(tensor):
        target = expected(name, read.dtype)
        if how == _INTEGERS:
            target = target.floor()
        found = _order(read, target, name)
        if found is None:
            continue
        problems = [text for text in (how, found) if text]
        if not how and tensor.dtype != dtype:
            problems.append(f"dtype {code}, allowed: {CODES[dtype]}, as the metadata says")
        if tensor.shape != right.shape:
            problems.append(f"shape {tuple(tensor.shape)}, allowed: {tuple(right.shape)}")
        return "; ".join(problems)
    if tensor.dtype not in CODES:
        return f"dtype {code}, allowed: {CODES[dtype]}"
    right = expected(name, tensor.dtype)
    return _values(tensor, right)


def _readings(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor as it is, and as its bytes could be meant."""
    if tensor.dtype in CODES:
        yield "", tensor
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    swapped = data.reshape(-1, tensor.itemsize).flip(1).reshape(-1)
    shape = tuple(tensor.shape)
    for kind, code in CODES.items():
        if kind.itemsize == tensor.itemsize:
            if kind != tensor.dtype:
                yield f"its bytes are {code}, its dtype says otherwise", data.view(kind).reshape(shape)
            order = "" if kind == tensor.dtype else f"{code}, and "
            yield f"its bytes are {order}big-endian, allowed: little-endian", swapped.view(kind).reshape(shape)
    integer = {4: torch.int32, 8: torch.int64}.get(tensor.itemsize)
    if integer is not None:
        held = data.view(integer).reshape(shape)
        yield _INTEGERS, held.to(torch.float64 if tensor.itemsize > 4 else torch.float32)


def _order(tensor: Tensor, right: Tensor, name: str) -> str | None:
    """In which order of axes the values are the right ones: "" for the right one; None where in none."""
    if tensor.numel() != right.numel():
        return None
    flat = tensor.reshape(-1)
    if torch.equal(flat, right.reshape(-1)):
        return ""
    letters = letters_of(base_of(name))
    for order in permutations(range(right.ndim)):
        if torch.equal(flat, right.permute(order).reshape(-1)):
            written = "".join(letters[axis] for axis in order)
            return f"its values are in the order {written}, allowed: {letters}"
    return None


def _values(tensor: Tensor, right: Tensor) -> str:
    """What is wrong where the values are not the right ones in any order."""
    if tensor.shape == right.shape:
        flat, want = tensor.reshape(-1), right.reshape(-1)
        for shift in range(1, min(SHIFTS, len(want) // 2) + 1):
            for sign, here, there in ((1, flat[shift:], want[:-shift]), (-1, flat[:-shift], want[shift:])):
                if torch.equal(here, there):
                    where = "early" if sign > 0 else "late"
                    return f"its data_offsets begin {shift} values too {where}"
        wrong = (flat != want).nonzero()[:, 0]
        first = int(wrong[0])
        return (
            f"{len(wrong)} of {len(want)} values are wrong, the first at index {first}: got {float(flat[first]):g}, "
            f"allowed: {float(want[first]):g}"
        )
    return f"shape {tuple(tensor.shape)}, allowed: {tuple(right.shape)}, and its values are in no order of axes"
