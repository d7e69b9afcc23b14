"""Figures and pictures: drawn without a window, each with a text beside it, and right where it counts."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from html_tables import rows as table_rows
from PIL import Image

from svdlab.notebook import figures as plots
from svdlab.notebook.players import picture, plot_case_frames
from svdlab.notebook.tables import catalogue_table, stage_table
from svdlab.parity.diagnose import CatalogueRow, row_of
from svdlab.parity.lab import Case, Lab, every_chunk, motion
from svdlab.svd.images import to_levels

BUG = "guidance_constant"


@pytest.fixture(scope="module")
def lab(tiny: Path) -> Lab:
    return Lab(str(tiny), image=Image.linear_gradient("L").convert("RGB").resize((48, 32)))


@pytest.fixture(scope="module")
def case(lab: Lab) -> Case:
    return lab.case(lab.settings(num_frames=3, num_inference_steps=2, height=32, width=32), BUG)


def lines(ax: object) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}  # type: ignore[attr-defined]


def test_every_figure_has_axes_with_names_and_a_text(case: Case) -> None:
    on, off = case.on, case.off
    figures = [
        plots.plot_divergence(on),
        plots.plot_divergence(on, off, "a port", inputs=False),
        plots.plot_fix(on, off, BUG),
        plots.plot_grid(["1", "2"], [on, on], {BUG: [off, off]}, "fps (1/s)"),
        plots.plot_curves([1, 2], {"a": [1, 2], "b": [2, 3]}, ("x (s)", "y (m)"), log_x=True, band=(0, 1, "band")),
        plots.plot_ramps({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)}),
        plots.plot_frames(on, off, BUG),
        plots.plot_steps(on),
        plots.plot_catalogue([row_of(BUG, off), row_of("another", on)]),
    ]
    for figure in figures:
        html = figure._repr_html_()
        assert re.search(r'<img [^>]*alt="[^"]{20,}" src="data:image/png;base64,iVBOR', html)
        assert figure.axes[0].get_ylabel() and all(
            ax.get_xlabel() or ax.get_label() == "<colorbar>" for ax in figure.axes
        )


def test_the_lines_are_the_numbers(case: Case) -> None:
    probes, steps = plots.plot_fix(case.on, case.off, BUG).axes
    drawn = lines(probes)
    zero = min(drawn["svdlab float32, fix on"])
    assert drawn[f"fix off ({BUG})"] == [p.divergence or zero for p in case.off.probes]
    assert 0 < zero <= min(p.divergence for p in case.on.probes if p.divergence) / 10, "equal lies below all others"
    ticks = {
        float(at): label.get_text() for at, label in zip(probes.get_yticks(), probes.get_yticklabels(), strict=True)
    }
    assert ticks[zero] == "0" and list(ticks.values()).count("0") == 1
    assert drawn["diffusers float32 (the noise floor)"] == [p.floor for p in case.on.probes]
    assert all(len(line.get_ydata()) == 2 for line in steps.get_lines()), "one point per step"
    frames = lines(plots.plot_frames(case.on, case.off, BUG).axes[0])
    assert frames[f"fix off ({BUG})"][0] > 100 * frames["fix on"][0], "the first frame is guided wrongly"


def test_the_steps_and_the_catalogue_are_the_numbers(case: Case) -> None:
    last = plots.plot_steps(case.on).axes[-1]
    assert lines(last)["svdlab float32"] == [case.on[f"latents.00{i}"].divergence for i in range(2)]
    quiet = CatalogueRow("quiet", "frames", 1e4, 1e-5, True)
    loud = CatalogueRow("loud", "frames", 1e6, 1e-1, False)
    ax = plots.plot_catalogue([quiet, loud]).axes[0]
    points = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}
    assert points["1 missed by the mean squared error"] == ([1e-5], [1e4])
    assert points["1 caught by it"] == ([1e-1], [1e6])
    assert [text.get_text() for text in ax.texts] == ["quiet"], "the bugs that only the ratio catches are named"


def test_a_benchmark_is_drawn_as_it_was_timed() -> None:
    case = {"name": "unet", "dtype": "float32", "ratio": 2.0, "ratio_range": [1.5, 3.0]}
    case |= {"svdlab_of_matrix_peak": 0.5, "diffusers_of_matrix_peak": 0.25}
    row = {"axis": "frames", "dtype": "float32", "values": [2, 4], "svdlab_s": [1.0, 2.0], "diffusers_s": [2.0, 8.0]}
    row |= {"svdlab_exponent": 1.0, "diffusers_exponent": 2.0}
    figure = plots.plot_bench(
        {"cases": [case, {**case, "compiled_ratio": 1.2, "compiled_ratio_range": [1, 2]}], "growth": [row]}
    )
    ratios, limits, grown = figure.axes
    assert [patch.get_width() for patch in limits.patches] == [50, 50, 25, 25]
    assert lines(grown)["diffusers, frames, float32: 2.00"] == [1.0, 4.0]
    assert all(ax.get_xlabel() for ax in figure.axes) and len(figure.alt) > 20
    assert len(plots.plot_bench({"cases": [case], "growth": []}).axes) == 2
    assert [c.get_label() for c in ratios.containers] == ["diffusers", "diffusers, compiled"]


def test_the_stages_show_their_worst_probe(case: Case) -> None:
    _, *rows = table_rows(stage_table(case.off).to_html())
    assert [row[0] for row in rows] == ["image embedding", "image latents", "noise prediction, every step", "frames"]
    worst = max(p.ratio for p in case.off.probes if p.name.startswith("noise_pred."))
    assert rows[2][1:3] == ["2", f"{worst:.2f}"]


def test_a_false_negative_is_marked() -> None:
    rows = [CatalogueRow("quiet", "frames", 1e4, 1e-5, True), CatalogueRow("<none>", None, 1.0, 1e-1, False)]
    html = catalogue_table(rows).to_html()
    _, quiet, none = table_rows(html)
    assert quiet == ["quiet", "frames", "1e+04", "1.0e-05", "misses it", "catches it"]
    assert none == ["<none>", "none", "1", "1.0e-01", "catches it", "misses it"]
    assert html.count("background") == 2, "the two that are missed"
    assert "Of 2 bugs MSE &lt; 1e-3 misses 1, the noise ratio 1." in html


def test_a_chunk_changes_diffusers_and_not_the_exact_decode(lab: Lab, case: Case) -> None:
    chunks = every_chunk(lab, case.settings)
    assert [c.size for c in chunks] == [1, 2, 3]
    assert all(c.parity.verdict == c.exact.verdict == "parity" for c in chunks)
    assert chunks[0].cuts > chunks[1].cuts > 1e-3 and chunks[2].cuts == 0
    assert chunks[0].distance["exact"] < 1e-3 * chunks[0].distance["parity"]
    drawn = lines(plots.plot_chunks(chunks).axes[0])
    assert drawn["svdlab, exact"] == [c.distance["exact"] for c in chunks]


def test_a_picture_has_a_text_and_whole_pixels() -> None:
    html = picture('two <"greys">', torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).data
    alt, png = re.search('alt="([^"]*)" src="data:image/png;base64,([^"]*)"', html).groups()  # type: ignore[union-attr]
    assert alt == "two &lt;&quot;greys&quot;&gt;"
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        assert image.height == 192 and image.width > 2 * 192


def test_motion_is_the_change_from_frame_to_frame() -> None:
    frames = torch.stack([torch.full((3, 4, 4), level / 127.5 - 1) for level in (0.0, 10.0, 30.0)])
    assert motion(frames) == pytest.approx(15.0, abs=1e-4)
    assert motion(frames[:1]) == 0.0


def test_a_film_shows_every_frame_of_every_row(case: Case) -> None:
    plot = plot_case_frames(case, fix=False)
    rows = ["diffusers", "svdlab, fix off"]
    assert [ax.get_ylabel() for ax in plot.axes[::3]][:2] == rows and len(plot.axes) == 9
    drawn = plot.axes[3].get_images()[0].get_array()
    assert np.array_equal(drawn, to_levels(case.off.traces["candidate"]["frames"][0, 0]))
    assert rows[1] in plot.alt


def test_the_ramp_is_drawn_as_it_is() -> None:
    ramp = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    plot = plots.plot_ramps({"one": ramp, "other": ramp.flip(0)})
    assert torch.equal(torch.from_numpy(plot.axes[0].get_images()[0].get_array().data), ramp)
    assert [text.get_text() for text in plot.axes[1].texts] == ["3.0", "4.0", "1.0", "2.0"]


def test_two_passes_hold_less_than_one(lab: Lab, case: Case) -> None:
    (_, one), (_, two) = (lab.step_cost(case.settings.replace(cfg=way), rounds=1) for way in ("batched", "sequential"))
    assert 0 < two < one
