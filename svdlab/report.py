"""Every notebook, run headless into pages that open offline: ``svdlab report``.

A notebook's closing cell calls ``record``; its verdict travels in the executed notebook as an output of its own type,
so that there is no side file and the call is harmless in a live kernel.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from svdlab.errors import SvdlabError
from svdlab.files import atomic_path, write_json, write_text
from svdlab.options import JSON

VERDICT = "application/vnd.svdlab.verdict+json"
_PACKAGES = ("svdlab", "torch", "diffusers", "transformers", "numpy", "papermill")


@dataclass(frozen=True)
class Verdict:
    """What a notebook found: a name, whether it holds, and the numbers that say so."""

    name: str
    passed: bool
    numbers: dict[str, float | str] = field(default_factory=dict)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        numbers = ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in self.numbers.items())
        word, colour = ("yes", "#00664f") if self.passed else ("NO", "#a32a00")
        text = f"{escape(self.name)}: {escape(numbers)}"
        html = f'<p style="font-size:1.1em"><b style="color:{colour}">{word}</b> {text}</p>'
        return {VERDICT: asdict(self), "text/html": html, "text/plain": f"{word}: {self.name}: {numbers}"}


def record(name: str, passed: bool, **numbers: float | int | str) -> Verdict:
    """A verdict as the last expression of a notebook's closing cell; the report collects it.

    Args:
        name: what was asked, such as "svdlab is at parity with diffusers".
        passed: the answer.
        numbers: what it rests on, shown beside it.
    """
    return Verdict(name, bool(passed), dict(numbers))


@dataclass
class NotebookResult:
    """One notebook's run: ``status`` is "passed", "failed" (a verdict is no) or "error" (a cell raised)."""

    name: str
    status: str
    seconds: float
    verdicts: list[dict[str, Any]]
    error: str = ""
    page: str = ""


def run_report(
    notebooks: Sequence[Path], out: Path, parameters: dict[str, Any] | None = None, workers: int = 2
) -> list[NotebookResult]:
    """Run notebooks with papermill, two at a time, and write a page for each, ``index.html`` and ``results.json``.

    Args:
        notebooks: the files.
        out: folder for the pages, made if needed.
        parameters: papermill parameters for every notebook.
        workers: how many run at once; the cores are divided among them.

    Returns:
        One result a notebook, in the given order. A failing notebook does not stop the others.
    """
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Spinning OpenMP teams that share cores are tens of times slower: every process gets its own share.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    results: dict[Path, NotebookResult] = {}
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(notebooks), desc="notebooks", unit="notebook") as bar:
        futures = {pool.submit(_run_one, path, out, parameters or {}, environment): path for path in notebooks}
        try:
            for future in as_completed(futures):
                result = results[futures[future]] = future.result()
                bar.set_postfix_str(f"{result.name} {result.status}")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    ordered = [results[path] for path in notebooks]
    versions = _versions()
    write_json(out / "results.json", {"versions": versions, "notebooks": [asdict(r) for r in ordered]})
    write_text(out / "index.html", _index(ordered, versions))
    return ordered


