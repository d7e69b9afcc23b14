"""Every notebook, run headless into pages that open offline: ``svdlab report``.

A notebook's closing cell calls ``record``; its verdict travels in the executed notebook as an output of its own type,
so that there is no side file and the call is harmless in a live kernel.
"""

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
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from svdlab.cli.options import DEVICE, JSON, MODEL, settings_options
from svdlab.errors import SvdlabError
from svdlab.files import write_json, write_text
from svdlab.svd.settings import GenerationSettings

if TYPE_CHECKING:
    from jinja2 import Environment

VERDICT = "application/vnd.svdlab.verdict+json"
_PACKAGES = ("svdlab", "torch", "diffusers", "transformers", "numpy", "papermill")


@dataclass(frozen=True)
class Verdict:
    """What a notebook found.

    Attributes:
        name: what was asked.
        passed: the answer.
        numbers: what it rests on.
        fixes: one mapping a bug that was put in a fix's place: ``bug``, ``ratio_on`` and ``ratio_off`` (the worst noise
            ratio with the fix and without it), ``first_divergence`` and ``frames_mse`` without it.
    """

    name: str
    passed: bool
    numbers: dict[str, float | str] = field(default_factory=dict)
    fixes: list[dict[str, Any]] = field(default_factory=list)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        numbers = ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in self.numbers.items())
        text = f"{'yes' if self.passed else 'NO'}: {self.name}: {numbers}"
        return {
            VERDICT: asdict(self),
            "text/html": _templates().get_template("verdict.html").render(v=self),
            "text/plain": text,
        }


def record(
    name: str, passed: bool, *, fixes: Sequence[Mapping[str, Any]] = (), **numbers: float | int | str
) -> Verdict:
    """A verdict as the last expression of a notebook's closing cell; the report collects it.

    Args:
        name: what was asked, such as "svdlab is at parity with diffusers".
        passed: the answer.
        fixes: a row each for the report's table over all fixes, see ``Verdict``.
        numbers: what it rests on, shown beside it.
    """
    return Verdict(name, bool(passed), dict(numbers), [dict(fix) for fix in fixes])


@dataclass
class NotebookResult:
    """One notebook's run.

    Attributes:
        name: the file's, without its suffix.
        title: its first heading.
        status: "passed", "failed" (a verdict is no) or "error" (a cell raised, or it took too long).
        seconds: for the run and its page.
        verdicts: what its cells recorded, in order.
        error: the last line of what went wrong, or nothing.
        page: its HTML file.
        parameters: what its parameters cell came to hold.
        thumbnail: the page's first player or picture, as HTML.
    """

    name: str
    status: str
    seconds: float
    verdicts: list[dict[str, Any]]
    error: str = ""
    page: str = ""
    title: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    thumbnail: str = field(default="", repr=False)

    def fixes(self) -> list[dict[str, Any]]:
        """What its verdicts say of fixes, in order."""
        return [fix for verdict in self.verdicts for fix in verdict.get("fixes", ())]

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
    write_text(out / "report.xml", _junit(results))
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
            write_text(out / result.page, _page(executed, result, pages))
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


def changes(results: Sequence[NotebookResult], previous: Mapping[str, Any]) -> list[Change]:
    """Which verdicts differ from an earlier ``results.json``; one that is gone counts as changed.

    Raises:
        SvdlabError: ``previous`` is no report's results.
    """
    try:
        before = {(n["name"], v["name"]): v["passed"] for n in previous["notebooks"] for v in n["verdicts"]}
        moved([], previous)
    except (KeyError, TypeError, AttributeError):
        raise SvdlabError("--previous: no results of a report, allowed: a results.json or its folder") from None
    now = {(r.name, v["name"]): v["passed"] for r in results for v in r.verdicts}
    words = {True: "yes", False: "NO", None: "absent"}
    keys = list(dict.fromkeys([*before, *now]))
    return [
        Change(*key, words[before.get(key)], words[now.get(key)]) for key in keys if before.get(key) != now.get(key)
    ]


