"""Sliders over one fix: made from ``GenerationSettings``, computed by one thread, drawn headless, too.

With somebody there to move them, the sliders recompute. In a page made by papermill the same cell draws its defaults
and a grid of slider values, so that the page says what the widget would.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any, Literal, get_args, get_origin

import ipywidgets

from svdlab.errors import SvdlabError
from svdlab.files import check_folder
from svdlab.notebook.figures import plot_divergence, plot_grid
from svdlab.parity.bugs import BUGS
from svdlab.parity.candidate import capture
from svdlab.parity.compare import compare
from svdlab.parity.lab import Case, Lab, Stopped, ratio_text
from svdlab.parity.trace import Trace
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings

# A checkpoint of more weights answers in minutes: its sliders wait for the Run button.
_LIVE_PARAMETERS = 10**8
_DEBOUNCE = 0.25  # seconds without a move before a slider counts as moved
_WIDE = {"description_width": "11em"}


def is_live() -> bool:
    """Whether an editor runs this cell, so that there is a hand for the sliders.

    JupyterLab, Notebook and VS Code name the cell that they run; papermill and nbconvert do not.
    """
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent() if kernel is not None else {}
    return "cellId" in request.get("metadata", {}) or "google.colab" in sys.modules


def control(name: str, value: Any, high: float | None = None) -> ipywidgets.ValueWidget:
    """The widget of one setting: bounds and steps of its slider, a choice for a literal, and its help.

    Args:
        name: a field of ``GenerationSettings``.
        value: where it starts.
        high: an upper bound for the slider below the field's own.

    Raises:
        SvdlabError: a field that no slider is made for.
    """
    field = GenerationSettings.model_fields.get(name)
    shared: dict[str, Any] = {"description": name.replace("_", " "), "style": _WIDE, "layout": {"width": "30em"}}
    if field is not None and get_origin(field.annotation) is Literal:
        return ipywidgets.Dropdown(options=get_args(field.annotation), value=value, **shared)
    extra = field.json_schema_extra if field is not None else None
    if field is None or not isinstance(extra, dict) or "slider" not in extra:
        raise SvdlabError(f"{name}: no slider for it, allowed: settings with bounds")
    bounds: Any = extra["slider"]
    low, own_high, step = bounds
    whole = all(isinstance(v, int) for v in (low, own_high, step))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    shared["tooltip"] = field.description
    # A start outside the usual range widens it.
    top = max(own_high if high is None else min(own_high, high), value)
    return kind(value=value, min=min(low, value), max=top, step=step, **shared)


class Worker:
    """One thread that runs the newest request. An older one is told to stop, and never runs beside it.

    Args:
        delay: seconds without a newer request before one runs.
    """

    def __init__(self, delay: float = _DEBOUNCE):
        self.delay = delay
        self._changed = threading.Condition()
        self._next: Callable[[threading.Event], None] | None = None
        self._stop = threading.Event()
        self._busy = False
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[threading.Event], None]) -> None:
        """Run ``work`` soon, unless a newer one comes; it is handed an event that is set once it is to stop."""
        with self._changed:
            self._stop.set()
            self._next = work
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="svdlab widget", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self) -> None:
        """Drop what waits and stop what runs."""
        with self._changed:
            self._next = None
            self._stop.set()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until nothing runs and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is None and not self._busy)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                newest = None
                while newest is not self._next:
                    newest = self._next
                    self._changed.wait(self.delay)
                if newest is None:
                    continue
                self._next, self._stop, self._busy = None, threading.Event(), True
            try:
                newest(self._stop)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


class Explorer:
    """One fix at any position of the sliders: a panel where somebody can move them, a page where nobody can.

    Args:
        lab: what computes.
        settings: where the sliders start.
        bugs: what can stand in the fix's place, names of ``rules.BUGS``.
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
        self.seen: dict[tuple[GenerationSettings, str], Case] = {}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if is_live():
            return Panel(self).show()._repr_mimebundle_()
        return {"text/html": self.page(), "text/plain": f"Explorer of {', '.join(self.bugs)}"}

    def answer(self) -> dict[str, Any]:
        """What the closing cell records, over every position of the sliders that was computed, the first included.

        With another rule broken everything after it diverges. That is another notebook's answer: this one's is no
        where the first divergence is at the probe that this fix makes.

        Returns:
            The arguments of ``report.record``. ``passed``: so at no position with the fix. A bug that moves nothing
            by more than rounding at the first position, as some do in a half dtype, is named.
        """
        first = [self._look(self.start, bug) for bug in self.bugs]
        on = [case.on for case in list(self.seen.values())]
        own = {BUGS[bug].first_probe for bug in self.bugs}
        diverging = {c.first_divergence for c in on} - {None}
        answer: dict[str, Any] = {
            "passed": not diverging & own,
            "fixes": [
                {
                    "bug": case.bug,
                    "ratio_on": case.on.worst.ratio,
                    "ratio_off": case.off.worst.ratio,
                    "first_divergence": case.off.first_divergence,
                    "frames_mse": case.off.frames_mse,
                }
                for case in first
            ],
            "worst_ratio_fix_on": max(c.worst.ratio for c in on),
            "settings_seen": len({settings for settings, _ in self.seen}),
        }
        if elsewhere := sorted(str(probe) for probe in diverging - own):
            answer["diverges_elsewhere"] = ", ".join(elsewhere)
        if quiet := [case.bug for case in first if case.off.verdict == "parity"]:
            answer["bugs_below_the_noise"] = ", ".join(quiet)
        return answer

    def _look(self, settings: GenerationSettings, bug: str) -> Case:
        return self.remember(self.lab.case(settings, bug))

    def remember(self, case: Case) -> Case:
        """Count a case for the answer, without its tensors."""
        slim = {name: replace(getattr(case, name), traces={}) for name in ("on", "off")}
        self.seen[case.settings, case.bug] = replace(case, **slim)
        return case

    def page(self) -> str:
        """What a page without sliders shows: the start with the fix off and on, then the grid. HTML."""
        parts = []
        for bug in self.bugs:
            case = self._look(self.start, bug)
            parts.append(f"<h4>{escape(bug)}: {escape(BUGS[bug].cause)}</h4>")
            parts.append(case.plot()._repr_html_())
            parts += [case.number(fix=False), case.clips(fix=False)]
        parts += [case.number(fix=True), case.clips(fix=True)]
        if self.changes:
            parts.append(self._grid())
        return "".join(parts)

    def _grid(self) -> str:
        rows = [[self._look(self.start.replace(**change), bug) for bug in self.bugs] for change in self.changes]
        labels = [" to ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in c.values()) for c in self.changes]
        names = list(self.changes[0])
        axis = " to ".join(name.replace("_", " ") for name in names)
        if len(names) == 1 and (unit := unit_of(names[0])):
            axis = f"{axis} ({unit})"
        off = {bug: [row[i].off for row in rows] for i, bug in enumerate(self.bugs)}
        plot = plot_grid(labels, [row[0].on for row in rows], off, axis)
        heads = [axis, "bug", "first above 4", "ratio, fix off", "ratio, fix on", "frames MSE, fix off", "MSE < 1e-3"]
        body = []
        for label, row in zip(labels, rows, strict=True):
            for case in row:
                first = case.off.first_divergence or "none"
                bar = "" if case.off.verdict == "parity" else "misses it" if case.off.passes_mse_bar else "catches it"
                numbers = [ratio_text(case.off), ratio_text(case.on), f"{case.off.frames_mse:.1e}"]
                body.append("".join(f"<td>{escape(t)}</td>" for t in (label, case.bug, first, *numbers, bar)))
        return (
            f"<h4>At other positions of the sliders</h4>{plot._repr_html_()}"
            f"<table><thead><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr></thead>"
            f"<tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody></table>"
        )


class Panel:
    """Sliders, a fix on/off toggle, the plot with its number, and the clips side by side.

    Args:
        explorer: what it is about.
    """

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.worker = Worker()
        self.case: Case | None = None
        self._drawing = threading.RLock()
        self.controls = {name: self._control(name) for name in explorer.sliders}
        self.bug = ipywidgets.Dropdown(
            options=explorer.bugs, description="the bug", style=_WIDE, layout={"width": "30em"}
        )
        self.fix = ipywidgets.Checkbox(
            value=True, description="fix on", indent=False, layout={"width": "6em", "margin": "2px 2px 2px 6px"}
        )
        self.run = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self.stop = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress = ipywidgets.FloatProgress(max=1.0, layout={"width": "12em"})
        self.status, self.number, self.caption = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.plot, self.clips = ipywidgets.HTML(), ipywidgets.HTML()
        for widget in (*self.controls.values(), self.bug):
            widget.observe(self._moved, "value")
        self.fix.observe(lambda change: self._draw_choice(), "value")
        self.run.on_click(lambda button: self.compute())
        self.stop.on_click(lambda button: self.worker.stop())

    def _control(self, name: str) -> ipywidgets.ValueWidget:
        start = self.explorer.start
        high = start.num_frames if name == "decode_chunk_size" else None
        value = getattr(start, name)
        return control(name, high if value in (None, "auto") else value, high)

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget, and the first case under way."""
        rows = [
            ipywidgets.HBox([widget, ipywidgets.HTML(f"<small>{escape(help_of(name))}</small>")])
            for name, widget in self.controls.items()
        ]
        if len(self.explorer.bugs) > 1:
            rows.append(self.bug)
        buttons = [self.fix, *([] if self.explorer.live else [self.run]), self.stop, self.progress, self.status]
        self.compute()
        return ipywidgets.VBox([*rows, ipywidgets.HBox(buttons), self.caption, self.plot, self.number, self.clips])

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
            self._say(_shown_error(error))
            return
        bug = self.bug.value
        self._dim(0.4)
        self.worker.submit(lambda stop: self._compute(settings, bug, stop))

    def _moved(self, change: Any) -> None:
        if self.explorer.live:
            self.compute()
        else:
            self._say("The sliders have moved: press Run.")

    def _compute(self, settings: GenerationSettings, bug: str, stop: threading.Event) -> None:
        """In the worker's thread: draw what comes, and show an error where the number would be."""
        said = ""

        def watch(fraction: float, text: str) -> None:
            nonlocal said
            if stop.is_set():
                raise Stopped
            if text != said:
                said = text
                self.progress.value = fraction
                self._say(escape(text))

        self.stop.disabled = False
        try:
            for case in self.explorer.lab.cases(settings, bug, watch):
                if stop.is_set():
                    raise Stopped
                self._draw(case)
            self._say("done")
        except Stopped:
            self._say("stopped")
        except Exception as error:
            self._say(_shown_error(error))
        finally:
            self.progress.value = 0.0
            self.stop.disabled = True
            self._dim(1.0)

    def _draw(self, case: Case) -> None:
        with self._drawing:
            self.case = case
            self._draw_choice()
            if case.measured:
                self.explorer.remember(case)
                self.plot.value = case.plot()._repr_html_()
                self.plot.layout.opacity = "1"

    def _draw_choice(self) -> None:
        """What the toggle changes: the number and the clips. The plot has both lines."""
        with self._drawing:
            if self.case is not None:
                # A stopped run leaves the pictures behind the sliders: they say what they are of.
                at = (f"{n.replace('_', ' ')} {getattr(self.case.settings, n)}" for n in self.controls)
                self.caption.value = f"<small>Shown: {escape(', '.join([*at, self.case.bug]))}</small>"
                self.number.value = self.case.number(self.fix.value)
                self.clips.value = self.case.clips(self.fix.value)
                self.clips.layout.opacity = "1"

    def _dim(self, opacity: float) -> None:
        for widget in (self.plot, self.clips):
            widget.layout.opacity = str(opacity)

    def _say(self, html: str) -> None:
        self.status.value = _status(html)


class Diagnoser:
    """Names the bug in a reader's own port: writes the reference for it, reads what the port wrote.

    Args:
        pipe: svdlab with the checkpoint that the port runs.
        reference: diffusers' trace, whose inputs the port is to replay.
        truth: the same in float64.
    """

    def __init__(self, pipe: SVDPipeline, reference: Trace, truth: Trace):
        self.pipe, self.reference, self.truth = pipe, reference, truth
        self.worker = Worker(0.0)
        wide: dict[str, Any] = {"style": _WIDE, "layout": {"width": "36em"}}
        self.target = ipywidgets.Text(value="reference.safetensors", description="the reference goes to", **wide)
        self.write = ipywidgets.Button(description="Write reference")
        self.source = ipywidgets.Text(placeholder="port.safetensors", description="the port's trace", **wide)
        self.diagnose = ipywidgets.Button(description="Diagnose", button_style="primary")
        self.status, self.found = ipywidgets.HTML(), ipywidgets.HTML()
        self.write.on_click(lambda button: self._start(self._write))
        self.diagnose.on_click(lambda button: self._start(self._diagnose))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if is_live():
            return self.show()._repr_mimebundle_()
        text = "With a kernel behind this page, two fields stand here: where the reference goes, and your port's file."
        return {"text/html": f"<p><i>{escape(text)}</i></p>", "text/plain": text}

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget."""
        rows = ([self.target, self.write], [self.source, self.diagnose])
        return ipywidgets.VBox([*map(ipywidgets.HBox, rows), self.status, self.found])

    def _start(self, work: Callable[[], str]) -> None:
        def run(stop: threading.Event) -> None:
            try:
                self.status.value = _status("at work ...")
                self.status.value = _status(escape(work()))
            except Exception as error:
                self.status.value = _status(_shown_error(error))

        self.worker.submit(run)

    def _write(self) -> str:
        check_folder(self.target.value)
        return f"wrote {self.reference.save(self.target.value).label}"

    def _diagnose(self) -> str:
        from svdlab.parity.diagnose import diagnose

        self.found.value = ""
        diagnosis = diagnose(self.reference, Trace.open(self.source.value), self.truth, pipe=self.pipe)
        own = compare(self.reference, capture(self.pipe, replay=self.reference, preprocess=True), self.truth)
        plot = plot_divergence(own, diagnosis.comparison, "the port")
        self.found.value = plot._repr_html_() + diagnosis._repr_html_()
        return "done"


def _status(html: str) -> str:
    return f"<span role='status'>{html}</span>"


def _shown_error(error: Exception) -> str:
    """Bad input in its one line; anything else whole, since a thread's traceback would be lost: HTML."""
    if isinstance(error, SvdlabError):
        return f"<b role='alert'>{escape(str(error))}</b>"
    text = escape("".join(traceback.format_exception(error)))
    return f"<details open><summary>{escape(repr(error))}</summary><pre>{text}</pre></details>"


def help_of(name: str) -> str:
    """A setting's one line of help, with its unit."""
    unit = unit_of(name)
    description = GenerationSettings.model_fields[name].description or ""
    return f"{description} ({unit})" if unit else description


def unit_of(name: str) -> str:
    """A setting's unit, or nothing."""
    extra = GenerationSettings.model_fields[name].json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""
