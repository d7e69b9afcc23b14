"""A fix at every position of a grid, in a page without a kernel: a slider, the fix off and on, nothing computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from svdlab.notebook.charts import plot_fix
from svdlab.notebook.players import CHOICES, Player, case_clips
from svdlab.notebook.scripts import joined, packed
from svdlab.notebook.tables import number_html
from svdlab.parity.bugs import BUGS
from svdlab.parity.lab import Case, Choice

# What a page needs to show the figure of ``FixGrid.to_html``, beside what its player and its chart need.
SCRIPT, STYLE = joined("unpacked.js", "fix_grid.js"), joined("fix_grid.css")
_CHOICES: tuple[Choice, ...] = ("off", "on")


class FixGrid:
    """What a panel over a fix would show at some positions of its sliders, made before the page is opened.

    Cases are added one by one, so that their tensors need not all be kept.

    Args:
        axis: what the slider moves.
        labels: of its positions.
        start: the position that is shown first.
        bugs: those that can be injected, names of ``bugs.BUGS``; the first one is shown first.
        unit: of the axis, or nothing.
        max_bytes: how much of a page the clips of all cases but the first may take. Those that do not fit are left
            out, and the figure says so where they are missing.
    """

    def __init__(
        self,
        axis: str,
        labels: Sequence[str],
        start: int,
        bugs: Sequence[str],
        unit: str = "",
        max_bytes: int = 2**20,
    ):
        self.axis, self.labels, self.start, self.bugs, self.unit = axis, list(labels), start, tuple(bugs), unit
        self._cases: dict[tuple[str, int], dict[str, Any]] = {}
        self._sprites: dict[str, int] = {}
        self._left = max_bytes
        self._first, self._shown = "", list[str]()

    def add(self, case: Case, position: int) -> None:
        """Keep what is shown of a case, of one of the bugs, at a position; those that matter most come first."""
        plot = plot_fix(case)
        players = {which: Player(case_clips(case, which), case.settings.fps, blink=True) for which in _CHOICES}
        numbers = {which: number_html(case, which) for which in _CHOICES}
        about = {name: value for name, value in players["off"].content.items() if name != "clips"}
        kept = {
            "about": about,
            "clips": self._carried({which: p.content["clips"] for which, p in players.items()}),
            "numbers": numbers,
            "plot": {"spec": plot.spec, "alt": plot.alt},
        }
        self._cases[case.bug, position] = kept
        if (case.bug, position) == (self.bugs[0], self.start):
            self._shown = [clip["src"] for clip in players["off"].content["clips"]]
            without = "".join(f"<div>{numbers[which]}</div>" for which in _CHOICES[1:])
            self._first = (
                f'<div class="number">{numbers["off"]}</div>{players["off"].to_html()}{plot._repr_html_()}'
                f'<div class="without">{without}<p>With scripts on, a slider here moves {escape(self.axis)}.</p></div>'
            )

    def _carried(self, clips: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, list[tuple[str, int]]] | None:
        """By choice, each clip's title and the number of its picture, which the page carries once; None: no room."""
        every = dict.fromkeys(clip["src"] for shown in clips.values() for clip in shown)
        new = [src for src in every if src not in self._sprites]
        if self._sprites:
            if (size := sum(map(len, new))) > self._left:
                return None
            self._left -= size
        for src in new:
            self._sprites[src] = len(self._sprites)
        return {which: [(c["title"], self._sprites[c["src"]]) for c in shown] for which, shown in clips.items()}

    def to_html(self) -> str:
        """A figure that carries all of it; ``SCRIPT`` brings it to life, and without scripts it shows the start."""
        bugs = [
            {"name": bug, "cause": BUGS[bug].cause, "cases": [self._cases[bug, i] for i in range(len(self.labels))]}
            for bug in self.bugs
        ]
        data = {
            "axis": self.axis,
            "unit": self.unit,
            "labels": self.labels,
            "start": self.start,
            "choices": {which: CHOICES[which] for which in _CHOICES},
            "bugs": bugs,
            # Those that the figure shows without scripts are taken from there.
            "sprites": ["" if src in self._shown else src for src in self._sprites],
            "shown": [self._sprites[src] for src in self._shown],
        }
        title = f"{self.bugs[0]}: {BUGS[self.bugs[0]].cause}"
        return (
            f'<figure class="svdlab-fix-grid" aria-label="the fix off and on"><h3>{escape(title)}</h3>{self._first}'
            f'<script type="text/plain">{packed(data)}</script></figure>'
        )
