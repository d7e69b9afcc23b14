"""JSON from outside is bounded and typed before anything is done with it."""

from __future__ import annotations

import ast
import json
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
        (json.dumps({"name": "a", "sizes": [], "x" * 5000: 1}), f"'{'x' * 56}...: no such field"),
        (json.dumps({"name": "a", "sizes": [], "\x1b[31m": 1}), r"'\x1b[31m': no such field"),
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


ROOT = Path(__file__).parent.parent
# What reads only what svdlab itself wrote a moment before, and how many times it does.
OWN = {
    "svdlab/parity/writer.py": 1,  # the settings' own to_json
    "svdlab/cli/sweep.py": 1,  # pandas' to_json
}


def _json_parsed(source: str) -> int:
    """How many times a module's code parses JSON by itself."""
    calls = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            calls += sum(name.name not in ("dumps", "dump") for name in node.names)
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "json" and node.attr in ("load", "loads")
            calls += own or node.attr in ("JSONDecoder", "validate_json", "model_validate_json")
    return calls


def test_no_other_module_parses_json() -> None:
    assert _json_parsed("import json\njson.loads('1')\njson.load(x)\nfrom json import loads, dumps") == 3
    assert _json_parsed("Model.model_validate_json(text)\nfrom svdlab.reading import parse") == 1
    found = {}
    for path in sorted((ROOT / "svdlab").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name != "svdlab/reading.py" and (calls := _json_parsed(path.read_text())):
            found[name] = calls
    assert found == OWN, "read JSON through svdlab/reading.py, which bounds and types it"
