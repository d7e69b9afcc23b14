"""A panel over one fix: controls made from ``GenerationSettings``, computed by one thread, drawn headless, too.

With somebody there to move them, the sliders recompute. In a page made by papermill the same cell computes a grid of
slider values before, so that the page shows what the widget would.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import ipywidgets
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.notebook.charts import ChartWidget, plot_fix, plot_grid
from svdlab.notebook.controls import NARROW, alert, control, help_of, is_live, set_stale, small, stale_style, unit_of
from svdlab.notebook.fix_grid import FixGrid
from svdlab.notebook.inspector import Inspector
from svdlab.notebook.panel import Panel
from svdlab.notebook.players import CHOICES, Player, case_clips, difference
from svdlab.notebook.snippet import Snippet, case_code
from svdlab.notebook.tables import fix_row, grid_table, number_html
from svdlab.parity.bugs import BUGS
from svdlab.parity.lab import Cancelled, Case, Choice, Lab, Stages
from svdlab.samples import read_image
from svdlab.svd.settings import GenerationSettings

# A checkpoint of more weights answers in minutes: its sliders wait for the Run button.
_LIVE_PARAMETERS = 10**8
_PANEL, _PLOT = "svdlab-panel", "svdlab-panel-plot"
_POINTING = "Click a tensor in the plot to look into it, below."
# A drawing has the colours of paper; on a dark theme its lightness is turned over, and its hues stay.
_STYLE = f"""
.{_PANEL} .widget-html-content {{ line-height: 1.45; }}
.{_PANEL} .widget-html-content p {{ margin: 4px 0 8px; }}
[data-jp-theme-light="false"] .{_PLOT} svg {{ filter: invert(1) hue-rotate(180deg); }}
"""


class Explorer:
    """One fix at any position of the sliders: a panel where somebody can move them, a page where nobody can.

    Args:
        lab: what computes.
        settings: where the sliders start.
        bugs: those that can be injected, names of ``bugs.BUGS``.
        sliders: which settings have a control.
        grid: changes of the settings between which a page's slider moves, all of the same settings.
        live: recompute at every move, or wait for the Run button; default: by the checkpoint's size.
        stages: functions of the reader's for stages' places, by their names in ``svd.stages.STAGES``: a third choice
            beside the fix on and off.

    Raises:
        SvdlabError: a name that is not a stage's.
    """

    def __init__(
        self,
        lab: Lab,
        settings: GenerationSettings,
        bugs: Sequence[str],
        sliders: Sequence[str],
        grid: Sequence[Mapping[str, Any]] = (),
        live: bool | None = None,
        stages: Stages | None = None,
    ):
        self.lab, self.start = lab, settings
        self.bugs, self.sliders, self.changes = tuple(bugs), tuple(sliders), tuple(grid)
        self.live = lab.parameters <= _LIVE_PARAMETERS if live is None else live
        self.stages = dict(stages or {})
        lab.pipe.with_stage(**self.stages)  # so that a wrong name is refused here
        self.computed: dict[tuple[GenerationSettings, str, str | None], Case] = {}

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
            "settings_seen": len({(settings, image) for settings, _, image in self.computed}),
        }
        if elsewhere := sorted(str(probe) for probe in diverging - own):
            answer["diverges_elsewhere"] = ", ".join(elsewhere)
        if quiet := [case.bug for case in first if case.off.verdict == "parity"]:
            answer["bugs_below_the_noise"] = ", ".join(quiet)
        return answer

    def _case(self, settings: GenerationSettings, bug: str, stages: Stages | None = None) -> Case:
        return self.remember(self.lab.case(settings, bug, stages))

    def remember(self, case: Case, image: str | None = None) -> Case:
        """Count a case for the answer, without its tensors; ``image`` names another image than the lab's."""
        slim = {name: replace(getattr(case, name), traces={}) for name in ("on", "off")}
        self.computed[case.settings, case.bug, image] = replace(case, **slim, own=None)
        return case

    def page(self) -> str:
        """What a page without a kernel shows: the fix off and on over the grid, own functions at the start. HTML."""
        changes, start = self._positions()
        labels = [" to ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in c.values()) for c in changes]
        names = list(changes[0])
        axis, unit = " to ".join(name.replace("_", " ") for name in names), unit_of(names[0]) if len(names) == 1 else ""
        figure, rows, own = FixGrid(axis, labels, start, self.bugs, unit), [list[Case]() for _ in changes], ""
        for i in sorted(range(len(changes)), key=lambda i: abs(i - start)):
            for bug in self.bugs:
                mine = self.stages if (i, bug) == (start, self.bugs[0]) else None
                case = self._case(self.start.replace(**changes[i]), bug, mine)
                figure.add(case, i)
                rows[i].append(self.computed[case.settings, bug, None])
                if case.own is not None:
                    clips = Player(case_clips(case, "own"), case.settings.fps, blink=True).to_html()
                    own = f"<h3>Your code at {escape(axis)} {escape(labels[i])}</h3>{number_html(case, 'own')}{clips}"
        axis = f"{axis} ({unit})" if unit else axis
        off = {bug: [row[i].off for row in rows] for i, bug in enumerate(self.bugs)}
        plot = plot_grid(labels, [row[0].on for row in rows], off, axis)
        table = grid_table(axis, labels, rows)
        grid = f"<h3>At every setting</h3>{plot._repr_html_()}{table.to_html()}" if self.changes else ""
        return f"{figure.to_html()}{own}{grid}"

    def _positions(self) -> tuple[list[Mapping[str, Any]], int]:
        """The grid, with the start among it, and where that is."""
        changes = list(self.changes or [{self.sliders[0]: getattr(self.start, self.sliders[0])}])
        start = {name: getattr(self.start, name) for name in changes[0]}
        if start not in changes:
            changes = sorted([*changes, start], key=lambda change: [_rank(value) for value in change.values()])
        return changes, changes.index(start)


def _rank(value: Any) -> tuple[bool, float, str]:
    """Where a value goes among others: numbers as they rise, and behind them what is none, such as "auto"."""
    return (False, value, "") if isinstance(value, (int, float)) else (True, 0.0, str(value))


@dataclass(frozen=True)
class _Asked:
    """What the controls ask for: a case of a lab. ``image`` names the file that the lab's image is of, if it is one."""

    lab: Lab
    settings: GenerationSettings
    bug: str
    image: str | None = None


@dataclass(frozen=True)
class _Pinned:
    """A clip that stays while the controls move on, and what was asked for to make it."""

    asked: _Asked
    which: Choice
    frames: Tensor
    number: str


class ExplorerPanel(Panel):
    """Controls and the verdict on the left, the clips and the plot of one case on the right.

    All that is shown is of one case. Where the controls ask for another one it is dimmed, until that is there.

    Args:
        explorer: what it is about.
    """

    def __init__(self, explorer: Explorer):
        super().__init__()
        self.explorer = explorer
        self.case: Case | None = None
        self._shown: _Asked | None = None
        self._pinned: _Pinned | None = None
        self._own_image: tuple[Lab, str] | None = None
        self._drawing = threading.RLock()
        self.controls = {name: self._control(name) for name in explorer.sliders}
        self.bug = ipywidgets.Dropdown(options=explorer.bugs, description="the bug", **NARROW)
        self.seed = ipywidgets.IntText(explorer.start.seed, description="seed", tooltip=help_of("seed"), **NARROW)
        self.upload = ipywidgets.FileUpload(
            accept="image/*", description="your image", tooltip="a clip of an image of yours", layout={"width": "auto"}
        )
        options = [(text, which) for which, text in CHOICES.items() if which != "own" or explorer.stages]
        self.which = ipywidgets.ToggleButtons(options=options, style={"button_width": f"{88 // len(options)}%"})
        self.reset = _button("Reset", "undo", "all controls as they were at first")
        self.pin = _button("Pin as A", "thumb-tack", "keep this clip, and compare with it what comes")
        self.back = _button("Back to what is shown", "arrow-left", "the controls as they were for what is shown")
        self.number, self.pinned_number, self.caption, self.refused = (ipywidgets.HTML() for _ in range(4))
        self.clips, self.plot, self.snippet = ipywidgets.VBox(), ChartWidget(), Snippet()
        # In boxes that can be dimmed: an anywidget takes no class once it is drawn.
        self.drawn, self.copied = ipywidgets.VBox([self.plot]), ipywidgets.VBox([self.snippet])
        self.inspector: Inspector | None = None
        self.inspected = ipywidgets.VBox(layout={"flex": "1 1 100%", "min_width": "0"})
        self.close = _button("Close", "times", "no tensor")
        self.back.layout.display = "none"
        for widget in (*self.controls.values(), self.bug, self.seed):
            widget.observe(self._moved, "value")
        self.which.observe(lambda change: self._draw_choice(), "value")
        self.upload.observe(self._uploaded, "value")
        self.run.on_click(lambda button: self.compute())
        self.stop.on_click(lambda button: self._mark(ended=True))
        self.reset.on_click(lambda button: self._reset())
        self.back.on_click(lambda button: self._go_back())
        self.pin.on_click(lambda button: self._pin())
        self.close.on_click(lambda button: self._close_inspector())
        self.plot.on_click(self.inspect)

    def _control(self, name: str) -> ipywidgets.ValueWidget:
        start = self.explorer.start
        high = start.num_frames if name == "decode_chunk_size" else None
        value = getattr(start, name)
        return control(name, high if value in (None, "auto") else value, high)

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget, and the first case under way."""
        bug = [self.bug] if len(self.explorer.bugs) > 1 else []
        left = [
            self.which,
            self.number,
            self.pinned_number,
            *bug,
            *self.controls.values(),
            self.seed,
            ipywidgets.HBox([self.upload, self.pin, self.reset]),
            self.refused,
            ipywidgets.HBox([self.run, self.stop, self.progress]),
            self.status,
            self.copied,
        ]
        right = [ipywidgets.HBox([self.caption, self.back]), self.clips, self.drawn, ipywidgets.HTML(small(_POINTING))]
        self.drawn.add_class(_PLOT)
        self.compute()
        columns = [
            ipywidgets.VBox(left, layout={"flex": "0 1 330px"}),
            ipywidgets.VBox(right, layout={"flex": "1 1 480px", "min_width": "0"}),
            self.inspected,
        ]
        style = ipywidgets.HTML(f"<style>{_STYLE}</style>", layout={"display": "none"})
        layout = {"flex_flow": "row wrap", "align_items": "flex-start"}
        panel = ipywidgets.HBox([*columns, stale_style(), style], layout=layout)
        panel.add_class(_PANEL)
        return panel

    @property
    def settings(self) -> GenerationSettings:
        """Where the controls stand.

        Raises:
            SvdlabError: they stand where the settings do not allow.
        """
        values = {name: widget.value for name, widget in self.controls.items()}
        # A slider in steps of 0.1 says 0.30000000000000004.
        values = {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}
        return self.explorer.start.replace(**values, seed=self.seed.value)

    def _asked(self) -> _Asked:
        lab, image = self._own_image or (self.explorer.lab, None)
        return _Asked(lab, self.settings, self.bug.value, image)

    def compute(self) -> None:
        """Ask the worker for the case at which the controls stand."""
        try:
            asked = self._asked()
        except SvdlabError as error:
            problem = error

            def refuse(stop: threading.Event) -> str:
                raise problem

            self.submit(refuse)  # in its turn, so that what runs now has no later word
            self._mark(ended=True)
            return
        self._mark()
        self.submit(lambda stop: self._compute(asked, stop))

    def _moved(self, change: Any) -> None:
        if self.explorer.live:
            self.compute()
        else:
            self.say("The controls have moved: press Run.")
            self._mark(ended=True)

    def _uploaded(self, change: Any) -> None:
        if not self.upload.value:
            return
        (file,) = self.upload.value
        try:
            image = read_image(file["name"], bytes(file["content"]))
        except SvdlabError as error:
            self.refused.value = alert(error)
        else:
            self.refused.value = ""
            self._own_image = self.explorer.lab.with_image(image), file["name"]
            self._moved(change)
        self.upload.value = ()

    def _put(self, settings: GenerationSettings, bug: str, own_image: tuple[Lab, str] | None) -> None:
        """Set all controls, and compute where that moves one of them."""
        self._own_image = own_image
        for name, widget in self.controls.items():
            value = getattr(settings, name)
            widget.value = widget.max if value in (None, "auto") else value
        self.seed.value, self.bug.value = settings.seed, bug
        self._moved(None)

    def _reset(self) -> None:
        self.which.value, self.refused.value = "off", ""
        self._close_inspector()
        if self._pinned:
            self._pin()
        self._put(self.explorer.start, self.explorer.bugs[0], None)

    def _go_back(self) -> None:
        shown = self._shown
        assert shown is not None
        self._put(shown.settings, shown.bug, None if shown.image is None else (shown.lab, shown.image))

    def _pin(self) -> None:
        """Keep what is shown as A, or let it go."""
        with self._drawing:
            if self._pinned or self.case is None or self._shown is None:
                self._pinned = None
            else:
                frames = self.case.comparison(self.which.value).traces["candidate"]["frames"][0]
                self._pinned = _Pinned(self._shown, self.which.value, frames, self.number.value)
            self.pin.description = "Unpin A" if self._pinned else "Pin as A"
            self._draw_choice()

    def _mark(self, ended: bool = False) -> None:
        """Dim what is not of the case that the controls ask for; once nothing runs, offer the way back to it."""
        try:
            stale = self._shown is not None and self._shown != self._asked()
        except SvdlabError:
            stale = self._shown is not None
        for widget in (self.number, self.clips, self.drawn, self.copied, self.inspected):
            set_stale(widget, stale)
        self.back.layout.display = "" if stale and ended else "none"

    def _compute(self, asked: _Asked, stop: threading.Event) -> str:
        """In the worker's thread: draw what comes."""
        said = ""

        def on_progress(fraction: float, text: str) -> None:
            nonlocal said
            if stop.is_set():
                raise Cancelled
            if text != said:
                said = text
                self.progress.value = fraction
                self.say(text)

        try:
            for case in asked.lab.cases(asked.settings, asked.bug, self.explorer.stages, on_progress):
                if stop.is_set():
                    raise Cancelled
                self._draw(asked, case)
        finally:
            self._mark(ended=not self.worker.waiting)
        return "done"

    def _draw(self, asked: _Asked, case: Case) -> None:
        with self._drawing:
            self.case, self._shown = case, asked
            if case.measured:
                self.explorer.remember(case, asked.image)
            self.plot.show(plot_fix(case, steps=False))
            self._draw_choice()
            self._mark()

    def _draw_choice(self) -> None:
        """What the toggle changes: the number, the clips and the code. The plot has all lines."""
        with self._drawing:
            if self.case is None or self._shown is None:
                return
            which, shown = self.which.value, self._shown
            self.number.value = number_html(self.case, which)
            self.caption.value = small(f"Shown: {', '.join([CHOICES[which], *self._named(shown)])}")
            self.snippet.code = case_code(
                shown.lab, self.case.settings, shown.bug, which, self.explorer.stages, shown.image
            )
            self._show_clips(self.case, which)
            self._show_tensors(self.case, which)

    def _named(self, asked: _Asked) -> list[str]:
        """What was asked for, as a reader finds it in the controls."""
        settings = (f"{name.replace('_', ' ')} {getattr(asked.settings, name)}" for name in (*self.controls, "seed"))
        return [asked.bug, *settings, *([asked.image] if asked.image else [])]

    def inspect(self, probe: str) -> None:
        """Show a tensor of the case under the plot, as the plot asks when it is clicked.

        Args:
            probe: one of the plot's.

        Raises:
            SvdlabError: no such tensor.
        """
        with self._drawing:
            if self.case is None:
                return
            if self.inspector is None:
                which = self.which.value
                self.inspector = Inspector(self.case.comparison(which), name=f"svdlab, {CHOICES[which]}")
                self.inspector.observe(lambda change: self._mark_probe(change["new"]), "view")
                self.inspected.children = [self.inspector, self.close]
            self.inspector.show(probe)

    def _show_tensors(self, case: Case, which: Choice) -> None:
        """In the inspector that is there, the same tensor of this case."""
        if self.inspector is not None:
            self.inspector.compare(case.comparison(which), f"svdlab, {CHOICES[which]}")

    def _mark_probe(self, view: Mapping[str, Any]) -> None:
        self.plot.chosen = view.get("probe", self.plot.chosen)

    def _close_inspector(self) -> None:
        with self._drawing:
            if self.inspector is not None:
                self.inspected.children, self.plot.chosen = (), ""
                self.inspector.close()
                self.inspector = None

    def _show_clips(self, case: Case, which: Choice) -> None:
        """In the player that is there, so that it goes on at its frame."""
        clips = case_clips(case, which)
        self.pinned_number.value = ""
        if self._pinned and self._shown:
            a, b = self._pinned, case.comparison(which).traces["candidate"]["frames"][0]
            if a.frames.shape != b.shape:
                self._pinned, self.pin.description = None, "Pin as A"
            else:
                apart = [name for name in self._named(a.asked) if name not in self._named(self._shown)]
                other = [name for name in self._named(self._shown) if name not in self._named(a.asked)]
                title, shown = difference(a.frames, b, b)
                names = (", ".join([CHOICES[a.which], *apart]), ", ".join([CHOICES[which], *other]))
                clips = {f"A: {names[0]}": a.frames, f"B: {names[1]}": b, f"A and B: {title}": shown}
                self.pinned_number.value = f"<details><summary>A: {escape(names[0])}</summary>{a.number}</details>"
        if self.clips.children:
            self.clips.children[0].show(clips, case.settings.fps, blink=True)
        else:
            self.clips.children = [Player(clips, case.settings.fps, blink=True)]


def _button(text: str, icon: str, help: str) -> ipywidgets.Button:
    return ipywidgets.Button(description=text, icon=icon, tooltip=help, layout={"width": "auto"})
