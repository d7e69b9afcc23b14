"""The notebooks in a real JupyterLab, moved by the keyboard of a real browser.

Skipped where Chromium or Playwright is missing, unless SVDLAB_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_page import Notebook, chromium, jupyter_lab

from svdlab.lab import Lab, ratio_text
from svdlab.parity.compare import Comparison


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


def said(comparison: Comparison) -> tuple[str, str]:
    return ratio_text(comparison), comparison.verdict


def test_the_frame_rate(browser: Any, server: str, lab: Lab) -> None:
    notebook = Notebook(browser, server, "01_fps_conditioning")
    notebook.wait_for("done")
    start = lab.settings(num_inference_steps=4)
    assert notebook.number() == said(lab.case(start, "fps_not_decremented").on)
    plot, clips = notebook.pictures()

    notebook.press("fps", "ArrowRight", times=2)
    notebook.wait_for_other(plot)
    moved = lab.case(start.replace(fps=9), "fps_not_decremented")
    assert notebook.number() == said(moved.on)
    assert notebook.pictures()[1] != clips, "another clip"

    plot, clips = notebook.pictures()
    notebook.toggle_fix()
    notebook.page.get_by_text("svdlab, fix off").wait_for()
    assert notebook.number() == said(moved.off) and notebook.number()[1] == "divergence"
    assert notebook.pictures()[0] == plot and notebook.pictures()[1] != clips, "the plot has both lines, the clip one"

    notebook.press("fps", "ArrowRight", times=5)
    notebook.wait_for("diffusers, step")
    notebook.page.get_by_role("button", name="Stop").press("Enter")
    notebook.wait_for("stopped")
    notebook.press("fps", "ArrowLeft", times=5)
    notebook.wait_for("done")
    assert notebook.number() == said(moved.off), "a stopped run leaves nothing behind"
    assert notebook.verdict().startswith("yes")


def test_the_guidance(browser: Any, server: str, lab: Lab) -> None:
    notebook = Notebook(browser, server, "04_per_frame_guidance")
    notebook.wait_for("done")
    plot, clips = notebook.pictures()
    notebook.press("min guidance scale", "ArrowRight", times=3)
    notebook.press("max guidance scale", "ArrowLeft", times=4)
    notebook.wait_for_other(plot)
    settings = lab.settings(num_inference_steps=4, min_guidance_scale=1.3, max_guidance_scale=2.6)
    for bug in ("guidance_per_step", "guidance_constant"):
        case = lab.case(settings, bug)
        assert notebook.number() == said(case.on)
        notebook.toggle_fix()
        notebook.page.get_by_text(f"Fix off ({bug})").wait_for()
        assert notebook.number() == said(case.off)
        notebook.toggle_fix()
        plot = notebook.pictures()[0]
        notebook.page.get_by_label("the bug").select_option("guidance_constant")
        if bug == "guidance_per_step":
            notebook.wait_for_other(plot)
    assert notebook.pictures()[1] != clips
