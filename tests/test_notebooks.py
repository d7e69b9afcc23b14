"""What every notebook in git keeps to."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "outputs are stripped in git"
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"], "the question comes first"
    assert "parameters" in code[0]["metadata"].get("tags", [])
    assert "record(" in "".join(code[-1]["source"]), "the closing cell records the verdict"
    for cell in code:
        source = "".join(cell["source"])
        ast.parse(source)
        assert len(source.splitlines()) <= 25, "a code cell fits on a screen"
