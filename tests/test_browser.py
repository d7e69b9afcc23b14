"""The notebooks in a real JupyterLab, moved by the keyboard of a real browser.

Skipped where Chromium or Playwright is missing, unless SVDLAB_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from jupyter_page import COMPUTE_MS, Notebook, chromium, jupyter_lab

from svdlab.notebook.sweep_export import export_sweep
from svdlab.notebook.tables import ratio_text
from svdlab.parity.compare import Comparison
from svdlab.parity.lab import Choice, Lab
from svdlab.parity.trace import Trace
from svdlab.report.results import NotebookResult
from svdlab.report.run import run_report
from svdlab.svd.images import to_levels
from svdlab.svd.settings import GenerationSettings
from svdlab.sweep import Sweep, grid, run_sweep


def _missing() -> str:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install 'svdlab[dev]'"
    return "" if chromium() else "no chromium on the PATH: apt-get install chromium"


REQUIRED = os.environ.get("SVDLAB_REQUIRE_BROWSER") == "1"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(_missing()) and not REQUIRED, reason=_missing() or "it is there"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with jupyter_lab(tmp_path_factory.mktemp("jupyter")) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield program
        program.close()


@pytest.fixture(scope="module")
def lab() -> Lab:
    """What the package computes, in this process."""
    return Lab()


KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def said(comparison: Comparison) -> tuple[str, str]:
    return ratio_text(comparison), comparison.verdict


def test_the_frame_rate(browser: Any, server: str, lab: Lab) -> None:
    notebook = Notebook(browser, server, "01_fps_conditioning")
    page, bug = notebook.page, "fps_not_decremented"
    notebook.wait_shown("fps 7", "fix off")
    start = lab.settings(num_inference_steps=4)
    assert notebook.number() == said(lab.case(start, bug).off), "it begins with the bug"
    page.locator(".svdlab-panel").get_by_role("button", name="Pause").press("Enter")
    plot, clips = notebook.pictures()

    notebook.press("fps", "ArrowRight", times=2)
    notebook.wait_shown("fps 9")
    moved = lab.case(start.replace(fps=9), bug)
    assert notebook.number() == said(moved.off)
    assert notebook.pictures()[0] != plot and notebook.pictures()[1] != clips, "another plot and another clip"

    plot, clips = notebook.pictures()
    notebook.choose("fix on")
    page.get_by_text("svdlab, fix on").wait_for()
    assert notebook.number() == said(moved.on) and notebook.number()[1] == "parity"
    assert notebook.pictures()[0] == plot and notebook.pictures()[1] != clips, "the plot has all lines, the clip one"
    notebook.choose("fix off")
    page.get_by_text("svdlab, fix off").wait_for()
    assert notebook.pictures()[1] == clips, "the same frame in the same place"

    page.get_by_role("button", name="Pin as A").press("Enter")
    notebook.choose("your code")
    page.get_by_text("B: your code").wait_for()
    assert page.get_by_text("A: fix off", exact=True).first.is_visible()
    own = page.get_by_text("the code that makes what is shown").locator("..").locator("pre").text_content()
    assert own and "settings.fps - 2" in own and "'time_ids': yours" in own
    page.get_by_role("button", name="Unpin A").press("Enter")

    # As many steps as there are take long enough to be stopped in the middle.
    notebook.press("num inference steps", "End")
    notebook.wait_for("diffusers, step")
    assert notebook.opacities() == (0.4, 0.4, 0.4), "what is shown is of the case before"
    page.get_by_role("button", name="Stop").press("Enter")
    notebook.wait_for("stopped")
    assert notebook.opacities() == (0.4, 0.4, 0.4), "and still is"
    page.get_by_role("button", name="Back to what is shown").press("Enter")
    notebook.wait_shown("num inference steps 4", "fps 9", "your code")
    assert notebook.opacities() == (1.0, 1.0, 1.0)
    notebook.choose("fix off")
    notebook.wait_shown("fps 9", "fix off")
    assert notebook.number() == said(moved.off), "a stopped run leaves nothing behind"
    assert notebook.verdict().startswith("yes")


def test_the_guidance(browser: Any, server: str, lab: Lab) -> None:
    notebook = Notebook(browser, server, "04_per_frame_guidance")
    notebook.wait_shown("guidance_per_step")
    plot, clips = notebook.pictures()
    notebook.press("min guidance scale", "ArrowRight", times=3)
    notebook.press("max guidance scale", "ArrowLeft", times=4)
    settings = lab.settings(num_inference_steps=4, min_guidance_scale=1.3, max_guidance_scale=2.6)
    for bug, first, then in (("guidance_per_step", "off", "on"), ("guidance_constant", "on", "off")):
        notebook.page.get_by_label("the bug").select_option(bug)
        notebook.wait_shown("min guidance scale 1.3", "max guidance scale 2.6", bug)
        assert notebook.pictures()[0] != plot and notebook.pictures()[1] != clips
        plot, clips = notebook.pictures()
        case = lab.case(settings, bug)
        assert notebook.number() == said(case.comparison(first))
        notebook.choose(f"fix {then}")
        notebook.page.get_by_text(f"svdlab, fix {then}").wait_for()
        assert notebook.number() == said(case.comparison(then))


class Inspected:
    """The last tensor inspector of a page, and what it says."""

    def __init__(self, page: Any, traces: dict[str, Trace]):
        self.root, self.traces = page.locator(".svdlab-inspector").last, traces

    def wait_for(self, probe: str) -> None:
        self.root.locator(".title b", has_text=re.compile(f"^{re.escape(probe)}$")).wait_for()

    def index(self) -> list[int]:
        return json.loads(self.root.get_by_label("index", exact=True).inner_text())

    def check(self, probe: str) -> None:
        """What it says of the place under the cursor are the tensors' own values, to the last bit."""
        at = tuple(self.index())
        r, c = (self.traces[role][probe][at].numpy() for role in ("reference", "candidate"))
        _, reference, candidate, difference = self.root.locator(".readout output").all_inner_texts()
        assert np.float32(reference) == r and np.float32(candidate) == c
        assert float(difference) == np.float64(c) - np.float64(r)


