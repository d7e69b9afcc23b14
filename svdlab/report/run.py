"""Every notebook, run headless by papermill in a process of its own: ``svdlab report``."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from svdlab.errors import SvdlabError
from svdlab.files import write_json, write_text
from svdlab.report.pages import index_page, junit, notebook_page
from svdlab.report.results import NotebookResult
from svdlab.report.verdict import VERDICT

_PACKAGES = ("svdlab", "torch", "diffusers", "transformers", "numpy", "papermill")


def run_report(
    notebooks: Sequence[Path],
    out: Path,
    parameters: Mapping[str, Any] | None = None,
    workers: int = 2,
    timeout: float | None = None,
    previous: Mapping[str, Any] | None = None,
) -> list[NotebookResult]:
    """Run notebooks with papermill and write a page for each, ``index.html``, ``results.json`` and ``report.xml``.

    Every file is self-contained; the index links to the pages beside it.

    Args:
        notebooks: the files.
        out: folder for the pages, made if needed.
        parameters: papermill parameters; each notebook gets those that its parameters cell has.
        workers: how many run at once; the cores are divided among them.
        timeout: seconds that one notebook may take.
        previous: an earlier report's ``results.json``, to show what changed.

    Returns:
        One result per notebook, in the given order. A failing notebook does not stop the others; an interruption leaves
        the report of those that are done.
    """
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Spinning OpenMP teams that share cores are tens of times slower: every process gets its own share.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    results: dict[Path, NotebookResult] = {}
    given, started = dict(parameters or {}), time.perf_counter()
    titles = {path: title_of(path) for path in notebooks}
    pages = [(f"{path.stem}.html", titles[path]) for path in notebooks]
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(notebooks), desc="notebooks", unit="notebook") as bar:
        futures = {
            pool.submit(_run_one, path, titles[path], out, pages, given, environment, timeout): path
            for path in notebooks
        }
        try:
            for future in as_completed(futures):
                result = results[futures[future]] = future.result()
                bar.set_postfix_str(f"{result.name} {result.status}")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            seconds = time.perf_counter() - started
            _write(out, [results[path] for path in notebooks if path in results], given, seconds, previous)
    return [results[path] for path in notebooks]


def _write(
    out: Path,
    results: Sequence[NotebookResult],
    parameters: Mapping[str, Any],
    seconds: float,
    previous: Mapping[str, Any] | None,
) -> None:
    made = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    about = {"made": made, "seconds": seconds, "parameters": dict(parameters), "versions": _versions()}
    write_json(out / "results.json", {**about, "notebooks": [r.to_dict() for r in results]})
    write_text(out / "report.xml", junit(results))
    write_text(out / "index.html", index_page(results, about, previous))


# Runs in a process of its own: the parameters that the notebook has, printed, then the notebook.
_PAPERMILL = """
import json, sys, papermill
source, executed, given, folder = sys.argv[1:]
known = papermill.inspect_notebook(source)
given = {k: v for k, v in json.loads(given).items() if k in known}
print(json.dumps({k: [v["default"], *([given[k]] if k in given else [])] for k, v in known.items()}), flush=True)
papermill.execute_notebook(
    source, executed, parameters=given, kernel_name="python3", cwd=folder, progress_bar=False, start_timeout=600
)
"""


def _run_one(
    path: Path,
    title: str,
    out: Path,
    pages: Sequence[tuple[str, str]],
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    timeout: float | None,
) -> NotebookResult:
    """One notebook in a process of its own, then its page."""
    started = time.perf_counter()
    result = NotebookResult(path.stem, "error", 0.0, [], title=title)
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / path.name
        command = [sys.executable, "-c", _PAPERMILL, str(path), str(executed), json.dumps(parameters), str(path.parent)]
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
            printed = run.stdout
            if run.returncode:
                result.error = _printable((run.stderr.strip().splitlines() or ["no message"])[-1])
        except subprocess.TimeoutExpired as expired:
            printed = (expired.stdout or b"").decode()
            result.error = f"stopped after {timeout:g} s (--timeout)"
        result.parameters = _effective(printed)
        try:
            result.verdicts, result.thumbnail = read_verdicts(executed), first_picture(executed, title)
        except (OSError, ValueError, KeyError) as problem:
            result.error = result.error or f"no notebook was written: {problem}"
        passed = all(v["passed"] for v in result.verdicts)
        result.status = "error" if result.error else "passed" if passed else "failed"
        result.seconds = time.perf_counter() - started
        if executed.exists():
            result.page = f"{path.stem}.html"
            write_text(out / result.page, notebook_page(executed, result, pages))
    return result


def _effective(printed: str) -> dict[str, Any]:
    """The values of a notebook's parameters: what was given, else what its cell says."""
    found = {}
    for name, (default, *given) in json.loads(printed.partition("\n")[0] or "{}").items():
        try:
            found[name] = given[0] if given else ast.literal_eval(default)
        except (ValueError, SyntaxError):
            found[name] = default
    return found


def title_of(notebook: Path) -> str:
    """A notebook's first heading, or its file's name."""
    for cell in _cells(notebook):
        if cell["cell_type"] == "markdown" and (found := re.search(r"^# (.+)$", "".join(cell["source"]), re.MULTILINE)):
            return found[1].strip()
    return notebook.stem


def _cells(notebook: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError):
        raise SvdlabError(f"{notebook}: not a notebook, allowed: *.ipynb of format 4") from None


def _outputs(executed: Path) -> list[dict[str, Any]]:
    """The displayed data of an executed notebook, in order, by type."""
    return [output["data"] for cell in _cells(executed) for output in cell.get("outputs", []) if "data" in output]


def read_verdicts(executed: Path) -> list[dict[str, Any]]:
    """What ``record`` left in an executed notebook, in order."""
    return [data[VERDICT] for data in _outputs(executed) if VERDICT in data]


def first_picture(executed: Path, alt: str) -> str:
    """The first player that carries its clip, or else the first picture, as HTML that carries it too; or nothing."""
    outputs, text = _outputs(executed), escape(f"from {alt}")
    html = "".join("".join(data.get("text/html", "")) for data in outputs)
    if found := re.search(r'src="(data:video/mp4;base64,[A-Za-z0-9+/=]+)"', html):
        return f'<video autoplay loop muted playsinline aria-label="{text}" src="{found[1]}"></video>'
    if found := re.search(r'src="(data:image/png;base64,[A-Za-z0-9+/=]+)"', html):
        return f'<img alt="{text}" src="{found[1]}">'
    for data in outputs:
        if png := re.fullmatch(r"[A-Za-z0-9+/=\s]+", "".join(data.get("image/png", ""))):
            return f'<img alt="{text}" src="data:image/png;base64,{"".join(png[0].split())}">'
    return ""


def _printable(text: str) -> str:
    """XML allows no terminal colours."""
    return "".join(c for c in re.sub(r"\x1b\[[0-9;]*m", "", text) if c.isprintable())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def notebooks_at_a_time(model: str, device: str) -> int:
    """Two notebooks at a time where the memory holds both: diffusers twice (one in float64), and svdlab."""
    import psutil
    import torch

    from svdlab.svd.checkpoint import checkpoint_folder

    weights = sum(file.stat().st_size for file in checkpoint_folder(model).glob("*/*.safetensors"))
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    return 2 if 2 * 12 * weights < free else 1
