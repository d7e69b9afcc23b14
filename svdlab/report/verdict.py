"""What a notebook found: ``record`` in its closing cell, and the output of its own type in which it travels.

There is no side file, and the call is harmless in a live kernel. Importing this is light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from svdlab.files import json_value
from svdlab.tables import CSS, Cell, Column, Table

if TYPE_CHECKING:
    from svdlab.parity.diagnose import CatalogueRow

VERDICT = "application/vnd.svdlab.verdict+json"
FIX_COLUMNS = (
    "injected bug",
    "first tensor above 4",
    Column("noise ratio there, fix off", "right"),
    Column("fix on", "right"),
    Column("frames MSE, fix off", "right"),
    "the usual test, MSE < 1e-3",
)


@dataclass(frozen=True)
class Verdict:
    """What a notebook found.

    Attributes:
        name: what was asked.
        passed: the answer.
        numbers: what it rests on.
        fixes: one mapping per injected bug: ``bug``, ``first_divergence`` with the bug, ``ratio_on`` and ``ratio_off``
            (the noise ratio there with the fix and with the bug), ``frames_mse`` with the bug; and of the settings that
            were computed, at how many the bug shows (``shown_at``), and at how many of these the usual test misses it
            (``missed_at``).
        catalogue: one mapping per bug of the catalogue, a ``parity.diagnose.CatalogueRow``.
    """

    name: str
    passed: bool
    numbers: dict[str, float | str] = field(default_factory=dict)
    fixes: list[dict[str, Any]] = field(default_factory=list)
    catalogue: list[dict[str, Any]] = field(default_factory=list)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        numbers = ", ".join(f"{words(name)} {shown(value)}" for name, value in self.numbers.items())
        return {
            VERDICT: json_value(asdict(self)),
            "text/html": self._html(),
            "text/plain": f"{'yes' if self.passed else 'NO'}: {self.name}: {numbers}",
        }

    def _html(self) -> str:
        style, word = (CSS["good"], "yes") if self.passed else (CSS["bad"], "NO")
        parts = [f"<p style='font-size:1.1em'><b style='{style};padding:0 0.4em'>{word}</b> {escape(self.name)}</p>"]
        if self.numbers:
            numbers = [(words(name), shown(value)) for name, value in self.numbers.items()]
            parts.append(Table(["", Column("", "right")], numbers).to_html())
        if self.fixes:
            parts.append(Table(FIX_COLUMNS, [fix_cells(fix) for fix in self.fixes]).to_html())
        return "".join(parts)


def record(
    name: str,
    passed: bool,
    *,
    fixes: Sequence[Mapping[str, Any]] = (),
    catalogue: Sequence[CatalogueRow] = (),
    **numbers: float | int | str,
) -> Verdict:
    """A verdict as the last expression of a notebook's closing cell; the report collects it.

    Args:
        name: what was asked, such as "svdlab is at parity with diffusers".
        passed: the answer.
        fixes: one row each in the report's table of all fixes, see ``Verdict``.
        catalogue: what ``parity.diagnose.catalogue`` found, with which the report begins.
        numbers: what it rests on, shown beside it.
    """
    rows = [asdict(row) for row in catalogue]
    return Verdict(name, bool(passed), dict(numbers), [dict(fix) for fix in fixes], rows)


def fix_cells(fix: Mapping[str, Any]) -> list[Cell]:
    """A row under ``FIX_COLUMNS``."""
    from svdlab.parity.compare import THRESHOLD

    first, ratio = fix["first_divergence"], fix["ratio_on"]
    return [
        Cell(fix["bug"]),
        Cell(first or "none: below the noise"),
        Cell(shown(fix["ratio_off"])),
        Cell(shown(ratio), "good" if ratio is not None and ratio <= THRESHOLD else "bad"),
        Cell(shown(fix["frames_mse"])),
        missed_cell(fix.get("missed_at", 0), fix.get("shown_at", 0)),
    ]


def missed_cell(missed: int, settings: int) -> Cell:
    """At how many of the settings at which a bug shows a test misses it."""
    if not settings:
        return Cell("")
    at = f"{settings} setting{'s' * (settings > 1)}"
    if not missed:
        return Cell(f"catches it at {'all ' * (settings > 1)}{at}")
    return Cell(f"misses it at {missed} of {at}", "marked")


def shown(value: Any) -> str:
    """A value as reports print it: three digits of a float; None is a number that is not finite."""
    if value is None:
        return "not finite"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    """The name of a number or a setting, as one reads it."""
    return name.replace("_", " ")
