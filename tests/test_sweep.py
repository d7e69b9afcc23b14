"""Sweeps in one process: what a point is, what is on the disk, and that whatever happens nothing finished is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import numpy as np
import pandas as pd
import pytest
import torch
from command_line import run as svdlab
from PIL import Image, ImageSequence
from poisoned import poisoned

import svdlab as svdlab_package
from svdlab.errors import SvdlabError
from svdlab.parity.lab import Lab
from svdlab.svd.approximations import approximated
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.video import Clip
from svdlab.sweep import Sweep, compare_sweeps, grid, parse_axis, resume_sweep, run_sweep
from svdlab.sweep import point as point_module
from svdlab.sweep import run as run_module
from svdlab.sweep.code import CLIP_CODE, Code, code_version, file_digests
from svdlab.sweep.documents import FORMAT
from svdlab.sweep.plan import make_points, remarks
from svdlab.sweep.point import SweepHalted
from svdlab.sweep.run import Progress

SMALL = GenerationSettings(num_frames=2, num_inference_steps=1, height=32, width=32)
SMALL_OPTIONS = "--num-frames 2 --num-inference-steps 1 --height 32 --width 32".split()
TLS = "--tls-ca-file ca.pem --tls-cert c.pem --tls-key k.pem".split()
AXES = {"fps": [7, 14], "max_guidance_scale": [1.0, 3.0]}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((48, 32))


@pytest.fixture(scope="module")
def four(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A finished sweep of two by two points; read only."""
    return run_sweep(tmp_path_factory.mktemp("sweeps") / "four", grid(AXES), SMALL, model=str(tiny), image=PICTURE)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything that a sweep's points hold, and when it was written."""
    paths = [path for path in (folder / "points").glob("[!.]*/*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def hashes(sweep: Sweep) -> dict[str, str]:
    table = sweep.table()
    return dict(zip(table["point"], table["frames_sha256"], strict=True))


def failing(monkeypatch: pytest.MonkeyPatch, when: Any) -> list[int]:
    """Let points fail for which ``when(point, number)`` raises; returns the list of those that were tried."""
    make, tried = point_module.make_point, []

    def made(lab: Any, source: Any, point: Any, step: Any) -> dict[str, bytes]:
        tried.append(point.settings.fps)
        when(point, len(tried))
        return make(lab, source, point, step)

    monkeypatch.setattr(point_module, "make_point", made)
    return tried


# --- what is asked for ---


def test_an_axis_is_read_as_it_is_written() -> None:
    assert parse_axis("fps=7, 14") == ("fps", [7, 14])
    assert parse_axis("max-guidance-scale=1.5,3") == ("max_guidance_scale", [1.5, 3])
    assert parse_axis("decode_chunk_size=none,2") == ("decode_chunk_size", [None, 2])
    assert parse_axis("cfg=batched,sequential") == ("cfg", ["batched", "sequential"])
    assert parse_axis("sigmas=[[700, 5, 0], [80, 0]]") == ("sigmas", [[700, 5, 0], [80, 0]])
    assert parse_axis("rules=none,gelu_tanh+sincos_order") == ("rules", ["none", "gelu_tanh+sincos_order"])


def test_a_range_is_its_values() -> None:
    assert parse_axis("fps=5-9") == ("fps", [5, 6, 7, 8, 9])
    assert parse_axis("fps=1, 7:28:7, 30") == ("fps", [1, 7, 14, 21, 28, 30])
    assert parse_axis("fps=7:27:7") == ("fps", [7, 14, 21]), "the end is met by a step, or left out"
    assert parse_axis("max_guidance_scale=1:1.6:0.2") == ("max_guidance_scale", [1.0, 1.2, 1.4, 1.6]), "not 1.5999"
    assert parse_axis("noise_aug_strength=1e-2,0.5") == ("noise_aug_strength", [0.01, 0.5]), "an exponent is no range"
    assert all(isinstance(value, int) for value in parse_axis("seed=3-4")[1])


def test_unusual_values_are_remarked() -> None:
    (fps,) = remarks({"fps": [7, 60, 120], "seed": [10**9], "rules": ["none"], "cfg": ["batched"]})
    assert fps == "fps: 60, 120: unusual, most take 1 to 30 (1/s)"
    assert not remarks({"fps": [1, 30], "decode_chunk_size": [None, "auto", 2]})


def test_the_last_axis_is_the_fastest_and_rules_and_seeds_are_axes() -> None:
    changes = grid({"rules": ["none", "gelu_tanh+sincos_order"], "seed": [3, 1]})
    points = make_points(SMALL, changes)
    assert [(p.bugs, p.settings.seed) for p in points] == [
        ((), 3),
        ((), 1),
        (("gelu_tanh", "sincos_order"), 3),
        (("gelu_tanh", "sincos_order"), 1),
    ]
    by_dtype = make_points(SMALL, grid({"fps": [1, 2], "dtype": ["float32", "float64"]}))
    assert [p.settings.dtype for p in by_dtype] == ["float32"] * 2 + ["float64"] * 2, "each dtype is loaded once"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "fps=7,0"], "fps: got 0, allowed: integer >= 1"),
        (["--grid", "fps=7,fast"], "fps: got 'fast', allowed: integer >= 1"),
        (["--grid", "speed=1"], "speed: no such setting, allowed: height, width"),
        (["--grid", "fps"], "grid: got 'fps', allowed: NAME=VALUE"),
        (["--grid", "fps=,"], "fps: got no values"),
        (["--grid", "fps=7,7"], "points: fps=7 twice"),
        (["--grid", "fps=7", "--grid", "fps=8"], "an axis twice"),
        (["--grid", "sigmas=[1"], "sigmas: got '[1', allowed: a JSON list"),
        (["--grid", "rules=none,gelu"], "rules: got 'gelu', allowed: none, or bugs' names, such as gelu_"),
        (
            ["--grid", "approximation=deepcache"],
            "approximation: got 'deepcache', allowed: none, or approximations' names",
        ),
        (["--grid", "fps=9-5"], "fps: got the range '9-5', allowed: one that rises"),
        (["--grid", "fps=7:28:0"], "fps: got the range '7:28:0', allowed: one that rises"),
        (["--grid", "fps=7:28"], "fps: got '7:28', allowed: FROM:TO:STEP, such as 7:28:7"),
        (["--grid", "fps=7::7"], "fps: got '7::7', allowed: FROM:TO:STEP"),
        (["--grid", "seed=1-9999999999"], "seed: got the range '1-9999999999' of 9999999999 values, allowed: at most"),
        (["--grid", "fps=0.5:2:0.5"], "fps: got 0.5, allowed: integer >= 1"),
        (["--grid", "self=1"], "self: no such setting, allowed: height, width"),
        (
            ["--grid", f"seed={','.join(map(str, range(400)))}", "--grid", f"fps={','.join(map(str, range(400)))}"],
            "grid: got 160000 points, allowed: at most 100000",
        ),
        (["--grid", "num_videos_per_prompt=1,2"], "num_videos_per_prompt: got 2, allowed in a sweep: 1"),
        (["--grid", "fps=7", "--points", "p.json"], "give --grid NAME=VALUES, or --points FILE"),
        ([], "give --grid NAME=VALUES, or --points FILE"),
        (["--points", "nowhere.json"], "--points: nowhere.json: no such file"),
        (["--grid", "fps=7", "--model", "nowhere"], "model: 'nowhere' is no folder"),
        (["--grid", "height=32,33"], "height: got 33, allowed: integer"),
        (["--grid", "fps=7", "--workers", "2", "--scheduler", "tcp://x:1"], "--workers: not together with --scheduler"),
        (["--grid", "fps=7", "--workers", "2", "--device", "cuda"], "--workers: not together with --device cuda"),
        (["--grid", "fps=7", "--tls-key", "k.pem"], "--tls-ca-file, --tls-cert, --tls-key"),
        (["--grid", "fps=7", "--workers", "2", *TLS], "--tls-ca-file: only with --scheduler; --workers makes"),
        (["--grid", "fps=7", *TLS], "--tls-ca-file: only with --scheduler"),
        (["--resume", "nowhere", "--grid", "fps=7"], "not together with --resume"),
    ],
)
def test_what_is_not_allowed_is_refused_before_anything_starts(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(point_module, "make_point", lambda *args: pytest.fail("a point was computed"))
    code, out, err = svdlab(capsys, monkeypatch, "sweep", "--out", "out", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_size_that_this_checkpoint_cannot_make_is_refused_before_anything_starts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from svdlab.svd.random_checkpoint import TINY_VAE, write_random_checkpoint

    deep = {"block_out_channels": (32,) * 5, "down_block_types": ("DownEncoderBlock2D",) * 5}
    model = write_random_checkpoint(tmp_path_factory.mktemp("deep"), vae={**TINY_VAE, **deep})
    with pytest.raises(SvdlabError, match="height: got 40, allowed: multiples of 16"):
        run_sweep(tmp_path / "out", grid({"height": [32, 40]}), SMALL, model=str(model), image=PICTURE)
    assert not list(tmp_path.iterdir())


def test_what_cannot_fit_is_refused_before_any_point_is_computed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(monkeypatch, lambda point, number: (_ for _ in ()).throw(RuntimeError("is tried")))
    options = ["--out", str(tmp_path / "out"), "--model", str(tiny), "--grid", "num_frames=2,1000", *SMALL_OPTIONS]
    huge = [*options, "--height", "8192", "--width", "8192"]
    code, out, err = svdlab(capsys, monkeypatch, "sweep", *huge)
    assert (code, out) == (2, "") and err.startswith("error: 1000 frames of 8192x8192, float32: at least ")
    assert err.endswith(" GiB, what is free on cpu; --force tries\n") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()) and not tried
    code, out, _ = svdlab(capsys, monkeypatch, "sweep", *huge, "--force")
    assert code == 1 and len(tried) == 2 and "0 points finished, 2 failed" in out
    code, out, err = svdlab(capsys, monkeypatch, "sweep", "--resume", str(tmp_path / "out"))
    assert (code, out) == (2, "") and "--force tries" in err
    assert svdlab(capsys, monkeypatch, "sweep", "--resume", str(tmp_path / "out"), "--force")[0] == 1


# --- what is on the disk ---


def test_a_point_is_what_the_pipeline_makes(four: Sweep, tiny: Path) -> None:
    identity = four.at(fps=14, max_guidance_scale=3.0)
    folder = four.folder / "points" / identity
    assert sorted(p.name for p in folder.iterdir()) == ["clip.mp4", "frames.mkv", "metrics.json", "thumbnail.webp"]
    lab = Lab(str(tiny), image=PICTURE)
    settings = lab.settings(**{**SMALL.model_dump(), "fps": 14})
    (clip,) = lab.pipe.generate(PICTURE, settings, progress=False)
    assert np.array_equal(four.frames(identity), clip.frames), "lossless"
    played = Clip.from_video(four.clip(identity))
    assert played.fps == 14 and played.shape == clip.shape
    with Image.open(four.thumbnail(identity)) as thumbnail:
        assert thumbnail.n_frames == 2 and thumbnail.height == 32
    metrics = four.metrics(identity)
    assert metrics["settings"] == json.loads(settings.to_json())
    levels = clip.frames.astype(float)
    assert metrics["motion_per_frame"] == pytest.approx([np.abs(levels[1] - levels[0]).mean()], abs=0.6)
    assert metrics["motion"] == pytest.approx(np.mean(metrics["motion_per_frame"]))
    assert metrics["seconds"] > 0 and metrics["peak_memory_mib"] > 50 and metrics["divergence"] is None


def test_the_table_loads_in_pandas_and_has_every_point_once(four: Sweep) -> None:
    parquet, csv = pd.read_parquet(four.folder / "table.parquet"), pd.read_csv(four.folder / "table.csv")
    for table in (parquet, csv):
        assert list(zip(table["fps"], table["max_guidance_scale"], strict=True)) == [(7, 1), (7, 3), (14, 1), (14, 3)]
        assert set(table["status"]) == {"finished"} and table["point"].is_unique
        assert list(table["rules"]) == ["none"] * 4
        assert all((four.folder / folder / "clip.mp4").is_file() for folder in table["folder"])
    assert list(parquet["motion"]) == pytest.approx(list(csv["motion"]))
    assert parquet["decode_chunk_size"].isna().all() and str(parquet["num_frames"].dtype) == "Int64"


def test_neighbours_are_compared(four: Sweep) -> None:
    a, b, c = (four.at(fps=f, max_guidance_scale=g) for f, g in ((7, 1.0), (7, 3.0), (14, 1.0)))
    by_axis = {n["axis"]: n for n in four.metrics(a)["neighbours"]}
    for axis, other, value in (("max_guidance_scale", b, 3.0), ("fps", c, 14)):
        expected = np.abs(four.frames(a).astype(float) - four.frames(other)).mean()
        assert by_axis[axis]["point"] == other and by_axis[axis]["value"] == value
        assert by_axis[axis]["difference"] == pytest.approx(expected) and expected > 0
    row = four.table().set_index("point").loc[a]
    assert row["difference_fps"] == by_axis["fps"]["difference"]


def test_a_list_of_points_and_clips_of_two_sizes(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, out = tmp_path / "points.json", tmp_path / "out"
    listed.write_text(json.dumps([{"height": 32}, {"height": 40}, {"height": 40, "rules": "gelu_tanh"}]))
    options = ["--points", str(listed), "--out", str(out), "--model", str(tiny), *SMALL_OPTIONS]
    assert svdlab(capsys, monkeypatch, "sweep", *options)[0] == 0
    sweep = Sweep.open(out)
    table = sweep.table()
    assert list(table["height"]) == [32, 40, 40] and list(table["rules"]) == ["none", "none", "gelu_tanh"]
    assert list(sweep.plan.axes) == ["height", "rules"]
    assert table["difference_height"].isna().all(), "there is no difference between two sizes"
    assert list(table["difference_rules"].notna()) == [False, True, True]


def test_an_approximation_is_an_axis(tiny: Path, tmp_path: Path) -> None:
    names = ["none", "deep_features", "guidance_interval+deep_features"]
    settings = SMALL.replace(num_inference_steps=4)
    changes = grid({"approximation": names})
    sweep = run_sweep(tmp_path / "out", changes, settings, model=str(tiny), image=PICTURE, divergence=True)
    table = Sweep.open(tmp_path / "out").table()
    assert (
        list(table["approximation"])
        == sweep.plan.axes["approximation"]
        == [*names[:2], "deep_features+guidance_interval"]
    )
    assert list(table["divergence_verdict"]) == ["parity", "divergence", "divergence"]
    assert table["frames_sha256"].nunique() == 3
    pipe = approximated(SVDPipeline.from_pretrained(tiny, compat="diffusers"), "deep_features")
    inputs = pipe.prepare(PICTURE, settings, torch.Generator().manual_seed(settings.seed))
    expected = hashlib.sha256(pipe.run(inputs, settings)[0].contiguous().numpy().tobytes()).hexdigest()
    assert table["frames_sha256"][1] == expected
    (both,) = make_points(SMALL, [{"approximation": ["guidance_interval", "deep_features"]}])
    assert both.approximations == ("deep_features", "guidance_interval"), "one point, in whatever order it is asked for"


def test_the_distance_from_diffusers_is_measured_where_there_is_one(tiny: Path, tmp_path: Path) -> None:
    changes = [{"fps": 7}, {"fps": 7, "rules": "fps_not_decremented"}, {"fps": 7, "min_guidance_scale": 3.0}]
    falls = SMALL.replace(max_guidance_scale=1.0)
    sweep = run_sweep(tmp_path / "out", changes, falls, model=str(tiny), image=PICTURE, divergence=True)
    assert list(sweep.table()["divergence_verdict"]) == ["parity", "divergence", "no reference"]
    good, bad, none = (sweep.metrics(identity)["divergence"] for identity in sweep.plan.points)
    assert good["ratio"] <= 4 < bad["ratio"] and bad["first_divergence"] == "added_time_ids"
    assert "diffusers fails at a ramp" in none["reason"]


def test_the_identity_is_of_everything_that_decides(four: Sweep) -> None:
    from dataclasses import replace

    source, point = four.plan.source, next(iter(four.plan.points.values()))
    others = {
        source.identity(replace(point, settings=point.settings.replace(seed=1))),
        source.identity(replace(point, bugs=("gelu_tanh",))),
        replace(source, model=replace(source.model, fingerprint="other")).identity(point),
        replace(source, code=replace(source.code, torch="9.9.9")).identity(point),
        replace(source, code=replace(source.code, files={"svd/unet.py": "other"})).identity(point),
        replace(source, image_digest="other").identity(point),
        replace(source, divergence=True).identity(point),
    }
    assert len(others) == 7 and source.identity(point) not in others
    same = replace(source, device="cuda", threads=3, token="t", points="/elsewhere")
    assert same.identity(point) == source.identity(point)


def test_the_code_that_decides_is_the_whole_svd_room_and_the_bugs(tmp_path: Path) -> None:
    package = Path(svdlab_package.__file__).parent
    graph = grimp.build_graph("svdlab", cache_dir=None)
    below = {
        "svdlab",
        "svdlab.errors",
        "svdlab.files",
        "svdlab.lazy",
        "svdlab.parity",
        "svdlab.reading",
        "svdlab.tables",
    }
    room = {m for m in graph.modules if f"{m}.".startswith("svdlab.svd.")}
    decide = room | graph.find_upstream_modules("svdlab.parity.bugs") | {"svdlab.parity.bugs"}
    covered = {path.removesuffix(".py").removesuffix("/__init__") for path in code_version(divergence=False).files}
    assert len(room) > 5 and {m.partition(".")[2].replace(".", "/") for m in decide - below} == covered
    assert "parity/compare.py" in code_version(divergence=True).files

    copy = tmp_path / "svdlab"
    for name in CLIP_CODE:
        source = package / name
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
    code = Code("1", "2", file_digests(copy, CLIP_CODE))
    assert code.files == code_version(divergence=False).files and not code.changes(since=code)
    for path in ("svd/new.py", "svd/deep/down/new.py"):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_text("x = 1\n")
        more = Code("1", "2", file_digests(copy, CLIP_CODE))
        assert more.identity != code.identity and more.changes(since=code) == f"changed: {path}"
        (copy / path).write_bytes(b"x = 1\r\n")
        assert file_digests(copy, CLIP_CODE) == more.files, "the same code with Windows' line ends"
        (copy / path).unlink()


def test_three_by_three_with_the_checkpoint_that_ships(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = ["--grid", "fps=7,14,28", "--grid", "max_guidance_scale=1,3,5"]
    code, out, _ = svdlab(
        capsys, monkeypatch, "sweep", *axes, "--out", str(tmp_path / "out"), "--num-inference-steps", "1"
    )
    assert code == 0 and "9 points finished, 0 failed" in out
    table = pd.read_parquet(tmp_path / "out/table.parquet")
    assert [(row.fps, row.max_guidance_scale) for row in table.itertuples()] == [
        (fps, guidance) for fps in (7, 14, 28) for guidance in (1.0, 3.0, 5.0)
    ]
    assert (
        table["frames_sha256"].is_unique
        and table[["difference_fps", "difference_max_guidance_scale"]].gt(0).to_numpy().all()
    )


def test_the_model_is_loaded_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdlab.svd.pipeline import SVDPipeline

    loaded, load = list[object](), SVDPipeline.from_pretrained

    def counted(*arguments: Any, **options: Any) -> SVDPipeline:
        loaded.append(options["device"])
        return load(*arguments, **options)

    monkeypatch.setattr(SVDPipeline, "from_pretrained", counted)
    other = PICTURE.rotate(180)  # none that another test has loaded the model for
    run_sweep(tmp_path / "out", grid({"fps": [7, 14, 21]}), SMALL, model=str(tiny), image=other)
    assert loaded == ["meta", "cpu"], "once without weights to see what it is, once with them"


# --- what happens in between ---


def test_a_finished_point_is_never_computed_again(four: Sweep, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, said = files(four.folder), list[Progress]()
    tried = failing(monkeypatch, lambda point, number: None)
    for again in (
        run_sweep(four.folder, grid(AXES), SMALL, model=str(tiny), image=PICTURE, on_progress=said.append),
        resume_sweep(four.folder),
    ):
        assert hashes(again) == hashes(four) and not again.unplanned_points()
    assert not tried and files(four.folder) == before
    assert said[0].done == said[0].total == 4


def test_a_failing_point_is_recorded_and_the_rest_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def when(point: Any, number: int) -> None:
        if point.settings.fps == 14:
            raise RuntimeError("no memory left")

    failing(monkeypatch, when)
    options = ["--grid", "fps=7,14,28", "--out", str(out), "--model", str(tiny), *SMALL_OPTIONS]
    code, said, _ = svdlab(capsys, monkeypatch, "sweep", *options, "--json", str(tmp_path / "rows.json"))
    assert (
        code == 1 and "failed: fps=14: RuntimeError: no memory left" in said and "2 points finished, 1 failed" in said
    )
    table = pd.read_csv(out / "table.csv")
    assert list(table["status"]) == ["finished", "failed", "finished"] and list(table["fps"]) == [7, 14, 28]
    (failure,) = (out / "failures").iterdir()
    assert "when(point" in json.loads(failure.read_text())["traceback"]
    rows = json.loads((tmp_path / "rows.json").read_text())["points"]
    assert [row["error"] for row in rows] == ["", "RuntimeError: no memory left", ""]

    monkeypatch.undo()
    tried = failing(monkeypatch, lambda point, number: None)
    code, said, _ = svdlab(capsys, monkeypatch, "sweep", "--resume", str(out))
    assert code == 0 and tried == [14] and "3 points finished, 0 failed" in said
    assert not list((out / "failures").iterdir())


@pytest.mark.parametrize(
    ("network", "key", "where"),
    [("unet", "conv_in.weight", "latents after step 0"), ("vae", "decoder.conv_out.weight", "frames")],
)
def test_a_weight_that_is_nan_is_named(tiny: Path, tmp_path: Path, network: str, key: str, where: str) -> None:
    model = poisoned(tiny, tmp_path / "model", network, key)
    (error,) = run_sweep(tmp_path / "out", [{"fps": 7}], SMALL, model=str(model), image=PICTURE).table()["error"]
    assert error.startswith(f"SvdlabError: {where}: ")
    assert error.endswith(f" values are NaN or infinite: the checkpoint's {network} holds NaN or infinity in {key}")


def test_ctrl_c_stops_cleanly_and_the_sweep_is_resumed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def when(point: Any, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    failing(monkeypatch, when)
    options = ["--grid", "fps=7,14,21,28", "--out", str(out), "--model", str(tiny), *SMALL_OPTIONS]
    code, _, err = svdlab(capsys, monkeypatch, "sweep", *options)
    assert code == 130 and f"2 of 4 points are finished; resume with: svdlab sweep --resume {out}" in err
    assert list(pd.read_csv(out / "table.csv")["fps"]) == [7, 14]
    assert not [p for p in (out / "points").iterdir() if p.name.startswith(".")]
    monkeypatch.undo()
    tried = failing(monkeypatch, lambda point, number: None)
    assert svdlab(capsys, monkeypatch, "sweep", "--resume", str(out))[0] == 0
    assert tried == [21, 28]


def test_stop_gives_up_the_point_under_way(tiny: Path, tmp_path: Path) -> None:
    said = list[Progress]()
    sweep = run_sweep(
        tmp_path / "out",
        grid({"fps": [7, 14, 21]}),
        SMALL.replace(num_inference_steps=4),
        model=str(tiny),
        image=PICTURE,
        on_progress=said.append,
        should_stop=lambda: said[-1].done == 1 and said[-1].within > 0.3,
    )
    assert list(sweep.table()["fps"]) == [7]
    assert said[-1].done == 1 and 0.3 < said[-1].within < 0.5, "the second of four steps was not made"


def test_progress_says_how_long_it_takes() -> None:
    text = str(Progress(total=10, done=4, failed=1, points_per_minute=12.0))
    assert text == "4 of 10 points, 12.0 points/min, 0:00:30 left, 1 failed"
    assert str(Progress(total=10, done=0, failed=0)) == "0 of 10 points"


DRIVER = """
import sys, time
from svdlab.sweep import point, resume_sweep, run_sweep, grid
from test_sweep import AXES, PICTURE, SMALL
make, began = point.make_point, []
def slow(*arguments):
    print("began", flush=True)
    began.append(arguments)
    time.sleep(600 if len(began) == 3 else 0)
    return make(*arguments)
point.make_point = slow
run_sweep(sys.argv[1], grid({"fps": [7, 14, 21, 28]}), SMALL, model=sys.argv[2], image=PICTURE, threads=1)
"""


def test_the_driver_killed_and_resumed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(out), str(tiny)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    for _ in range(3):
        assert driver.stdout.readline() == "began\n"
    with pytest.raises(SvdlabError, match="another process is at work"):
        resume_sweep(out)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    (out / "points" / ".0000-half").mkdir()  # what a process leaves that is killed while it writes
    before = {name: value for name, value in files(out).items() if "metrics" not in name}
    done = Sweep.open(out)
    assert sum(map(done.finished, done.plan.points)) == 2
    tried = failing(monkeypatch, lambda point, number: None)
    sweep = resume_sweep(out)
    assert tried == [21, 28], "the third was under way"
    assert list(sweep.table()["status"]) == ["finished"] * 4
    after = files(out)
    assert {name: after[name] for name in before} == before, "no finished point was touched"
    assert not [p for p in (out / "points").iterdir() if p.name.startswith(".")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount: test_a_disk_that_refuses covers the same path")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    small_disk: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out"
    PICTURE.save(small_disk.parent / "picture.png")
    options = ["--grid", f"fps={','.join(map(str, range(1, 41)))}", "--image", str(small_disk.parent / "picture.png")]
    options += ["--out", str(out), "--model", str(tiny), *SMALL_OPTIONS]
    code, _, err = svdlab(capsys, monkeypatch, "sweep", *options)
    assert code == 2
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in message and f"svdlab sweep --resume {out}" in message
    sweep = Sweep.open(out)
    finished = [identity for identity in sweep.plan.points if sweep.finished(identity)]
    assert 0 < len(finished) < 40 and f"{len(finished)} of 40 points are finished and intact" in message
    for identity in finished:
        assert sweep.frames(identity).shape == (2, 32, 32, 3) and sweep.metrics(identity)["point"] == identity
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    tried = failing(monkeypatch, lambda point, number: None)
    code, said, _ = svdlab(capsys, monkeypatch, "sweep", "--resume", str(out))
    assert code == 0 and "40 points finished, 0 failed" in said
    assert len(tried) == 40 - len(finished)


def test_a_disk_that_refuses(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, written = os.fsync, []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) > 6:  # in the middle of the second point
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        SweepHalted, match="No space left on device; 1 of 3 points are finished and intact; resume with"
    ):
        run_sweep(tmp_path / "out", grid({"fps": [7, 14, 21]}), SMALL, model=str(tiny), image=PICTURE)
    monkeypatch.undo()
    assert len(list((tmp_path / "out/points").iterdir())) == 1
    assert list(resume_sweep(tmp_path / "out").table()["status"]) == ["finished"] * 3


def test_another_version_makes_new_points_and_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_sweep(out, grid({"fps": [7, 14]}), SMALL, model=str(tiny), image=PICTURE)
    now = code_version(divergence=False)
    files = {**now.files, "svd/unet.py": "another", "svd/kernels/new.py": "there"}
    later = Code("9.9.9", "8.8.8", files)
    for module in (point_module, run_module):
        monkeypatch.setattr(module, "code_version", lambda divergence: later)
    tried = failing(monkeypatch, lambda point, number: None)
    code, said, err = svdlab(capsys, monkeypatch, "sweep", "--resume", str(out))
    assert code == 0 and tried == [7, 14] and "2 points finished" in said
    changes = f"svdlab {now.svdlab} -> 9.9.9; torch {now.torch} -> 8.8.8; changed: svd/kernels/new.py, svd/unet.py"
    assert f"note: 2 points in {out} were made by other code ({changes}): kept, not in the table" in err
    assert len(list((out / "points").iterdir())) == 4 and len(pd.read_csv(out / "table.csv")) == 2


def test_another_model_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    from svdlab.svd.random_checkpoint import write_random_checkpoint

    model = write_random_checkpoint(tmp_path / "model", seed=0)
    first = run_sweep(tmp_path / "out", grid({"fps": [7]}), SMALL, model=str(model), image=PICTURE)
    write_random_checkpoint(tmp_path / "model", seed=1)
    time.sleep(0.01)
    second = resume_sweep(tmp_path / "out")
    assert set(first.plan.points).isdisjoint(second.plan.points)
    assert second.unplanned_points() == {f"were made with another model ({model})": 1}
    third = run_sweep(tmp_path / "out", grid({"fps": [8]}), SMALL, model=str(model), image=PICTURE)
    assert third.unplanned_points()["have settings that are no longer asked for"] == 1
    metrics = second.folder / "points" / next(iter(second.plan.points)) / "metrics.json"
    metrics.write_text(metrics.read_text().replace(f'"format": {FORMAT}', '"format": 2'))
    turned = run_sweep(tmp_path / "out", grid({"fps": [8]}), SMALL, model=str(model), image=PICTURE.rotate(180))
    assert turned.unplanned_points() == {
        f"were made with another model ({model}) and from another image": 1,
        "are in another format or damaged": 1,
        "were made from another image": 1,
    }
    measured = run_sweep(
        tmp_path / "out", grid({"fps": [8]}), SMALL, model=str(model), image=PICTURE.rotate(180), divergence=True
    )
    assert measured.unplanned_points()["were made without the distance from diffusers"] == 3


def test_a_damaged_point_is_computed_again_and_said(
    four: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(four.folder, out)
    bad_json, cut, gone, flipped = (out / "points" / identity for identity in four.plan.points)
    (bad_json / "metrics.json").write_text("{")
    (cut / "frames.mkv").write_bytes((cut / "frames.mkv").read_bytes()[:-9])
    (gone / "clip.mp4").unlink()
    text = (flipped / "metrics.json").read_text()
    (flipped / "metrics.json").write_text(text.replace('"motion": ', '"motion": 1'))
    failure = out / "failures" / f"{gone.name}.json"
    failure.write_text("[")
    reader = Sweep.open(out)
    for identity, message in ((flipped.name, "is not what was written"), (bad_json.name, "not JSON")):
        with pytest.raises(SvdlabError, match=f"metrics.json: {message}"):
            reader.metrics(identity)
    with pytest.raises(SvdlabError, match="frames.mkv: is not what was written"):
        reader.frames(cut.name)
    tried = failing(monkeypatch, lambda point, number: None)
    code, _, err = svdlab(capsys, monkeypatch, "sweep", "--resume", str(out))
    assert code == 0 and len(tried) == 4 and hashes(Sweep.open(out)) == hashes(four)
    assert err.count("the point was damaged, and has been computed again") == 4
    assert f"{gone.name}/clip.mp4: cannot be read (No such file or directory)" in err
    # One that is damaged and of another plan only counts.
    (out / "points" / "0123456789abcdef").mkdir()
    code, _, err = svdlab(capsys, monkeypatch, "sweep", "--resume", str(out))
    assert code == 0 and len(tried) == 4 and "1 points in" in err and "are in another format or damaged" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["points"][0].update(point="../../../etc"), "points.0.point: got '../../../etc'"),
        (lambda plan: plan["points"][1]["settings"].update(fps="7"), "points.1: fps: got '7'"),
        (lambda plan: plan["axes"].update(fps=[7]), "axes.fps: 14, which a point has, is missing"),
        (lambda plan: plan["axes"].update(speed=[7]), "axes: got 'speed', allowed: a setting, or rules, approximation"),
        (lambda plan: plan.update(threads=0), "threads: got 0, allowed: greater than or equal to 1"),
        (lambda plan: plan.update(image=None), "image: got None"),
        (lambda plan: plan.update(points=[]), "points: "),
    ],
)
def test_a_damaged_plan_is_one_line(four: Sweep, tmp_path: Path, change: Any, message: str) -> None:
    plan = json.loads((four.folder / "sweep.json").read_text())
    change(plan)
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    shutil.copy(four.folder / "image.png", tmp_path)
    with pytest.raises(SvdlabError, match=re.escape(message)) as error:
        Sweep.open(tmp_path)
    assert "\n" not in str(error.value) and "sweep.json" in str(error.value)


def test_a_damaged_picture_is_one_line(four: Sweep, tmp_path: Path) -> None:
    shutil.copy(four.folder / "sweep.json", tmp_path)
    whole = (four.folder / "image.png").read_bytes()
    PICTURE.rotate(180).save(tmp_path / "image.png")
    with pytest.raises(SvdlabError, match="image.png: is not what was written"):
        resume_sweep(tmp_path)
    (tmp_path / "image.png").write_bytes(whole[:99])
    with pytest.raises(SvdlabError, match="image.png: not readable as a picture"):
        resume_sweep(tmp_path)


def test_a_damaged_sweep_is_named(four: Sweep, tmp_path: Path) -> None:
    with pytest.raises(SvdlabError, match="no sweep"):
        Sweep.open(tmp_path)
    (tmp_path / "image.png").write_bytes(b"")
    for text, message in (
        ("{", "sweep.json: not JSON"),
        (json.dumps({"format": FORMAT}), "sweep.json: svdlab is missing"),
        ('{"format": 9}', f"format 9, allowed: {FORMAT}"),
    ):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(SvdlabError, match=message):
            Sweep.open(tmp_path)


# --- two sweeps ---


def test_did_this_change_move_anything(
    four: Sweep, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = run_sweep(tmp_path / "same", grid(AXES), SMALL, model=str(tiny), image=PICTURE)
    assert not compare_sweeps(four, same).moved() and not compare_sweeps(four, same).differs
    assert svdlab(capsys, monkeypatch, "sweep-compare", str(four.folder), str(same.folder))[0] == 0

    exact = SMALL.replace(decode="exact", decode_chunk_size=1)
    other = run_sweep(tmp_path / "other", grid(AXES), exact, model=str(tiny), image=PICTURE)
    found = compare_sweeps(four, other)
    assert found.differs == {"decode": ("parity", "exact"), "decode_chunk_size": ("None", "1")}
    results = tmp_path / "found.json"
    code, out, _ = svdlab(
        capsys, monkeypatch, "sweep-compare", str(four.folder), str(other.folder), "--json", str(results)
    )
    moved = [p for p in found.points if p.moved()]
    assert code == (1 if moved else 0) and f"{len(moved)} of 4 points moved" in out.replace("\n", " ")
    assert json.loads(results.read_text())["moved"] is bool(moved)
    tolerant = ["--tolerance", "2"]
    assert svdlab(capsys, monkeypatch, "sweep-compare", str(four.folder), str(other.folder), *tolerant)[0] == 0

    bad = [{**change, "rules": "decode_unscaled"} for change in grid(AXES)]
    broken = run_sweep(tmp_path / "broken", bad[:3], SMALL, model=str(tiny), image=PICTURE)
    with pytest.raises(SvdlabError, match="allowed: two sweeps over the same axes"):
        compare_sweeps(four, broken)
    shifted = run_sweep(tmp_path / "shifted", grid(AXES)[:3], SMALL.replace(seed=1), model=str(tiny), image=PICTURE)
    found = compare_sweeps(four, shifted)
    assert found.moved(tolerance=2) and len(found.points) == 3 and found.differs == {"seed": ("0", "1")}
    assert all(p.mean and p.largest for p in found.points)


def test_an_option_that_does_not_go_with_resume_is_named_as_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = svdlab(capsys, monkeypatch, "sweep", "--resume", str(tmp_path), "--grid", "fps=7")
    assert code == 2 and err == "error: --grid: not together with --resume, which reads it from DIR\n"


# --- one file ---


def test_a_sweep_in_one_file(
    four: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, picture = tmp_path / "board.html", tmp_path / "board.gif"
    assert svdlab(capsys, monkeypatch, "sweep-export", str(four.folder), str(page))[0] == 0
    html = page.read_text()
    assert html.count("data:image/webp") == 4 and "script-src 'sha256-" in html and "http://www.w3.org/2000/svg" in html
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", html), "nothing is loaded"
    assert svdlab(capsys, monkeypatch, "sweep-export", str(four.folder), str(picture))[0] == 0
    with Image.open(picture) as gif:
        frames = [np.asarray(frame.convert("RGB")).astype(float) for frame in ImageSequence.Iterator(gif)]
        assert len(frames) == 2 and gif.info["duration"] in (140, 143), "at the slowest rate of the grid, 7 a second"
    # The last clip in the lower right corner, four times as large as its 32 pixels, within 256 colours.
    last = four.frames(four.at(fps=14, max_guidance_scale=3.0)).repeat(4, axis=1).repeat(4, axis=2)
    for seen, made in zip(frames, last, strict=True):
        # Random weights make noise of all colours, which a palette is the least fit for.
        assert abs(seen[-132:-4, -132:-4] - made).mean() < 12 < abs(seen[-132:-4, -132:-4] - made[:, ::-1]).mean()
    for path, message in (("board.mp4", "allowed: .html, .gif"), (str(four.folder / "sweep.json/x.gif"), "sweep.json")):
        code, _, err = svdlab(capsys, monkeypatch, "sweep-export", str(four.folder), path)
        assert code == 2 and message in err and err.count("\n") == 1
    both = tmp_path / "both.html"
    arguments = [str(four.folder), str(four.folder), "--export", str(both)]
    assert svdlab(capsys, monkeypatch, "sweep-compare", *arguments)[0] == 0
    assert both.read_text().count("data:image/webp") == 8
