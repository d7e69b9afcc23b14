"""What every notebook in git keeps to, and what one says when nobody is there to move its sliders."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from page_text import PAGE_BYTES, asked_in_vain, visible

from svdlab.notebook.tables import NOTEBOOK_OF
from svdlab.parity.bugs import BUGS
from svdlab.parity.demo import SETTINGS, SIX
from svdlab.report.pages import LIVE
from svdlab.report.run import run_report

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "outputs are stripped in git"
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"], "the question comes first"
    assert "parameters" in code[0]["metadata"].get("tags", [])
    assert "record(" in "".join(code[-1]["source"]), "the closing cell records the verdict"
    for cell in code:
        source = "".join(cell["source"])
        ast.parse(source)
        assert len(source.splitlines()) <= 25, "a code cell fits on a screen"


# What a page has of what a notebook shows.
SHOWN = {"Explorer": "svdlab-fix-grid", "Inspector": "svdlab-inspector", "Player": "svdlab-player"}
SHOWN |= dict.fromkeys(["SweepExplorer", "show_sweep"], "svdlab-board")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_page_asks_for_nothing_that_takes_a_kernel(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    calls = {getattr(node.func, "id", "") for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    controls = " ".join(name for made, name in SHOWN.items() if made in calls)
    for cell in cells:
        if cell["cell_type"] == "markdown" and LIVE not in cell["metadata"].get("tags", []):
            assert not asked_in_vain("".join(cell["source"]), controls)


def test_a_sentence_about_an_absent_control_is_found() -> None:
    for said in (
        "Move the slider.",
        "Press the first button",
        "Read it, and press Diagnose.",
        "A click on a clip marks it.",
        "With `case.on` in the place of `case.off` it is right.",
        "1. Upload its file, or type where it is",
        "It is done by the cell above: edit it and run it again.",
    ):
        assert asked_in_vain(said, "")
    assert not asked_in_vain("The slider moves along.", '<figure class="svdlab-fix-grid">')
    assert not asked_in_vain("They change the clip; a port may choose the wrong one, and its type is the same.", "")


def test_the_report_s_finding_is_the_readme_s() -> None:
    """Both count the bugs that the usual threshold misses: at the settings of docs/catalogue.md."""
    (path,) = (p for p in NOTEBOOKS if p.stem == "07_full_parity")
    cells = json.loads(path.read_text())["cells"]
    (source,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    given: dict[str, object] = {}
    exec(source, given)
    found = [given[f"catalogue_{name}"] for name in ("frames", "steps", "seed")]
    assert found == [SETTINGS.num_frames, SETTINGS.num_inference_steps, SETTINGS.seed]


def test_a_notebook_with_sliders_speaks_without_them(tiny: Path, tmp_path: Path) -> None:
    (path,) = (p for p in NOTEBOOKS if p.stem == "01_fps_conditioning")
    small = {"model": str(tiny), "num_frames": 2, "height": 32, "width": 32, "num_inference_steps": 1, "fps_grid": [3]}
    (result,) = run_report([path], tmp_path, small)
    assert result.status == "passed", result.error
    assert result.verdicts[0]["numbers"]["settings_seen"] == 2, "the start and the grid"
    page = (tmp_path / result.page).read_text()
    assert len(page) < PAGE_BYTES
    players = re.findall(r'<figure [^>]*class="svdlab-player"', page)
    assert "At every setting" in page and len(players) == 3, "at the top, with the slider, your code"
    assert len(re.findall(r'<figure [^>]*class="svdlab-fix-grid"', page)) == 1
    assert "widget-view" not in page, "there is no kernel behind the page"
    assert "time_ids is one small function" in visible(page) and not asked_in_vain(visible(page), page)


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.stem[:2] in ("01", "02", "03", "04", "05", "06")], ids=lambda p: p.stem
)
def test_a_fix_is_told_in_full(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    story = "".join(cells[0]["source"])
    assert "$$" in story and "**diffusers**" in story and ".py:" in story, "the formula, and where diffusers has it"
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (explorer,) = (call for call in calls if getattr(call.func, "id", "") == "Explorer")
    given = {keyword.arg: keyword.value for keyword in explorer.keywords}
    bugs, sliders = (ast.literal_eval(given[name]) for name in ("bugs", "sliders"))
    assert bugs and all(bug in BUGS and f"`{bug}`" in story for bug in bugs), "every bug of the sliders is told"
    assert {"fps", "min_guidance_scale", "max_guidance_scale"} <= set(sliders)
    assert [bug for bug, name in NOTEBOOK_OF.items() if name == path.stem] == bugs, "where a verdict sends its reader"


def test_the_hidden_bugs_are_those_of_the_demo() -> None:
    (path,) = (p for p in NOTEBOOKS if p.stem == "09_diagnose_a_port")
    cells = json.loads(path.read_text())["cells"]
    (parameters,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    given = {node.targets[0].id: node.value for node in ast.parse("".join(parameters["source"])).body}  # type: ignore[attr-defined]
    assert ast.literal_eval(given["hidden_bugs"]) == list(SIX)
    assert list(given) == "model device dtype num_inference_steps num_frames seed".split() + [
        "hidden_bugs",
        "port_trace",
        "reference_trace",
    ]
