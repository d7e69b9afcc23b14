"""Exit codes: 0 yes, 1 no, 2 bad input or environment, 70 a bug; and outputs are checked before any work."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from command_line import run
from safetensors import SafetensorError

from svdlab import cli
from svdlab.errors import SvdlabError
from svdlab.files import atomic_path, check_outputs


def _raising(error: BaseException) -> click.Command:
    def callback() -> None:
        raise error

    return click.Command("kernels", callback=callback)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SystemExit(1), 1, ""),
        (SvdlabError("fps: got 0"), 2, "error: fps: got 0"),
        (SvdlabError("name \x1b[31m\n\u202e" + "x" * 5000), 2, r"error: name \x1b[31m \u202exxx"),
        (click.ClickException("odd"), 2, "Error: odd"),
        (click.UsageError("odd"), 2, "Error: odd"),
        (OSError(28, "No space left on device", "out.json"), 2, "error: out.json: No space left on device"),
        (PermissionError(13, "Permission denied", "x"), 2, "error: x: Permission denied"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "error: I/O error: No space"),
        (MemoryError(), 2, "error: out of memory (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "error: out of memory (CUDA out of memory. Tried)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 2, "error: out of memory ([enforce"),
        (AssertionError("Torch not compiled with CUDA enabled"), 2, "error: the device cannot be used (Torch not"),
        (ModuleNotFoundError("No module named 'pandas'", name="pandas"), 2, "error: pandas is not installed"),
        (ModuleNotFoundError("No module named 'other'", name="other"), 70, "svdlab: internal error: ModuleNotFound"),
        (SafetensorError("odd"), 70, "svdlab: internal error: SafetensorError: odd (run again with svdlab --debug"),
        (KeyError("a\nb"), 70, r"svdlab: internal error: KeyError: 'a\nb' (run again with svdlab --debug"),
        (RecursionError("deep"), 70, "svdlab: internal error: RecursionError: deep"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_one_place_turns_exceptions_into_exit_codes(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli._Commands, "get_command", lambda self, ctx, name: _raising(error))
    found, _, err = run(capsys, monkeypatch, "kernels")
    last = err.splitlines()[-1] if err else ""
    assert found == code and last.startswith(line) and len(err) < 2500 and "Traceback" not in err
    assert last.isprintable()
    _, _, debugged = run(capsys, monkeypatch, "--debug", "kernels")
    wanted = isinstance(error, Exception) and not isinstance(error, click.ClickException)
    assert ("Traceback" in debugged) == wanted and "again with" not in debugged


# A command that prints, as click, as rich, or as Python does.
_PRINTS = """
import sys, click
from svdlab import cli
def callback():
    for _ in range(3):
        {}
