"""The notebooks in a real JupyterLab, moved by the keyboard of a real browser.

Skipped where Chromium or Playwright is missing, unless SVDLAB_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_page import COMPUTE_MS, Notebook, chromium, jupyter_lab

from svdlab.lab import Lab, ratio_text
from svdlab.parity.compare import Comparison
from svdlab.report import run_report


def _missing() -> str:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install 'svdlab[dev]'"
    return "" if chromium() else "no chromium on the PATH: apt-get install chromium"


REQUIRED = os.environ.get("SVDLAB_REQUIRE_BROWSER") == "1"
pytestmark = pytest.mark.skipif(bool(_missing()) and not REQUIRED, reason=_missing() or "it is there")


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
    notebook.wait_shown("fps 7")
    start = lab.settings(num_inference_steps=4)
    assert notebook.number() == said(lab.case(start, "fps_not_decremented").on)
    plot, clips = notebook.pictures()

    notebook.press("fps", "ArrowRight", times=2)
    notebook.wait_shown("fps 9")
    moved = lab.case(start.replace(fps=9), "fps_not_decremented")
    assert notebook.number() == said(moved.on)
    assert notebook.pictures()[0] != plot and notebook.pictures()[1] != clips, "another plot and another clip"

    plot, clips = notebook.pictures()
    notebook.toggle_fix()
    notebook.page.get_by_text("svdlab, fix off").wait_for()
    assert notebook.number() == said(moved.off) and notebook.number()[1] == "divergence"
    assert notebook.pictures()[0] == plot and notebook.pictures()[1] != clips, "the plot has both lines, the clip one"

    # As many steps as there are take long enough to be stopped in the middle.
    notebook.press("num inference steps", "End")
    notebook.wait_for("(diffusers|svdlab).*, step")
    notebook.page.get_by_role("button", name="Stop").press("Enter")
    notebook.wait_for("stopped")
    notebook.press("num inference steps", "Home")
    notebook.wait_shown("num inference steps 1", "fps 9")
    short = lab.case(start.replace(fps=9, num_inference_steps=1), "fps_not_decremented")
    assert notebook.number() == said(short.off), "a stopped run leaves nothing behind"
    assert notebook.verdict().startswith("yes")


def test_the_guidance(browser: Any, server: str, lab: Lab) -> None:
    notebook = Notebook(browser, server, "04_per_frame_guidance")
    notebook.wait_shown("guidance_per_step")
    plot, clips = notebook.pictures()
    notebook.press("min guidance scale", "ArrowRight", times=3)
    notebook.press("max guidance scale", "ArrowLeft", times=4)
    settings = lab.settings(num_inference_steps=4, min_guidance_scale=1.3, max_guidance_scale=2.6)
    for bug in ("guidance_per_step", "guidance_constant"):
        notebook.page.get_by_label("the bug").select_option(bug)
        notebook.wait_shown("min guidance scale 1.3", "max guidance scale 2.6", bug)
        assert notebook.pictures()[0] != plot and notebook.pictures()[1] != clips
        plot, clips = notebook.pictures()
        case = lab.case(settings, bug)
        assert notebook.number() == said(case.off if bug == "guidance_constant" else case.on)
        notebook.toggle_fix()
        notebook.page.get_by_text(f"Fix {'on' if bug == 'guidance_constant' else f'off ({bug})'}:").wait_for()
        assert notebook.number() == said(case.on if bug == "guidance_constant" else case.off)


def test_a_reader_brings_a_file(browser: Any, server: str) -> None:
    notebook = Notebook(browser, server, "09_diagnose_a_port")
    field = notebook.page.get_by_label("the port's trace")
    field.fill("not-there.safetensors")
    field.press("Tab")
    notebook.page.keyboard.press("Enter")
    notebook.wait_for("not-there.safetensors")
    notebook.page.get_by_role("button", name="Write reference").press("Enter")
    notebook.wait_for("wrote reference.safetensors")
    field.fill("reference.safetensors")
    field.press("Tab")
    notebook.page.keyboard.press("Enter")
    notebook.wait_for("done")
    assert "nothing to explain" in notebook.page.locator(".widget-html", has_text="parity:").inner_text()


def test_a_report_opens_offline(browser: Any, tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A page\n\n$$x = \\frac{1}{2}$$"),
        nbformat.v4.new_code_cell("fps = 7", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import numpy as np\nfrom svdlab.clip import Clip\nClip(np.zeros((3, 16, 16, 3), np.uint8), fps)"
        ),
        nbformat.v4.new_code_cell("from svdlab.report import record\nrecord('so', True, ratio=1.0)"),
    ]
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    nbformat.write(made, tmp_path / "one.ipynb")
    (result,) = run_report([tmp_path / "one.ipynb"], tmp_path / "out")
    assert result.status == "passed", result.error
    context = browser.new_context(offline=True)
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.set_default_timeout(COMPUTE_MS)
    page.goto((tmp_path / "out/index.html").as_uri())
    page.get_by_role("link", name="A page").first.click()
    page.locator("math mfrac").wait_for()
    page.wait_for_function("() => document.querySelector('video').readyState >= 2")
    page.get_by_role("link", name="All verdicts").first.click()
    page.get_by_text("1 of 1 notebooks passed").wait_for()
    context.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
