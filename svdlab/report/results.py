"""What a report found, notebook by notebook, and what is not what it was in an earlier report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from svdlab.errors import about
from svdlab.reading import Document, read_as
from svdlab.report.verdict import shown, words

if TYPE_CHECKING:
    from svdlab.parity.diagnose import CatalogueRow


class Fix(Document):
    """What a verdict says of one injected bug and its fix, see ``verdict.Verdict``; None: not finite."""

    bug: str
    ratio_on: float | None
    ratio_off: float | None
    first_divergence: str | None
    frames_mse: float | None
    shown_at: int = 0
    missed_at: int = 0


class CatalogueEntry(Document):
    """A bug of the catalogue and what two tests say of it, see ``parity.diagnose.CatalogueRow``; None: not finite."""

    bug: str
    first_divergence: str | None
    ratio: float | None
    frames_mse: float | None
    passes_mse_bar: bool


class RecordedVerdict(Document):
    """A verdict as a notebook holds it."""

    name: str
    passed: bool
    numbers: dict[str, float | int | str | bool | None]
    fixes: list[Fix] = []
    catalogue: list[CatalogueEntry] = []


class _PreviousNotebook(Document):
    model_config = ConfigDict(extra="ignore")

    name: str
    verdicts: list[RecordedVerdict]


class _Previous(Document):
    """Of ``results.json``, what a later report compares itself with."""

    model_config = ConfigDict(extra="ignore")

    made: str = ""
    notebooks: list[_PreviousNotebook]


@dataclass
class NotebookResult:
    """One notebook's run.

    Attributes:
        name: the file's, without its suffix.
        title: its first heading.
        status: "passed", "failed" (a verdict is no) or "error" (a cell raised, or it took too long).
        seconds: for the run and its page.
        verdicts: what its cells recorded, in order.
        error: the last line of what went wrong, or nothing.
        page: its HTML file.
        parameters: what its parameters cell came to hold.
        thumbnail: the page's first player or picture, as HTML.
    """

    name: str
    status: str
    seconds: float
    verdicts: list[dict[str, Any]]
    error: str = ""
    page: str = ""
    title: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    thumbnail: str = field(default="", repr=False)

    def fixes(self) -> list[dict[str, Any]]:
        """What its verdicts say of fixes, in order."""
        return [fix for verdict in self.verdicts for fix in verdict.get("fixes", ())]

    def catalogue(self) -> list[CatalogueRow]:
        """What its verdicts say of every bug of the catalogue, in order."""
        from svdlab.parity.diagnose import CatalogueRow

        numbers = {"ratio": math.inf, "frames_mse": math.inf}  # JSON holds no infinity
        entries = [entry for verdict in self.verdicts for entry in verdict.get("catalogue", ())]
        return [CatalogueRow(**{**e, **{k: v for k, v in numbers.items() if e[k] is None}}) for e in entries]

    def to_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds: all but the thumbnail."""
        return {name: value for name, value in asdict(self).items() if name != "thumbnail"}


@dataclass(frozen=True)
class Change:
    """A verdict that is not what it was: ``was`` and ``now`` are "yes", "NO" or "absent"."""

    notebook: str
    verdict: str
    was: str
    now: str

    @property
    def regression(self) -> bool:
        """Whether a verdict that was yes no longer is."""
        return self.was == "yes"


def changes(results: Sequence[NotebookResult], previous: Mapping[str, Any]) -> list[Change]:
    """Which verdicts differ from an earlier ``results.json``; one that is gone counts as changed."""
    before = {(n["name"], v["name"]): v["passed"] for n in previous["notebooks"] for v in n["verdicts"]}
    now = {(r.name, v["name"]): v["passed"] for r in results for v in r.verdicts}
    words = {True: "yes", False: "NO", None: "absent"}
    keys = list(dict.fromkeys([*before, *now]))
    return [
        Change(*key, words[before.get(key)], words[now.get(key)]) for key in keys if before.get(key) != now.get(key)
    ]


def moved(results: Sequence[NotebookResult], previous: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Numbers that differ from an earlier report's in the three digits that are shown: notebook, number, was, is."""
    before = {r["name"]: dict(_numbers(r)) for r in previous["notebooks"]}
    return [
        (r.name, name, old, new)
        for r in results
        for name, new in _numbers(r.to_dict())
        if (old := before.get(r.name, {}).get(name, new)) != new
    ]


def _numbers(notebook: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for verdict in notebook["verdicts"]:
        for name, value in verdict["numbers"].items():
            yield words(name), shown(value)
        for fix in verdict.get("fixes", ()):
            for name in ("ratio_on", "ratio_off", "first_divergence", "frames_mse", "shown_at", "missed_at"):
                yield f"{fix['bug']}: {words(name)}", shown(fix[name])


def read_previous(path: str) -> dict[str, Any]:
    """An earlier report's results.

    Args:
        path: a ``results.json`` or its folder.

    Raises:
        SvdlabError: there is none, or something in it is not what a report writes.
    """
    file = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    with about("--previous"):
        return read_as(_Previous, file).model_dump()
