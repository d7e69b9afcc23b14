"""The script for a GPU runs its whole length at tiny sizes, and the page is made of what it writes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


def run(monkeypatch: pytest.MonkeyPatch, out: Path) -> Any:
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--quick", "--device", "cpu", "--out", str(out)])
    # The compiler takes minutes here; test_bench.py has it called.
    monkeypatch.setattr(torch, "compile", lambda module: module)
    with pytest.raises(SystemExit) as leave:
        runpy.run_path(str(DOCS / "measure_gpu.py"), run_name="__main__")
    return leave.value.code


@pytest.mark.slow
def test_every_part_runs_and_is_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    out.unlink(missing_ok=True)
    assert run(monkeypatch, out) == 0
    found = json.loads(out.read_text())
    assert (
        list(found["parts"])
        == [
            "parity",
            "full_size_parity",
            "generation",
            "step",
            "kernels",
            "generation_compiled",
        ]
        and not found["errors"]
    )
    assert [row["verdict"] for row in found["parts"]["parity"]] == ["parity"] * 3
    assert all(0 < row["ratio"] <= 4 for row in found["parts"]["full_size_parity"])
    (generation,) = found["parts"]["generation"]
    assert generation["simulated_peak_gib"] > 0 and generation["num_inference_steps"] == 2
    assert all("svdlab_compiled_ratio" in row for row in found["parts"]["step"])
    page = runpy.run_path(str(DOCS / "make_performance.py"))["gpu_tables"](found)
    for heading in ("parity, embedded", "published UNet", "generation", "simulated", "kernels launched"):
        assert heading in page

    # What is missing is measured, and nothing else; a part that fails costs no other.
    del found["parts"]["parity"], found["parts"]["kernels"]
    out.write_text(json.dumps(found))
    capsys.readouterr()
    monkeypatch.setattr("svdlab.parity.three_way.three_way", lambda *_, **__: 1 / 0)
    assert run(monkeypatch, out) == 1
    again = json.loads(out.read_text())
    assert "ZeroDivisionError" in again["errors"]["parity"] and "kernels" in again["parts"]
    assert capsys.readouterr().out.split() == ["parity", "kernels"]
