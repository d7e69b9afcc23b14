"""How far a trace's tensors are from the limits of narrow dtypes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import run

from svdlab.parity.ranges import range_of, ranges
from svdlab.parity.trace import Trace
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=16, width=16, num_frames=2, num_inference_steps=2)


def _trace(largest: float) -> Trace:
    latents = torch.linspace(-1, 1, 1 * 2 * 4 * 2 * 2).view(1, 2, 4, 2, 2)
    tensors = {
        "latents.000": latents * largest,
        "frames": torch.zeros(1, 2, 3, 16, 16),
        "unet.conv_in.000": latents * 500,
        "sigmas": torch.tensor([7e5, 1e-5, 0.0]),
    }
    return Trace(tensors, SETTINGS, "test")


@pytest.mark.parametrize("value", [448.0, 512.0, 57344.0, 65504.0, 1e5])
def test_against_what_the_dtypes_do(value: float) -> None:
    """A value fits where casting keeps it; beyond the limit it gives infinity, or the limit itself."""
    headroom = range_of("x", torch.tensor([value, -1.0])).headroom
    for name, factor in headroom.items():
        dtype = getattr(torch, "float8_e4m3fn" if name == "float8_e4m3" else name)
        fits = float(torch.tensor(value).to(dtype).float()) == pytest.approx(value, rel=0.05)
        assert factor is not None and (factor >= 1) == fits, name


def test_small_values() -> None:
    found = range_of("x", torch.tensor([0.0, 1e-7, 1.0, -2.0, 3e-5]))
    assert found.largest == 2 and found.smallest == pytest.approx(1e-7)
    assert found.subnormal == 0.5  # of those that are not zero
    assert range_of("x", torch.zeros(3)).headroom["float16"] is None


def test_order_and_summary() -> None:
    assert ranges(_trace(10)).tightest.name == "unet.conv_in.000"  # the sigmas stay in float32
    found = ranges(_trace(2800))
    assert [r.name for r in found.tensors] == ["sigmas", "unet.conv_in.000", "latents.000", "frames"]
    assert found.summary() == "nearest to float16's limit: latents.000, 2800, a factor of 23.39 below 65504"
    found = ranges(_trace(1e5))
    assert found.overflowing("float16") == ["latents.000"]
    assert found.overflowing("float8_e4m3") == ["unet.conv_in.000", "latents.000"]
    assert "above 65504; 1 of 4 tensors overflow, first latents.000" in found.summary()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path, result = tmp_path / "trace.safetensors", tmp_path / "ranges.json"
    _trace(1e5).save(path)
    code, out, err = run(capsys, monkeypatch, "ranges", str(path), "--json", str(result))
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.startswith("latents.000"))
    assert row.split() == ["latents.000", "1e+05", "0.655", "3e+33", "0.00448", "0.573"]
    assert "nearest to float16's limit: latents.000" in out
    written = json.loads(result.read_text())
    assert written["nearest"] == "latents.000" and written["overflow"]["float16"] == ["latents.000"]
    by_name = {r["name"]: r for r in written["tensors"]}
    assert by_name["frames"]["headroom"]["float16"] is None
    assert by_name["unet.conv_in.000"]["headroom"]["float16"] == pytest.approx(65504 / 500)
    code, _, err = run(capsys, monkeypatch, "ranges", str(tmp_path / "none.safetensors"))
    assert code == 2 and "no such file" in err