cli._Commands.get_command = lambda self, ctx, name: click.Command("kernels", callback=callback)
sys.argv = ["svdlab", "kernels"]
cli.main()
"""
_WAYS = ("click.echo('yes')", "print('yes')", "__import__('rich.console').console.Console().print('yes')")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("way", _WAYS)
def test_what_cannot_be_printed_is_no_answer(way: str) -> None:
    script = [sys.executable, "-c", _PRINTS.format(way)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert done.returncode == 2 and done.stderr == "error: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(script, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert done.returncode == 2 and done.stderr == "error: the output was closed before its end\n"


def _linked(folder: Path) -> Path:
    (folder / "link").symlink_to(folder, target_is_directory=True)
    return folder / "link" / "in.json"


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda d: d, "is a folder, allowed: a file"),
        (lambda d: d / ("x" * 300), "cannot be written (File name too long)"),
        (lambda d: d / "missing" / "x.json", "missing is no folder that can be written"),
        (lambda d: d / "in.json" / "x.json", "in.json is no folder that can be written"),
        (lambda d: d / "a\0b", "cannot be written (embedded null"),
        (lambda d: "/dev/null", "is no regular file"),
        (lambda d: d / "other.json", "is given for two outputs"),
        (lambda d: d / "sub" / ".." / "other.json", "is given for two outputs"),
        (lambda d: d / "in.json", "is an input, too, and would be overwritten"),
        (lambda d: os.path.relpath(d / "in.json"), "is an input, too, and would be overwritten"),
        (_linked, "is an input, too, and would be overwritten"),
        (lambda d: d / "model" / "config.json", "is an input, too, and would be overwritten"),
    ],
)
def test_outputs_are_checked(tmp_path: Path, output: Callable[[Path], str], reason: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "in.json").touch()
    path, inputs = output(tmp_path), [tmp_path / "in.json", tmp_path / "model", None]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SvdlabError) as error:
        check_outputs(tmp_path / "other.json", None, path, inputs=inputs)
    assert reason in str(error.value) and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SvdlabError, match="is a file, allowed: a folder"):
        check_outputs(folders=[tmp_path / "in.json"])
    check_outputs(tmp_path / "new.json", folders=[tmp_path / "sub", tmp_path / "made"], inputs=inputs)
    check_outputs(tmp_path / "model" / "new.json", inputs=inputs)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):  # root writes everywhere; a disk may still be mounted read-only
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    for outputs, folders in (([tmp_path / "x"], []), ([], [tmp_path]), ([], [tmp_path / "new"])):
        with pytest.raises(SvdlabError, match="is no folder that can be written"):
            check_outputs(*outputs, folders=folders)
    tmp_path.chmod(0o700)


def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    check_outputs(path)
    with atomic_path(path) as temporary:
        temporary.write_text("1")
    assert path.read_text() == "1"


def test_a_full_disk_leaves_what_was_there_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sums.json"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, out, err = run(capsys, monkeypatch, "weights", "embedded", "--out", str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err == f"error: {path}: File too large\n" and not out
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "in.png", "--out", "in.mp4", "--json", "in.mp4"],
        ["generate", "in.png", "--out", "folder.mp4"],
        ["trace", "--implementation", "svdlab", "--inputs", "in.st", "--out", "in.st"],
        ["trace", "--check-writer", "in.st", "--json", "in.st"],
        ["compare", "in.st", "in.st", "--json", "./in.st"],
        ["diagnose", "in.st", "in.st", "--junit", "x.xml", "--json", "x.xml"],
        ["diagnose", "in.st", "in.st", "--candidate-truth", "t.st", "--junit", "t.st"],
        ["parity", "--json", "folder.mp4"],
        ["parity", "--keep", "in.st"],
        ["demo", "--keep", "in.st"],
        ["bundle", "unet", "in.st", "--out", "folder.mp4"],
        ["bundle", "unet", "in.st", "--out", "new", "--json", "in.st"],
        ["notebooks", "folder.mp4"],
        ["import", "in.st", "--reference", "r.st", "--out", "in.st"],
        ["import", "folder.mp4", "--reference", "r.st", "--propose", "r.st"],
        ["ranges", "in.st", "--json", "in.st"],
        ["weights", "embedded", "--check", "in.st", "--json", "in.st"],
        ["bench", "--json", "x.png", "--plot", "x.png"],
        ["memory", "--json", "folder.mp4"],
        ["kernels", "--json", "folder.mp4"],
        ["train-tiny", "--out", "new", "--work", "new"],
        ["evaluate", "--card", "x", "--json", "x"],
        ["generate", "in.png", "--out", "in.mp4", "--device", "foo"],
        ["compare", "in.st", "in.st", "--device", "cuda:99"],
    ],
    ids=" ".join,
)
def test_every_command_checks_its_outputs_first(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    for name in ("in.st", "t.st", "r.st", "in.png"):
        (tmp_path / name).write_text("damaged: whatever reads it first refuses it in other words")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, monkeypatch, *arguments)
    reasons = (
        "is an input, too",
        "is given for two outputs",
        "is a folder",
        "is a file",
        "is there already",
        "--device",
    )
    assert code == 2 and not out and err.count("\n") == 1 and any(reason in err for reason in reasons), err
    assert sorted(tmp_path.rglob("*")) == before
