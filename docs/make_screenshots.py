"""The README's screenshot of a live notebook, taken by the browser that the tests use.

Run ``python docs/make_screenshots.py``; it writes ``docs/notebook.png``.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from jupyter_page import Notebook, chromium, jupyter_lab  # noqa: E402

with tempfile.TemporaryDirectory() as folder, jupyter_lab(Path(folder)) as url, sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
    notebook = Notebook(browser, url, "01_fps_conditioning")
    notebook.page.set_viewport_size({"width": 1280, "height": 1600})
    notebook.wait_for("done")
    notebook.toggle_fix()
    notebook.page.get_by_text("svdlab, fix off").wait_for()
    notebook.page.locator(".jp-OutputArea-output", has=notebook.page.locator(".widget-slider")).screenshot(
        path=HERE / "notebook.png"
    )
    browser.close()
