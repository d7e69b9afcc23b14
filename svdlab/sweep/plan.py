"""What a sweep is to compute: axes and their values, made into points and checked before anything starts."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from svdlab.errors import SvdlabError, short
from svdlab.parity.bugs import BUGS, check_bugs
from svdlab.reading import parse
from svdlab.svd.approximations import APPROXIMATIONS
from svdlab.svd.settings import GenerationSettings

# The axes that are no setting, as grids, tables and files call them: injected bugs, and what is left out for speed.
RULES, APPROXIMATION = "rules", "approximation"
# The names that each of them takes.
NAMED: Mapping[str, Mapping[str, Any]] = {RULES: BUGS, APPROXIMATION: APPROXIMATIONS}
_KINDS = {RULES: "bugs", APPROXIMATION: "approximations"}
_NO_NAME = "none"
# 5-9, and 7:28:7 or 1:3:0.5; an exponent's sign is none of a range.
_SPAN = re.compile(r"(\d{1,19})-(\d{1,19})")
_STEPPED = re.compile(r"[\d.]{1,40}(:[\d.]{0,40})+")
# Far more than anyone looks at; what is above is a mistake that would fill the memory.
MOST_POINTS = 100_000
Changes = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """One generation of a sweep.

    Attributes:
        settings: all of them.
        bugs: of the catalogue, those that are injected, by name; without any it is what diffusers does.
        approximations: of ``approximations.APPROXIMATIONS``, by name.
    """

    settings: GenerationSettings
    bugs: tuple[str, ...] = ()
    approximations: tuple[str, ...] = ()

    def named(self) -> dict[str, tuple[str, ...]]:
        """The names on each axis of ``NAMED``."""
        return {RULES: self.bugs, APPROXIMATION: self.approximations}

    def value(self, axis: str) -> Any:
        """Where the point stands on an axis: a setting's value, or names as text."""
        return names_text(self.named()[axis]) if axis in NAMED else getattr(self.settings, axis)


def names_text(names: Sequence[str]) -> str:
    """Bugs or approximations as a grid and the table have them: "none", or names with a plus between them."""
    return "+".join(names) or _NO_NAME


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """An axis as the command line takes it: ``fps=7,14``, ``seed=5-9``, ``sigmas=[[700,5,0],[80,1,0]]``.

    Raises:
        SvdlabError: no name, no values, see ``parse_values``.
    """
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if not name or not values.strip():
        raise SvdlabError(f"grid: got {short(text)}, allowed: NAME=VALUE,VALUE,..., such as fps=7,14,28")
    return name, parse_values(name, values)


def parse_values(name: str, text: str) -> list[Any]:
    """The values of one axis: one JSON list, or with commas between them values, ``5-9`` and ``7:28:7``.

    ``5-9`` is 5, 6, 7, 8, 9; ``7:28:7`` is FROM:TO:STEP, 7, 14, 21, 28, with TO where a step meets it.

    Raises:
        SvdlabError: a list that is not JSON, a range without a value, more than ``MOST_POINTS``.
    """
    shown = short(name)[1:-1]
    if text.strip().startswith("["):
        try:
            return parse(text, name)
        except SvdlabError:
            raise SvdlabError(f"{shown}: got {short(text.strip())}, allowed: a JSON list, or VALUE,VALUE,...") from None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return parts if name in NAMED else [value for part in parts for value in _values(shown, part)]


def _values(name: str, text: str) -> list[Any]:
    """What stands between two commas."""
    if span := _SPAN.fullmatch(text):
        first, last, step = Decimal(span[1]), Decimal(span[2]), Decimal(1)
    elif _STEPPED.fullmatch(text):
        try:
            first, last, step = map(Decimal, text.split(":"))
        except (ArithmeticError, ValueError):
            raise SvdlabError(f"{name}: got {short(text)}, allowed: FROM:TO:STEP, such as 7:28:7") from None
    else:
        return [_value(text)]
    if last < first or step <= 0:
        raise SvdlabError(f"{name}: got the range {short(text)}, allowed: one that rises, such as 5-9 or 7:28:7")
    number = math.floor((last - first) / step) + 1
    if number > MOST_POINTS:
        raise SvdlabError(f"{name}: got the range {short(text)} of {number} values, allowed: at most {MOST_POINTS}")
    whole = all(value == value.to_integral_value() for value in (first, step))
    return [int(value) if whole else float(value) for value in (first + i * step for i in range(number))]


