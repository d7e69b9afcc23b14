"""The commands as a user calls them: what they print, write, and exit with."""

from __future__ import annotations

import json
from pathlib import Path

import av
import click
import pytest
import torch
from command_line import run
from poisoned import poisoned

from svdlab import cli
from svdlab.errors import SvdlabError
from svdlab.parity.trace import Trace
from svdlab.samples import sample_photo
from svdlab.svd import checkpoint as weights
from svdlab.svd import pipeline
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings


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
        (["PICTURE", "--out", "clip.gif", "--fps", "101"], "fps: got 101, allowed in a .gif: at most 100"),
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


SMALL = "--height 32 --width 40 --num-frames 2 --num-inference-steps 3".split()


def test_numbers_that_are_too_large_give_no_clip(tiny: Path) -> None:
    pipe = SVDPipeline.from_pretrained(tiny).with_stage(time_ids=lambda settings: torch.full((1, 3), torch.inf))
    settings = GenerationSettings(height=32, width=40, num_frames=2, num_inference_steps=3)
    with pytest.raises(SvdlabError) as error:
        pipe.generate(sample_photo(), settings, progress=False)
    assert str(error.value) == (
        "latents after step 0: 160 of 160 values are NaN or infinite: too large for float32, allowed: a wider dtype, "
        "settings nearer to the defaults"
    )


@pytest.mark.parametrize(
    ("network", "key", "where"),
    [
        ("unet", "conv_in.weight", "latents after step 0"),
        ("vae", "encoder.conv_in.bias", "latents after step 0"),
        ("image_encoder", "visual_projection.weight", "latents after step 0"),
        ("vae", "decoder.conv_out.weight", "frames"),
    ],
)
def test_a_weight_that_is_nan_is_named(
    tmp_path: Path,
    tiny: Path,
    picture: str,
    network: str,
    key: str,
    where: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, target = poisoned(tiny, tmp_path / "model", network, key), tmp_path / "clip.gif"
    arguments = [picture, "--out", str(target), "--model", str(model), *SMALL]
    code, out, error = run(capsys, monkeypatch, "generate", *arguments)
    last = error.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith(f"error: {where}: "), error
    assert last.endswith(f": the checkpoint's {network} holds NaN or infinity in {key}") and not target.exists()


def test_parity_of_weights_that_are_nan_is_no_verdict(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = poisoned(tiny, tmp_path / "model", "unet", "conv_in.weight")
    code, out, error = run(capsys, monkeypatch, "parity", "--model", str(model), *SMALL)
    assert (code, out) == (2, "") and "noise_pred_uncond.000: 160 of 160 values are NaN or infinite" in error


@pytest.mark.parametrize(
    "command",
    [["generate", "PICTURE", "--out", "x.mp4"], ["parity"], ["trace", "--implementation", "svdlab", "--out", "x"]],
)
def test_what_cannot_fit_is_refused_before_any_weight_is_loaded(
    tmp_path: Path,
    picture: str,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object) -> None:
        raise SvdlabError("weights are loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "load_components", load)
    command = [picture if part == "PICTURE" else part for part in command]
    huge = ["--height", "16384", "--width", "16384", "--num-frames", "500"]
    code, out, error = run(capsys, monkeypatch, *command, *huge)
    assert (code, out) == (2, "") and error.count("\n") == 1
    assert error.startswith("error: 500 frames of 16384x16384, float32: at least ")
    assert error.endswith(" GiB, what is free on cpu; --force tries\n")
    assert run(capsys, monkeypatch, *command, *huge, "--force") == (2, "", "error: weights are loaded\n")


COMMANDS = {
    "bench": [],
    "bundle": ["unet", "x", "--out", "x"],
    "compare": ["x", "x"],
    "diagnose": ["x", "x"],
    "evaluate": [],
    "frontier": [],
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
    "cuda:x": "allowed: cpu, cuda, cuda:1, mps",
    "meta": "but torch sees no such device here; allowed: cpu",
    "mps": "but torch sees no such device here; allowed: cpu",
    "cuda": "but torch sees no such device here; allowed: cpu",
    "cuda:9": "but torch sees no such device here; allowed: cpu",
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = f"error: --device: got {device!r}, {NO_DEVICE[device]}\n"
    for name, arguments in COMMANDS.items():
        assert run(capsys, monkeypatch, name, *arguments, "--device", device) == (2, "", line), name
    assert not list(tmp_path.iterdir())


def test_a_second_device_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _, _, error = run(capsys, monkeypatch, "kernels", "--device", "cuda:9")
    assert error == "error: --device: got 'cuda:9', but torch sees no such device here; allowed: cpu, cuda\n"


def test_the_original_s_choices_are_switched_one_by_one(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not asked for stays as in diffusers, and the trace says what was."""
    result, kept = tmp_path / "result.json", tmp_path / "trace.safetensors"
    shared = ["--model", str(tiny), "--until", "guidance_scale", "--reference", "stability", *SMALL]
    one = ["--departure", "fps_not_decremented"]
    code, _, error = run(capsys, monkeypatch, "parity", *shared, *one, "--json", str(result))
    written = json.loads(result.read_text())
    assert code == 1 and written["candidate"].startswith("svdlab (fps_not_decremented) "), error
    assert [p["name"] for p in written["probes"] if p["ratio"] > 4] == ["added_time_ids"]

    arguments = ["trace", "--implementation", "svdlab", "--out", str(kept)]
    code, _, error = run(capsys, monkeypatch, *arguments, *shared)
    made = Trace.open(kept)
    assert code == 0 and "frames_truncated" in made.implementation, error
    assert made["added_time_ids"][0, 0] == 7 and made["guidance_scale"].tolist() == [[1.0, 2.5]]

    for wrong, message in (
        (["parity", *one], "--departure: only together with --reference stability"),
        (
            ["parity", "--reference", "stability", "--departure", "quick_gelu"],
            "departures: got 'quick_gelu', allowed: ",
        ),
        ([*arguments[:2], "diffusers", *arguments[3:], *shared], "--reference stability: not with --implementation"),
    ):
        code, _, error = run(capsys, monkeypatch, *wrong)
        assert code == 2 and message in error
