"""Every notebook, run headless into pages that open offline: ``svdlab report``.

A notebook's closing cell calls ``record``; its verdict travels in the executed notebook as an output of its own type,
so that there is no side file and the call is harmless in a live kernel.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from svdlab.errors import SvdlabError
from svdlab.files import atomic_path, write_json, write_text
from svdlab.options import DEVICE, JSON, MODEL, settings_options
from svdlab.settings import GenerationSettings

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
    """One notebook's run.

    Attributes:
        name: the file's, without its suffix.
        status: "passed", "failed" (a verdict is no) or "error" (a cell raised, or it took too long).
        seconds: for the run and its page.
        verdicts: what its cells recorded, in order.
        error: the last line of what went wrong, or nothing.
        page: its HTML file.
        thumbnail: the page's first player or picture, as HTML.
    """

    name: str
    status: str
    seconds: float
    verdicts: list[dict[str, Any]]
    error: str = ""
    page: str = ""
    thumbnail: str = field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds: all but the thumbnail."""
        return {name: value for name, value in asdict(self).items() if name != "thumbnail"}


@dataclass(frozen=True)
class Change:
    """A verdict that is not what it was: ``was`` and ``now`` are "yes", "NO" or "absent"."""

    notebook: str
    verdict: str
    was: str
    now: str

    @property
    def regression(self) -> bool:
        """Whether a verdict that was yes no longer is."""
        return self.was == "yes"


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
        timeout: seconds a notebook may take.
        previous: an earlier report's ``results.json``, to show what changed.

    Returns:
        One result a notebook, in the given order. A failing notebook does not stop the others; an interruption leaves
        the report of those that are done.
    """
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Spinning OpenMP teams that share cores are tens of times slower: every process gets its own share.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    results: dict[Path, NotebookResult] = {}
    given = dict(parameters or {})
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(notebooks), desc="notebooks", unit="notebook") as bar:
        futures = {pool.submit(_run_one, path, out, given, environment, timeout): path for path in notebooks}
        try:
            for future in as_completed(futures):
                result = results[futures[future]] = future.result()
                bar.set_postfix_str(f"{result.name} {result.status}")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            _write(out, [results[path] for path in notebooks if path in results], given, previous)
    return [results[path] for path in notebooks]


def _write(
    out: Path, results: Sequence[NotebookResult], parameters: Mapping[str, Any], previous: Mapping[str, Any] | None
) -> None:
    about = {"parameters": dict(parameters), "versions": _versions()}
    write_json(out / "results.json", {**about, "notebooks": [r.to_dict() for r in results]})
    write_text(out / "report.xml", _junit(results))
    write_text(out / "index.html", index_page(results, previous=previous, **about))


def _run_one(
    path: Path, out: Path, parameters: dict[str, Any], environment: dict[str, str], timeout: float | None
) -> NotebookResult:
    """One notebook in a process of its own, then its page."""
    started = time.perf_counter()
    thumbnail = ""
    with atomic_path(out / f".{path.stem}.executed.ipynb") as executed:
        script = (
            "import sys, json, papermill; known = papermill.inspect_notebook(sys.argv[1]); "
            "given = {k: v for k, v in json.loads(sys.argv[3]).items() if k in known}; "
            "papermill.execute_notebook(sys.argv[1], sys.argv[2], parameters=given, "
            "kernel_name='python3', cwd=sys.argv[4], progress_bar=False, start_timeout=600)"
        )
        command = [sys.executable, "-c", script, str(path), str(executed), json.dumps(parameters), str(path.parent)]
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
            error = "" if run.returncode == 0 else (run.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            error = f"stopped after {timeout:g} s (--timeout)"
        try:
            verdicts, thumbnail = read_verdicts(executed), first_picture(executed)
            page = f"{path.stem}.html"
            write_text(out / page, _page(executed))
        except (ValueError, KeyError) as problem:
            verdicts, page, error = [], "", error or f"no notebook was written: {problem}"
    (out / f".{path.stem}.executed.ipynb").unlink(missing_ok=True)
    passed = all(v["passed"] for v in verdicts)
    status = "error" if error else "passed" if passed else "failed"
    return NotebookResult(path.stem, status, time.perf_counter() - started, verdicts, error, page, thumbnail)


def _outputs(executed: Path) -> list[dict[str, Any]]:
    """The displayed data of an executed notebook, in order, by type."""
    cells = json.loads(executed.read_text())["cells"]
    return [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]


def read_verdicts(executed: Path) -> list[dict[str, Any]]:
    """What ``record`` left in an executed notebook, in order."""
    return [data[VERDICT] for data in _outputs(executed) if VERDICT in data]


def first_picture(executed: Path) -> str:
    """The first player that carries its clip, or else the first picture, as HTML that carries it too; or nothing."""
    outputs = _outputs(executed)
    for data in outputs:
        if found := re.search(r'src="(data:video/mp4;base64,[A-Za-z0-9+/=]+)"', "".join(data.get("text/html", ""))):
            return f'<video autoplay loop muted playsinline src="{found[1]}"></video>'
    for data in outputs:
        if png := re.fullmatch(r"[A-Za-z0-9+/=\s]+", "".join(data.get("image/png", ""))):
            return f'<img alt="" src="data:image/png;base64,{"".join(png[0].split())}">'
    return ""


def changes(results: Sequence[NotebookResult], previous: Mapping[str, Any]) -> list[Change]:
    """Which verdicts differ from an earlier ``results.json``; one that is gone counts as changed.

    Raises:
        SvdlabError: ``previous`` is no report's results.
    """
    try:
        before = {(n["name"], v["name"]): v["passed"] for n in previous["notebooks"] for v in n["verdicts"]}
    except (KeyError, TypeError):
        raise SvdlabError("--previous: no results of a report, allowed: a results.json or its folder") from None
    now = {(r.name, v["name"]): v["passed"] for r in results for v in r.verdicts}
    words = {True: "yes", False: "NO", None: "absent"}
    keys = list(dict.fromkeys([*before, *now]))
    return [
        Change(*key, words[before.get(key)], words[now.get(key)]) for key in keys if before.get(key) != now.get(key)
    ]


def _junit(results: Sequence[NotebookResult]) -> str:
    """A test suite a notebook, a test case a verdict."""
    suites = ET.Element("testsuites", name="svdlab report")
    for r in results:
        failures, error = sum(not v["passed"] for v in r.verdicts), int(r.status == "error")
        cases = len(r.verdicts) + error
        about = {"name": r.name, "tests": cases, "failures": failures, "errors": error, "time": round(r.seconds, 3)}
        suite = ET.SubElement(suites, "testsuite", {k: str(v) for k, v in about.items()})
        for v in r.verdicts:
            case = ET.SubElement(suite, "testcase", classname=r.name, name=v["name"])
            if not v["passed"]:
                numbers = ", ".join(f"{k} {_shown(n)}" for k, n in v["numbers"].items())
                ET.SubElement(case, "failure", message=numbers)
        if error:
            case = ET.SubElement(suite, "testcase", classname=r.name, name="runs to its end")
            ET.SubElement(case, "error", message=_printable(r.error))
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """XML allows no terminal colours."""
    return "".join(c for c in re.sub(r"\x1b\[[0-9;]*m", "", text) if c.isprintable())


def _page(executed: Path) -> str:
    """A notebook as HTML that needs no network: no mathjax, no require.js, no widget manager, pictures inside."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(embed_images=True, mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)  # there is no kernel behind a page, and their script is on the network
    name = executed.name.removeprefix(".").removesuffix(".executed.ipynb")
    return exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})[0]


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


