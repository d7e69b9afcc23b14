"""The report: notebooks run apart, verdicts collected, pages that open offline, exit codes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html import escape
from pathlib import Path

import nbformat
import psutil
import pytest
from click.testing import CliRunner
from command_line import run as svdlab
from html_tables import rows
from page_text import PAGE_BYTES

from svdlab.cli.report import report
from svdlab.errors import SvdlabError
from svdlab.notebook.charts import page_script
from svdlab.notebook.players import SCRIPT
from svdlab.parity.diagnose import CatalogueRow
from svdlab.reading import parse_as
from svdlab.report import record
from svdlab.report import run as run_module
from svdlab.report.exporter import mathml
from svdlab.report.pages import LIVE, index_page, scrollable
from svdlab.report.provenance import made_with
from svdlab.report.results import NotebookResult, RecordedVerdict, changes, moved
from svdlab.report.run import run_report
from svdlab.report.verdict import VERDICT, fix_cells
from svdlab.tables import CSS, Column, Table

PASSES = "from svdlab.report import record\nrecord('one is <1>', True, ratio=1.5, n=depth)"


def notebook(path: Path, *cells: str) -> Path:
    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made.cells = [nbformat.v4.new_code_cell("depth = 1", metadata={"tags": ["parameters"]})]
    made.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(made, path)
    return path


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[NotebookResult], Path]:
    """The results and the folder of a report in which one notebook raises, one passes, and one is no; read only."""
    folder = tmp_path_factory.mktemp("three")
    books = [
        notebook(folder / "a_raises.ipynb", "raise ValueError('\\x1b[31mboom')"),
        notebook(folder / "b & <i>passes.ipynb", PASSES),
        notebook(folder / "c_is_no.ipynb", PASSES.replace("one is", "two is"), PASSES.replace("True", "False")),
    ]
    return run_report(books, folder / "out", {"depth": 7}), folder / "out"


def test_a_failing_notebook_does_not_stop_the_others(three: tuple[list[NotebookResult], Path]) -> None:
    results, out = three
    assert [r.status for r in results] == ["error", "passed", "failed"]
    assert "boom" in results[0].error
    found = {"name": "one is <1>", "passed": True, "numbers": {"ratio": 1.5, "n": 7}, "fixes": [], "catalogue": []}
    assert results[1].verdicts == [found] and results[1].parameters == {"depth": 7}
    written = json.loads((out / "results.json").read_text())
    assert [n["status"] for n in written["notebooks"]] == ["error", "passed", "failed"]
    assert written["versions"]["svdlab"]
    index = (out / "index.html").read_text()
    assert "b &amp; &lt;i&gt;passes" in index and "<i>" not in index and "one is &lt;1&gt;" in index
    assert "1 of 3 notebooks passed; 2 of 3 verdicts are yes" in index
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["a_raises.html", "b & <i>passes.html", "c_is_no.html", "index.html", "report.xml", "results.json"]
    )
    assert "boom" in (out / "a_raises.html").read_text().partition("</nav>")[2][:200], "the error comes first"


def test_a_page_loads_nothing_and_runs_what_draws_its_charts(tmp_path: Path) -> None:
    cells = [
        "from svdlab.notebook import plot_curves\nplot_curves([1, 2], {'a': [1, 2]}, ('x (s)', 'y (m)'))",
        PASSES,
    ]
    run_report([notebook(tmp_path / "one.ipynb", *cells)], tmp_path / "out", {})
    for name in ("index.html", "one.html"):
        page = (tmp_path / "out" / name).read_text()
        scripts = re.findall(r'<script type="module">(.*?)</script>', page, re.DOTALL)
        assert scripts == ([page_script()] if name == "one.html" else []), "what draws the chart"
        page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        assert "<script" not in page and "<link" not in page and "<iframe" not in page
        assert not re.findall(r"(?:src|href|url|@import)\s*[=(]?\s*[\"']?(?:https?:)?//[\w.]", page)
        here = {*re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', page)}
        assert here <= {"index.html", "one.html", "results.json", "report.xml"}, "links lead to files beside it"
    page = (tmp_path / "out/one.html").read_text()
    assert "data:image/svg+xml" in page and len(page) < PAGE_BYTES
    digest = base64.b64encode(hashlib.sha256(page_script().encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in page and "unsafe-eval" not in page
    assert '<img alt="from one" src="data:image/svg+xml' in (tmp_path / "out/index.html").read_text(), "a thumbnail"


def test_pages_lead_to_each_other(tmp_path: Path) -> None:
    books = [notebook(tmp_path / f"{name}.ipynb", PASSES) for name in ("a", "b <i>", "c")]
    made = nbformat.read(books[1], as_version=4)
    made.cells.insert(0, nbformat.v4.new_markdown_cell("# Is <i> safe?\n\n$$\\tfrac{1}{4}$$ and $x_1$, not `$y$`"))
    nbformat.write(made, books[1])
    results = run_report(books, tmp_path / "out", {})
    assert [r.title for r in results] == ["a", "Is <i> safe?", "c"]
    page = (tmp_path / "out/b <i>.html").read_text()
    assert page.count('<a href="a.html" rel="prev">') == page.count('<a href="c.html" rel="next">') == 2
    assert "<title>Is &lt;i&gt; safe?</title>" in page
    assert "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>4</mn></mrow></mfrac>" in page, "a formula is in one piece"
    assert page.count("<math") == 2 and "<code>$y$</code>" in page, "a formula in code is code"
    middle = '<a href="b%20%3Ci%3E.html">Is &lt;i&gt; safe?</a>'
    assert middle in (tmp_path / "out/index.html").read_text()
    assert 'rel="prev"' not in (tmp_path / "out/a.html").read_text()


def test_a_formula_that_cannot_be_converted_is_shown_as_it_is_written(tmp_path: Path) -> None:
    assert "<mtext>time_ids</mtext>" in mathml(r"\text{time\_ids}_i", "inline")
    for broken in (r"\left( x < 1", "{", "x^"):
        assert mathml(broken, "block") == f"<code>{escape(broken)}</code>"
    book = notebook(tmp_path / "one.ipynb", PASSES)
    made = nbformat.read(book, as_version=4)
    made.cells.insert(0, nbformat.v4.new_markdown_cell("# One\n\n$\\left( x < 1$ and $y$"))
    nbformat.write(made, book)
    (result,) = run_report([book], tmp_path / "out", {})
    page = (tmp_path / "out/one.html").read_text()
    assert result.status == "passed" and r"<code>\left( x &lt; 1</code>" in page and page.count("<math") == 1


BROKEN = {
    "formula": (
        [r"# A $x_1$ and $\frac{$ title", r"$\frac{$ $a_b_c$ $\text{<script>alert(1)</script>}$"],
        "passed",
        "",
    ),
    "attachment": (
        ["![x](attachment:no.png)"],
        "error",
        "its page cannot be made: InvalidNotebook: missing attachment",
    ),
    "html": (["<script>alert(1)</script><b onclick='x()'>b</b> [j](javascript:x) <iframe src='//x'>"], "passed", ""),
}


def test_one_broken_notebook_leaves_the_others_and_the_earlier_report(tmp_path: Path) -> None:
    books = [notebook(tmp_path / "a_good.ipynb", PASSES)]
    for name, (cells, *_) in BROKEN.items():
        book = notebook(tmp_path / f"{name}.ipynb", PASSES)
        made = nbformat.read(book, as_version=4)
        made.cells += [nbformat.v4.new_markdown_cell(cell) for cell in cells]
        nbformat.write(made, book)
        books.append(book)
    mime = "{'application/vnd.svdlab.verdict+json': {'name': 3}}"
    shows = f"from IPython.display import display\ndisplay({mime}, raw=True)"
    books.append(notebook(tmp_path / "verdict.ipynb", shows))
    untyped = notebook(tmp_path / "untyped.ipynb", PASSES)
    text = json.loads(untyped.read_text())
    del text["cells"][0]["cell_type"]
    untyped.write_text(json.dumps(text))
    books.append(untyped)
    results = {r.name: r for r in run_report(books, tmp_path / "out", {})}
    assert results["a_good"].status == "passed"
    for name, (_, status, error) in BROKEN.items():
        assert results[name].status == status and results[name].error.startswith(error), results[name]
    assert results["verdict"].error == "verdict: name: got 3, allowed: a valid string"
    assert results["untyped"].status == "error" and results["untyped"].error
    written = json.loads((tmp_path / "out/results.json").read_text())["notebooks"]
    assert [n["name"] for n in written] == [book.stem for book in books]
    for name in ("formula", "html"):
        page = (tmp_path / f"out/{name}.html").read_text()
        assert not re.search(r"<script|<iframe|<[^>]*onclick|href=.javascript", page), name
        assert "Content-Security-Policy" in page and "script-src" not in page and "default-src 'none'" in page
    page = (tmp_path / "out/formula.html").read_text()
    assert "<h1 id=" in page and "<msub><mi>x</mi><mn>1</mn></msub>" in page, "a formula in a heading"
    assert "ns0:" not in page and r"<code>\frac{</code>" in page and "&lt;script&gt;alert(1)" in page


def test_what_fails_while_the_report_is_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text("earlier")
    monkeypatch.setattr(run_module, "index_page", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_module._write(tmp_path, [NotebookResult("a", "passed", 1.0, [])], {}, 1.0, None)
    assert (tmp_path / "results.json").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


STUCK = """import ctypes, pathlib
pathlib.Path("kernel.pid").write_text(str(__import__("os").getpid()))
ctypes.PyDLL(None).sleep(600)"""  # with the interpreter's lock: no signal handler and no thread of Python's runs


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupted_report_keeps_what_is_finished_and_leaves_no_process(
    tmp_path: Path, how: signal.Signals
) -> None:
    notebook(tmp_path / "a.ipynb", PASSES)
    notebook(tmp_path / "b.ipynb", STUCK)
    program = "from svdlab.cli import main; main()"
    options = ["report", "--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # What a shell puts into the background ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    pid = tmp_path / "kernel.pid"
    wait_until(lambda: pid.exists() and pid.read_text() != "")
    kernel = psutil.Process(int(pid.read_text()))
    papermill = kernel.parent()
    assert papermill is not None and papermill.parent().pid == process.pid
    process.send_signal(how)
    assert process.wait(30) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    wait_until(lambda: gone(kernel) and gone(papermill))
    notebooks = json.loads((tmp_path / "out/results.json").read_text())["notebooks"]
    assert [n["status"] for n in notebooks] == ["passed", "error"] and "not finished" in notebooks[1]["error"]
    assert "1 of 2 notebooks passed" in (tmp_path / "out/index.html").read_text()


def test_a_kernel_stuck_in_c_ends_at_the_time_limit(tmp_path: Path) -> None:
    (result,) = run_report([notebook(tmp_path / "one.ipynb", STUCK)], tmp_path / "out", {}, timeout=12)
    assert result.status == "error" and "--timeout" in result.error
    kernel = int((tmp_path / "kernel.pid").read_text())
    wait_until(lambda: not psutil.pid_exists(kernel) or gone(psutil.Process(kernel)))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "nosuch/x.json"], "nosuch is no folder that can be written"),
        (["-p", "dpth", "5"], "-p 'dpth': no notebook has it, allowed: depth"),
        (["--timeout", "nan"], "--timeout: got nan"),
        (["--timeout", "-1"], "--timeout"),
        (["--timeout", "inf"], "--timeout"),
    ],
)
def test_what_is_not_allowed_is_refused_before_any_notebook_runs(
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("svdlab.cli.report.run_report", lambda *arguments: pytest.fail("a notebook ran"))
    notebook(tmp_path / "one.ipynb", PASSES)
    arguments = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), *options]
    code, _, err = svdlab(capsys, monkeypatch, "report", *arguments)
    assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_record_is_light() -> None:
    program = "import sys; from svdlab.report import record; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["papermill", "nbconvert", "click", "torch", "matplotlib", "jinja2"]
    run = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("cell", "code"), [(PASSES.replace("True", "False"), 1), ("1 / 0", 1)])
def test_exit_codes(tmp_path: Path, cell: str, code: int) -> None:
    notebook(tmp_path / "one.ipynb", cell)
    arguments = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(report, arguments)
    assert result.exit_code == code, result.output
    assert json.loads((tmp_path / "r.json").read_text())["notebooks"][0]["name"] == "one"


def test_notebooks_can_be_chosen_and_what_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ipynb").write_text("no notebook")
    for name in ("a", "b", "more/c"):
        notebook(tmp_path / f"{name}.ipynb", PASSES)

    def asked(*paths: str) -> list[str]:
        arguments = [part for path in paths for part in ("--notebooks", str(tmp_path / path))]
        result = CliRunner().invoke(report, [*arguments, "--out", str(tmp_path / "out")])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return [n["name"] for n in json.loads((tmp_path / "out/results.json").read_text())["notebooks"]]

    for wrong in (["empty"], ["nowhere.ipynb"], ["more", "more/c.ipynb"], ["text.ipynb"]):
        with pytest.raises(SvdlabError, match="(notebooks: .*|text.ipynb: not JSON)"):
            asked(*wrong)
    assert asked("b.ipynb", "more") == ["b", "c"]


def test_record_shows_itself() -> None:
    one = {"bug": "<b>", "ratio_on": 1.2, "ratio_off": 7e4, "first_divergence": "frames", "frames_mse": 2e-5}
    one |= {"shown_at": 4, "missed_at": 3}
    bundle = record("a <b>", False, fixes=[one], ratio=9.87654)._repr_mimebundle_()
    assert bundle["text/plain"] == "NO: a <b>: ratio 9.88"
    assert "a &lt;b&gt;" in bundle["text/html"]
    numbers, heads, row = rows(bundle["text/html"])
    assert numbers == ["ratio", "9.88"] and heads[0] == "injected bug"
    assert row == ["<b>", "frames", "7e+04", "1.2", "2e-05", "misses it at 3 of 4 settings"]


def test_a_number_that_is_not_finite_is_recorded_as_none() -> None:
    """A bug that makes the frames NaN costs its notebook nothing: JSON holds no infinity."""
    fix = {
        "bug": "b",
        "ratio_on": math.nan,
        "ratio_off": math.inf,
        "first_divergence": "frames",
        "frames_mse": math.nan,
    }
    bundle = record("a", True, fixes=[fix], ratio=math.inf)._repr_mimebundle_()
    text = json.dumps(bundle[VERDICT], allow_nan=False)
    kept = parse_as(RecordedVerdict, text, "verdict").model_dump()
    assert kept["numbers"] == {"ratio": None} and kept["fixes"][0]["ratio_off"] is None
    cells = fix_cells(kept["fixes"][0])
    assert [cell.text for cell in cells[2:]] == ["not finite", "not finite", "not finite", ""]
    assert cells[3].style == "bad"


def about(**parameters: object) -> dict[str, object]:
    return {
        "made": "2026-01-02",
        "seconds": 3.0,
        "parameters": parameters,
        "made_with": {"command": "svdlab report"},
        "versions": {"python": sys.version.split()[0]},
    }


def test_the_index_names_what_made_it() -> None:
    result = NotebookResult("x", "passed", 1.0, [], "", "x.html", "X", {"steps": "<4>"})
    page = index_page([result], about(model="<b>mine</b>", fps=9))
    assert sys.version.split()[0] in page and 'href="x.html"' in page and "2026-01-02" in page
    shown = rows(page)
    assert ["model", "<b>mine</b>"] in shown and ["fps", "9"] in shown and ["steps", "<4>"] in shown
    assert "<b>mine" not in page


def fix(bug: str, on: float, mse: float, missed: int) -> dict[str, object]:
    return {
        "bug": bug,
        "ratio_on": on,
        "ratio_off": 7e4,
        "first_divergence": "frames",
        "frames_mse": mse,
        "shown_at": 2,
        "missed_at": missed,
    }


def test_the_index_has_a_row_for_every_bug() -> None:
    fixes = [fix("quiet", 1.2, 1e-5, 2), fix("loud", 99.0, 0.1, 0)]
    page = index_page([NotebookResult("x", "passed", 1.0, [{**verdict("v", True), "fixes": fixes}])], about())
    _, quiet, loud = rows(page)[:3]
    assert quiet == ["x 1 s", "quiet", "frames", "7e+04", "1.2", "1e-05", "misses it at 2 of 2 settings"]
    assert loud == ["", "loud", "frames", "7e+04", "99", "0.1", "catches it at all 2 settings"], "named once"
    assert page.count(f'<td style="text-align:right;{CSS["bad"]}">99</td>') == 1, "a fix that does not hold is red"


def test_the_index_begins_with_what_the_usual_test_misses() -> None:
    rows = [CatalogueRow("quiet", "frames", 1e4, 1e-5, True), CatalogueRow("loud", "frames", math.inf, math.nan, False)]
    bundle = record("all", True, catalogue=rows)._repr_mimebundle_()
    kept = parse_as(RecordedVerdict, json.dumps(bundle[VERDICT], allow_nan=False), "verdict").model_dump()
    result = NotebookResult("07", "passed", 1.0, [kept], page="07.html")
    assert [(row.bug, row.ratio) for row in result.catalogue()] == [("quiet", 1e4), ("loud", math.inf)]
    page = index_page([NotebookResult("x", "passed", 1.0, [verdict("v", True)]), result], about())
    said = page.index("A port can pass MSE &lt; 1e-3 and be wrong: 1 of 2 known bugs do.")
    assert said < page.index('<figure class="svdlab-chart"') < page.index("2 of 2 notebooks passed; 2")
    assert 'href="07.html"' in page
    without = index_page([NotebookResult("x", "passed", 1.0, [verdict("v", True)])], about())
    assert "it is not in this report" in without and "svdlab-chart" not in without


def test_a_table_scrolls_and_its_names_may_break() -> None:
    table = Table(["name", Column("number", "right")], [("noise_pred.000 in a/file.py", "1.5e-07")]).to_html()
    page = scrollable(table)
    assert "noise_<wbr>pred.000 in a/<wbr>file.<wbr>py" in page and ">1.5e-07<" in page
    assert rows(page) == rows(table) and page.startswith('<div class="scroll" tabindex="0"')
    assert "<th></th>" not in scrollable("<table><tr><th></th><th>a</th></tr></table>"), "pandas' corner"


def test_what_needs_a_kernel_is_not_on_a_page(tmp_path: Path) -> None:
    book = notebook(tmp_path / "one.ipynb", PASSES)
    made = nbformat.read(book, as_version=4)
    made.cells.insert(0, nbformat.v4.new_markdown_cell("# One\n\nRead."))
    made.cells.insert(1, nbformat.v4.new_markdown_cell("Move the slider.", metadata={"tags": [LIVE]}))
    nbformat.write(made, book)
    run_report([book], tmp_path / "out")
    page = (tmp_path / "out/one.html").read_text()
    assert "Read." in page and "Move the slider" not in page


def test_a_page_begins_with_the_answer_and_folds_its_code(three: tuple[list[NotebookResult], Path]) -> None:
    page = (three[1] / "b & <i>passes.html").read_text().partition("<main>")[2]
    answer, first = page.index("one is &lt;1&gt;"), page.index("jp-Cell")
    assert answer < first and "ratio <b>1.5</b>" in page[:first]
    assert page.count('<details class="code">') == page.count("jp-CodeMirrorEditor") == 3, (
        "the injected parameters, too"
    )


def test_a_report_says_what_made_it(tmp_path: Path) -> None:
    found = made_with(["report", "--fps", "9"], "embedded", "cpu")
    assert found["command"] == "svdlab report --fps 9" and found["processor"]
    assert re.fullmatch(r"embedded, sha256 [0-9a-f]{16}", found["checkpoint"])
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|no clone", found["commit"])
    assert all(value in index_page([], {**about(), "made_with": found}) for value in found.values())
    with pytest.raises(SvdlabError, match="nowhere"):
        made_with([], str(tmp_path / "nowhere"), "cpu")


def test_junit_names_what_failed(three: tuple[list[NotebookResult], Path]) -> None:
    a, b, c = ET.parse(three[1] / "report.xml").getroot()
    assert (a.get("errors"), b.get("failures"), c.get("tests"), c.get("failures")) == ("1", "0", "2", "1")
    assert [case.find("failure") is not None for case in c] == [False, True]
    assert "boom" in a[0].find("error").get("message")  # type: ignore[union-attr, operator]


def test_a_report_shows_the_first_clip_of_each_notebook(tmp_path: Path) -> None:
    cells = ["import numpy as np\nfrom svdlab.svd.video import Clip\nClip(np.zeros((2, 8, 8, 3), np.uint8), 7)", PASSES]
    run_report([notebook(tmp_path / "one.ipynb", *cells)], tmp_path / "out", {})
    assert '<img alt="from one" src="data:image/webp;base64,' in (tmp_path / "out/index.html").read_text()


def test_a_page_runs_the_script_of_its_players_and_no_other(tmp_path: Path) -> None:
    shows = "import torch\nfrom svdlab.notebook import Player\nPlayer({'<one>': torch.zeros(2, 3, 8, 8)}, fps=7)"
    run_report([notebook(tmp_path / "one.ipynb", shows, PASSES)], tmp_path / "out", {})
    for name, players in (("index.html", 1), ("one.html", 2)):  # the first stands at the top, too
        page = (tmp_path / "out" / name).read_text()
        (script,) = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
        assert script == SCRIPT
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert page.count("script-src") == 1 and f"script-src 'sha256-{allowed}'; img-src" in page
        assert len(re.findall(r'<figure [^>]*class="svdlab-player"', page)) == players


def test_settings_reach_the_notebooks_that_have_them(tmp_path: Path) -> None:
    notebook(tmp_path / "one.ipynb", PASSES.replace("True", "'fps' not in globals()"))
    arguments = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), "--fps", "9", "-p", "depth", "5"]
    result = CliRunner().invoke(report, arguments)
    assert result.exit_code == 0, result.output  # every verdict is yes
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["notebooks"][0]["verdicts"][0]["numbers"]["n"] == 5
    assert written["parameters"] == {"model": "embedded", "device": "cpu", "fps": 9, "depth": 5}


def test_a_wrong_setting_is_refused_before_any_notebook_runs(tmp_path: Path) -> None:
    notebook(tmp_path / "one.ipynb", PASSES)
    result = CliRunner().invoke(report, ["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), "--fps", "0"])
    assert "fps: got 0" in str(result.exception) and not (tmp_path / "out").exists()


def verdict(name: str, passed: bool) -> dict[str, object]:
    return {"name": name, "passed": passed, "numbers": {}}


def test_what_changed_since_the_previous_report() -> None:
    before = {
        "notebooks": [{"name": "a", "verdicts": [verdict("kept", True), verdict("lost", True), verdict("bad", False)]}]
    }
    now = [NotebookResult("a", "failed", 1.0, [verdict("kept", True), verdict("bad", True), verdict("new", False)])]
    found = {c.verdict: (c.was, c.now, c.regression) for c in changes(now, before)}
    assert found == {"lost": ("yes", "absent", True), "bad": ("NO", "yes", False), "new": ("absent", "NO", False)}


def test_numbers_that_moved_since_the_previous_report() -> None:
    def result(ratio: float, first: str) -> NotebookResult:
        fix = {"bug": "b", "ratio_on": 1.0, "ratio_off": 7e4, "first_divergence": first, "frames_mse": 0.1}
        fix |= {"shown_at": 1, "missed_at": 0}
        return NotebookResult("a", "passed", 1.0, [{**verdict("v", True), "numbers": {"ratio": ratio}, "fixes": [fix]}])

    before = {"notebooks": [result(1.2341, "frames").to_dict()]}
    assert moved([result(1.2342, "frames")], before) == [], "as far as it is shown"
    now = [result(1.31, "latents.000")]
    assert moved(now, before) == [("a", "ratio", "1.23", "1.31"), ("a", "b: first divergence", "frames", "latents.000")]
    page = index_page(now, about(), before)
    assert "numbers that moved: 2" in page and ["a", "ratio", "1.23", "1.31"] in rows(page)


def test_a_regression_exits_with_one(tmp_path: Path) -> None:
    # Every notebook passes, but a verdict of the previous report is no longer there.
    notebook(tmp_path / "one.ipynb", PASSES)
    (tmp_path / "old").mkdir()
    old = {"notebooks": [{"name": "one", "verdicts": [verdict("one is <1>", True), verdict("gone", True)]}]}
    (tmp_path / "old/results.json").write_text(json.dumps(old))
    arguments = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), "--previous", str(tmp_path / "old")]
    result = CliRunner().invoke(report, arguments)
    assert result.exit_code == 1 and "REGRESSION: one: gone: was yes, is absent" in result.output
    assert "regression" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"notebooks": 3}',
        "[]",
        '{"notebooks": [{"name": [], "verdicts": []}]}',
        '{"notebooks": [{"name": "a", "verdicts": [{"name": "v", "passed": "yes", "numbers": {}}]}]}',
        '{"notebooks": [{"name": "a", "verdicts": [{"name": "v", "passed": true, "numbers": {"n": [1]}}]}]}',
        '{"made": {}, "notebooks": []}',
        '{"notebooks": [], "x": NaN}',
    ],
)
def test_a_previous_report_that_is_none(tmp_path: Path, text: str) -> None:
    notebook(tmp_path / "one.ipynb", PASSES)
    (tmp_path / "old.json").write_text(text)
    arguments = ["--notebooks", str(tmp_path), "--previous", str(tmp_path / "old.json")]
    assert "--previous" in str(CliRunner().invoke(report, arguments).exception)


@pytest.mark.slow
def test_a_broken_stage_turns_the_right_notebook_red(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    shutil.copytree(root / "svdlab", tmp_path / "svdlab", ignore=shutil.ignore_patterns("__pycache__"))
    stages = tmp_path / "svdlab/svd/stages.py"
    right = "settings.fps - 1"
    assert stages.read_text().count(right) == 1
    stages.write_text(stages.read_text().replace(right, "settings.fps"))
    (tmp_path / "notebooks").mkdir()
    for name in ("01_fps_conditioning", "02_timestep_scaling"):
        shutil.copy(root / f"notebooks/{name}.ipynb", tmp_path / "notebooks")
    command = "-m svdlab.cli report --out out --workers 2 --num-inference-steps 1 -p fps_grid [7]"
    program = f"import sys; sys.argv[1:] = {command.split()[2:]}; from svdlab.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())["notebooks"]
    # Its own cell says that what it calls right is what svdlab does.
    assert [r["status"] for r in results] == ["error", "passed"], results
    assert "AssertionError" in results[0]["error"]
