"""A JupyterLab over the notebooks, and a hand that opens one, runs it and moves its sliders by the keyboard."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOKEN = "svdlab-browser-test"
# Waits for something to appear, generous; nothing is measured by them.
START_S, COMPUTE_MS = 300, 600_000
# Cells that are out of sight are in the page all the same, and nothing pops up over them.
LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def chromium() -> str | None:
    """The browser's program, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """The address of a JupyterLab over a copy of the notebooks in ``folder``, on a free port of this machine."""
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
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


class Notebook:
    """A notebook that was opened in JupyterLab and run from top to bottom."""

    def __init__(self, browser: Any, url: str, name: str):
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000})
        self.page.set_default_timeout(COMPUTE_MS)
        self.page.set_default_navigation_timeout(COMPUTE_MS)
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

    def choose(self, text: str) -> None:
        """Press one of the buttons "fix off", "fix on", "your code"."""
        self.page.get_by_role("button", name=text, exact=True).press("Enter")

    def number(self) -> tuple[str, str]:
        """The noise ratio of what is shown, and the verdict beside it."""
        line = self.page.locator(".svdlab-panel .widget-html b", has=self.page.locator("output"))
        ratio, verdict = line.inner_text().removeprefix("noise ratio ").split(", ")
        return ratio, verdict

    def pictures(self) -> tuple[str, str]:
        """The plot and the clips."""
        plot = self.page.locator(".svdlab-panel-plot svg").inner_html()
        read = "all => all.map(c => c.toDataURL()).join()"
        return plot, self.page.locator(".svdlab-panel .svdlab-player canvas").evaluate_all(read)

    def opacities(self) -> tuple[float, ...]:
        """How opaque the browser draws the plot, the clips and the code."""
        inner = (".svdlab-chart-widget", ".svdlab-player", "text=Copy code")
        boxes = (self.page.locator(".svdlab-panel .widget-vbox", has=self.page.locator(one)).last for one in inner)
        return tuple(box.evaluate("element => Number(getComputedStyle(element).opacity)") for box in boxes)

    def wait_shown(self, *words: str) -> None:
        """Until all of a case is there whose settings, or whose bug, are those words, and nothing is computed."""
        self.page.wait_for_function(
            """words => {
                const html = [...document.querySelectorAll('.widget-html')].map(e => e.textContent);
                const shown = html.find(text => text.startsWith('Shown: ')) || '';
                const parts = shown.replace('Shown: ', '').split(', ');
                const done = document.querySelector('[role=status]')?.textContent === 'done';
                const number = document.querySelector('.svdlab-panel .widget-html output');
                return done && number && words.every(w => parts.includes(w));
            }""",
            arg=list(words),
        )

    def verdict(self) -> str:
        """What the closing cell recorded."""
        return self.page.locator(".jp-OutputArea-output", has_text=re.compile("^(yes|NO)")).last.inner_text()
