"""The identity test of a writer tells what is wrong with it, and the writers in docs/writers/ pass it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from safetensors.torch import save_file
from torch import Tensor

from svdlab.parity.compare import compare
from svdlab.parity.identity import SETTINGS, SHAPES, WriterCheck, check_writer, expected
from svdlab.parity.trace import CODES, METADATA_KEY, Trace

WRITERS = Path(__file__).parents[1] / "docs" / "writers"
DOCS = WRITERS.parent / "trace-format.md"


def right(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: expected(name, dtype) for name in SHAPES}


def write(path: Path, held: dict[str, Tensor], dtype: str = "float32", **header: Any) -> Path:
    settings = {name: getattr(SETTINGS, name) for name in sorted(SETTINGS.model_fields_set)}
    good = {"format": 1, "implementation": "w", "implementation_version": "", "dtype": dtype, "settings": settings}
    metadata = {METADATA_KEY: json.dumps({**good, "order": list(held), **header})}
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, metadata=metadata)
    return path


def judged(path: Path, held: dict[str, Tensor], dtype: str = "float32", **header: Any) -> tuple[WriterCheck, str]:
    """The check of a file, and what it says of latents.000."""
    found = check_writer(write(path, held, dtype, **header))
    return found, next(check.why for check in found.tensors if check.name == "latents.000")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_right_writer(tmp_path: Path, dtype: str) -> None:
    found, _ = judged(tmp_path / "t.safetensors", right(getattr(torch, dtype)), dtype)
    assert found.right and not found.header and {check.status for check in found.tensors} == {"right"}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in right(getattr(torch, dtype)).values())


def bytes_swapped(tensor: Tensor) -> Tensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).reshape(-1, tensor.itemsize).flip(1)
    return data.reshape(-1).view(tensor.dtype).reshape(tensor.shape)


SHAPE = SHAPES["latents.000"]
FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "channels last": (
        lambda t: t.permute(0, 1, 3, 4, 2),
        "its values are in the order NFHWC, allowed: NFCHW; shape (5, 7, 2, 3, 4), allowed: (5, 7, 4, 2, 3)",
    ),
    "channels last under the right shape": (
        lambda t: t.permute(0, 1, 3, 4, 2).reshape(SHAPE),
        "its values are in the order NFHWC, allowed: NFCHW",
    ),
    "column-major": (lambda t: t.permute(4, 3, 2, 1, 0).reshape(SHAPE), "its values are in the order WHCFN"),
    "height and width exchanged": (lambda t: t.transpose(3, 4).reshape(SHAPE), "in the order NFCWH"),
    "right values under another shape": (lambda t: t.reshape(7, 5, 4, 2, 3), "shape (7, 5, 4, 2, 3), allowed: (5, 7,"),
    "frames folded": (lambda t: t.flatten(0, 1), "shape (35, 4, 2, 3), allowed: (5, 7, 4, 2, 3)"),
    "big-endian": (bytes_swapped, "its bytes are big-endian, allowed: little-endian"),
    "big-endian and channels last": (
        lambda t: bytes_swapped(t.permute(0, 1, 3, 4, 2)),
        "its bytes are big-endian, allowed: little-endian; its values are in the order NFHWC",
    ),
    "integers": (lambda t: t.to(torch.int32).view(torch.float32), "its bytes are integers, allowed: floats"),
    "double": (lambda t: t.double(), "dtype F64, allowed: F32, as the metadata says"),
    "half": (lambda t: expected("latents.000", torch.float16), "dtype F16, allowed: F32, as the metadata says"),
    "one value": (lambda t: t + (t == t[1, 2, 3, 1, 2]), "1 of 840 values are wrong, the first at index 239"),
    "rounded to half": (lambda t: t.half().float(), "values are wrong, the first at index"),
    "rounded to bfloat16": (lambda t: t.bfloat16().float(), "values are wrong, the first at index"),
    "offset": (lambda t: t.reshape(-1).roll(3).reshape(SHAPE), "its data_offsets begin 3 values too early"),
    "offset the other way": (
        lambda t: t.reshape(-1).roll(-2).reshape(SHAPE),
        "its data_offsets begin 2 values too late",
    ),
    "another size": (lambda t: t[:, :6], "shape (5, 6, 4, 2, 3), allowed: (5, 7, 4, 2, 3), and its values are in no"),
    "another tensor's": (lambda t: t + 1 / 16, "840 of 840 values are wrong"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    held = right()
    held["latents.000"] = make(held["latents.000"])
    found, why = judged(tmp_path / "t.safetensors", held)
    assert message in why, why
    assert not found.right and not found.header
    assert [check.name for check in found.tensors if check.status != "right"] == ["latents.000"]


@pytest.mark.parametrize(("labelled", "meant"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_half_dtypes_taken_for_each_other(tmp_path: Path, labelled: torch.dtype, meant: torch.dtype) -> None:
    held = right(labelled)
    held["latents.000"] = expected("latents.000", meant).view(labelled)
    _, why = judged(tmp_path / "t.safetensors", held, str(labelled).removeprefix("torch."))
    assert why == f"its bytes are {CODES[meant]}, its dtype says otherwise"


def test_the_metadata_is_judged_too(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    found, _ = judged(path, right(), settings={"height": 16, "width": 24, "num_frames": 7})
    assert "settings: got" in found.header and not found.right
    found, _ = judged(path, right(), format=2)
    assert found.header == "trace format version 2, allowed: 1"
    held = right()
    held["latent"] = held.pop("latents.000")
    found = check_writer(write(path, held))
    assert {check.name: check.status for check in found.tensors if check.status != "right"} == {
        "latents.000": "missing",
        "latent": "unexpected",
    }
    save_file(right(), path)
    assert "has no 'svdlab.trace'" in check_writer(path).header


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = write(tmp_path / "t.safetensors", right()), tmp_path / "found.json"
    code, out, _ = run(capsys, monkeypatch, "trace", "--check-writer", str(path), "--json", str(found))
    assert code == 0 and "the writer is right" in out
    assert json.loads(found.read_text())["verdict"] == "right"
    held = right()
    held["frames"] = held["frames"].movedim(2, -1)
    write(path, held)
    code, out, _ = run(capsys, monkeypatch, "trace", "--check-writer", str(path))
    assert code == 1 and "NFHWC" in out
    data = path.read_bytes()
    path.write_bytes(data[:8][::-1] + data[8:])
    for arguments, message in (
        (["--check-writer", str(path)], "the length of its header is big-endian, allowed: little-endian"),
        (["--check-writer", str(tmp_path / "none")], "no such file, allowed: the test tensors"),
        (["--check-writer", str(path), "--out", "x"], "--check-writer: not together with --implementation and --out"),
        (["--out", "x"], "--implementation: is missing, allowed: diffusers, svdlab"),
        (["--implementation", "svdlab"], "--out: is missing, allowed: the trace to write"),
    ):
        code, _, err = run(capsys, monkeypatch, "trace", *arguments)
        assert code == 2 and err.count("\n") == 1 and message in err


def test_the_page_has_the_test_tensors() -> None:
    text = DOCS.read_text()
    section = text[text.index("## The identity test of a writer") :]
    rows = dict(re.findall(r"^\| \d+ \| `([^`]+)` \| \(([\d, ]+)\) \|", section, re.MULTILINE))
    assert list(rows) == list(SHAPES)
    for name, sizes in rows.items():
        assert tuple(int(size) for size in sizes.split(",") if size.strip()) == SHAPES[name]
    settings = re.search(r"```json\n(\{.*?\})\n```", section, re.DOTALL)
    assert settings is not None
    assert json.loads(settings[1]) == {name: getattr(SETTINGS, name) for name in SETTINGS.model_fields_set}


COMMANDS: dict[str, tuple[str, list[list[str]]]] = {
    "writer.rs": ("rustc", [["rustc", "-D", "warnings", "-o", "PROGRAM", "SOURCE"], ["PROGRAM", "FILE"]]),
    "writer.cpp": (
        "g++",
        [["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "SOURCE", "-o", "PROGRAM"], ["PROGRAM", "FILE"]],
    ),
    "writer.mjs": ("node", [["node", "SOURCE", "FILE"]]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_writers_write_what_they_should(tmp_path: Path, name: str) -> None:
    compiler, steps = COMMANDS[name]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on this machine")
    path = tmp_path / "check.safetensors"
    known = {"SOURCE": str(WRITERS / name), "PROGRAM": str(tmp_path / "writer"), "FILE": str(path)}
    for step in steps:
        done = subprocess.run([known.get(word, word) for word in step], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    found = check_writer(path)
    assert found.right, found
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix not in ("", ".pdb")) == ["check.safetensors"]
    trace = Trace.open(path)
    assert trace.implementation == name and trace.probes == tuple(sorted(SHAPES, key=list(trace.probes).index))
    assert trace.settings == SETTINGS
    other = Trace(right(), SETTINGS, "the same")
    assert compare(other, trace).verdict == "parity"


def test_the_swift_writer_says_that_it_is_untried_and_has_the_same_tensors() -> None:
    text = (WRITERS / "Writer.swift").read_text()
    assert "UNTRIED" in text
    assert {
        name: tuple(map(int, sizes.split(","))) for name, sizes in re.findall(r'\("([^"]+)", \[([\d, ]+)\]\)', text)
    } == dict(SHAPES)