def index_page(
    results: Sequence[NotebookResult],
    versions: Mapping[str, str],
    parameters: Mapping[str, Any],
    previous: Mapping[str, Any] | None = None,
) -> str:
    """``index.html``: every verdict, with a picture, what changed, and what it was made with."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("svdlab"), autoescape=True, trim_blocks=True)
    environment.filters["shown"] = _shown
    verdicts = [v for r in results for v in r.verdicts]
    return environment.get_template("report.html").render(
        results=results,
        passed=sum(r.status == "passed" for r in results),
        verdicts=len(verdicts),
        yes=sum(v["passed"] for v in verdicts),
        changes=None if previous is None else changes(results, previous),
        parameters=parameters,
        versions=versions,
    )


def _read_previous(path: str) -> dict[str, Any]:
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        previous = json.loads(file.read_text())
    except (OSError, ValueError):
        raise SvdlabError(f"--previous: {file} is not readable, allowed: a results.json or its folder") from None
    changes([], previous)
    return previous


def _side_by_side(model: str) -> int:
    """Two notebooks at a time where the memory holds both: diffusers twice (one in float64), svdlab and its packing."""
    import psutil

    from svdlab.weights import checkpoint_folder

    weights = sum(file.stat().st_size for file in checkpoint_folder(model).glob("*/*.safetensors"))
    return 2 if 2 * 12 * weights < psutil.virtual_memory().available else 1


@click.command()
@click.option("--out", default="reports", show_default=True, metavar="DIR", help="Where the pages go.")
@click.option("--notebooks", "folder", metavar="DIR", help="Which notebooks; default: those of the checkout.")
@click.option("--workers", type=click.IntRange(1), help="Notebooks at a time; default: 2 where the memory allows.")
@click.option("--timeout", default=1800.0, show_default=True, type=click.FloatRange(1), help="Seconds a notebook.")
@click.option("--previous", metavar="DIR", help="An earlier report: show what changed, exit 1 on a regression.")
@click.option("-p", "--parameter", nargs=2, multiple=True, metavar="NAME VALUE", help="Any other papermill parameter.")
@MODEL
@DEVICE
@JSON
@settings_options
def report(
    out: str,
    folder: str | None,
    workers: int | None,
    timeout: float,
    previous: str | None,
    parameter: Sequence[tuple[str, str]],
    model: str,
    device: str,
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Run every notebook into HTML pages with an index.

    Each notebook takes the settings that its parameters cell names.
    """
    source = Path(folder) if folder else Path(__file__).parent.parent / "notebooks"
    notebooks = sorted(p for p in source.glob("*.ipynb"))
    if not notebooks:
        raise SvdlabError(f"notebooks: {source} holds no *.ipynb; give --notebooks DIR")
    GenerationSettings(**given)  # refused here rather than in every notebook
    parameters = {"model": model, "device": device, **given, **{name: _value(text) for name, text in parameter}}
    before = _read_previous(previous) if previous else None
    results = run_report(notebooks, Path(out), parameters, workers or _side_by_side(model), timeout, before)
    for r in results:
        click.echo(f"{r.status:7} {r.seconds:5.0f} s  {r.name}  {r.error}")
        for v in r.verdicts:
            click.echo(f"        {'yes' if v['passed'] else 'NO '}  {v['name']}")
    changed = changes(results, before) if before else []
    for change in changed:
        word = "REGRESSION" if change.regression else "changed"
        click.echo(f"{word}: {change.notebook}: {change.verdict}: was {change.was}, is {change.now}")
    click.echo(f"{Path(out) / 'index.html'}")
    if json_path:
        write_json(json_path, {"notebooks": [r.to_dict() for r in results], "changes": [asdict(c) for c in changed]})
    good = all(r.status == "passed" for r in results) and not any(c.regression for c in changed)
    sys.exit(0 if good else 1)


def _value(text: str) -> Any:
    """A parameter's value: JSON where it is JSON (numbers, true, null), else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
