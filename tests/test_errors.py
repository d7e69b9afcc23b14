"""An error is one short line that no terminal obeys, whatever was in the file that it is about."""

from __future__ import annotations

import pickle

import pytest

from svdlab.errors import SvdlabError, about


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("x.json: é 😀 fine", "x.json: é 😀 fine"),
        ("two\nlines\r and \b", r"two lines  and \x08"),
        ("\x1b[31mred\x1b[0m \x9b2J", r"\x1b[31mred\x1b[0m \x9b2J"),
        ("right\u202eleft \udcff \u2028", r"right\u202eleft \udcff "),
        ("f: " + "n" * 10**6 + ", allowed: 3", "f: " + "n" * 694 + "..." + "n" * 288 + ", allowed: 3"),
    ],
)
def test_an_error_is_one_short_line(message: str, line: str) -> None:
    error = SvdlabError(message)
    assert str(error) == line and len(line) <= 1000
    assert str(pickle.loads(pickle.dumps(error))) == line
    with pytest.raises(SvdlabError) as again, about("a\tb"):
        raise error
    assert str(again.value).startswith(r"a\tb: ") and len(str(again.value)) <= 1000
