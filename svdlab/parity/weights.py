"""Which weights a port loaded wrong: its own tensors, or their checksums, against a checkpoint's, key by key."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError, short
from svdlab.reading import read_as
from svdlab.svd.checkpoint import open_weights
from svdlab.tables import Cell, Table
from svdlab.tensors import TensorFile

Status = Literal["right", "rounded", "wrong", "missing", "extra"]
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_COMPONENTS = ("unet", "vae", "image_encoder")


@dataclass(frozen=True)
class WeightResult:
    """What a port has under one key.

    Attributes:
        key: component and checkpoint key, such as ``unet.conv_in.weight``.
        status: "right" bit by bit, "rounded" to the dtype of the dump, "wrong", "missing" or "extra".
        text: what is wrong, in words.
    """

    key: str
    status: Status
    text: str = ""


@dataclass(frozen=True)
class WeightsReport:
    """All keys of a checkpoint and of a dump."""

    results: list[WeightResult]

    @property
    def bad(self) -> list[WeightResult]:
        """Those that are wrong, missing or extra."""
        return [r for r in self.results if r.status not in ("right", "rounded")]

    def summary(self) -> str:
        """The answer in one line."""
        counts = Counter(r.status for r in self.results)
        parts = (f"{counts[status]} {status}" for status in get_args(Status) if counts[status])
        return f"{len(self.results)} weights: {', '.join(parts)}"

    def table(self) -> Table:
        """One row for each weight that is not right."""
        rows: list[list[str | Cell]] = [[r.key, Cell(r.status, "bad"), r.text] for r in self.bad]
        return Table(["weight", "", "what"], rows, title="", caption=self.summary())

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {"bad": len(self.bad), "weights": [asdict(r) for r in self.results]}


def checksum(tensor: Tensor) -> str:
    """sha256 of the values as float32, little-endian, in row-major order."""
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(values.tobytes()).hexdigest()


def checkpoint_weights(checkpoint: str | os.PathLike[str], variant: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a checkpoint, a folder or a single file, as stored and by its name in a folder.

    Raises:
        SvdlabError: a file that is no whole safetensors file.
    """
    for component, weights in open_weights(Path(checkpoint), variant).items():
        yield from ((f"{component}.{key}", weights.read(key)) for key in weights.entries)


def check_weights(
    checkpoint: str | os.PathLike[str],
    dump: str | os.PathLike[str],
    variant: str | None = None,
    progress: bool = False,
) -> WeightsReport:
    """Compare what a port has loaded with a checkpoint.

    Args:
        checkpoint: a folder in diffusers' layout, or a single file.
        dump: a ``.safetensors`` file or a folder of them, or a ``.json`` of checksums (``checksum``) by key. Keys are
            the checkpoint's, with the component before them (``unet.conv_in.weight``), or without in a file or a
            folder of the component's name.
        variant: of the checkpoint's file names ("fp16").
        progress: show a bar.

    Raises:
        SvdlabError: no such file, nothing readable in it, or a value that is no checksum.
    """
    found = _dump(Path(dump))
    right = {}
    results = []
    sums: dict[str, str] = {}
    for key, tensor in tqdm(checkpoint_weights(checkpoint, variant), desc="weights", disable=not progress):
        right[key] = tensor
        sums[checksum(tensor)] = key
    for key, tensor in right.items():
        results.append(_judge(key, tensor, found[key], sums) if key in found else WeightResult(key, "missing"))
    results += [WeightResult(key, "extra", "no weight of the checkpoint") for key in found if key not in right]
    return WeightsReport(results)


def _judge(key: str, right: Tensor, found: Tensor | str, sums: Mapping[str, str]) -> WeightResult:
    if isinstance(found, str):
        if found == checksum(right):
            return WeightResult(key, "right")
        other = sums.get(found)
        return WeightResult(key, "wrong", f"the checksum of {other}" if other else "another checksum")
    if found.shape == right.shape:
        if torch.equal(found.to(torch.float64), right.to(torch.float64)):
            return WeightResult(key, "right")
        if torch.equal(found, right.to(found.dtype)):
            return WeightResult(key, "rounded", f"to {str(found.dtype).removeprefix('torch.')}")
    text = _what(right, found, sums)
    return WeightResult(key, "wrong", text)


def _what(right: Tensor, found: Tensor, sums: Mapping[str, str]) -> str:
    """What is wrong with a weight, in words."""
    if other := sums.get(checksum(found)):
        if found.numel() == right.numel() and checksum(right) == checksum(found):
            return f"shape {tuple(found.shape)}, allowed: {tuple(right.shape)}; the values are in the right order"
        return f"holds the values of {other}"
    wanted = right.to(found.dtype)
    for order in permutations(range(right.ndim)):
        if tuple(wanted.permute(order).shape) == tuple(found.shape) and torch.equal(wanted.permute(order), found):
            return f"its axes are in the order {order} of the checkpoint's"
    if found.shape != right.shape:
        same = found.numel() == right.numel() and found.numel() > 1
        if same:
            for order in permutations(range(right.ndim)):
                if torch.equal(wanted.permute(order).reshape(-1), found.reshape(-1)):
                    shape = f"shape {tuple(found.shape)}, allowed: {tuple(right.shape)}"
                    return f"{shape}; the values are in the order of axes {order}"
        return f"shape {tuple(found.shape)}, allowed: {tuple(right.shape)}"
    a, b = found.double(), right.double()
    if not bool(torch.isfinite(a).all()):
        return f"{int((~torch.isfinite(a)).sum())} of {a.numel()} values are NaN or infinite"
    distance = float((a - b).norm()) / (float(b.norm()) or 1.0)
    return f"{int((a != b).sum())} of {a.numel()} values differ, relative distance {distance:.3g}"


def _dump(path: Path) -> dict[str, Tensor | str]:
    if not path.exists():
        raise SvdlabError(f"{path}: no such file, allowed: .safetensors, a folder of them, or a .json of checksums")
    if path.suffix == ".json":
        return dict(_checksums(path))
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, Tensor | str] = {}
    for file in files:
        inside = file.relative_to(path).parts if path.is_dir() else (file.name,)
        component = next((c for c in _COMPONENTS if c in (inside[0], file.stem)), None)
        for key, tensor in _tensors(file):
            known = key.split(".", 1)[0] in _COMPONENTS
            found[key if known or component is None else f"{component}.{key}"] = tensor
    if not found:
        raise SvdlabError(f"{path}: no tensors, allowed: .safetensors files with the checkpoint's keys")
    return found


def _checksums(path: Path) -> dict[str, str]:
    sums = read_as(dict[str, str], path)
    if not sums:
        raise SvdlabError(f"{path}: got {{}}, allowed: an object of checksums by key")
    for key, value in sums.items():
        if not _SHA256.fullmatch(value):
            raise SvdlabError(f"{path}: {key[:200]}: got {short(value)}, allowed: sha256 in 64 hexadecimal digits")
    return {key: value.lower() for key, value in sums.items()}


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    file = TensorFile(path)
    for key in file.entries:
        yield key, file.read(key)