def _run_one(path: Path, out: Path, parameters: dict[str, Any], environment: dict[str, str]) -> NotebookResult:
    """One notebook in a process of its own, then its page."""
    started = time.perf_counter()
    with atomic_path(out / f".{path.stem}.executed.ipynb") as executed:
        script = (
            "import sys, json, papermill; papermill.execute_notebook(sys.argv[1], sys.argv[2], "
            "parameters=json.loads(sys.argv[3]), kernel_name='python3', cwd=sys.argv[4], progress_bar=False)"
        )
        command = [sys.executable, "-c", script, str(path), str(executed), json.dumps(parameters), str(path.parent)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        error = "" if run.returncode == 0 else (run.stderr.strip().splitlines() or ["no message"])[-1]
        try:
            verdicts = read_verdicts(executed)
            page = f"{path.stem}.html"
            write_text(out / page, _page(executed))
        except (ValueError, KeyError) as problem:
            verdicts, page, error = [], "", error or f"no notebook was written: {problem}"
    (out / f".{path.stem}.executed.ipynb").unlink(missing_ok=True)
    passed = all(v["passed"] for v in verdicts)
    status = "error" if error else "passed" if passed else "failed"
    return NotebookResult(path.stem, status, time.perf_counter() - started, verdicts, error, page)


def read_verdicts(executed: Path) -> list[dict[str, Any]]:
    """What ``record`` left in an executed notebook, in order."""
    cells = json.loads(executed.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output["data"][VERDICT] for output in outputs if VERDICT in output.get("data", {})]


def _page(executed: Path) -> str:
    """A notebook as HTML that needs no network: no mathjax, no require.js, pictures inside."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True, mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    return exporter.from_filename(str(executed))[0]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 2rem; }
th, td { text-align: left; padding: .4rem .8rem; border-bottom: 1px solid #d0d0d0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: #00664f; font-weight: 600; } .failed, .error { color: #a32a00; font-weight: 600; }
.lead { font-size: 1.15rem; }
"""


def _index(results: Sequence[NotebookResult], versions: dict[str, str]) -> str:
    good = sum(r.status == "passed" for r in results)
    verdicts = [v for r in results for v in r.verdicts]
    rows = []
    for r in results:
        found = "<br>".join(
            f'<span class="{"passed" if v["passed"] else "failed"}">{"yes" if v["passed"] else "NO"}</span> '
            f"{escape(v['name'])}"
            + "".join(f"; {escape(k.replace('_', ' '))} {escape(_shown(n))}" for k, n in v["numbers"].items())
            for v in r.verdicts
        )
        title = f'<a href="{escape(r.page)}">{escape(r.name)}</a>' if r.page else escape(r.name)
        rows.append(
            f'<tr><td>{title}</td><td class="{r.status}">{r.status}</td><td>{found}{escape(r.error)}</td>'
            f'<td class="number">{r.seconds:.0f}</td></tr>'
        )
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in versions.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>svdlab report</title>'
        f"<style>{_STYLE}</style><h1>svdlab report</h1>"
        f'<p class="lead">{good} of {len(results)} notebooks passed; '
        f"{sum(v['passed'] for v in verdicts)} of {len(verdicts)} verdicts are yes.</p>"
        "<table><thead><tr><th>notebook</th><th>status</th><th>what it found</th><th>seconds</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
        "<p>A verdict compares the distance from a float64 run with that of diffusers itself: a noise ratio of at most "
        "4 means that svdlab is as close to the truth as diffusers is.</p>"
        f"<h2>Made with</h2><table><tbody>{facts}</tbody></table></html>"
    )


@click.command()
@click.option("--out", default="reports", show_default=True, metavar="DIR", help="Where the pages go.")
@click.option("--notebooks", "folder", metavar="DIR", help="Which notebooks; default: those of the checkout.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Notebooks at a time.")
@click.option(
    "-p", "--parameter", nargs=2, multiple=True, metavar="NAME VALUE", help="For every notebook, as papermill's."
)
@JSON
def report(
    out: str, folder: str | None, workers: int, parameter: Sequence[tuple[str, str]], json_path: str | None
) -> None:
    """Run every notebook into HTML pages with an index."""
    source = Path(folder) if folder else Path(__file__).parent.parent / "notebooks"
    notebooks = sorted(p for p in source.glob("*.ipynb"))
    if not notebooks:
        raise SvdlabError(f"notebooks: {source} holds no *.ipynb; give --notebooks DIR")
    results = run_report(notebooks, Path(out), {name: _value(text) for name, text in parameter}, workers)
    for r in results:
        click.echo(f"{r.status:7} {r.seconds:5.0f} s  {r.name}  {r.error}")
        for v in r.verdicts:
            click.echo(f"        {'yes' if v['passed'] else 'NO '}  {v['name']}")
    click.echo(f"{Path(out) / 'index.html'}")
    if json_path:
        write_json(json_path, {"notebooks": [asdict(r) for r in results]})
    sys.exit(0 if all(r.status == "passed" for r in results) else 1)


def _value(text: str) -> Any:
    """A parameter's value: JSON where it is JSON (numbers, true, null), else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