def moved(results: Sequence[NotebookResult], previous: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Numbers that differ from an earlier report's in the three digits that are shown: notebook, number, was, is."""
    before = {r["name"]: dict(_numbers(r)) for r in previous["notebooks"]}
    return [
        (r.name, name, old, new)
        for r in results
        for name, new in _numbers(r.to_dict())
        if (old := before.get(r.name, {}).get(name, new)) != new
    ]


def _numbers(notebook: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for verdict in notebook["verdicts"]:
        for name, value in verdict["numbers"].items():
            yield name.replace("_", " "), _shown(value)
        for fix in verdict.get("fixes", ()):
            for name in ("ratio_on", "ratio_off", "first_divergence", "frames_mse"):
                yield f"{fix['bug']}: {name.replace('_', ' ')}", _shown(fix[name])


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
            ET.SubElement(case, "error", message=r.error)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """XML allows no terminal colours."""
    return "".join(c for c in re.sub(r"\x1b\[[0-9;]*m", "", text) if c.isprintable())


def _page(executed: Path, result: NotebookResult, pages: Sequence[tuple[str, str]]) -> str:
    """A notebook as HTML that needs no network and runs no script: pictures inside, formulas as MathML."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        embed_images=True, template_file="page.html.j2", extra_template_paths=[str(Path(__file__).parent / "templates")]
    )
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)  # there is no kernel behind a page, and their script is on the network
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = take_formulas(cell.source, formulas)
    at = [page for page, _ in pages].index(result.page)
    around = {"result": result, "before": pages[at - 1] if at else None, "after": (*pages, None)[at + 1]}
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": result.title}, "around": around})
    return re.sub(_FORMULA.format(r"(\d+)"), lambda found: formulas[int(found[1])], page)


# Stands for a formula while markdown becomes HTML: nbconvert would take MathML apart.
_FORMULA = "svdlab-formula-{}-"


def take_formulas(markdown: str, formulas: list[str]) -> str:
    """Markdown with a mark for each formula (``$...$``, ``$$...$$``; not in code).

    Args:
        markdown: with TeX.
        formulas: here they go as MathML, which browsers draw by themselves.
    """
    from latex2mathml.converter import convert

    def take(found: re.Match[str]) -> str:
        code, block, inline = found.groups()
        if code:
            return code
        # TeX writes an underscore in text as \_, which the converter would print as it is.
        tex = re.sub(r"\\text\{[^}]*\}", lambda text: text[0].replace("\\_", "_"), block or inline)
        formulas.append(convert(tex, display="block" if block else "inline"))
        return _FORMULA.format(len(formulas) - 1)

    return re.sub(r"(```.*?```|`[^`]*`)|\$\$(.+?)\$\$|\$(\S(?:[^$\n]*\S)?)\$", take, markdown, flags=re.DOTALL)


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


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("svdlab.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = _shown
    return environment


def index_page(
    results: Sequence[NotebookResult], about: Mapping[str, Any], previous: Mapping[str, Any] | None = None
) -> str:
    """``index.html``: the verdict on every fix, every notebook with a picture, what changed, and what it was made with.

    Args:
        results: in the order in which they are shown.
        about: ``made`` (date and time), ``seconds`` in all, ``parameters`` given, ``versions``.
        previous: an earlier report's ``results.json``.
    """
    verdicts = [v for r in results for v in r.verdicts]
    return (
        _templates()
        .get_template("report.html")
        .render(
            results=results,
            passed=sum(r.status == "passed" for r in results),
            verdicts=len(verdicts),
            yes=sum(v["passed"] for v in verdicts),
            changes=None if previous is None else changes(results, previous),
            moved=[] if previous is None else moved(results, previous),
            previous=previous,
            **about,
        )
    )


def _read_previous(path: str) -> dict[str, Any]:
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        previous = json.loads(file.read_text())
    except (OSError, ValueError):
        raise SvdlabError(f"--previous: {file} is not readable, allowed: a results.json or its folder") from None
    changes([], previous)
    return previous


def _side_by_side(model: str, device: str) -> int:
    """Two notebooks at a time where the memory holds both: diffusers twice (one in float64), svdlab and its packing."""
    import psutil
    import torch

    from svdlab.svd.checkpoint import checkpoint_folder

    weights = sum(file.stat().st_size for file in checkpoint_folder(model).glob("*/*.safetensors"))
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    return 2 if 2 * 12 * weights < free else 1


@click.command()
@click.option("--out", default="reports", show_default=True, metavar="DIR", help="Where the pages go.")
@click.option(
    "--notebooks",
    "chosen",
    multiple=True,
    metavar="PATH",
    help="A folder of notebooks, or one notebook; repeatable. Default: those of the checkout.",
)
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
    chosen: Sequence[str],
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
    sources = [Path(path) for path in chosen] or [Path(__file__).parent.parent.parent / "notebooks"]
    notebooks = [p for source in sources for p in (sorted(source.glob("*.ipynb")) if source.is_dir() else [source])]
    for path in notebooks:
        if path.suffix != ".ipynb" or not path.is_file():
            raise SvdlabError(f"--notebooks: {path} is none, allowed: a folder or an *.ipynb")
    if not notebooks:
        raise SvdlabError(f"--notebooks: {sources[0]} holds no *.ipynb")
    if repeated := {p.stem for p in notebooks if sum(q.stem == p.stem for q in notebooks) > 1}:
        raise SvdlabError(f"--notebooks: {min(repeated)} is given twice, allowed: names that differ")
    GenerationSettings(**given)  # refused here rather than in every notebook
    parameters = {"model": model, "device": device, **given, **{name: _value(text) for name, text in parameter}}
    before = _read_previous(previous) if previous else None
    results = run_report(notebooks, Path(out), parameters, workers or _side_by_side(model, device), timeout, before)
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
