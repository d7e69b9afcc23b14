"""The README's screenshots, taken by the browser that the tests use: a live notebook, and a report.

Run ``python docs/make_screenshots.py [REPORT]`` after ``make report``; it writes ``docs/notebook.png`` and
``docs/report.png``. ``make pictures`` does all of it. REPORT is the report's folder, ``reports`` by default.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from jupyter_page import COMPUTE_MS, Notebook, chromium, jupyter_lab  # noqa: E402


def save(png: bytes, name: str) -> None:
    """Write a screenshot in 256 colours: what a repository can carry."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(HERE / name, optimize=True)
    print(f"{name}: {image.width}x{image.height}, {(HERE / name).stat().st_size // 1000} kB")


report = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "reports") / "index.html"
if not report.exists():
    sys.exit(f"{report} is not there: run make report")
with tempfile.TemporaryDirectory() as folder, jupyter_lab(Path(folder)) as url, sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])

    page = browser.new_page(viewport={"width": 1200, "height": 1150})
    page.set_default_timeout(COMPUTE_MS)
    page.goto(report.resolve().as_uri())
    page.wait_for_function("() => [...document.images].every(image => image.complete)")
    save(page.screenshot(), "report.png")

    notebook = Notebook(browser, url, "01_fps_conditioning")
    notebook.page.set_viewport_size({"width": 1280, "height": 1600})
    notebook.wait_shown("fps 7")
    save(notebook.page.locator(".svdlab-panel").screenshot(), "notebook.png")
    browser.close()
