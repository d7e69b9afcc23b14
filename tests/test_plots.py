"""Figures and pictures: drawn without a window, each with a text beside it, and right where it counts."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chart_lines import drawn, unpacked
from html_tables import rows as table_rows
from PIL import Image

from svdlab.notebook import charts
from svdlab.notebook import figures as plots
from svdlab.notebook.players import picture, plot_case_frames
from svdlab.notebook.tables import catalogue_table, stage_table, where_it_shows
from svdlab.parity.diagnose import CatalogueRow, finding, row_of
from svdlab.parity.lab import Case, Lab, every_chunk, motion
from svdlab.svd.images import to_levels

BUG = "guidance_constant"
DIGITS = 1e-5  # a chart carries six digits


@pytest.fixture(scope="module")
def lab(tiny: Path) -> Lab:
    return Lab(str(tiny), image=Image.linear_gradient("L").convert("RGB").resize((48, 32)))


@pytest.fixture(scope="module")
def case(lab: Lab) -> Case:
    return lab.case(lab.settings(num_frames=3, num_inference_steps=2, height=32, width=32), BUG)


def lines(ax: object) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}  # type: ignore[attr-defined]


def test_every_chart_has_axes_with_names_and_a_text(case: Case) -> None:
    on, off = case.on, case.off
    every = [
        charts.plot_divergence(on),
        charts.plot_divergence(on, off, "a port", inputs=False),
        charts.plot_fix(case),
        charts.plot_grid(["1", "2"], [on, on], {BUG: [off, off]}, "fps (1/s)"),
        charts.plot_curves([1, 2], {"a": [1, 2], "b": [2, 3]}, ("x (s)", "y (m)"), log_x=True, band=(0, 1, "band")),
        charts.plot_frames(on, off, BUG),
        charts.plot_steps(on),
        charts.plot_catalogue([row_of(BUG, off), row_of("another", on)]),
    ]
    for chart in every:
        html = chart._repr_html_()
        assert re.search(r'<img [^>]*alt="[^"]{20,}" src="data:image/svg', html)
        assert re.findall(r"<text[^>]*transform=.[^>]*rotate.-90[^>]*>[^<]{5,}<", chart.to_svg()), (
            "a vertical axis's name"
        )
        (spec,) = re.findall(r'<script type="text/plain">(.*)</script>', html)
        assert unpacked(spec) == chart.spec
        assert "http" not in json.dumps(chart.spec).replace(chart.spec["$schema"], "")
    ramps = plots.plot_ramps({"a": torch.ones(2, 3), "b": torch.zeros(2, 3)})
    assert re.search(r'<img [^>]*alt="[^"]{20,}" src="data:image/webp;base64,UklGR', ramps._repr_html_())
    assert ramps.axes[0].get_ylabel() and ramps.axes[0].get_xlabel()


def test_an_editor_draws_the_chart_itself(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    chart = charts.plot_steps(case.on)
    assert set(chart._repr_mimebundle_()) == {"text/html", "text/plain"}
    monkeypatch.setattr(charts, "is_live", lambda: True)
    assert chart._repr_mimebundle_() == {charts.VEGA_LITE: chart.spec, "text/plain": chart.alt}


def test_a_text_in_a_chart_ends_no_script() -> None:
    chart = charts.plot_curves([1, 2], {"</script><b>": [1, 2]}, ("x", "y"))
    assert "</script><b>" not in chart._repr_html_() and "<b>" not in chart._repr_html_()


def test_the_lines_are_the_numbers(case: Case) -> None:
    spec = charts.plot_fix(case).spec
    probes, steps = drawn(spec), drawn(spec, "latents after each step")
    zero = min(probes["svdlab float32, fix on"].values())
    assert probes[f"fix off ({BUG})"] == pytest.approx(
        {p.name: p.divergence or zero for p in case.off.probes}, rel=DIGITS
    )
    assert 0 < zero <= min(p.divergence for p in case.on.probes if p.divergence) / 10, "equal lies below all others"
    assert probes["diffusers float32 (the noise floor)"] == pytest.approx(
        {p.name: p.floor for p in case.on.probes}, rel=DIGITS
    )
    assert all(sorted(line) == [1, 2] for line in steps.values()), "one point per step"
    assert steps["fix off (guidance_constant)"][2] == pytest.approx(case.off["latents.001"].divergence, rel=DIGITS)
    frames = drawn(charts.plot_frames(case.on, case.off, BUG).spec)
    assert frames[f"fix off ({BUG})"][1] > 100 * frames["fix on"][1], "the first frame is guided wrongly"


def test_a_distance_of_zero_is_said_to_be_zero(case: Case) -> None:
    svg = charts.plot_divergence(case.on).to_svg()
    assert len(re.findall(r"<text[^>]*>0</text>", svg)) == 1 and re.search(r"<text[^>]*>1e-\d+</text>", svg)


def test_every_bug_of_a_grid_has_its_line(case: Case) -> None:
    off = {f"bug {i}": [case.off] for i in range(6)}
    lines = drawn(charts.plot_grid(["7"], [case.on], off, "fps").spec)
    assert set(lines) == {"fix on", *(f"fix off (bug {i})" for i in range(6))}
    assert lines["fix off (bug 5)"] == pytest.approx({"7": case.off["frames"].ratio}, rel=DIGITS)


def test_the_steps_and_the_catalogue_are_the_numbers(case: Case) -> None:
    last = drawn(charts.plot_steps(case.on).spec, "latents")
    distances = [case.on[f"latents.00{i}"].divergence for i in range(2)]
    assert list(last["svdlab float32"].values()) == pytest.approx(distances, rel=DIGITS)
    quiet = CatalogueRow("quiet", "frames", 1e4, 1e-5, True)
    loud = CatalogueRow("loud", "frames", 1e6, 1e-1, False)
    broken = CatalogueRow("broken", "frames", math.inf, math.nan, False)
    chart = charts.plot_catalogue([quiet, loud, broken])
    every = [row for rows in chart.spec["datasets"].values() for row in rows]
    points = {row["bug"]: row for row in every if "bug" in row}
    assert {bug: row["group"] for bug, row in points.items()} == {
        "quiet": "1 missed by the mean squared error",
        "loud": "2 caught by it",
        "broken": "2 caught by it",
    }
    assert (points["quiet"]["at"], points["quiet"]["ratio"]) == (1e-5, 1e4)
    assert chart.alt.endswith("Missed: quiet."), "the bugs that only the ratio catches are named"


def test_the_finding_counts_what_each_test_sees() -> None:
    rows = [
        CatalogueRow("quiet", "frames", 1e4, 1e-5, True),
        CatalogueRow("loud", "frames", 1e6, 1e-1, False),
        CatalogueRow("silent", None, 1.0, 0.0, True),
    ]
    said = "A port can pass MSE < 1e-3 and be wrong: 1 of 2 known bugs do. The noise ratio catches all of them."
    assert finding(rows) == f"{said} (1 more show at other settings only.)"
    assert "catches 1 of them" in finding([rows[0], CatalogueRow("odd", None, 1.0, 1.0, False)])


def test_where_a_bug_shows_is_said_from_its_numbers(case: Case) -> None:
    text = where_it_shows(case, replace(case, off=case.on)).data
    first, none = text.splitlines()
    assert none == f"- `{BUG}`: no tensor is above 4 at these settings"
    assert "the first tensor above 4 is `guidance_scale`" in first and "`noise_pred_uncond.000`" in first
    names = [p.name for p in case.off.probes]
    after = names[names.index("guidance_scale") + 1 :]
    wrong = [name for name in after if case.off[name].ratio > 4]
    assert f"of the {len(after)} behind it {len(wrong)} are above 4" in first
    assert all((f"`{name}`" in first) is (name not in wrong) for name in after)


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
    distances = drawn(charts.plot_chunks(chunks).spec)["svdlab, exact"]
    assert list(distances.values()) == pytest.approx([c.distance["exact"] for c in chunks], rel=DIGITS)


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
    plot = plot_case_frames(case, "off")
    rows = ["diffusers", "svdlab, fix off"]
    assert [ax.get_ylabel() for ax in plot.axes[::3]][:2] == rows and len(plot.axes) == 9
    shown = plot.axes[3].get_images()[0].get_array()
    assert np.array_equal(shown, to_levels(case.off.traces["candidate"]["frames"][0, 0]))
    assert rows[1] in plot.alt


def test_the_ramp_is_drawn_as_it_is() -> None:
    ramp = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    plot = plots.plot_ramps({"one": ramp, "other": ramp.flip(0)})
    assert torch.equal(torch.from_numpy(plot.axes[0].get_images()[0].get_array().data), ramp)
    assert [text.get_text() for text in plot.axes[1].texts] == ["3.0", "4.0", "1.0", "2.0"]


def test_two_passes_hold_less_than_one(lab: Lab, case: Case) -> None:
    (_, one), (_, two) = (lab.step_cost(case.settings.replace(cfg=way), rounds=1) for way in ("batched", "sequential"))
    assert 0 < two < one
