"""A sweep by hand: pick axes and values, watch it run, look at the clips and at the metrics; headless, a page of it."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets
import traitlets

from svdlab.errors import SvdlabError
from svdlab.notebook.controls import help_of, is_live, small
from svdlab.notebook.panel import Panel
from svdlab.notebook.sweep_export import export_sweep
from svdlab.notebook.sweep_view import SCRIPT, Board, View, comparison_html, text_of, values_text
from svdlab.svd.checkpoint import EMBEDDED
from svdlab.svd.settings import GenerationSettings, allowed
from svdlab.sweep.compare import compare_sweeps
from svdlab.sweep.folder import PLAN, Sweep
from svdlab.sweep.plan import NAMED, grid, make_points, parse_values, remarks
from svdlab.sweep.run import Backend, OnProgress, Progress, ShouldStop, run_sweep

if TYPE_CHECKING:
    from PIL import Image

# Where sweeps go that nobody gave a folder for: beside the notebook.
SWEEPS = Path("sweeps")
_AXES = 3  # rows of axis and values
_NONE = "(no axis)"
_ALL = "all"
# Above that many points other axes than two start held at a value.
_MOST_CLIPS = 60
# A board with another clip is drawn no more often than this many seconds: all of it is sent again.
_DRAW_S = 2.0
# What an axis can be: one clip per point, and a dtype would load the weights again.
_FIELDS = [name for name in GenerationSettings.model_fields if name not in ("num_videos_per_prompt", "dtype")]


class BoardWidget(anywidget.AnyWidget):
    """A board that says which point is chosen and where its clock stands; HTML in a page.

    Attributes:
        html: of ``Board.html`` or ``comparison_html``; empty where there is nothing to show.
        chosen: the key of the point that is marked.
        frame: of all clips, from 0; ``playing``: whether the clock runs.
    """

    _esm = SCRIPT
    html = traitlets.Unicode("").tag(sync=True)
    chosen = traitlets.Unicode("").tag(sync=True)
    frame = traitlets.Int(0).tag(sync=True)
    playing = traitlets.Bool(True).tag(sync=True)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return super()._repr_mimebundle_(**kwargs) if is_live() else {"text/html": self.html}


def show_sweep(sweep: Sweep) -> BoardWidget:
    """The board of a sweep, for a cell to show."""
    return BoardWidget(html=Board(sweep).html(View(sweep)))


def sweeps_side_by_side(before: Sweep, after: Sweep) -> BoardWidget:
    """The same points of two sweeps on one clock, and which clips changed, for a cell to show.

    Raises:
        SvdlabError: see ``compare_sweeps``.
    """
    return BoardWidget(html=comparison_html(before, after))


class SweepExplorer:
    """A sweep in a notebook: a panel where somebody can pick its axes, a page where nobody can.

    Args:
        axes: by name, the values; the first is drawn downwards, the last from left to right.
        settings: what all points share.
        out: the folder; default: with a hand for the panel one in ``sweeps``, named after the axes, that stays; for a
            page one that goes when this does.
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
        if out is None and not is_live():
            self._temporary = tempfile.TemporaryDirectory(prefix="svdlab-sweep-")
            out = self._temporary.name
        self.out = default_folder(self.axes) if out is None else Path(out)
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

        A folder that holds another sweep is left as it is: see ``separate`` of ``run_sweep``.

        Raises:
            SvdlabError: see ``run_sweep``.
        """
        with self._running:
            return run_sweep(
                self.out,
                grid(self.axes),
                self.settings,
                separate=True,
                on_progress=on_progress,
                should_stop=should_stop,
                **self.options,
            )

    def page(self) -> str:
        """What a page without widgets shows: the board of all points. HTML."""
        sweep = self.run()
        return Board(sweep).html(View(sweep))

    def answer(self) -> dict[str, Any]:
        """What the closing cell records: every point there, and the first row the same when it is computed again.

        Returns:
            ``passed``, and the numbers it rests on.
        """
        sweep = self.run()
        table = sweep.table()
        _, first = View(sweep).rows()[0]
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


def default_folder(axes: Mapping[str, Sequence[Any]]) -> Path:
    """Where a sweep over these axes goes that nobody gave a folder for."""
    return SWEEPS / "-".join(axes)


class SweepPanel(Panel):
    """Axes and values, Run and Stop, the board, and another sweep beside it.

    Args:
        explorer: what it is about.
    """

    def __init__(self, explorer: SweepExplorer):
        super().__init__(delay=0.0)
        self.explorer = explorer
        self.sweep: Sweep | None = None
        self.board, self.comparison = BoardWidget(), BoardWidget()
        self.kept = ipywidgets.HTML()
        named = [*explorer.axes.items(), *[(_NONE, [])] * _AXES][: max(_AXES, len(explorer.axes))]
        self.rows = [_AxisRow(i + 1, name, values) for i, (name, values) in enumerate(named)]
        self.divergence = ipywidgets.Checkbox(
            value=explorer.options["divergence"],
            description="measure the distance from diffusers (several times slower)",
            indent=False,
            layout={"width": "auto"},
        )
        self.folder = _folder_entry("folder", str(explorer.out))
        self.other = _folder_entry("beside it", "")
        self.load = ipywidgets.Button(description="Load", icon="folder-open", tooltip="show the sweep in this folder")
        self.compare = ipywidgets.Button(
            description="Compare",
            icon="columns",
            tooltip="show the same points of the sweep in this folder beside these",
        )
        self.file = ipywidgets.Text(
            description="file",
            placeholder="board.html or board.gif, into the folder",
            style={"description_width": "6em"},
            layout={"width": "40em", "max_width": "100%"},
        )
        self.export = ipywidgets.Button(
            description="Export",
            icon="download",
            tooltip="write the board as it is shown: one page that needs nothing else (.html), or an animation (.gif)",
        )
        self.controls = ipywidgets.HBox(layout={"flex_flow": "row wrap"})
        self.run.on_click(lambda button: self.compute())
        self.load.on_click(lambda button: self.open(self.folder.value))
        self.compare.on_click(lambda button: self.compare_with(self.other.value))
        self.export.on_click(lambda button: self.export_to(self.file.value))

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget; a small checkpoint starts at once."""
        if self.explorer.starts_at_once:
            self.compute()
        wrapped = {"flex_flow": "row wrap"}
        return ipywidgets.VBox(
            [
                *(row.widget for row in self.rows),
                self.divergence,
                ipywidgets.HBox([self.folder, self.load], layout=wrapped),
                ipywidgets.HBox([self.run, self.stop, self.progress, self.status], layout=wrapped),
                self.kept,
                self.controls,
                self.board,
                ipywidgets.HBox([self.file, self.export], layout=wrapped),
                ipywidgets.HBox([self.other, self.compare], layout=wrapped),
                self.comparison,
            ]
        )

    def picked(self) -> dict[str, list[Any]]:
        """The axes as they stand in the panel.

        Raises:
            SvdlabError: none, one of them twice, values that are not allowed.
        """
        rows = [(row.axis.value, row.entry.value) for row in self.rows if row.axis.value != _NONE]
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
        if self.folder.value == str(default_folder(self.explorer.axes)):
            self.folder.value = str(default_folder(axes))
        self.explorer.axes, self.explorer.out = axes, Path(self.folder.value)
        self.explorer.options["divergence"] = self.divergence.value
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
        for row, (name, values) in zip(self.rows, named, strict=False):
            row.axis.value = name if name in row.axis.options else _NONE
            row.entry.value = values_text(values)
        self.divergence.value = sweep.plan.source.divergence
        self._lay_out(sweep)
        self.say(f"loaded, {_finished(sweep)} of {len(sweep.plan.points)} points")

    def compare_with(self, folder: str) -> None:
        """Show the same points of another sweep beside those of this one, and which clips changed."""
        try:
            if self.sweep is None:
                raise SvdlabError("beside it: there is no sweep yet, allowed: Run or Load first")
            self.comparison.html = comparison_html(self.sweep, Sweep.open(folder))
        except SvdlabError as error:
            self.say_error(error)

    def export_to(self, file: str) -> None:
        """Write the board over the axes and values that are shown; a name without a folder goes into the sweep's."""
        try:
            if self.sweep is None:
                raise SvdlabError("file: there is no sweep yet, allowed: Run or Load first")
            path = export_sweep(
                self.sweep, self.sweep.folder / Path(file.strip() or "board.html").expanduser(), self.view()
            )
        except SvdlabError as error:
            self.say_error(error)
            return
        self.say(f"written to {path.absolute()}")

    def _compute(self, stop: threading.Event) -> str:
        """In the worker's thread: draw each clip as it comes."""
        drawn = 0.0

        def on_progress(progress: Progress) -> None:
            nonlocal drawn
            self.progress.value = progress.fraction
            self.say(str(progress))
            if self.sweep is None and (progress.folder / PLAN).is_file():
                self._lay_out(Sweep.open(progress.folder))
            elif time.monotonic() - drawn > _DRAW_S:
                self._draw()
                drawn = time.monotonic()

        self.say("loading the model")
        sweep = self.explorer.run(on_progress, stop.is_set)
        self._draw()
        notes = "".join(f"; {n} earlier points {why}" for why, n in sweep.unplanned_points().items())
        return f"{'stopped' if stop.is_set() else 'done'}, {_finished(sweep)} of {len(sweep.plan.points)} points{notes}"

    def _lay_out(self, sweep: Sweep) -> None:
        """New axes to choose from, and the board over them."""
        self.sweep, self._board, self.comparison.html = sweep, Board(sweep), ""
        self.kept.value = small(self._where_kept(sweep.folder))
        axes = sweep.plan.axes
        self.x = ipywidgets.Dropdown(options=list(axes), value=View(sweep).x, description="across")
        many = len(sweep.plan.points) > _MOST_CLIPS
        self.held = {
            name: ipywidgets.Dropdown(
                options=[(_ALL, _ALL), *((text_of(v), v) for v in values)],
                value=values[0] if many and name in list(axes)[:-2] else _ALL,
                description=name.replace("_", " "),
                style={"description_width": "initial"},
            )
            for name, values in axes.items()
        }
        for widget in (self.x, *self.held.values()):
            widget.observe(lambda change: self._draw(), "value")
        self._draw()

    def _where_kept(self, folder: Path) -> str:
        kept = f"Kept in {folder.absolute()}, and resumed from there."
        asked = Path(self.folder.value)
        return kept if folder == asked else f"{kept} ({asked} holds another sweep, which stays as it is.)"

    def view(self) -> View:
        """What the board is over."""
        assert self.sweep is not None
        held = {n: w.value for n, w in self.held.items() if n != self.x.value and w.value != _ALL}
        return View(self.sweep, self.x.value, held)

    def _draw(self) -> None:
        if self.sweep is None:
            return
        others = [widget for name, widget in self.held.items() if name != self.x.value]
        self.controls.children = [self.x, *others] if others else []
        self.board.html = self._board.html(self.view())


