"""JSON from outside is bounded and typed before anything is done with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from svdlab.errors import SvdlabError
from svdlab.reading import MAX_DEPTH, MAX_DIGITS, Document, parse, parse_as, read_as, read_json


class Clip(Document):
    name: str
    sizes: tuple[int, ...]
    scale: float = 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
        ('{"a":' * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
        ("9" * 5_000, f"a number of over {MAX_DIGITS} digits"),
        ("1." + "0" * 5_000, f"a number of over {MAX_DIGITS} digits"),
        ("1e999", "got the number '1e999', allowed: finite numbers"),
        ("[NaN]", "got the number 'NaN', allowed: finite numbers"),
        ("-Infinity", "got the number '-Infinity', allowed: finite numbers"),
        ("{'a': 1}", "not JSON"),
        ("", "not JSON"),
        ('"[[[', "not JSON"),
    ],
)
def test_json_is_bounded(text: str, reason: str) -> None:
    with pytest.raises(SvdlabError, match="x.json") as error:
        parse(text, "x.json")
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


def test_brackets_and_digits_inside_strings_are_text() -> None:
    text = '{"a": "' + "[" * 500 + r"\"" + "1" * 500 + '"}'
    assert parse(text, "x") == {"a": "[" * 500 + '"' + "1" * 500}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "a"}', "sizes is missing"),
        ('{"name": 1, "sizes": []}', "name: got 1, allowed: a valid string"),
        ('{"name": "a", "sizes": [1, "2"]}', "sizes.1: got '2', allowed: a valid integer"),
        ('{"name": "a", "sizes": [], "scale": "1"}', "scale: got '1', allowed: a valid number"),
        ('{"name": "a", "sizes": [], "extra": 1}', "extra: no such field"),
        ("[1]", "got [1], allowed: an object"),
    ],
)
def test_a_document_names_the_field(text: str, reason: str) -> None:
    with pytest.raises(SvdlabError) as error:
        parse_as(Clip, text, "x.json")
    assert str(error.value) == f"x.json: {reason}"


def test_a_document(tmp_path: Path) -> None:
    (tmp_path / "clip.json").write_text('{"name": "a", "sizes": [1, 2]}')
    assert read_as(Clip, tmp_path / "clip.json") == Clip(name="a", sizes=(1, 2))


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_text("[" + " " * 100 + "]")
    for path, reason in (
        (tmp_path / "missing", "no such file"),
        (tmp_path, "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "a\0b", "no such file"),
        (tmp_path / "binary", "not text in UTF-8"),
        (tmp_path / "large", "larger than 99 bytes"),
    ):
        with pytest.raises(SvdlabError, match=reason):
            read_json(path, limit=99)
