"""docs/catalogue.md is the catalogue; what is measured there is not measured again."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from svdlab.parity.bugs import BUGS, DEPARTURES
from svdlab.parity.demo import SIX
from svdlab.parity.diagnose import CatalogueRow

DOCS = Path(__file__).parent.parent / "docs"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_catalogue", DOCS / "make_catalogue.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    text = (DOCS / "catalogue.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_page_lists_the_catalogue() -> None:
    listed = rows("The bugs")
    assert [row[:3] for row in listed] == [[f"`{b.name}`", b.cause, f"`{b.stage}`"] for b in BUGS.values()]
    for row, bug in zip(listed, BUGS.values(), strict=True):
        path, _, name = bug.diffusers.partition(":")
        assert f"{Path(path).name}:{name}" in row[3] and row[4] == bug.met
        assert row[3].endswith(f"/src/{path.removeprefix('../')})" if path.startswith("..") else f"diffusers/{path})")
    departures = [[f"`{n}`", o.does, o.diffusers, f"`{o.source}`"] for n, o in DEPARTURES.items()]
    assert rows("What is no bug") == departures
    assert f"{len(BUGS)} bugs, " in (DOCS / "catalogue.md").read_text()


def test_every_bug_has_figures_or_a_note() -> None:
    measured = rows("What the usual threshold says of each")
    assert [row[0] for row in measured] == [f"`{name}`" for name in BUGS]
    shown = [row for row in measured if row[2]]
    for _, first, ratio, mse, said in shown:
        assert first and float(ratio) > 10, "well above rounding, not beside it"
        assert said == ("passes" if float(mse) < 1e-3 else "fails")
    notes = {row[0].strip("`"): row[1] for row in measured if not row[2]}
    assert notes == script().NEEDS
    missed = sum(row[4] == "passes" for row in shown)
    text, readme = (" ".join(page.read_text().split()) for page in (DOCS / "catalogue.md", DOCS.parent / "README.md"))
    assert f"of the {len(shown)} bugs that show at these settings it misses {missed}" in text
    assert f"{missed} of the {len(shown)} known bugs that show on the embedded checkpoint do" in readme


def test_the_readme_says_what_the_demo_says() -> None:
    """tests/test_demo.py holds the demo to these names."""
    (said,) = re.findall(r"```\n(\w+: .*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    assert sorted(said.splitlines()) == sorted(f"{name}: {BUGS[name].cause}" for name in SIX)


def test_a_bug_that_does_nothing_needs_a_note() -> None:
    make = script()
    row = CatalogueRow("quick_gelu", "image_embeddings", 1.5e4, 2.3e-7, True)
    silent = [CatalogueRow(name, None, 1.0, 0.0, True) for name in make.NEEDS]
    table = make.figure_table([row, *silent])
    assert table.rows[0] == ("`quick_gelu`", "`image_embeddings`", "1.5e+04", "2.30e-07", "passes")
    with pytest.raises(ValueError, match="what does nothing"):
        make.figure_table([replace(row, first_divergence=None), *silent])
    with pytest.raises(ValueError, match="what does nothing"):
        make.figure_table([row, *silent[1:]])