def test_a_click_in_the_plot_opens_the_inspector(browser: Any, server: str, lab: Lab) -> None:
    notebook = Notebook(browser, server, "01_fps_conditioning")
    notebook.wait_shown("fps 7")
    page, start = notebook.page, lab.settings(num_inference_steps=4)
    points = page.locator(".svdlab-panel-plot .mark-symbol path[fill='#CC79A7']")  # your code's, above the others

    def check(probe: str, which: Choice, settings: GenerationSettings) -> None:
        """It names the probe, and says of every place what the tensors of the case have there."""
        case = lab.case(settings, "fps_not_decremented")
        shown = Inspected(page, case.comparison(which).traces)
        shown.wait_for(probe)
        page.wait_for_function("() => !document.querySelector('.svdlab-panel .svdlab-stale')")
        shown.root.locator("figcaption", has_text=f"svdlab, fix {which}").wait_for()
        shown.check(probe)
        if shown.root.locator("canvas").count():
            shown.root.locator("canvas").nth(1).hover(position={"x": 3, "y": 3})
            assert shown.index()[-2:] == [0, 0]
            shown.check(probe)

    probes = [p.name for p in lab.case(start, "fps_not_decremented").on.probes]
    for probe in ("latents.001", "image_embeddings", "noise_pred.000"):
        points.nth(probes.index(probe)).click()
        page.mouse.move(0, 0)  # so that no text is above the next one
        check(probe, "off", start)
    assert page.locator(".svdlab-inspector").count() == 1
    notebook.choose("fix on")
    check("noise_pred.000", "on", start)
    notebook.press("fps", "ArrowRight", times=2)
    notebook.wait_shown("fps 9", "fix on")
    check("noise_pred.000", "on", start.replace(fps=9))
    page.locator(".svdlab-panel").get_by_role("button", name="Close").press("Enter")
    page.locator(".svdlab-inspector").wait_for(state="detached")