def remarks(axes: Mapping[str, Sequence[Any]]) -> list[str]:
    """Values that are allowed and unusual, one line for each axis that has some: those outside its slider's range."""
    said = []
    for name, values in axes.items():
        field = GenerationSettings.model_fields.get(name)
        extra = field.json_schema_extra if field is not None else None
        if not isinstance(extra, dict) or "slider" not in extra:
            continue
        bounds: Any = extra["slider"]
        low, high, _ = bounds
        unusual = [f"{v:g}" for v in values if isinstance(v, (int, float)) and not low <= v <= high]
        if unusual:
            shown = ", ".join(unusual[:5]) + (f" and {len(unusual) - 5} more" if len(unusual) > 5 else "")
            said.append(f"{name}: {shown}: unusual, most take {low:g} to {high:g} ({extra['unit']})")
    return said


def _value(text: str) -> Any:
    """A number where it is one, nothing for "none", else the text."""
    if text.lower() == "none":
        return None
    try:
        return parse(text, "value")
    except SvdlabError:
        return text


def grid(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest, so that whole rows are done first.

    Raises:
        SvdlabError: an axis without values, more than ``MOST_POINTS``.
    """
    for name, values in axes.items():
        if not values:
            raise SvdlabError(f"{short(name)[1:-1]}: got no values, allowed: one or more")
    if (number := math.prod(map(len, axes.values()))) > MOST_POINTS:
        raise SvdlabError(f"grid: got {number} points, allowed: at most {MOST_POINTS}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def make_points(settings: GenerationSettings, changes: Changes) -> list[Point]:
    """A point for each change of the settings; ``rules`` and ``approximation`` may be changed, too.

    Raises:
        SvdlabError: a field that is not known, a value that is not allowed, bugs that are not in the catalogue,
            approximations that there are not, a change that is there twice, none at all.
    """
    if not changes:
        raise SvdlabError("points: got none, allowed: one or more")
    points: dict[Point, None] = {}
    for change in changes:
        if unknown := [name for name in change if name not in (*GenerationSettings.model_fields, *NAMED)]:
            allowed = ", ".join([*GenerationSettings.model_fields, *NAMED])
            raise SvdlabError(f"{short(unknown[0])[1:-1]}: no such setting, allowed: {allowed}")
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in change.items()}
        bugs, approximations = (_names(axis, values.pop(axis, ())) for axis in NAMED)
        check_bugs(*bugs)
        approximations = tuple(name for name in APPROXIMATIONS if name in approximations)  # their order is none
        point = Point(settings.replace(**values), bugs, approximations)
        if point.settings.num_videos_per_prompt != 1:
            raise SvdlabError(
                f"num_videos_per_prompt: got {point.settings.num_videos_per_prompt}, allowed in a sweep: 1 (take seed "
                "for an axis)"
            )
        if point in points:
            shown = ", ".join(f"{name}={short(value)}" for name, value in change.items())
            raise SvdlabError(f"points: {shown or 'the settings'} twice, allowed: every point once")
        points[point] = None
    # Weights are loaded for each dtype: one after the other.
    order = {dtype: i for i, dtype in enumerate(dict.fromkeys(p.settings.dtype for p in points))}
    return sorted(points, key=lambda p: order[p.settings.dtype])


def _names(axis: str, value: Any) -> tuple[str, ...]:
    names, kind, known = value.split("+") if isinstance(value, str) else value, _KINDS[axis], NAMED[axis]
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise SvdlabError(f"{axis}: got {short(value)}, allowed: none, or names of {kind} with + between them")
    names = tuple(name for name in names if name != _NO_NAME)
    if unknown := [name for name in names if name not in known]:
        like = ", ".join(difflib.get_close_matches(unknown[0], known, n=3) or list(known)[:3])
        raise SvdlabError(f"{axis}: got {short(unknown[0])}, allowed: none, or {kind}' names, such as {like}")
    return names


def axes_of(changes: Changes, points: Sequence[Point]) -> dict[str, list[Any]]:
    """The axes and the values that the points have on them; numbers rise, anything else stays in its order."""
    names = list(dict.fromkeys(name for change in changes for name in change))
    axes = {}
    for name in names:
        values = list(dict.fromkeys(point.value(name) for point in points))
        numbers = all(isinstance(v, (int, float)) for v in values)
        axes[name] = sorted(values) if numbers else values
    return axes


def neighbours(axes: Mapping[str, Sequence[Any]], points: Sequence[Point]) -> list[tuple[str, Point, Point]]:
    """Pairs of points that stand next to each other on one axis and together on all others: (axis, point, next)."""
    pairs = []
    for axis, values in axes.items():
        others = [name for name in axes if name != axis]
        rank = {value: i for i, value in enumerate(values)}
        lines: dict[tuple[Any, ...], list[Point]] = {}
        for point in points:
            lines.setdefault(tuple(point.value(name) for name in others), []).append(point)
        for line in lines.values():
            line = sorted(line, key=lambda p: rank[p.value(axis)])
            pairs += [(axis, a, b) for a, b in itertools.pairwise(line)]
    return pairs
