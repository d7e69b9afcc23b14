"""Conda users get the versions that pip users get."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _pyproject() -> tuple[set[str], str]:
    text = (ROOT / "pyproject.toml").read_text()
    tomllib = pytest.importorskip("tomllib", reason="the standard library reads TOML from Python 3.11 on")
    project = tomllib.loads(text)["project"]
    return {*project["dependencies"], *project["optional-dependencies"]["dev"]}, project["requires-python"]


def test_environment_yml_equals_pyproject() -> None:
    lines = (ROOT / "environment.yml").read_text().splitlines()
    pip = {line.strip()[2:] for line in lines if line.startswith("      - ")} - {"--editable ."}
    python = next(line.strip()[2:] for line in lines if line.strip().startswith("- python"))
    expected, requires_python = _pyproject()
    assert pip == expected
    assert python == f"python{requires_python}"


def test_the_torch_range_is_one_that_every_machine_has() -> None:
    dependencies, _ = _pyproject()
    torch = next(d for d in dependencies if re.match(r"torch\b", d))
    assert torch == "torch>=2.11,<2.14"
