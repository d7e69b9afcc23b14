"""The command line, run in the test's own process."""

from __future__ import annotations

import sys

import pytest

from svdlab import cli


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``svdlab ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["svdlab", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    return code, out, err
