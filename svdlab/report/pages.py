"""A report's pages, which open offline: one per notebook, the index, and JUnit's XML for machines."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from svdlab.notebook.scripts import policy
from svdlab.report.results import NotebookResult, changes, moved
from svdlab.report.verdict import FIX_COLUMNS, fix_cells, shown, words
from svdlab.tables import Cell, Column, Table

if TYPE_CHECKING:
    from svdlab.parity.diagnose import CatalogueRow

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Script:
    """A script of the pages, which their policy allows by its hash: nothing else runs in them.

    Attributes:
        marker: what it brings to life; a page without this text goes without the script.
        text: an ES module.
        style: its style sheet.
    """

    marker: str
    text: str
    style: str = ""


def scripts_for(content: str) -> list[Script]:
    """The scripts that a page with this content needs."""
    from svdlab.notebook import charts, fix_grid, inspector, players, sweep_view

    known = [
        Script("svdlab-fix-grid", fix_grid.SCRIPT, fix_grid.STYLE),  # before those that take its parts over
        Script("svdlab-player", players.SCRIPT, players.STYLE),
        Script("svdlab-inspector", inspector.SCRIPT, inspector.STYLE),
        Script("svdlab-board", sweep_view.SCRIPT),
    ]
    if "svdlab-chart" in content:  # made when it is needed: it takes seconds
        known.append(Script("svdlab-chart", charts.page_script(), charts.STYLE))
    return [script for script in known if script.marker in content]


def _policy(scripts: Sequence[Script]) -> str:
    return policy(*(script.text for script in scripts))


# A markdown cell with this tag tells a reader what to do with a kernel: a page has none.
LIVE = "live"


def notebook_page(executed: Path, result: NotebookResult, pages: Sequence[tuple[str, str]]) -> str:
    """A notebook as HTML that needs no network: pictures inside, formulas as MathML, no script but ``scripts_for``'s.

    Args:
        executed: the notebook with its outputs.
        result: what is known of its run.
        pages: file and title of every page of the report, in order.
    """
    import nbformat

    from svdlab.report.exporter import PageExporter

    exporter = PageExporter(embed_images=True, template_file="page.html.j2", extra_template_paths=[str(TEMPLATES)])
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.environment.filters.update(shown=shown, words=words, fix_table=_fix_table, policy=_policy)
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)  # there is no kernel behind a page, and their script is on the network
    notebook.cells = [cell for cell in notebook.cells if LIVE not in cell.metadata.get("tags", ())]
    at = [page for page, _ in pages].index(result.page)
    around = {"result": result, "before": pages[at - 1] if at else None, "after": (*pages, None)[at + 1]}
    outputs = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    resources = {"metadata": {"name": result.title}, "around": around, "scripts": scripts_for(outputs)}
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    head, main, body = page.partition("<main>")  # the scripts in the head are to stay what their hashes say
    head = re.sub(r"--jp-icon-[\w-]+:\s*url\([^)]*\);", "", head)  # of JupyterLab's buttons: 150 kB, and none is here
    return f"{head}{main}{scrollable(body)}"


def index_page(
    results: Sequence[NotebookResult], about: Mapping[str, Any], previous: Mapping[str, Any] | None = None
) -> str:
    """``index.html``: what the usual test misses, every fix, every notebook, what changed, and what it was made with.

    Args:
        results: in the order in which they are shown.
        about: ``made`` (date and time), ``seconds`` in all, ``parameters`` given, ``made_with``, ``versions``.
        previous: an earlier report's ``results.json``.
    """
    from jinja2 import Environment, FileSystemLoader

    from svdlab.parity.diagnose import finding

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(shown=shown, words=words, pairs=_pairs, table=_table, policy=_policy)
    verdicts = [v for r in results for v in r.verdicts]
    page, bugs = next(((r.page, rows) for r in results if (rows := r.catalogue())), ("", []))
    picture = plot_html(bugs) if bugs else ""
    return environment.get_template("report.html").render(
        results=results,
        scripts=scripts_for("".join([picture, *(r.thumbnail for r in results)])),
        passed=sum(r.status == "passed" for r in results),
        verdicts=len(verdicts),
        yes=sum(v["passed"] for v in verdicts),
        finding=finding(bugs) if bugs else "",
        picture=picture,
        catalogue_page=page,
        fixes=_fixes(results),
        changes=None if previous is None else _changes(results, previous),
        moved=None if previous is None else _moved(results, previous),
        previous=previous,
        **about,
    )


def plot_html(bugs: Sequence[CatalogueRow]) -> str:
    """The picture of ``finding``."""
    from svdlab.notebook.charts import plot_catalogue

    return plot_catalogue(bugs)._repr_html_()


def scrollable(html: str) -> str:
    """HTML whose wide tables scroll, by the keyboard too, in place of the page, and whose long names may break."""
    html = html.replace("<th></th>", "<td></td>")  # pandas' corner is no head
    html = re.sub(r"(<td(?![^>]*right)[^>]*>)([^<]+)(?=</td>)", lambda cell: cell[1] + _breakable(cell[2]), html)
    box = '<div class="scroll" tabindex="0" role="group" aria-label="table">'
    return re.sub(r"<table\b", f"{box}<table", html).replace("</table>", "</table></div>")


def _breakable(text: str) -> str:
    return re.sub(r"(?<=[a-z}])([._/:])(?=[a-z{])", r"\1<wbr>", text)


def _table(table: Table) -> str:
    return scrollable(table.to_html())


def _fixes(results: Sequence[NotebookResult]) -> Table:
    """Every fix on and off; a notebook with several bugs is named once."""
    rows: list[list[str | Cell]] = []
    for result in results:
        link = f'<a href="{quote(result.page)}">{escape(result.name)}</a>'
        name = Cell(result.name, html=f"{result.thumbnail}<br>{link} <small>{result.seconds:.0f} s</small>")
        for i, fix in enumerate(result.fixes()):
            rows.append([Cell("") if i else name, *fix_cells(fix)])
    return Table(["notebook", *FIX_COLUMNS], rows)


def _fix_table(fixes: Sequence[Mapping[str, Any]]) -> str:
    return Table(FIX_COLUMNS, [fix_cells(fix) for fix in fixes]).to_html() if fixes else ""


def _changes(results: Sequence[NotebookResult], previous: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = [
        [
            change.notebook,
            change.verdict,
            change.was,
            Cell(f"{change.now}{' (regression)' * change.regression}", "good" if change.now == "yes" else "bad"),
        ]
        for change in changes(results, previous)
    ]
    return Table(["notebook", "verdict", "was", "is"], rows)


def _moved(results: Sequence[NotebookResult], previous: Mapping[str, Any]) -> Table:
    return Table(["notebook", "number", Column("was", "right"), Column("is", "right")], moved(results, previous))


def _pairs(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Names and values."""
    return Table(["", ""], [(name, str(value)) for values in groups for name, value in values.items()])


def junit(results: Sequence[NotebookResult]) -> str:
    """``report.xml``: one test suite per notebook, one test case per verdict."""
    suites = ET.Element("testsuites", name="svdlab report")
    for r in results:
        failures, error = sum(not v["passed"] for v in r.verdicts), int(r.status == "error")
        cases = len(r.verdicts) + error
        about = {"name": r.name, "tests": cases, "failures": failures, "errors": error, "time": round(r.seconds, 3)}
        suite = ET.SubElement(suites, "testsuite", {k: str(v) for k, v in about.items()})
        for v in r.verdicts:
            case = ET.SubElement(suite, "testcase", classname=r.name, name=v["name"])
            if not v["passed"]:
                numbers = ", ".join(f"{k} {shown(n)}" for k, n in v["numbers"].items())
                ET.SubElement(case, "failure", message=numbers)
        if error:
            case = ET.SubElement(suite, "testcase", classname=r.name, name="runs to its end")
            ET.SubElement(case, "error", message=r.error)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