class _AxisRow:
    """One axis of the panel: which, its values, what it takes, and the names where it takes some."""

    def __init__(self, number: int, name: str, values: Sequence[Any]):
        shared = {"style": {"description_width": "6em"}, "layout": {"width": "22em", "flex": "0 0 auto"}}
        names = [_NONE, *_FIELDS, *NAMED]
        self.axis = ipywidgets.Dropdown(options=names, value=name, description=f"axis {number}", **shared)
        self.entry = ipywidgets.Text(
            value=values_text(values), placeholder="7, 14 or 5-9 or 7:28:7", description=f"values {number}", **shared
        )
        self.names = ipywidgets.SelectMultiple(rows=6, description=f"names {number}", **shared)
        self.about = ipywidgets.HTML(layout={"max_width": "40em"})
        row = ipywidgets.HBox([self.axis, self.entry, self.about], layout={"flex_flow": "row wrap"})
        self.widget = ipywidgets.VBox([row, self.names])
        self.axis.observe(self._explain, "value")
        self.entry.observe(self._explain, "value")
        self.names.observe(self._take, "value")
        self._explain()

    def _take(self, change: Any = None) -> None:
        """The names that are picked, after none."""
        if self.axis.value in NAMED:
            self.entry.value = ", ".join(["none", *self.names.value])

    def _explain(self, change: Any = None) -> None:
        name = self.axis.value
        known = NAMED.get(name, {})
        self.entry.disabled = name == _NONE
        self.names.layout.display = None if known else "none"
        if self.names.options != tuple(known):
            self.names.options = tuple(known)
        if known:
            chosen = [f"{one}: {known[one].said}" for one in self.names.value]
            said = "; ".join(chosen) or "none, and some of these; several at once with + between them"
        else:
            said = "" if name == _NONE else "; ".join([f"{help_of(name)}; {allowed(name)}", *self._remarks()])
        self.about.value = small(said)

    def _remarks(self) -> list[str]:
        try:
            return remarks({self.axis.value: parse_values(self.axis.value, self.entry.value)})
        except SvdlabError:  # it is said when it is run
            return []


def _folder_entry(description: str, value: str) -> ipywidgets.Combobox:
    """A folder, and those of the sweeps that are kept to choose from."""
    return ipywidgets.Combobox(
        value=value,
        options=[str(path.parent) for path in sorted(SWEEPS.glob(f"*/{PLAN}"))],
        description=description,
        continuous_update=False,
        layout={"width": "40em", "max_width": "100%"},
        style={"description_width": "6em"},
    )


def _finished(sweep: Sweep) -> int:
    return sum(map(sweep.finished, sweep.plan.points))
