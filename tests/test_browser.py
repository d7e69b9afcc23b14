"""The notebooks in a real JupyterLab, moved by the keyboard of a real browser.

Skipped where Chromium or Playwright is missing, unless SVDLAB_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from svdlab.lab import Lab, ratio_text
from svdlab.parity.compare import Comparison

ROOT = Path(__file__).parent.parent
REQUIRED = os.environ.get("SVDLAB_REQUIRE_BROWSER") == "1"
TOKEN = "svdlab-browser-test"
# Waits for something to appear, generous; nothing is measured by them.
START_S, COMPUTE_MS = 120, 180_000
# Cells that are out of sight are in the page all the same, and nothing pops up over them.
LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def _missing() -> str:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install 'svdlab[dev]'"
    return "" if _chromium() else "no chromium on the PATH: apt-get install chromium"


pytestmark = pytest.mark.skipif(bool(_missing()) and not REQUIRED, reason=_missing() or "it is there")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab over a copy of the notebooks, on a free port of this machine."""
    folder = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name, settings in LAB_SETTINGS.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PYTHONPATH": str(ROOT),
        # As many as in this process, so that both round alike.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.root_dir": folder / "notebooks",
        "ServerApp.allow_root": True,
        "IdentityProvider.token": TOKEN,
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not _answers(f"{url}/api/status?token={TOKEN}"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Notebook:
    """A notebook that was opened in JupyterLab and run from top to bottom."""

    def __init__(self, browser: Any, url: str, name: str):
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000})
        self.page.set_default_timeout(COMPUTE_MS)
        self.page.goto(f"{url}/lab/workspaces/{name}/tree/{name}.ipynb?token={TOKEN}")
        self.page.get_by_text("| Idle").wait_for()  # cells that are run before the kernel is there never run
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()

    def press(self, label: str, key: str, times: int = 1) -> None:
        """Keys on the slider of that name."""
        row = self.page.locator(".widget-slider", has=self.page.get_by_text(label, exact=True))
        handle = row.get_by_role("slider")
        for _ in range(times):
            handle.press(key)

    def wait_for(self, status: str) -> None:
        self.page.locator("[role=status]", has_text=re.compile(f"^{status}")).wait_for()

    def toggle_fix(self) -> None:
        self.page.get_by_label("fix on").press("Space")

    def number(self) -> tuple[str, str]:
        """The noise ratio under the plot, and the verdict beside it."""
        line = self.page.locator(".widget-html b", has=self.page.locator("output"))
        ratio, verdict = line.inner_text().removeprefix("noise ratio ").split(", ")
        return ratio, verdict

    def pictures(self) -> tuple[str, str]:
        """The plot and the clips."""
        plot, clips = (self.page.locator(f".widget-html {tag}").get_attribute("src") for tag in ("img", "video"))
        return plot, clips

    def wait_for_other(self, plot: str) -> None:
        """Until the plot is another one and nothing is computed."""
        self.page.wait_for_function(
            "before => document.querySelector('.widget-html img').getAttribute('src') != before", arg=plot
        )
        self.wait_for("done")

    def verdict(self) -> str:
        """What the closing cell recorded."""
        return self.page.locator(".jp-OutputArea-output", has_text=re.compile("^(yes|NO)")).last.inner_text()


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
