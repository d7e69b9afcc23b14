"""Reading JSON from outside: every file and text is bounded, then checked against a typed model.

Nothing else in svdlab parses JSON that it did not write itself; ``tests/test_reading.py`` states it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from svdlab.errors import SvdlabError, short

Model = TypeVar("Model")

# Far above what any of svdlab's files needs: a trace of SVD-XT with every tap has 19,000 names, 2 MB.
MAX_BYTES = 64 * 2**20
MAX_DEPTH = 32
MAX_DIGITS = 400

# Without a choice in the loop, for which re would keep 100 bytes a character.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1},}}")


class Document(BaseModel):
    """A JSON object from outside: strict types, no other fields, finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def check_file(path: str | os.PathLike[str], allowed: str) -> None:
    """Refuse what is no regular file, before it is opened: opening a pipe would block.

    Args:
        path: of any kind of file.
        allowed: what is, for the error.

    Raises:
        SvdlabError: no such file, or no regular one.
    """
    if not os.path.exists(path):
        raise SvdlabError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise SvdlabError(f"{path}: no regular file, allowed: {allowed}")


def read_text(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> str:
    """A text file.

    Args:
        path: a regular file; a pipe could block for ever.
        limit: of its size, in bytes.

    Raises:
        SvdlabError: no such file, no regular file, too large, not readable, not UTF-8.
    """
    check_file(path, "a file")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise SvdlabError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise SvdlabError(f"{path}: larger than {limit} bytes, allowed: at most that")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise SvdlabError(f"{path}: not text in UTF-8") from None


def parse(text: str, what: str) -> Any:
    """A JSON value of bounded depth, with finite numbers of bounded length.

    Args:
        text: the JSON.
        what: the file's or option's name, for errors.

    Raises:
        SvdlabError: not JSON, nested deeper than ``MAX_DEPTH``, a number of over ``MAX_DIGITS`` digits, NaN or
            infinity, a name that stands twice in one object, of which readers take either.
    """
    bare = _STRING.sub('""', text)
    depth = 0
    for bracket in _BRACKET.finditer(bare):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise SvdlabError(f"{what}: JSON nested deeper than {MAX_DEPTH} levels, allowed: at most that")
    if _LONG_NUMBER.search(bare):
        raise SvdlabError(f"{what}: JSON with a number of over {MAX_DIGITS} digits, allowed: at most that")

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise SvdlabError(f"{what}: got the number {short(number)}, allowed: finite numbers")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(pairs)) < len(pairs):
            names = Counter(name for name, _ in pairs)
            raise SvdlabError(f"{what}: the name {short(names.most_common(1)[0][0])} stands twice, allowed: once")
        return made

    try:
        return json.loads(text, parse_float=finite, parse_constant=finite, object_pairs_hook=once)
    except SvdlabError:
        raise
    except ValueError as error:
        raise SvdlabError(f"{what}: not JSON ({error})") from None


def parse_as(model: type[Model], text: str, what: str) -> Model:
    """A JSON text as a model.

    Args:
        model: a ``Document``, or another type that pydantic checks.
        text: the JSON.
        what: the file's or option's name, for errors.

    Raises:
        SvdlabError: as ``parse``; or the first field that is missing, unknown or not what the model allows.
    """
    parse(text, what)
    return checked_as(model, text, what)


def checked_as(model: type[Model], text: str, what: str) -> Model:
    """A JSON text that has passed ``parse`` as a model.

    Raises:
        SvdlabError: the first field that is missing, unknown or not what the model allows.
    """
    try:
        return TypeAdapter(model).validate_json(text)
    except ValidationError as error:
        raise SvdlabError(f"{what}: {first_problem(error)}") from None


def read_json(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file, see ``read_text`` and ``parse``."""
    return parse(read_text(path, limit), str(path))


def read_as(model: type[Model], path: str | os.PathLike[str], limit: int = MAX_BYTES) -> Model:
    """A JSON file as a model, see ``read_text`` and ``parse_as``."""
    return parse_as(model, read_text(path, limit), str(path))


def first_problem(error: ValidationError) -> str:
    """What pydantic found first, in one line: the field, what was got and what is allowed."""
    first = error.errors(include_url=False)[0]
    # A key of the file's own may be of any length.
    parts = [str(part) for part in first["loc"]]
    where = ".".join(part if len(part) <= 60 and part.isprintable() else short(part) for part in parts)
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] == "extra_forbidden":
        return f"{where}: no such field"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}" if where else str(first["ctx"]["error"])
    wanted = first["msg"].removeprefix("Input should be ")
    if first["type"] == "literal_error":
        wanted = str(first["ctx"]["expected"]).replace("'", "")
    return f"{where}{': ' * bool(where)}got {short(first['input'])}, allowed: {wanted}"
