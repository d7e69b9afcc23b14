"""A sweep by hand: pick axes and values, watch it run, look at the clips and at the metrics; headless, a page of it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets

from svdlab.errors import SvdlabError
from svdlab.notebook.controls import help_of, is_live, small
from svdlab.notebook.panel import Panel
from svdlab.notebook.sweep_view import CELL, View, clip_table, point_html, text_of, thumbnail_url, values_text
from svdlab.parity.bugs import BUGS
from svdlab.svd.checkpoint import EMBEDDED
from svdlab.svd.settings import GenerationSettings, allowed
from svdlab.sweep.compare import compare_sweeps
from svdlab.sweep.folder import PLAN, Sweep
from svdlab.sweep.plan import RULES, grid, make_points, parse_values
from svdlab.sweep.run import Backend, OnProgress, Progress, ShouldStop, run_sweep

if TYPE_CHECKING:
    from PIL import Image

_AXES = 3  # rows of axis and values
_NONE = "(no axis)"
# What an axis can be: one clip per point, and a dtype would load the weights again.
_FIELDS = [name for name in GenerationSettings.model_fields if name not in ("num_videos_per_prompt", "dtype")]


class SweepExplorer:
    """A sweep in a notebook: a panel where somebody can pick its axes, a page where nobody can.

    Args:
        axes: by name, the values; the first is drawn downwards, the last from left to right.
        settings: what all points share.
        out: the folder; default: one that goes when this does.
        model, revision, device, image, divergence, threads, backend: see ``run_sweep``.
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[Any]],
        settings: GenerationSettings | None = None,
        *,
        out: str | Path | None = None,
        model: str = EMBEDDED,
        revision: str | None = None,
        device: str = "cpu",
        image: Image.Image | None = None,
        divergence: bool = False,
        threads: int | None = None,
        backend: Backend | None = None,
    ):
        self.axes = {name: list(values) for name, values in axes.items()}
        self.settings = settings or GenerationSettings()
        make_points(self.settings, grid(self.axes))
        self._temporary = tempfile.TemporaryDirectory(prefix="svdlab-sweep-") if out is None else None
        self.out = Path(out if out is not None else self._temporary.name)  # type: ignore[union-attr]
        self.options: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "device": device,
            "image": image,
            "divergence": divergence,
            "threads": threads,
            "backend": backend,
        }
        # A large checkpoint waits for the Run button.
        self.starts_at_once = model == EMBEDDED
        self._running = threading.Lock()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if is_live():
            return SweepPanel(self).show()._repr_mimebundle_()
        return {"text/html": self.page(), "text/plain": f"SweepExplorer over {', '.join(self.axes)}"}

    def run(self, on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None) -> Sweep:
        """Compute what is missing of the present axes; a second thread waits, and then finds all there.

        Raises:
            SvdlabError: see ``run_sweep``.
        """
        with self._running:
            return run_sweep(
                self.out,
                grid(self.axes),
                self.settings,
                on_progress=on_progress,
                should_stop=should_stop,
                **self.options,
            )

    def page(self) -> str:
        """What a page without widgets shows: the grid of clips, the heat maps, one point in full. HTML."""
        sweep = self.run()
        view = View(sweep)
        rows = view.square()
        middle = rows[len(rows) // 2][len(rows[0]) // 2]
        parts = [clip_table(view).to_html(), view.plot()._repr_html_()]
        if middle is not None:
            parts.append(f"<h4>One point: {escape(view.name(middle))}</h4>{point_html(sweep, middle)}")
        return "".join(parts)

    def answer(self) -> dict[str, Any]:
        """What the closing cell records: every point there, and the first row the same when it is computed again.

        Returns:
            ``passed``, and the numbers it rests on.
        """
        sweep = self.run()
        table = sweep.table()
        first = View(sweep).square()[0]
        chosen = [sweep.plan.points[identity] for identity in first if identity is not None]
        changes = [{axis: point.value(axis) for axis in sweep.plan.axes} for point in chosen]
        with tempfile.TemporaryDirectory() as folder:
            again = run_sweep(folder, changes, self.settings, **self.options)
            found = compare_sweeps(sweep, again)
        finished = table[table["status"] == "finished"]
        return {
            "passed": len(finished) == len(sweep.plan.points) and not found.moved(),
            "points": len(sweep.plan.points),
            "finished": len(finished),
            "computed_again": len(found.points),
            "the_same_to_the_last_bit": sum(p.identical for p in found.points),
            **{f"mean_difference_{axis}": float(table[f"difference_{axis}"].mean()) for axis in sweep.plan.axes},
            "seconds_a_point": float(finished["seconds"].mean()),
        }


class SweepPanel(Panel):
    """Axes and values, Run and Stop, the grid of clips whose cells are buttons, heat maps, and the chosen point.

    Args:
        explorer: what it is about.
    """

    def __init__(self, explorer: SweepExplorer):
        super().__init__(delay=0.0)
        self.explorer = explorer
        self.sweep: Sweep | None = None
        self.cells: dict[str, ipywidgets.Button] = {}
        self.styles: dict[str, ipywidgets.HTML] = {}
        named = [*explorer.axes.items(), *[(_NONE, [])] * _AXES][: max(_AXES, len(explorer.axes))]
        self.rows = [self._row(i + 1, name, values) for i, (name, values) in enumerate(named)]
        wide = {"layout": {"width": "40em"}, "style": {"description_width": "6em"}}
        self.folder = ipywidgets.Text(value=str(explorer.out), description="folder", continuous_update=False, **wide)
        self.load = ipywidgets.Button(description="Load", icon="folder-open", tooltip="show the sweep in this folder")
        self.heat, self.chosen = ipywidgets.HTML(), ipywidgets.HTML()
        self.axes, self.grid = ipywidgets.HBox(), ipywidgets.VBox()
        self.run.on_click(lambda button: self.compute())
        self.load.on_click(lambda button: self.open(self.folder.value))

    def _row(self, number: int, name: str, values: Sequence[Any]) -> tuple[Any, Any, Any]:
        """One axis: which, its values, and what it takes."""
        shared = {"style": {"description_width": "6em"}, "layout": {"width": "22em", "flex": "0 0 auto"}}
        axis = ipywidgets.Dropdown(options=[_NONE, *_FIELDS, RULES], value=name, description=f"axis {number}", **shared)
        entry = ipywidgets.Text(
            value=values_text(values), placeholder="with commas between them", description=f"values {number}", **shared
        )
        about = ipywidgets.HTML()

        def explain(change: Any = None) -> None:
            if axis.value == RULES:
                said = f"none, or injected bugs: {', '.join(list(BUGS)[:3])}, ... with + between them"
            else:
                said = "" if axis.value == _NONE else f"{help_of(axis.value)}; {allowed(axis.value)}"
            about.value = small(said)
            entry.disabled = axis.value == _NONE

        axis.observe(explain, "value")
        explain()
        return axis, entry, about

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget; a small checkpoint starts at once."""
        if self.explorer.starts_at_once:
            self.compute()
        return ipywidgets.VBox(
            [
                *(ipywidgets.HBox(row) for row in self.rows),
                ipywidgets.HBox([self.folder, self.load]),
                ipywidgets.HBox([self.run, self.stop, self.progress, self.status]),
                self.axes,
                self.grid,
                self.chosen,
                self.heat,
            ]
        )

    def picked(self) -> dict[str, list[Any]]:
        """The axes as they stand in the panel.

        Raises:
            SvdlabError: none, one of them twice, values that are not allowed.
        """
        rows = [(axis.value, entry.value) for axis, entry, _ in self.rows if axis.value != _NONE]
        if not rows:
            raise SvdlabError("axes: got none, allowed: one or more")
        axes = {name: parse_values(name, text) for name, text in rows}
        if len(axes) < len(rows):
            raise SvdlabError(f"axes: {', '.join(name for name, _ in rows)}: one twice, allowed: once each")
        make_points(self.explorer.settings, grid(axes))
        return axes

    def compute(self) -> None:
        """Ask the worker for the sweep over the axes that are picked."""
        try:
            axes = self.picked()
        except SvdlabError as error:
            self.say_error(error)
            return
        self.explorer.axes, self.explorer.out = axes, Path(self.folder.value)
        self.sweep = None
        self.submit(self._compute)

    def open(self, folder: str) -> None:
        """Show the sweep that is in a folder, and its axes."""
        try:
            sweep = Sweep.open(folder)
        except SvdlabError as error:
            self.say_error(error)
            return
        named = [*sweep.plan.axes.items(), *[(_NONE, [])] * _AXES]
        for (axis, entry, _), (name, values) in zip(self.rows, named, strict=False):
            axis.value = name if name in axis.options else _NONE
            entry.value = values_text(values)
        self._lay_out(sweep)
        self._draw()
        self.say(f"loaded, {_finished(sweep)} of {len(sweep.plan.points)} points")

    def _compute(self, stop: threading.Event) -> str:
        """In the worker's thread: draw each clip as it comes."""

        def on_progress(progress: Progress) -> None:
            self.progress.value = progress.fraction
            self.say(str(progress))
            if self.sweep is None and (self.explorer.out / PLAN).is_file():
                self._lay_out(Sweep.open(self.explorer.out))
            self._draw_cells()

        self.say("loading the model")
        sweep = self.explorer.run(on_progress, stop.is_set)
        self._draw()
        notes = "".join(f"; {n} earlier points {why}" for why, n in sweep.unplanned_points().items())
        return f"{'stopped' if stop.is_set() else 'done'}, {_finished(sweep)} of {len(sweep.plan.points)} points{notes}"

    def _lay_out(self, sweep: Sweep) -> None:
        """New axes to choose from, and the grid over the last two of them."""
        self.sweep, self.chosen.value, self.heat.value = sweep, "", ""
        names = list(sweep.plan.axes)
        view = View(sweep)
        self.x = ipywidgets.Dropdown(options=names, value=view.x, description="across")
        self.y = ipywidgets.Dropdown(
            options=names if len(names) > 1 else [], value=view.y, description="down", disabled=len(names) == 1
        )
        self.others = {
            name: ipywidgets.Dropdown(
                options=[(text_of(v), v) for v in values],
                description=name.replace("_", " "),
                style={"description_width": "initial"},
            )
            for name, values in sweep.plan.axes.items()
        }
        for widget in (self.x, self.y, *self.others.values()):
            widget.observe(lambda change: self._draw(), "value")
        self._draw_grid()

    def view(self) -> View:
        """What the grid and the heat maps are over."""
        assert self.sweep is not None
        x, y = self.x.value, self.y.value
        if x == y:
            y = next((name for name in self.sweep.plan.axes if name != x), None)
        where = {name: widget.value for name, widget in self.others.items() if name not in (x, y)}
        return View(self.sweep, x, y, where)

    def _draw(self) -> None:
        if self.sweep is not None:
            self._draw_grid()
            self.heat.value = self.view().plot()._repr_html_()

    def _draw_grid(self) -> None:
        """One button per point. Its picture is its clip, by a style sheet, so that a key presses it, too."""
        view = self.view()
        others = [widget for name, widget in self.others.items() if name not in (view.x, view.y)]
        self.axes.children = [self.x, self.y, *others] if len(self.others) > 1 else []
        (x_name, columns), (y_name, rows) = view.heads(view.x), view.heads(view.y)
        self.cells, self.styles = {}, {}
        corner = "<br>".join(escape(f"{name} {arrow}") for name, arrow in ((x_name, "→"), (y_name, "↓")) if name)
        lines = [ipywidgets.HBox([_head(corner, "16em"), *(_head(escape(c)) for c in columns)])]
        for head, identities in zip(rows, view.square(), strict=True):
            cells = [self._cell(view, identity) for identity in identities]
            lines.append(ipywidgets.HBox([_head(escape(head), "16em"), *cells], layout={"align_items": "center"}))
        hidden = ipywidgets.Box(list(self.styles.values()), layout={"display": "none"})
        self._draw_cells()
        self.grid.children = [*lines, hidden]

    def _cell(self, view: View, identity: str | None) -> ipywidgets.Button:
        size = f"{CELL}px"
        button = ipywidgets.Button(layout={"width": size, "height": size, "margin": "2px", "padding": "0"})
        if identity is None:
            button.description, button.disabled = "no point", True
            return button
        button.description = button.tooltip = view.name(identity)
        button.disabled = True
        button.add_class(f"svdlab-{identity}")
        button.on_click(lambda _: self.choose(identity))
        self.cells[identity], self.styles[identity] = button, ipywidgets.HTML()
        return button

    def _draw_cells(self) -> None:
        """Those whose points have come meanwhile."""
        sweep = self.sweep
        if sweep is None:
            return
        for identity, button in self.cells.items():
            if not button.disabled:
                continue
            if sweep.finished(identity):
                picture = f"url({thumbnail_url(sweep, identity)}) center/contain no-repeat"
                look = f"background:{picture} !important;image-rendering:pixelated;font-size:0"
                self.styles[identity].value = f"<style>.svdlab-{identity}{{{look}}}</style>"
            elif sweep.failed(identity):
                button.description = f"failed: {button.tooltip}"
            else:
                continue
            button.disabled = False

    def choose(self, identity: str) -> None:
        """Show a point in full."""
        assert self.sweep is not None
        name = escape(View(self.sweep).name(identity))
        self.chosen.value = f"<h4 role='region' aria-label='chosen'>{name}</h4>{point_html(self.sweep, identity)}"


def _finished(sweep: Sweep) -> int:
    return sum(map(sweep.finished, sweep.plan.points))


def _head(text: str, width: str = f"{CELL + 4}px") -> ipywidgets.HTML:
    align = "right;padding-right:8px" if width.endswith("em") else "center"
    return ipywidgets.HTML(f"<div style='text-align:{align}'><b>{text}</b></div>", layout={"width": width})