def test_a_reader_brings_a_file(browser: Any, server: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    notebook = Notebook(browser, server, "09_diagnose_a_port")
    page = notebook.page
    field = page.get_by_label("the port's trace")
    field.fill("not-there.safetensors")
    field.press("Tab")
    page.keyboard.press("Enter")
    notebook.wait_for("not-there.safetensors")
    page.get_by_role("button", name="Write reference").press("Enter")
    notebook.wait_for("wrote reference.safetensors")
    paths = tmp_path_factory.getbasetemp().glob("jupyter*/notebooks/reference.safetensors")
    (written,) = {path.resolve() for path in paths}  # one of the folders is a link
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload the port's trace").click()
    chooser.value.set_files(str(written))
    notebook.wait_for("reference.safetensors: done")
    page.get_by_text("At parity: nothing is wrong").first.wait_for()
    same = Trace.open(written)
    inspected = Inspected(page, {"reference": same, "candidate": same})
    inspected.check(inspected.root.locator(".title b").inner_text())


SHOWS = """import torch
from svdlab.notebook import Player
one, two = (torch.rand(3, 3, 8, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
Player({"one": one, "two": two}, fps, blink=True)"""
INSPECTS = """from svdlab import GenerationSettings
from svdlab.notebook import Inspector
from svdlab.parity import Trace
from svdlab.parity.compare import compare
settings = GenerationSettings(height=64, width=64, num_frames=3, num_inference_steps=2)
names = ("latents.000", "latents.001", "input.noise")
new = lambda name: torch.randn((1, 3, 64, 64) if name == "input.noise" else (1, 3, 4, 8, 8))
reference = Trace({name: new(name) for name in names}, settings, "one")
candidate = Trace({name: tensor + 0.1 for name, tensor in reference.items()}, settings, "two")
for trace in (reference, candidate):
    trace.save(f"{trace.implementation}.safetensors")
Inspector(compare(reference, candidate), ["latents.000", "latents.001"])"""


CHART = "from svdlab.notebook import plot_curves\nplot_curves([1, 2], {'one': [1, 2], 'two': [2, 1]}, ('x', 'y'))"


EXPLORES = """from svdlab.notebook import Explorer
from svdlab.parity.lab import Choice, Lab
lab = Lab(model)
settings = lab.settings(num_frames=3, num_inference_steps=2, height=32, width=32)
Explorer(lab, settings, ["guidance_per_step", "guidance_constant"], ["max_guidance_scale"],
         [{"max_guidance_scale": scale} for scale in (2.0, 3.0, 6.0)])"""


def accessible(page: Any) -> None:
    """axe-core finds nothing serious, in either colour scheme."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        serious = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
        assert not serious, scheme


def drawn(page: Any, within: str = "") -> list[np.ndarray]:
    """The pixels of every canvas, (H, W, 3)."""
    read = (
        "all => all.map(c => [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]])"
    )
    found = page.locator(f"{within} .svdlab-player canvas").evaluate_all(read)
    return [np.array(data, np.uint8).reshape(height, width, 4)[..., :3] for height, width, data in found]


def reported(folder: Path, cells: list[Any]) -> NotebookResult:
    """The report, in ``out``, of a notebook ``one`` with these cells."""
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    nbformat.write(made, folder / "one.ipynb")
    (result,) = run_report([folder / "one.ipynb"], folder / "out")
    return result


def offline(browser: Any, path: Path) -> tuple[Any, list[str]]:
    """A file in a page without a network, and what the page asks for from then on."""
    context, asked = browser.new_context(offline=True), list[str]()
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.set_default_timeout(COMPUTE_MS)
    page.goto(path.as_uri())
    return page, asked


def test_a_report_opens_offline(browser: Any, tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A page\n\n$$x = \\frac{1}{2}$$"),
        nbformat.v4.new_code_cell("fps = 7", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(SHOWS),
        nbformat.v4.new_code_cell(INSPECTS),
        nbformat.v4.new_code_cell(CHART),
        nbformat.v4.new_code_cell("from svdlab.report import record\nrecord('so', True, ratio=1.0)"),
    ]
    assert reported(tmp_path, cells).status == "passed"
    page, asked = offline(browser, tmp_path / "out/index.html")
    page.get_by_role("link", name="A page").first.click()
    page.locator("math mfrac").wait_for()
    page.locator(".svdlab-chart svg").wait_for()
    accessible(page)
    page.locator(".found .svdlab-player").evaluate("figure => figure.remove()")  # at the top, it plays on its own
    page.get_by_role("button", name="Pause").click()
    page.get_by_label("frame", exact=True).first.press("End")
    page.get_by_role("button", name="One frame back").press("Enter")
    page.get_by_text("frame 2 of 3").wait_for()
    scope: dict[str, Any] = {"fps": 7}
    exec(SHOWS.rpartition("\n")[0], scope)
    made = [to_levels(scope[name])[1] for name in ("one", "two")]
    assert all(map(np.array_equal, drawn(page), made)), "what is drawn are the frames, to the last bit"
    page.get_by_role("button", name="Blink").press("Enter")
    page.wait_for_function("() => document.querySelector('.svdlab-player .title').textContent === 'two'")
    assert np.array_equal(drawn(page)[0], made[1]), "the second in the place of the first"

    files = {"reference": "one", "candidate": "two"}
    inspected = Inspected(page, {role: Trace.open(tmp_path / f"{name}.safetensors") for role, name in files.items()})
    inspected.wait_for("latents.000")
    inspected.check("latents.000")
    inspected.root.get_by_role("listbox").press("ArrowDown")
    inspected.wait_for("latents.001")
    assert "This page carries 2 of 3 tensors; a notebook with a kernel shows input.noise, too." in page.content()
    for label, at in (("frame", 2), ("channel", 3)):
        inspected.root.get_by_label(label, exact=True).last.press("End")
        assert at in inspected.index()
        inspected.check("latents.001")

    page.get_by_role("link", name="All verdicts").first.click()
    page.get_by_text("1 of 1 notebooks passed").wait_for()
    accessible(page)
    page.context.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]


def test_the_sliders_of_a_fix_move_offline(browser: Any, tmp_path: Path, tiny: Path) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A fix"),
        nbformat.v4.new_code_cell(f"model = {str(tiny)!r}", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(EXPLORES),
    ]
    assert not reported(tmp_path, cells).error
    page, asked = offline(browser, tmp_path / "out/one.html")
    grid, lab = page.locator(".svdlab-fix-grid"), Lab(str(tiny))
    start = lab.settings(num_frames=3, num_inference_steps=2, height=32, width=32)
    grid.get_by_role("button", name="Pause").press("Enter")
    grid.get_by_label("frame", exact=True).press("End")

    def check(which: Choice, bug: str, scale: float) -> None:
        """Every part of the figure is of one case, at the frame at which the clips stand."""
        page.get_by_text(f"Shown: fix {which}, {bug}, max guidance scale {scale:g}", exact=True).wait_for()
        case = lab.case(start.replace(max_guidance_scale=scale), bug)
        assert grid.locator("h3").inner_text().startswith(f"{bug}: ")
        assert grid.locator(".number output").inner_text() == ratio_text(case.comparison(which))
        page.locator(".svdlab-fix-grid .title", has_text=f"svdlab, fix {which}").wait_for()
        page.get_by_text("frame 3 of 3").last.wait_for()
        frames = case.comparison(which).traces["candidate"]["frames"][0]
        assert np.array_equal(drawn(page, ".svdlab-fix-grid")[1], to_levels(frames)[2])
        first = case.off["guidance_scale"].divergence
        page.locator(".svdlab-fix-grid .svdlab-chart svg").wait_for()
        page.get_by_role("img", name=f"fix off ({bug}): {case.off.summary()}").wait_for()
        point = grid.locator(".svdlab-chart .mark-symbol path[fill='#D55E00']")
        point.nth([p.name for p in case.off.probes].index("guidance_scale")).hover()
        hovered = page.locator("#vg-tooltip-element")
        hovered.get_by_text(f"fix off ({bug})").wait_for()
        values = dict(
            zip(hovered.locator("td.key").all_inner_texts(), hovered.locator("td.value").all_inner_texts(), strict=True)
        )
        assert values["probe"] == "guidance_scale" and float(values["distance"]) == pytest.approx(first, rel=1e-2)
        page.mouse.move(0, 0)

    check("off", "guidance_per_step", 3)
    slider = grid.get_by_label("max guidance scale")
    assert slider.get_attribute("aria-valuetext") == "3"
    slider.press("ArrowRight")
    check("off", "guidance_per_step", 6)
    grid.get_by_role("radio", name="fix off").press("ArrowRight")
    check("on", "guidance_per_step", 6)
    grid.get_by_label("the bug").select_option("guidance_constant")
    slider.press("Home")
    check("on", "guidance_constant", 2)
    accessible(page)
    page.context.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]


def test_a_sweep(browser: Any, server: str, tmp_path: Path) -> None:
    notebook = Notebook(browser, server, "08_parameter_sweep")
    page = notebook.page
    assert notebook.verdict().startswith("yes"), "run from top to bottom before anybody touches it"
    notebook.wait_for("done, 9 of 9 points")
    assert "sweeps/fps-max_guidance_scale, and resumed from there" in page.get_by_text("Kept in ").inner_text()
    run, load = (page.locator(".jupyter-button", has_text=text) for text in ("Run", "Load"))

    for label, values in (("values 1", "7, 0"), ("values 2", "1, 3")):
        page.get_by_label(label, exact=True).fill(values)
        page.keyboard.press("Tab")
    run.press("Enter")
    page.get_by_role("alert").get_by_text("fps: got 0, allowed: integer >= 1").wait_for()
    page.get_by_label("values 1", exact=True).fill("7:9:2")
    page.keyboard.press("Tab")
    run.press("Enter")
    notebook.wait_for("done, 4 of 4 points")
    page.get_by_text("holds another sweep, which stays as it is").wait_for()
    board = page.locator(".svdlab-board").first
    cells = board.get_by_role("button", name=re.compile("^fps "))
    assert cells.count() == 4

    settings = GenerationSettings(num_inference_steps=4)
    own = run_sweep(tmp_path, grid({"fps": [7, 9], "max_guidance_scale": [1.0, 3.0]}), settings, threads=1)
    first, chosen = own.at(fps=7, max_guidance_scale=1.0), own.at(fps=9, max_guidance_scale=3.0)
    _marks_and_one_clock(board, own, first, chosen)

    page.get_by_label("folder", exact=True).fill(str(tmp_path))
    page.keyboard.press("Tab")
    load.press("Enter")
    notebook.wait_for("loaded, 4 of 4 points")
    exported = export_sweep(own, tmp_path / "board.html")
    assert exported.stat().st_size < 3e6
    context = browser.new_context(offline=True)
    offline = context.new_page()
    problems: list[str] = []
    offline.on("console", lambda message: problems.append(message.text))
    offline.goto(exported.as_uri())
    _marks_and_one_clock(offline.locator(".svdlab-board"), own, first, chosen)
    context.close()
    assert not problems


# The part of a film's picture that is in sight, in the picture's own pixels.
IN_SIGHT = """film => {
    const picture = film.firstElementChild, [whole, part] = [picture, film].map(e => e.getBoundingClientRect());
    const scale = picture.naturalWidth / whole.width;
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [part.width, part.height].map(side => Math.round(side * scale));
    const context = canvas.getContext('2d');
    context.drawImage(picture, ...['left', 'top'].map(side => Math.round((whole[side] - part[side]) * scale)));
    return [canvas.height, canvas.width, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""


def _marks_and_one_clock(board: Any, sweep: Sweep, first: str, chosen: str) -> None:
    """Press a cell, press a number of a heat map, step back from the last frame: what is seen is the sweep's."""
    board.locator(f"button[data-point='{first}']:not(.heat)").press("Enter")
    marked = "all => all.map(one => one.dataset.point)"
    assert set(board.locator(".marked").evaluate_all(marked)) == {first}
    board.locator(f".heat[data-point='{chosen}']").last.click()
    assert board.locator(".marked").evaluate_all(marked) == [chosen] * 4, "its clip, and its number in three heat maps"
    beside = board.get_by_label("chosen")
    assert "fps 9, max guidance scale 3" in beside.inner_text()
    assert f"{sweep.metrics(chosen)['motion']:.3g} grey levels" in beside.inner_text()

    board.get_by_role("button", name="Pause").press("Enter")
    board.get_by_label("frame", exact=True).press("End")
    board.get_by_role("button", name="One frame back").press("Enter")
    last = len(sweep.frames(chosen)) - 1
    board.get_by_text(f"frame {last} of {last + 1}").wait_for()
    films = board.locator(".film:visible")
    assert films.evaluate_all("all => all.map(one => Number(one.dataset.frame))") == [last - 1] * 5
    for identity in sweep.plan.points:
        film = board.locator(f"button[data-point='{identity}'] .film")
        height, width, pixels = film.evaluate(IN_SIGHT)
        seen = np.array(pixels, np.uint8).reshape(height, width, 4)[..., :3]
        assert np.array_equal(seen, sweep.frames(identity)[last - 1]), "the frame itself, to the last bit"
