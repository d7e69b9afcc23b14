"""Conda users get the versions that pip users get, what svdlab imports is required, and tests that pages name exist."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import grimp
import pytest

from svdlab.errors import EXTRA_OF
from svdlab.parity.writer import versions_of_run

ROOT = Path(__file__).parent.parent
# What other packages bring: the extra's or svdlab's own package that does.
BROUGHT_BY = {
    "IPython": "ipywidgets",
    "traitlets": "ipywidgets",
    "typing_extensions": "pydantic",
    "nbformat": "nbconvert",
    "dask": "distributed",
}

# The releases of diffusers that the parity tests passed with; pyproject.toml allows what lies around them.
TRIED = ("0.42.1",)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0]


def expanded(project: dict[str, Any], extra: str) -> set[str]:
    """The requirements of an extra, with those of the extras that it refers to."""
    found = set()
    for requirement in project["optional-dependencies"][extra]:
        if inner := re.fullmatch(r"svdlab\[(.*)\]", requirement):
            found |= {r for name in inner[1].split(",") for r in expanded(project, name)}
        else:
            found.add(requirement)
    return found


def test_environment_yml_equals_pyproject(project: dict[str, Any]) -> None:
    lines = (ROOT / "environment.yml").read_text().splitlines()
    listed = [line.strip()[2:] for line in lines if line.startswith("      - ")]
    python = next(line.strip()[2:] for line in lines if line.strip().startswith("- python"))
    assert sorted(listed) == sorted({*project["dependencies"], *expanded(project, "dev"), "--editable ."})
    assert python == f"python{project['requires-python']}"


def test_no_version_is_written_twice(project: dict[str, Any]) -> None:
    extras = [r for group in project["optional-dependencies"].values() for r in group if not r.startswith("svdlab[")]
    names = [name_of(requirement) for requirement in [*project["dependencies"], *extras]]
    assert len(names) == len(set(names))
    assert expanded(project, "all") == {
        requirement for extra in ("parity", "sweep", "cluster", "notebook") for requirement in expanded(project, extra)
    }


def test_the_torch_range_is_one_that_every_machine_has(project: dict[str, Any]) -> None:
    assert next(r for r in project["dependencies"] if name_of(r) == "torch") == "torch>=2.11,<2.14"


def test_the_diffusers_that_is_tried_is_the_one_that_is_allowed_and_recorded(project: dict[str, Any]) -> None:
    low, high = ((int(a), int(b)) for a, b in ((TRIED[0].split(".")[:2]), TRIED[-1].split(".")[:2]))
    allowed = f"diffusers>={TRIED[0]},<{high[0]}.{high[1] + 1}"
    assert low <= high and allowed in project["optional-dependencies"]["parity"]
    assert importlib.metadata.version("diffusers") in TRIED, "run the parity tests with it, then add it to TRIED"
    assert versions_of_run()["diffusers"] in TRIED


def test_every_module_that_is_imported_is_required_and_errors_know_by_which_extra(project: dict[str, Any]) -> None:
    graph = grimp.build_graph("svdlab", include_external_packages=True, cache_dir=None)
    external = {m for m in graph.modules if m.partition(".")[0] != "svdlab"} - set(sys.stdlib_module_names)
    own = {name_of(requirement) for requirement in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    assert {"torch", "diffusers", "matplotlib"} <= external
    for module in external:
        package = BROUGHT_BY.get(module, distributions.get(module, [module])[0].lower())  # tomli: on Python 3.10 only
        if module in EXTRA_OF:
            listed = {name_of(r) for r in project["optional-dependencies"][EXTRA_OF[module]]}
            assert package in listed, f"{module} is not in svdlab[{EXTRA_OF[module]}]"
        else:
            assert package in own, f"{module} does not come with svdlab"


def test_every_test_that_a_page_names_is_there() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"`(tests/[\w./]+(?:::\w+)?)`", page.read_text())}
    assert len(named) > 50
    for name in sorted(named):
        file, _, test = name.partition("::")
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text(), name
        assert (ROOT / file).is_file(), name
