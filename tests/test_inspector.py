"""The tensor inspector: what it shows are the tensors' own values, and the difference is where it says."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.notebook.inspector import Inspector
from svdlab.parity import Trace, capture
from svdlab.parity.compare import Comparison, compare
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=32, width=48, num_frames=3, num_inference_steps=2, seed=3)
TAPS = ["unet.conv_in", "unet.time_embedding", "image_encoder.vision_model.encoder.layers.0", "vae.encoder.conv_in"]


@pytest.fixture(scope="module")
def reference(tiny: Path, photo: Any) -> Trace:
    return capture(SVDPipeline.from_pretrained(tiny), photo, SETTINGS, taps=TAPS)


def changed(trace: Trace, name: str, at: tuple[int, ...], value: float) -> Trace:
    """The trace with one value of one tensor moved by, or to where that is not finite, a value."""
    tensor = trace[name].clone()
    tensor[at] = tensor[at] + value
    return Trace({**trace, name: tensor}, trace.settings, "a port")


@pytest.fixture(scope="module")
def comparison(reference: Trace) -> Comparison:
    return compare(reference, changed(reference, "latents.001", (0, 2, 1, 3, 4), 5.0))


def plane(view: dict[str, Any], role: str) -> Tensor:
    values = np.frombuffer(view[role], view["dtype"])
    return torch.from_numpy(values.copy()).reshape(view["rows"], view["columns"])


def test_every_tensor_is_shown_as_it_is(reference: Trace, comparison: Comparison) -> None:
    inspector = Inspector(comparison)
    shown = {row["name"] for row in inspector.rows}
    assert shown == set(reference), "taps, too"
    for name in shown:
        inspector.show(name)
        view, tensor = inspector.view, reference[name]
        assert view["shape"] == list(tensor.shape)
        for index in ([0] * len(view["axes"]), [size - 1 for _, size in view["axes"]]):
            inspector.show(name, index)
            for role in ("reference", "candidate"):
                own = comparison.traces[role][name][tuple(index)]
                assert torch.equal(plane(inspector.view, role), own.reshape(view["rows"], view["columns"]))
        json.dumps({key: value for key, value in view.items() if not isinstance(value, bytes)}, allow_nan=False)


def test_it_says_where_the_difference_is(comparison: Comparison) -> None:
    view = Inspector(comparison).view
    assert view["probe"] == comparison.first_divergence == "latents.001"
    assert (view["worst"], view["cell"]) == ([0, 2, 1], [3, 4])
    assert view["difference"] == pytest.approx(5.0, rel=1e-5)
    assert view["shares"] == [[1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]
    histograms = view["histograms"]
    size = np.prod(view["shape"])
    assert sum(histograms["reference"]) == sum(histograms["candidate"]) == sum(histograms["difference"]) == size
    assert histograms["difference"][-1] == 1 and sorted(histograms["difference"])[-1] == size - 1
    difference = plane(view, "candidate") - plane(view, "reference")
    assert difference.abs().argmax() == 3 * view["columns"] + 4


def test_signed_values_have_a_map_about_zero(reference: Trace, comparison: Comparison) -> None:
    inspector = Inspector(comparison)
    assert inspector.view["signed"] and inspector.view["high"] == float(
        comparison.traces["candidate"]["latents.001"].abs().max()
    )
    inspector.show("input.source")
    assert not inspector.view["signed"] and 0 < inspector.view["high"] <= 1
    colours = np.frombuffer(inspector.look["diverging"], np.uint8).reshape(257, 3).astype(int)
    assert abs(colours[127] - colours[128]).max() <= 3 and colours[127].min() > 240, "white in the middle"


def test_another_truth_and_a_wider_dtype(reference: Trace) -> None:
    wide = Trace({name: t.double() for name, t in reference.items()}, reference.settings, "svdlab", dtype="float64")
    candidate = changed(reference, "frames", (0, 1, 2, 5, 6), 0.5)
    inspector = Inspector(compare(reference, candidate, wide))
    assert inspector.look["against"] == ["reference", "truth"]
    inspector.show("frames", against="truth")
    view = inspector.view
    assert view["dtype"] == "float64" and (view["worst"], view["cell"]) == ([0, 1, 2], [5, 6])
    assert torch.equal(plane(view, "reference"), wide["frames"][0, 1, 2])


def test_what_is_not_finite_is_shown_and_counted_out(reference: Trace) -> None:
    candidate = changed(reference, "noise_pred.000", (0, 1, 0, 0, 0), float("nan"))
    inspector = Inspector(compare(reference, candidate))
    view = inspector.view
    assert view["probe"] == "noise_pred.000" and "1 of the candidate's values are NaN" in view["said"]
    assert view["difference"] == 0.0 and view["shares"] == [], "what is left is equal"
    inspector.show("noise_pred.000", [0, 1, 0])
    assert plane(inspector.view, "candidate").isnan().sum() == 1
    (row,) = (row for row in inspector.rows if row["name"] == "noise_pred.000")
    assert row["wrong"] and row["ratio"] == "not finite"


def test_a_hand_asks_and_is_answered(comparison: Comparison) -> None:
    inspector = Inspector(comparison)
    inspector.asked = {"probe": "frames", "index": [0, 1, 2], "against": "reference"}
    assert inspector.view["probe"] == "frames" and inspector.view["index"] == [0, 1, 2]
    inspector.asked = {"probe": "frames", "index": [0, 1, 9], "against": "reference"}
    assert inspector.view == {"error": "index: got [0, 1, 9], allowed for frames: below [1, 3, 3]"}


def test_another_comparison_takes_its_place(reference: Trace, comparison: Comparison) -> None:
    inspector = Inspector(comparison)
    inspector.show("frames", [0, 1, 2])
    other = compare(reference, changed(reference, "frames", (0, 1, 2, 5, 6), 0.5))
    inspector.compare(other, "another")
    assert inspector.look["names"]["candidate"] == "another" and inspector.rows != Inspector(comparison).rows
    assert inspector.view["probe"] == "frames" and inspector.view["index"] == [0, 1, 2]
    assert torch.equal(plane(inspector.view, "candidate"), other.traces["candidate"]["frames"][0, 1, 2])
    few = {name: reference[name] for name in ("input.source", "latents.000", "latents.001")}
    one, two = (Trace(few, SETTINGS, name) for name in ("one", "two"))
    inspector.compare(compare(one, changed(two, "latents.001", (0,), 1.0)))
    assert inspector.view["probe"] == "latents.001", "which has no frames"


def test_bad_input_is_refused(comparison: Comparison) -> None:
    inspector = Inspector(comparison)
    for call, said in (
        (lambda: inspector.show("latents.007"), "probe: got 'latents.007', allowed"),
        (lambda: inspector.show("frames", [0]), r"index: got \[0\], allowed for frames: below \[1, 3, 3\]"),
        (lambda: inspector.show("frames", [0, 0, -1]), "index"),
        (lambda: inspector.show("frames", against="truth"), "against: got 'truth', allowed: reference"),
        (lambda: inspector.to_html(["latent"]), "probe: got 'latent'"),
        (lambda: Inspector(Comparison([], [], [], [], "bound", "float32", "a", "b")), "kept without its traces"),
    ):
        with pytest.raises(SvdlabError, match=said):
            call()


def test_a_page_carries_some_tensors_and_names_the_others(comparison: Comparison) -> None:
    inspector = Inspector(comparison)

    def carried(page: str) -> dict[str, Any]:
        (text,) = re.findall(r'data-inspector="([^"]*)"', page)
        return json.loads(html.unescape(text))

    page = inspector.to_html(["latents.001", "frames"], max_bytes=160_000)
    data = carried(page)
    assert list(data["tensors"]) == ["latents.001", "frames"]
    assert [row["name"] for row in data["rows"] if not row["absent"]] == ["latents.001", "frames"]
    assert f"carries 2 of {len(inspector.rows)} tensors" in page and "shows input.source, " in page
    for name, tensor in data["tensors"].items():
        for role in ("reference", "candidate"):
            values = np.frombuffer(base64.b64decode(tensor[role]), tensor["dtype"]).reshape(tensor["shape"])
            assert np.array_equal(values, comparison.traces[role][name].numpy())
    assert list(carried(inspector.to_html(["latents.001", "frames"], max_bytes=20_000))["tensors"]) == ["latents.001"]
    small = carried(inspector.to_html(max_bytes=2000))["tensors"]
    assert "sigmas" in small and "frames" not in small
    assert carried(inspector._repr_mimebundle_()["text/html"]), "without a hand it is a page"
