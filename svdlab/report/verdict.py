"""What a notebook found: ``record`` in its closing cell, and the output of its own type in which it travels.

There is no side file, and the call is harmless in a live kernel. Importing this is light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from svdlab.files import json_value
from svdlab.tables import Cell, Column, Table

VERDICT = "application/vnd.svdlab.verdict+json"
FIX_COLUMNS = (
    "injected bug",
    "first tensor above 4",
    Column("worst noise ratio, fix off", "right"),
    Column("fix on", "right"),
    Column("frames MSE, fix off", "right"),
    "the usual threshold, MSE < 1e-3",
)


@dataclass(frozen=True)
class Verdict:
    """What a notebook found.

    Attributes:
        name: what was asked.
        passed: the answer.
        numbers: what it rests on.
        fixes: one mapping per injected bug: ``bug``, ``ratio_on`` and ``ratio_off`` (the worst noise ratio with the fix
            and with the bug), ``first_divergence`` and ``frames_mse`` with the bug.
    """

    name: str
    passed: bool
    numbers: dict[str, float | str] = field(default_factory=dict)
    fixes: list[dict[str, Any]] = field(default_factory=list)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        numbers = ", ".join(f"{words(name)} {shown(value)}" for name, value in self.numbers.items())
        return {
            VERDICT: json_value(asdict(self)),
            "text/html": self._html(),
            "text/plain": f"{'yes' if self.passed else 'NO'}: {self.name}: {numbers}",
        }

    def _html(self) -> str:
        colour, word = ("#00664f", "yes") if self.passed else ("#a32a00", "NO")
        parts = [f"<p style='font-size:1.1em'><b style='color:{colour}'>{word}</b> {escape(self.name)}</p>"]
        if self.numbers:
            numbers = [(words(name), shown(value)) for name, value in self.numbers.items()]
            parts.append(Table(["", Column("", "right")], numbers).to_html())
        if self.fixes:
            parts.append(Table(FIX_COLUMNS, [fix_cells(fix) for fix in self.fixes]).to_html())
        return "".join(parts)


def record(
    name: str, passed: bool, *, fixes: Sequence[Mapping[str, Any]] = (), **numbers: float | int | str
) -> Verdict:
    """A verdict as the last expression of a notebook's closing cell; the report collects it.

    Args:
        name: what was asked, such as "svdlab is at parity with diffusers".
        passed: the answer.
        fixes: one row each in the report's table of all fixes, see ``Verdict``.
        numbers: what it rests on, shown beside it.
    """
    return Verdict(name, bool(passed), dict(numbers), [dict(fix) for fix in fixes])


def fix_cells(fix: Mapping[str, Any]) -> list[Cell]:
    """A row under ``FIX_COLUMNS``."""
    from svdlab.notebook.tables import caught
    from svdlab.parity.compare import MSE_BAR, THRESHOLD

    first, ratio, mse = fix["first_divergence"], fix["ratio_on"], fix["frames_mse"]
    return [
        Cell(fix["bug"]),
        Cell(first or "none: below the noise"),
        Cell(shown(fix["ratio_off"])),
        Cell(shown(ratio), "good" if ratio is not None and ratio <= THRESHOLD else "bad"),
        Cell(shown(mse)),
        caught(mse is None or not mse < MSE_BAR) if first else Cell(""),
    ]


def shown(value: Any) -> str:
    """A value as reports print it: three digits of a float; None is a number that is not finite."""
    if value is None:
        return "not finite"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    """The name of a number or a setting, as one reads it."""
    return name.replace("_", " ")
