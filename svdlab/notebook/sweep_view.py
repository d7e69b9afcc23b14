"""A sweep over two of its axes: the grid of clips, the heat maps of what was measured, one point in full."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from svdlab.notebook.controls import unit_of
from svdlab.notebook.figures import label_axes, new_plot
from svdlab.svd.video import Clip
from svdlab.sweep.folder import Sweep
from svdlab.sweep.plan import RULES
from svdlab.tables import Cell, Column, Table

if TYPE_CHECKING:
    from svdlab.notebook.figures import Plot

CELL = 120  # pixels, of a clip in the grid


class View:
    """Two axes of a sweep, with the others held at a value.

    Args:
        sweep: which.
        x, y: names of axes; default: the last one, and the one before it if there is one.
        where: values of the others; default: their first.
    """

    def __init__(self, sweep: Sweep, x: str | None = None, y: str | None = None, where: Mapping[str, Any] = {}):  # noqa: B006
        names = list(sweep.plan.axes)
        self.sweep, self.where = sweep, dict(where)
        self.x = x or names[-1]
        self.y = y if y is not None or len(names) == 1 else next(n for n in reversed(names) if n != self.x)

    def square(self) -> list[list[str | None]]:
        """Identities, (Y, X)."""
        return self.sweep.square(self.x, self.y, **self.where)

    def name(self, identity: str) -> str:
        """A point's place on all axes: "fps 7, max guidance scale 3"."""
        point = self.sweep.plan.points[identity]
        return ", ".join(f"{axis.replace('_', ' ')} {text_of(point.value(axis))}" for axis in self.sweep.plan.axes)

    def heads(self, axis: str | None) -> tuple[str, list[str]]:
        """An axis's name with its unit, and its values as text."""
        if axis is None:
            return "", [""]
        unit = "" if axis == RULES else unit_of(axis)
        name = axis.replace("_", " ")
        return f"{name} ({unit})" if unit and unit not in name else name, [
            text_of(value) for value in self.sweep.plan.axes[axis]
        ]

    def plot(self) -> Plot:
        """Motion, the difference to the neighbours on both axes, and the divergence where it was measured."""
        table, square = self.sweep.table(), self.square()
        columns = {"motion": ("motion", "grey levels per frame")}
        for axis in filter(None, (self.y, self.x)):
            columns[f"difference_{axis}"] = (f"difference to the next {axis.replace('_', ' ')}", "grey levels")
        if "divergence_ratio" in table:
            columns["divergence_ratio"] = ("distance from diffusers", "noise ratio; parity is up to 4")
        table = table.set_index("point") if len(table) else table
        maps = {}
        for column, (title, unit) in columns.items():
            known = table[column].dropna().to_dict() if column in table else {}
            maps[title] = unit, np.array([[known.get(i, np.nan) for i in row] for row in square], dtype=float)
        return plot_heatmaps(maps, self.heads(self.x), self.heads(self.y))


def text_of(value: Any) -> str:
    """A value of an axis as one reads it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def values_text(values: Sequence[Any]) -> str:
    """The values of an axis as one types them; the inverse of ``plan.parse_values``."""
    if any(isinstance(value, (list, tuple)) for value in values):
        return json.dumps(values)
    return ", ".join("none" if value is None else text_of(value) for value in values)


def thumbnail_url(sweep: Sweep, identity: str) -> str:
    """A point's thumbnail as a data URL."""
    data = base64.b64encode(sweep.thumbnail(identity).read_bytes()).decode()
    return f"data:image/webp;base64,{data}"


def clip_table(view: View) -> Table:
    """The grid of playing clips, for a page."""
    (x_name, columns), (y_name, rows) = view.heads(view.x), view.heads(view.y)
    corner = ", ".join(f"{name} {arrow}" for name, arrow in ((x_name, "→"), (y_name, "↓")) if name)
    body = [
        [Cell(head, "head"), *(_clip_cell(view, identity) for identity in identities)]
        for head, identities in zip(rows, view.square(), strict=True)
    ]
    return Table([corner, *(Column(column, "center") for column in columns)], body)


