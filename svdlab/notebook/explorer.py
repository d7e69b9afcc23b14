"""Sliders over one fix: made from ``GenerationSettings``, computed by one thread, drawn headless, too.

With somebody there to move them, the sliders recompute. In a page made by papermill the same cell draws its defaults
and a grid of slider values, so that the page says what the widget would.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import ipywidgets

from svdlab.errors import SvdlabError
from svdlab.notebook.charts import plot_fix, plot_grid
from svdlab.notebook.controls import WIDE, control, help_of, is_live, set_stale, small, stale_style, unit_of
from svdlab.notebook.panel import Panel
from svdlab.notebook.players import Player, case_clips
from svdlab.notebook.tables import fix_row, grid_table, number_html
from svdlab.parity.bugs import BUGS
from svdlab.parity.lab import Cancelled, Case, Lab
from svdlab.svd.settings import GenerationSettings

# A checkpoint of more weights answers in minutes: its sliders wait for the Run button.
_LIVE_PARAMETERS = 10**8


class Explorer:
    """One fix at any position of the sliders: a panel where somebody can move them, a page where nobody can.

    Args:
        lab: what computes.
        settings: where the sliders start.
        bugs: those that can be injected, names of ``bugs.BUGS``.
        sliders: which settings have a control.
        grid: changes of the settings that a page shows instead of sliders.
        live: recompute at every move, or wait for the Run button; default: by the checkpoint's size.
    """

    def __init__(
        self,
        lab: Lab,
        settings: GenerationSettings,
        bugs: Sequence[str],
        sliders: Sequence[str],
        grid: Sequence[Mapping[str, Any]] = (),
        live: bool | None = None,
    ):
        self.lab, self.start = lab, settings
        self.bugs, self.sliders, self.changes = tuple(bugs), tuple(sliders), tuple(grid)
        self.live = lab.parameters <= _LIVE_PARAMETERS if live is None else live
        self.computed: dict[tuple[GenerationSettings, str], Case] = {}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if is_live():
            return ExplorerPanel(self).show()._repr_mimebundle_()
        return {"text/html": self.page(), "text/plain": f"Explorer of {', '.join(self.bugs)}"}

    def answer(self) -> dict[str, Any]:
        """What the closing cell records, over every position of the sliders that was computed, the first included.

        With another stage wrong everything after it diverges. That is another notebook's answer: this one's is no
        where svdlab with the fix diverges first at the probe at which one of these bugs shows.

        Returns:
            The arguments of ``report.record``. A bug that moves nothing by more than rounding at the first position,
            as some do in a half dtype, is named.
        """
        first = [self._case(self.start, bug) for bug in self.bugs]
        on = [case.on for case in list(self.computed.values())]
        own = {BUGS[bug].first_probe for bug in self.bugs}
        diverging = {c.first_divergence for c in on} - {None}
        answer: dict[str, Any] = {
            "passed": not diverging & own,
            "fixes": [fix_row(case, [c for c in self.computed.values() if c.bug == case.bug]) for case in first],
            "worst_ratio_fix_on": max(c.worst.ratio for c in on),
            "settings_seen": len({settings for settings, _ in self.computed}),
        }
        if elsewhere := sorted(str(probe) for probe in diverging - own):
            answer["diverges_elsewhere"] = ", ".join(elsewhere)
        if quiet := [case.bug for case in first if case.off.verdict == "parity"]:
            answer["bugs_below_the_noise"] = ", ".join(quiet)
        return answer

    def _case(self, settings: GenerationSettings, bug: str) -> Case:
        return self.remember(self.lab.case(settings, bug))

    def remember(self, case: Case) -> Case:
        """Count a case for the answer, without its tensors."""
        slim = {name: replace(getattr(case, name), traces={}) for name in ("on", "off")}
        self.computed[case.settings, case.bug] = replace(case, **slim)
        return case

    def page(self) -> str:
        """What a page without sliders shows: the start with the fix off and on, then the grid. HTML."""
        parts = []
        for bug in self.bugs:
            case = self._case(self.start, bug)
            parts.append(f"<h3>{escape(bug)}: {escape(BUGS[bug].cause)}</h3>")
            parts.append(plot_fix(case.on, case.off, bug)._repr_html_())
            parts += [number_html(case, fix=False), _player(case, fix=False).to_html()]
        parts += [number_html(case, fix=True), _player(case, fix=True).to_html()]
        if self.changes:
            parts.append(self._grid())
        return "".join(parts)

    def _grid(self) -> str:
        rows = [[self._case(self.start.replace(**change), bug) for bug in self.bugs] for change in self.changes]
        labels = [" to ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in c.values()) for c in self.changes]
        names = list(self.changes[0])
        axis = " to ".join(name.replace("_", " ") for name in names)
        if len(names) == 1 and (unit := unit_of(names[0])):
            axis = f"{axis} ({unit})"
        off = {bug: [row[i].off for row in rows] for i, bug in enumerate(self.bugs)}
        plot = plot_grid(labels, [row[0].on for row in rows], off, axis)
        table = grid_table(axis, labels, rows)
        return f"<h3>At other settings</h3>{plot._repr_html_()}{table.to_html()}"


class ExplorerPanel(Panel):
    """Sliders, a fix on/off toggle, the plot with its number, and the clips side by side.

    Args:
        explorer: what it is about.
    """

    def __init__(self, explorer: Explorer):
        super().__init__()
        self.explorer = explorer
        self.case: Case | None = None
        self._drawing = threading.RLock()
        self.controls = {name: self._control(name) for name in explorer.sliders}
        self.bug = ipywidgets.Dropdown(
            options=explorer.bugs, description="the bug", style=WIDE, layout={"width": "30em"}
        )
        self.fix = ipywidgets.Checkbox(
            value=True, description="fix on", indent=False, layout={"width": "6em", "margin": "2px 2px 2px 6px"}
        )
        self.number, self.caption, self.plot = (ipywidgets.HTML() for _ in range(3))
        self.clips = ipywidgets.VBox()
        for widget in (*self.controls.values(), self.bug):
            widget.observe(self._moved, "value")
        self.fix.observe(lambda change: self._draw_choice(), "value")
        self.run.on_click(lambda button: self.compute())

    def _control(self, name: str) -> ipywidgets.ValueWidget:
        start = self.explorer.start
        high = start.num_frames if name == "decode_chunk_size" else None
        value = getattr(start, name)
        return control(name, high if value in (None, "auto") else value, high)

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget, and the first case under way."""
        rows = [
            ipywidgets.HBox([widget, ipywidgets.HTML(small(help_of(name)))]) for name, widget in self.controls.items()
        ]
        if len(self.explorer.bugs) > 1:
            rows.append(self.bug)
        buttons = [self.fix, *([] if self.explorer.live else [self.run]), self.stop, self.progress, self.status]
        self.compute()
        return ipywidgets.VBox(
            [*rows, ipywidgets.HBox(buttons), self.caption, self.plot, self.number, self.clips, stale_style()]
        )

    @property
    def settings(self) -> GenerationSettings:
        """Where the sliders stand.

        Raises:
            SvdlabError: they stand where the settings do not allow.
        """
        values = {name: widget.value for name, widget in self.controls.items()}
        # A slider in steps of 0.1 says 0.30000000000000004.
        return self.explorer.start.replace(**{n: round(v, 6) if isinstance(v, float) else v for n, v in values.items()})

    def compute(self) -> None:
        """Ask the worker for the case at which the sliders stand."""
        try:
            settings = self.settings
        except SvdlabError as error:
            self.say_error(error)
            return
        bug = self.bug.value
        self.submit(lambda stop: self._compute(settings, bug, stop))

    def _moved(self, change: Any) -> None:
        if self.explorer.live:
            self.compute()
        else:
            self.say("The sliders have moved: press Run.")

    def _compute(self, settings: GenerationSettings, bug: str, stop: threading.Event) -> str:
        """In the worker's thread: draw what comes; what is not yet of these settings is dimmed."""
        said = ""

        def on_progress(fraction: float, text: str) -> None:
            nonlocal said
            if stop.is_set():
                raise Cancelled
            if text != said:
                said = text
                self.progress.value = fraction
                self.say(text)

        set_stale(self.plot, True)
        set_stale(self.clips, True)
        try:
            for case in self.explorer.lab.cases(settings, bug, on_progress):
                if stop.is_set():
                    raise Cancelled
                self._draw(case)
        finally:
            set_stale(self.clips, False)
            # A run that ends before there is a noise floor leaves the plot of an earlier case.
            set_stale(self.plot, self.case is not None and not self.case.measured)
        return "done"

    def _draw(self, case: Case) -> None:
        with self._drawing:
            self.case = case
            self._draw_choice()
            set_stale(self.clips, False)
            if case.measured:
                self.explorer.remember(case)
                self.plot.value = plot_fix(case.on, case.off, case.bug)._repr_html_()
                set_stale(self.plot, False)

    def _draw_choice(self) -> None:
        """What the toggle changes: the number and the clips. The plot has both lines."""
        with self._drawing:
            if self.case is not None:
                # A stopped run leaves the pictures behind the sliders: they say what they are of.
                at = (f"{n.replace('_', ' ')} {getattr(self.case.settings, n)}" for n in self.controls)
                self.caption.value = small(f"Shown: {', '.join([*at, self.case.bug])}")
                self.number.value = number_html(self.case, self.fix.value)
                self._show_clips(self.case)

    def _show_clips(self, case: Case) -> None:
        """In the player that is there, so that it goes on at its frame."""
        if self.clips.children:
            self.clips.children[0].show(case_clips(case, self.fix.value), case.settings.fps)
        else:
            self.clips.children = [_player(case, self.fix.value)]


def _player(case: Case, fix: bool) -> Player:
    return Player(case_clips(case, fix), case.settings.fps)
