"""The commands as a user calls them: what they print, write, and exit with."""

from __future__ import annotations

import json
from pathlib import Path

import av
import click
import pytest
import torch
from command_line import run

from svdlab import cli
from svdlab.samples import sample_photo
from svdlab.svd import checkpoint as weights


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    sample_photo().save(path)
    return str(path)


def test_generate(
    tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, results = tmp_path / "clip.mp4", tmp_path / "results.json"
    options = "--height 40 --width 64 --num-frames 4 --num-inference-steps 2 --fps 12 --max-guidance-scale 2".split()
    code, out, _ = run(capsys, monkeypatch, "generate", picture, "--out", str(clip), "--json", str(results), *options)
    assert code == 0 and "4 frames of 64x40 at 12 fps" in out
    written = json.loads(results.read_text())
    assert written["path"] == str(clip) and written["seconds"] > 0
    assert written["settings"]["fps"] == 12 and written["settings"]["max_guidance_scale"] == 2.0
    with av.open(str(clip)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PICTURE", "--out", "clip.avi"], "clip.avi: suffix '.avi', allowed: .mp4, .gif"),
        (["nowhere.png", "--out", "clip.mp4"], "image: nowhere.png: no such file"),
        (["TEXT", "--out", "clip.mp4"], "not an image that can be read"),
        (["PICTURE", "--out", "nowhere/clip.mp4"], "nowhere is no folder that can be written"),
        (["PICTURE", "--out", "clip.mp4", "--fps", "0"], "fps: got 0, allowed: integer >= 1"),
        (["PICTURE", "--out", "clip.mp4", "--sigmas", "1,x"], "sigmas: got '1,x', allowed: numbers with commas"),
        (["PICTURE", "--out", "clip.mp4", "--num-videos-per-prompt", "2"], "num_videos_per_prompt: got 2"),
    ],
)
def test_bad_input_is_refused_before_any_weight_is_loaded(
    tmp_path: Path,
    picture: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "text.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load_components", lambda *args: pytest.fail("weights were loaded"))
    known = {"PICTURE": picture, "TEXT": str(tmp_path / "text.png")}
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, monkeypatch, "generate", *(known.get(a, a) for a in arguments))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not out and sorted(tmp_path.iterdir()) == before


def test_a_model_that_is_not_there(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(
        capsys, monkeypatch, "generate", picture, "--out", str(tmp_path / "c.gif"), "--model", str(tmp_path / "none")
    )
    assert code == 2 and "is no folder, allowed: a folder, owner/name, embedded" in err


def test_ctrl_c_leaves_nothing(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdlab.svd.pipeline import SVDPipeline

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SVDPipeline, "run", interrupted)
    code, _, err = run(capsys, monkeypatch, "generate", picture, "--out", str(tmp_path / "c.mp4"))
    assert code == 130 and "interrupted" in err
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]


def test_help_of_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "--help")
    assert code == 0
    names = [line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.strip()]
    assert {"generate", "parity", "trace", "compare", "diagnose", "report"} <= set(names)
    for name in names:
        code, out, _ = run(capsys, monkeypatch, name, "--help")
        assert code == 0 and "Usage:" in out
    _, out, _ = run(capsys, monkeypatch, "generate", "--help")
    assert "--motion-bucket-id" in out and "amount of motion [default: 127]" in " ".join(out.split())


COMMANDS = {
    "bench": [],
    "bundle": ["unet", "x", "--out", "x"],
    "compare": ["x", "x"],
    "diagnose": ["x", "x"],
    "evaluate": [],
    "generate": ["x", "--out", "x.mp4"],
    "kernels": [],
    "parity": [],
    "report": ["--out", "x"],
    "sweep": ["--out", "x", "--grid", "fps=7"],
    "trace": ["--implementation", "svdlab", "--out", "x"],
    "train-tiny": ["--out", "x"],
}
NO_DEVICE = {
    "foo": "allowed: cpu, cuda, cuda:1, mps",
    "meta": "allowed: cpu, cuda, cuda:1, mps",
    "cuda:x": "allowed: cpu, cuda, cuda:1, mps",
    "mps": "but torch sees no MPS device here",
    "cuda": "but torch sees no CUDA device here",
    "cuda:9": "but torch sees no CUDA device here",
}


def test_every_command_with_a_device_is_tried() -> None:
    group = cli.commands
    context = click.Context(group)
    having = {n for n in group.list_commands(context) if "device" in {p.name for p in _command(n).params}}
    assert having == {*COMMANDS, "memory"}


def _command(name: str) -> click.Command:
    found = cli.commands.get_command(click.Context(cli.commands), name)
    assert found is not None
    return found


@pytest.mark.parametrize("device", NO_DEVICE)
def test_a_device_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = f"error: --device: got {device!r}, {NO_DEVICE[device]}\n"
    for name, arguments in COMMANDS.items():
        assert run(capsys, monkeypatch, name, *arguments, "--device", device) == (2, "", line), name
    assert not list(tmp_path.iterdir())


def test_a_second_device_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _, _, error = run(capsys, monkeypatch, "kernels", "--device", "cuda:9")
    assert error == "error: --device: got 'cuda:9', allowed here: cuda:0\n"
