"""The port with six bugs: what the usual threshold says of it, and that all six are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run

from svdlab.errors import SvdlabError
from svdlab.parity import demo as module
from svdlab.parity.bugs import BUGS
from svdlab.parity.demo import MISSED, SETTINGS, SIX, Demo, demo
from svdlab.parity.trace import Trace


@pytest.fixture(scope="module")
def found() -> Demo:
    return demo()


def test_six_bugs_in_six_stages() -> None:
    assert len(SIX) == len({BUGS[name].stage for name in SIX}) == 6 and SIX[:5] == MISSED


@pytest.mark.slow
def test_the_usual_threshold_misses_five_alone_and_together(found: Demo) -> None:
    assert [row.bug for row in found.alone if row.passes_mse_bar] == list(MISSED)
    assert found.missed is not None
    assert found.missed.bug.split(" + ") == list(MISSED) and found.missed.passes_mse_bar
    assert not found.port.passes_mse_bar
    assert all(row.first_divergence for row in (*found.alone, found.missed, found.port))
    cells = [[getattr(cell, "text", cell) for cell in row] for row in found.table().rows]
    assert [row[0] for row in cells] == [*SIX, "the 5 that pass", "all 6"]
    assert [row[-1] for row in cells] == ["passes"] * 5 + ["fails", "passes", "fails"]


def test_all_six_are_named(found: Demo) -> None:
    assert found.diagnosis.verdict == "explained", found.summary()
    assert set(found.named) == set(found.diagnosis.bugs) == set(SIX)
    assert {stage.stage for stage in found.diagnosis.wrong} == {BUGS[name].stage for name in SIX}
    assert found.summary().endswith("6 of the port's 6 bugs named")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*, folder: str, progress: bool) -> Demo:
        return demo(SIX[5:], SETTINGS.replace(num_frames=2, num_inference_steps=1), folder)

    monkeypatch.setattr(module, "demo", again)
    result, keep = tmp_path / "demo.json", tmp_path / "traces"
    code, out, err = run(capsys, monkeypatch, "demo", "--json", str(result), "--keep", str(keep))
    assert code == 1, err
    written = json.loads(result.read_text())
    assert written["verdict"] == "explained" and written["bugs"] == ["time_ids_reordered"]
    assert written["port"]["bugs"] == ["time_ids_reordered"] == written["port"]["alone"][0]["bugs"]
    assert written["port"]["mse"] == written["port"]["alone"][0]["mse"] > 0
    assert out.index("frames MSE") < out.index("time_ids_reordered: motion bucket") and "1 of the port's 1 bugs" in out
    traces = {name: Trace.open(keep / f"{name}.safetensors") for name in ("reference", "port", "truth")}
    assert traces["truth"].dtype == "float64" and traces["port"].implementation == "svdlab"
    repeat = out.splitlines()[-1].split("the same again: svdlab ")[1].split()
    code, out, err = run(capsys, monkeypatch, *repeat)
    assert code == 1 and "time_ids_reordered" in out, err


def test_what_is_not_named_is_said(found: Demo) -> None:
    other = Demo(found.alone[:3], found.missed, found.port, found.diagnosis)
    assert "3 of the port's 3 bugs named, and not in it: noise_aug_after_encode" in other.summary()


def test_bad_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, "demo", "--keep", "nowhere/traces")
    assert code == 2 and "nowhere is no folder that can be written" in err
    with pytest.raises(SvdlabError, match="exclude each other"):
        demo(["clip_no_antialias", "clip_resize_nearest"])
