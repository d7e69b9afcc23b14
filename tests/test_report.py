"""The report: notebooks run apart, verdicts collected, pages that open offline, exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner

from svdlab.report import NotebookResult, _index, record, report, run_report

PASSES = "from svdlab.report import record\nrecord('one is <1>', True, ratio=1.5, n=depth)"


def notebook(path: Path, *cells: str) -> Path:
    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made.cells = [nbformat.v4.new_code_cell("depth = 1", metadata={"tags": ["parameters"]})]
    made.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(made, path)
    return path


def test_a_failing_notebook_does_not_stop_the_others(tmp_path: Path) -> None:
    books = [
        notebook(tmp_path / "a_raises.ipynb", "raise ValueError('boom')"),
        notebook(tmp_path / "b & <i>passes.ipynb", PASSES),
        notebook(tmp_path / "c_is_no.ipynb", PASSES.replace("True", "False")),
    ]
    results = run_report(books, tmp_path / "out", {"depth": 7})
    assert [r.status for r in results] == ["error", "passed", "failed"]
    assert "boom" in results[0].error
    assert results[1].verdicts == [{"name": "one is <1>", "passed": True, "numbers": {"ratio": 1.5, "n": 7}}]
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert [n["status"] for n in written["notebooks"]] == ["error", "passed", "failed"]
    assert written["versions"]["svdlab"]
    index = (tmp_path / "out/index.html").read_text()
    assert "b &amp; &lt;i&gt;passes" in index and "<i>" not in index and "one is &lt;1&gt;" in index
    assert "1 of 3 notebooks passed; 1 of 2 verdicts are yes" in index
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["a_raises.html", "b & <i>passes.html", "c_is_no.html", "index.html", "results.json"]
    )
    for page in (tmp_path / "out").glob("*.html"):
        remote = re.findall(r"(?:src|href)=[\"']?(?:https?:)?//[^\"' >]+", page.read_text())
        assert not remote, (page.name, remote)


@pytest.mark.parametrize(("cell", "code"), [(PASSES, 0), (PASSES.replace("True", "False"), 1), ("1 / 0", 1)])
def test_exit_codes(tmp_path: Path, cell: str, code: int) -> None:
    notebook(tmp_path / "one.ipynb", cell)
    arguments = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(report, arguments)
    assert result.exit_code == code, result.output
    assert json.loads((tmp_path / "r.json").read_text())["notebooks"][0]["name"] == "one"


def test_a_folder_without_notebooks(tmp_path: Path) -> None:
    result = CliRunner().invoke(report, ["--notebooks", str(tmp_path)])
    assert "holds no *.ipynb" in str(result.exception)


def test_record_shows_itself() -> None:
    bundle = record("a <b>", False, ratio=9.87654)._repr_mimebundle_()
    assert bundle["text/plain"] == "NO: a <b>: ratio 9.88" and "a &lt;b&gt;" in bundle["text/html"]


def test_the_index_names_what_made_it() -> None:
    page = _index([NotebookResult("x", "passed", 1.0, [], "", "x.html")], {"python": sys.version.split()[0]})
    assert sys.version.split()[0] in page and 'href="x.html"' in page
