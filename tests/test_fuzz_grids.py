"""Texts of grids and files of points, put together at random: points, or one line."""

from __future__ import annotations

import json
import random

from fuzzing import damage_json, fuzz

from svdlab.errors import SvdlabError
from svdlab.svd.settings import GenerationSettings
from svdlab.sweep.plan import axes_of, grid, make_points, neighbours, parse_axis

NAMES = (*GenerationSettings.model_fields, "rules", "self", "", " ", "max-guidance-scale", "cls", "settings", "\0", "é")
VALUES = (
    *("7", "14", "1.5", "-1", "1e39", "1e999", "NaN", "Infinity", "none", "None", "null", "true", "auto", "gelu_tanh"),
    *(
        "gelu_tanh+sincos_order",
        "+",
        "gelu_tanh+gelu_tanh",
        "[[700,5,0],[80,1,0]]",
        "[1",
        "[1,[2]]",
        "[]",
        "[[]]",
        "{}",
    ),
    *(
        '{"x":1}',
        "[" * 2000,
        "9" * 5000,
        "0x10",
        "1_0",
        "\0",
        "\x1b[31m",
        '"a"',
        '"\\ud800"',
        "[null]",
        "[true,1]",
        "é",
    ),
    *(
        "5-9",
        "9-5",
        "7:28:7",
        "1:3:0.5",
        "7::",
        "1:2:3:4",
        "0:1:1e-9",
        "..:1:1",
        "1-99999999999",
        "1:99999999999999999999999999999999999999:0.001",
    ),
    *("[1,1.0]", "[0.5,0.25]", "x" * 10_000, "32", "40", "float16", "batched", "exact", "2", "3", "", " ", "=", "\n"),
)


def use(changes: list[dict[str, object]]) -> None:
    try:
        points = make_points(GenerationSettings(), changes)
    except SvdlabError as error:  # the command line cuts what is too long
        raise SvdlabError(str(error)[:1000]) from None
    axes = axes_of(changes, points)
    json.dumps(axes)
    neighbours(axes, points)


def a_grid(chance: random.Random) -> None:
    axes: dict[str, list[object]] = {}
    for _ in range(chance.choice((1, 1, 2))):
        values = ",".join(chance.choices(VALUES, k=chance.choice((0, 1, 1, 1, 2))))
        text = f"{chance.choice(NAMES)}{chance.choice(('=', '=', '=', ' = ', '', '=['))}{values}"
        if chance.random() < 0.2:
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice('[]{},=+"\\\0 9') + text[at:]
        name, found = parse_axis(text)
        axes[name] = found
    use(grid(axes))


def a_file_of_points(chance: random.Random) -> None:
    good = [
        {"fps": 7, "rules": "none"},
        {"fps": 14, "rules": ["gelu_tanh"]},
        {"sigmas": [700, 5, 0], "decode": "exact"},
    ]
    changes = damage_json(chance, good, chance.randint(1, 3))
    if not isinstance(changes, list) or not all(isinstance(change, dict) for change in changes):
        raise SvdlabError("as the command line says")
    use(changes)


def test_grids() -> None:
    tally = fuzz(a_grid)
    assert tally["accepted"] and tally["refused"]


def test_files_of_points() -> None:
    tally = fuzz(a_file_of_points)
    assert tally["accepted"] and tally["refused"]