def _clip_cell(view: View, identity: str | None) -> Cell:
    if identity is None or not view.sweep.finished(identity):
        failed = identity is not None and view.sweep.failed(identity)
        return Cell("no point" if identity is None else "failed" if failed else "not computed")
    name = view.name(identity)
    look = f"height:{CELL}px;min-width:{CELL}px;object-fit:contain;image-rendering:pixelated"
    alt, source = escape(name), thumbnail_url(view.sweep, identity)
    return Cell(name, html=f'<img style="{look}" alt="{alt}" title="{alt}" src="{source}">')


def point_html(sweep: Sweep, identity: str) -> str:
    """A point in full: its clip, what it was made with, what was measured. HTML."""
    point = sweep.plan.points[identity]
    if not sweep.finished(identity):
        if not sweep.failed(identity):
            return "<p>not computed</p>"
        error = sweep.error(identity)
        head = escape(f"{error['type']}: {error['message']}")
        return f"<details open><summary>{head}</summary><pre>{escape(error['traceback'])}</pre></details>"
    metrics = sweep.metrics(identity)
    player = Clip(sweep.frames(identity), point.settings.fps)._repr_html_()
    settings = {name: text_of(v) for name, v in point.settings.model_dump().items() if v is not None}
    measured = {
        "motion": f"{metrics['motion']:.3g} grey levels per frame",
        "computed in": f"{metrics['seconds']:.2f} s",
        "peak memory": f"{metrics['peak_memory_mib']:.0f} MiB",
        "folder": f"points/{identity}",
    }
    if found := metrics["divergence"]:
        ratio = f", noise ratio {found['ratio']:.3g}" if "ratio" in found else ""
        measured["distance from diffusers"] = f"{found['verdict']}{ratio}"
    tables = (_pairs({**settings, RULES: text_of(point.value(RULES))}), _pairs(measured))
    shown = "".join(table.to_html() for table in tables)
    return f"<div style='display:flex;flex-wrap:wrap;gap:24px;align-items:flex-start'>{player}{shown}</div>"


def _pairs(rows: Mapping[str, str]) -> Table:
    return Table(["", ""], [[Cell(name.replace("_", " "), "head"), value] for name, value in rows.items()])


def plot_heatmaps(
    maps: Mapping[str, tuple[str, np.ndarray]], x: tuple[str, Sequence[str]], y: tuple[str, Sequence[str]]
) -> Plot:
    """Metrics of a sweep over two of its axes, one panel per metric, with the number in every cell.

    Colours begin at zero, and panels of one unit share them: a small change shall look small.

    Args:
        maps: by name, the unit and the values (Y, X), none of them negative; NaN where there is none.
        x, y: the axes' names and the values on them; an empty name for a sweep over one axis.
    """
    (x_name, columns), (y_name, rows) = x, y
    over = " and ".join(name for name in (y_name, x_name) if name)
    width, height = max(3.4, 0.75 * len(columns) + 1.0), 0.6 * len(rows) + 1.1
    plot = new_plot(min(13.0, width * len(maps)), height, f"Heat maps over {over}: {', '.join(maps)}.")
    top = {unit: 0.0 for unit, _ in maps.values()}
    for unit, values in maps.values():
        top[unit] = max(top[unit], np.nanmax(values, initial=0.0))
    axes = np.atleast_1d(plot.subplots(1, len(maps), sharey=True))
    for ax, (name, (unit, values)) in zip(axes, maps.items(), strict=True):
        ax.set_facecolor("#dddddd")  # what is not known
        ax.imshow(values, cmap="cividis", vmin=0.0, vmax=top[unit] or 1.0, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < 0.6 * top[unit] or not top[unit] else "black"
            text = "" if np.isnan(value) else f"{value:.3g}"
            ax.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows)
        label_axes(ax, x_name, y_name if ax is axes[0] else "", f"{name}\n({unit})")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    return plot
