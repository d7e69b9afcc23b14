"""Weights that a port has loaded, against the checkpoint: each way to load one wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdlab import cli
from svdlab.errors import SvdlabError
from svdlab.parity.weights import check_weights, checkpoint_weights, checksum

LINEAR = "unet.down_blocks.0.attentions.0.proj_in.weight"
CONV = "unet.conv_in.weight"
OTHER = "unet.down_blocks.0.attentions.0.proj_out.weight"


@pytest.fixture(scope="module")
def weights(tiny: Path) -> dict[str, Tensor]:
    return dict(checkpoint_weights(tiny))


def _dumped(weights: dict[str, Tensor], path: Path, **changed: Tensor | None) -> Path:
    kept = {key: t.clone().contiguous() for key, t in {**weights, **changed}.items() if t is not None}
    save_file(kept, path)
    return path


def test_right_weights(tiny: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    assert check_weights(tiny, _dumped(weights, tmp_path / "all.safetensors")).bad == []
    assert check_weights(tiny, tiny).bad == []
    half = {key: t.half() for key, t in weights.items()}
    report = check_weights(tiny, _dumped(half, tmp_path / "half.safetensors"))
    assert report.bad == [] and any(r.status == "rounded" and r.text == "to float16" for r in report.results)


@pytest.mark.parametrize(
    ("key", "change", "status", "text"),
    [
        (LINEAR, lambda w: w[LINEAR].T, "wrong", "order (1, 0)"),
        (CONV, lambda w: w[CONV].permute(2, 3, 1, 0), "wrong", "order (2, 3, 1, 0)"),
        (CONV, lambda w: w[CONV].transpose(2, 3), "wrong", "order (0, 1, 3, 2)"),
        (LINEAR, lambda w: w[OTHER], "wrong", f"holds the values of {OTHER}"),
        (LINEAR, lambda w: w[LINEAR][None], "wrong", "the values are in the right order"),
        (LINEAR, lambda w: w[LINEAR][:-1], "wrong", "allowed: "),
        (LINEAR, lambda w: w[LINEAR] * 1.001, "wrong", "relative distance 0.001"),
        (LINEAR, lambda w: w[LINEAR] * float("nan"), "wrong", "NaN"),
        (LINEAR, lambda w: None, "missing", ""),
        ("unet.my_own", lambda w: torch.ones(3), "extra", "no weight of the checkpoint"),
    ],
)
def test_a_wrong_weight_is_said(
    tiny: Path, weights: dict[str, Tensor], tmp_path: Path, key: str, change: Any, status: str, text: str
) -> None:
    report = check_weights(tiny, _dumped(weights, tmp_path / "dump.safetensors", **{key: change(weights)}))
    assert [(r.key, r.status) for r in report.bad] == [(key, status)]
    assert text in report.bad[0].text


def test_checksums(tiny: Path, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    sums = tmp_path / "sums.json"
    monkeypatch.setattr("sys.argv", ["svdlab", "weights", str(tiny), "--out", str(sums)])
    cli.main()
    assert json.loads(sums.read_text())[CONV] == checksum(weights[CONV])
    assert check_weights(tiny, sums).bad == []
    sums.write_text(json.dumps({**json.loads(sums.read_text()), LINEAR: checksum(weights[OTHER])}))
    monkeypatch.setattr(
        "sys.argv", ["svdlab", "weights", str(tiny), "--check", str(sums), "--json", str(tmp_path / "out.json")]
    )
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 1 and json.loads((tmp_path / "out.json").read_text())["bad"] == 1
    assert check_weights(tiny, sums).bad[0].text == f"the checksum of {OTHER}"


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"a": 3}', '{"a": "short"}', "not json", "[" * 10_000, json.dumps({"a": "x" * 64})]
)
def test_bad_checksums_are_refused(tiny: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "sums.json").write_text(content)
    with pytest.raises(SvdlabError, match=r"sums\.json"):
        check_weights(tiny, tmp_path / "sums.json")


def test_files_that_cannot_be_read(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SvdlabError, match="no such file"):
        check_weights(tiny, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901234")
    with pytest.raises(SvdlabError, match="not a whole safetensors file"):
        check_weights(tiny, tmp_path / "cut.safetensors")
