"""What a sweep's board shows, as HTML that a widget, a page and an exported file share."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from svdlab.notebook.controls import unit_of
from svdlab.notebook.scripts import joined
from svdlab.parity.compare import THRESHOLD
from svdlab.svd.video import Clip, data_url
from svdlab.sweep.compare import compare_sweeps
from svdlab.sweep.folder import Sweep
from svdlab.sweep.plan import NAMED
from svdlab.tables import Cell, Column, Table

CELL = 128  # pixels, the height of a clip in the grid; higher ones are reduced to it
SCRIPT, _STYLE = (joined(f"clock.{kind}", f"board.{kind}") for kind in ("js", "css"))
_PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#999999", "#E69F00", "#56B4E9")  # Okabe and Ito's, without the mark's
_UNKNOWN = "#dddddd"


class View:
    """A sweep over its axes: one goes across, the others down, or are held at a value.

    Args:
        sweep: which.
        x: the axis across; default: the last one.
        where: values of axes that are held.
    """

    def __init__(self, sweep: Sweep, x: str | None = None, where: Mapping[str, Any] = {}):  # noqa: B006
        names = list(sweep.plan.axes)
        self.sweep, self.where = sweep, dict(where)
        self.x = x or names[-1]
        self.down = [name for name in names if name != self.x and name not in self.where]

    def rows(self) -> list[tuple[str, list[str | None]]]:
        """The rows' heads, and the identities in them from left to right; None where the plan has no such point."""
        axes, found = self.sweep.plan.axes, []
        last = self.down[-1] if self.down else None
        for values in itertools.product(*(axes[name] for name in self.down[:-1])):
            at = dict(zip(self.down[:-1], values, strict=True))
            square = self.sweep.square(self.x, last, **self.where, **at)
            for value, identities in zip(axes[last] if last else [None], square, strict=True):
                place = {**at, last: value} if last else {}
                if any(identities):
                    found.append(
                        (_place(place) if len(place) > 1 else "".join(map(text_of, place.values())), identities)
                    )
        return found

    def heads(self) -> list[str]:
        """The columns' heads."""
        return [text_of(value) for value in self.sweep.plan.axes[self.x]]

    def corner(self) -> str:
        """Which axis goes where."""
        down = ", ".join(map(axis_name, self.down))
        return " · ".join(f"{name} {arrow}" for name, arrow in ((axis_name(self.x), "→"), (down, "↓")) if name)

    def name(self, identity: str) -> str:
        """A point's place on all axes: "fps 7, max guidance scale 3"."""
        return place_of(self.sweep, identity)


def axis_name(axis: str) -> str:
    """An axis's name with its unit."""
    unit, name = "" if axis in NAMED else unit_of(axis), axis.replace("_", " ")
    return f"{name} ({unit})" if unit and unit not in name else name


def place_of(sweep: Sweep, identity: str) -> str:
    """A point's place on all axes of a sweep: "fps 7, max guidance scale 3"."""
    point = sweep.plan.points[identity]
    return _place({axis: point.value(axis) for axis in sweep.plan.axes})


def _place(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis.replace('_', ' ')} {text_of(value)}" for axis, value in values.items())


def text_of(value: Any) -> str:
    """A value of an axis as one reads it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def values_text(values: Sequence[Any]) -> str:
    """The values of an axis as one types them; the inverse of ``plan.parse_values``."""
    if any(isinstance(value, (list, tuple)) for value in values):
        return json.dumps(values)
    return ", ".join("none" if value is None else text_of(value) for value in values)


# --- what a board is made of ---


@dataclass(frozen=True)
class Tile:
    """A cell of the grid: a clip, or a word in its place.

    Attributes:
        key: of the point, by which it is marked; none where there is no point.
        name: for those who cannot see it.
        film: its frames as one picture, HTML.
        word: where there is no clip.
        note: below it.
    """

    key: str | None
    name: str = ""
    film: str = ""
    word: str = ""
    note: str = ""

    def html(self) -> str:
        """A button, or what stands in its place."""
        inner = self.film or f"<span class='missing'>{escape(self.word)}</span>"
        inner += f"<span class='note'>{escape(self.note)}</span>" * bool(self.note)
        return inner if self.key is None else _button(self.key, inner, label=f"{self.name} {self.note}".strip())


@dataclass(frozen=True)
class HeatMap:
    """A number for each cell of a grid.

    Attributes:
        title: what it is; ``unit`` in what.
        rows: head, and for each column the key and the number, None where it is not known.
        shade: a number's colour.
        word: of a number, below it.
    """

    title: str
    unit: str
    rows: Sequence[tuple[str, Sequence[tuple[str | None, float | None]]]]
    shade: Callable[[float], str]
    word: Callable[[float], str] = field(default=lambda value: "")

    def html(self, heads: Sequence[str]) -> str:
        """A table whose cells mark the points."""
        return _grid(self.title, self.unit, heads, [(h, [self._cell(*cell) for cell in row]) for h, row in self.rows])

    def _cell(self, key: str | None, value: float | None) -> str:
        if key is None:
            return ""
        known = value is not None and not math.isnan(value)
        colour = self.shade(value) if known and value is not None else _UNKNOWN
        word = f"<small>{escape(self.word(value))}</small>" if known and value is not None else ""
        text = f"{value:.3g}{word}" if known else "–"
        look = f"background:{colour};color:{_ink(colour)}"
        return _button(key, text, look, "heat")


def board_html(
    corner: str,
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Tile]]],
    maps: Sequence[HeatMap],
    details: Mapping[str, str],
    *,
    fps: int,
    shapes: Sequence[tuple[int, ...]],
    caption: str,
    lines: str = "",
) -> str:
    """A board: the grid on one clock, the chosen point beside it, heat maps and parallel coordinates below.

    Args:
        corner, heads, rows: of the grid.
        maps: drawn below it, over the same rows and columns.
        details: by key, what is shown beside the grid once the point is chosen; HTML.
        fps: of the clock.
        shapes: of the clips' frames, (F, H, W, 3).
        caption: above the grid.
        lines: SVG whose groups carry points' keys.
    """
    chosen = list(details)[len(details) // 2] if details else ""
    frames = max((shape[0] for shape in shapes), default=1)
    height, width = _reduced_size(*shapes[0][1:3]) if shapes else (CELL, CELL)
    size, clock = f"--zoom:{enlargement(height)};--h:{height};--w:{width}", f"data-fps='{fps}' data-frames='{frames}'"
    grid = _grid(caption, corner, heads, [(head, [tile.html() for tile in tiles]) for head, tiles in rows])
    beside = "".join(f"<div data-detail='{key}'{' hidden' * (key != chosen)}>{d}</div>" for key, d in details.items())
    below = "".join(f"<div class='scroll'>{each.html(heads)}</div>" for each in maps)
    return (
        f"<style>{_STYLE}</style>"
        f"<div class='svdlab-board' role='group' aria-label='sweep' style='{size}' {clock} data-chosen='{chosen}'>"
        f"<div class='clock'></div><div class='parts'><div class='scroll films'>{grid}</div>"
        f"<div class='right'><div class='beside' role='group' aria-label='chosen'>{beside}</div>"
        f"<div class='maps'>{below}</div></div></div>"
        f"{lines}</div>"
    )


def _grid(title: str, about: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with heads on both sides; cells are HTML."""
    top = "".join(_head(head, "col") for head in heads)
    body = "".join(
        f"<tr>{_head(head, 'row')}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for head, cells in rows
    )
    return (
        f"<table><caption>{escape(title)}<small>{escape(about)}</small></caption>"
        f"<thead><tr><td></td>{top}</tr></thead><tbody>{body}</tbody></table>"
    )


def _head(name: str, scope: str) -> str:
    """A head, or an empty cell: where nothing goes down the rows have no names."""
    return f"<th scope='{scope}'>{_breakable(name)}</th>" if name else "<td></td>"


def _breakable(name: str) -> str:
    """A name that may go on in the next line, as bugs' names are long: HTML."""
    return escape(name).replace("_", "_<wbr>")


def _button(key: str, inner: str, look: str = "", kind: str = "", label: str = "") -> str:
    attributes = f" class='{kind}'" * bool(kind) + f" style='{look}'" * bool(look)
    # Heat maps are reached by the keyboard through the grid, which marks them.
    attributes += " tabindex='-1'" * (kind == "heat") + f' aria-label="{escape(label)}"' * bool(label)
    return f"<button type='button' data-point='{key}' aria-pressed='false'{attributes}>{inner}</button>"


def film_html(frames: np.ndarray, alt: str) -> str:
    """A clip's frames in one picture, of which a script shows one at a time and a page without scripts the first.

    Args:
        frames: uint8 (F, H, W, 3), carried exactly up to ``CELL`` pixels high, else reduced to them.
        alt: what they show.
    """
    exact = frames.shape[1] <= CELL
    images = Clip(reduced(frames), 1).to_pil()
    width, height = images[0].size
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", lossless=exact, quality=60 if exact else 85)
    url = data_url("image/webp", buffer.getvalue())
    look = f"style='--w:{width};--h:{height};--columns:{columns};--rows:{rows}'"
    data = f"data-frames='{len(images)}' data-columns='{columns}' data-rows='{rows}'"
    kind = "film" if exact else "film reduced"
    return f'<span class="{kind}" {look} {data}><img alt="{escape(alt)}" src="{url}"></span>'


def reduced(frames: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) that are at most ``CELL`` high."""
    height, width = _reduced_size(*frames.shape[1:3])
    if height == frames.shape[1]:
        return frames
    return np.stack([np.asarray(i.resize((width, height), Image.Resampling.BOX)) for i in Clip(frames, 1).to_pil()])


def _reduced_size(height: int, width: int) -> tuple[int, int]:
    return (height, width) if height <= CELL else (CELL, max(1, round(width * CELL / height)))


def enlargement(height: int) -> int:
    """How often a clip that high is enlarged in the grid, pixel for pixel."""
    return 2 ** int(math.log2(CELL / height)) if height < CELL else 1


# --- a sweep ---


class Board:
    """The board of one sweep; clips that were drawn once are kept.

    Args:
        sweep: which; it may be growing.
    """

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.film = functools.cache(self._make_film)

    def html(self, view: View) -> str:
        """All of it, for the axes of a view."""
        heads, plan, placed = view.heads(), self.sweep.plan, view.rows()
        rows = [(head, [self._tile(i) for i in identities]) for head, identities in placed]
        there = [i for _, identities in placed for i in identities if i is not None]
        shown = [i for i in there if self.sweep.finished(i) or self.sweep.failed(i)]
        finished = [i for i in there if self.sweep.finished(i)]
        shapes = [self.film(i)[1] for i in finished]
        rates = sorted({plan.points[i].settings.fps for i in there})
        caption = f"{len(finished)} clips, all at the same frame"
        if len(rates) > 1:
            caption += f", at {rates[0]} frames a second (made for {rates[0]} to {rates[-1]})"
        if shapes and shapes[0][1] > CELL:
            caption += f"; reduced from {shapes[0][2]} x {shapes[0][1]} pixels"
        details = {i: point_html(self.sweep, i) for i in shown}
        lines = parallel_svg(self.sweep, finished) if len(plan.axes) > 2 and finished else ""
        maps, corner = self._maps(view), view.corner()
        return board_html(corner, heads, rows, maps, details, fps=rates[0], shapes=shapes, caption=caption, lines=lines)

    def _tile(self, identity: str | None) -> Tile:
        if identity is None:
            return Tile(None, word="no point")
        name = place_of(self.sweep, identity)
        if self.sweep.finished(identity):
            return Tile(identity, name, film=self.film(identity)[0])
        if self.sweep.failed(identity):
            return Tile(identity, f"{name}: failed", word="failed")
        return Tile(None, word="not computed")

    def _make_film(self, identity: str) -> tuple[str, tuple[int, ...]]:
        """A finished point's film, and the shape of its frames."""
        frames = self.sweep.frames(identity)
        return film_html(frames, place_of(self.sweep, identity)), frames.shape

    def _maps(self, view: View) -> list[HeatMap]:
        """Motion, the difference to the neighbours on each axis, and the distance from diffusers where known."""
        table = self.sweep.table()
        if not len(table):
            return []
        table, rows = table.set_index("point"), view.rows()
        # An axis on which nothing moves has no differences.
        differences = [a for a, values in self.sweep.plan.axes.items() if len(values) > 1]
        found = {f"difference_{a}": f"Difference along {a.replace('_', ' ')}" for a in differences}
        columns = {"motion": "Motion", **found}
        numbers = {column: table[column].dropna().to_dict() for column in columns}
        # What is in grey levels shares its colours: a small change shall look small.
        top = max((v for column in found for v in numbers[column].values()), default=0.0)
        shades = {c: _from_zero(top if c in found else max(numbers[c].values(), default=0.0)) for c in columns}
        units = {
            c: "grey levels, to the next point" if c in found else "grey levels from frame to frame" for c in columns
        }
        maps = [HeatMap(columns[c], units[c], _numbers(rows, numbers[c]), shades[c]) for c in columns]
        if "divergence_ratio" in table:
            ratios = table["divergence_ratio"].dropna().to_dict()
            unit = f"noise ratio; parity is up to {THRESHOLD:g}"
            maps.append(HeatMap("Distance from diffusers", unit, _numbers(rows, ratios), _verdict_shade, _verdict_word))
        return maps


def _numbers(
    rows: Sequence[tuple[str, Sequence[str | None]]], known: Mapping[str, float]
) -> list[tuple[str, list[tuple[str | None, float | None]]]]:
    return [(head, [(i, known.get(i) if i is not None else None) for i in identities]) for head, identities in rows]


def _from_zero(top: float) -> Callable[[float], str]:
    """Shades from zero to ``top``: dark is little."""
    import matplotlib
    from matplotlib.colors import to_hex

    colours = matplotlib.colormaps["cividis"]
    return lambda value: to_hex(colours(value / top if top else 0.0))


def _verdict_shade(ratio: float) -> str:
    """Green up to the tolerance; above it the darker, the farther, on a logarithmic scale."""
    if ratio <= THRESHOLD:
        return "#a8dcc8"
    steps = ("#fbd9bf", "#f4a877", "#d9682a", "#a32a00")
    return steps[min(len(steps) - 1, int(math.log10(ratio / THRESHOLD) / 1.5))]


def _verdict_word(ratio: float) -> str:
    return "parity" if ratio <= THRESHOLD else "divergence"


def _ink(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return "#000" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "#fff"


def point_html(sweep: Sweep, identity: str) -> str:
    """A point: where it stands, its clip, what was measured, its settings; the error of one that failed. HTML."""
    point, heading = sweep.plan.points[identity], f"<p class='place'>{escape(place_of(sweep, identity))}</p>"
    settings = {name: text_of(v) for name, v in point.settings.model_dump().items() if v is not None}
    of_it = pairs_html({**settings, **{axis: point.value(axis) for axis in NAMED}})
    if not sweep.finished(identity):
        error = sweep.error(identity)
        said = f"<p><b>{escape(error['type'])}</b>: {escape(error['message'])}</p>"
        trace = f"<details><summary>traceback</summary><pre>{escape(error['traceback'])}</pre></details>"
        return f"{heading}{said}{trace}<details><summary>settings</summary>{of_it}</details>"
    metrics = sweep.metrics(identity)
    measured = {"motion": f"{metrics['motion']:.3g} grey levels from frame to frame"}
    if found := metrics["divergence"]:
        ratio = f", noise ratio {found['ratio']:.3g} at {found['probe']}" if found.get("ratio") is not None else ""
        measured["distance from diffusers"] = f"{found['verdict']}{ratio}{_because(found)}"
    measured["computed in"] = f"{metrics['seconds']:.2f} s, at most {metrics['peak_memory_mib']:.0f} MiB"
    measured["folder"] = f"points/{identity}"
    return _beside(heading, f"{pairs_html(measured)}<details><summary>all settings</summary>{of_it}</details>")


def _beside(heading: str, tables: str) -> str:
    """A point's clip, which the script puts there, and its tables."""
    return f"{heading}<div class='pair'><div class='large'></div><div>{tables}</div></div>"


def _because(found: Mapping[str, Any]) -> str:
    return f": {found['reason']}" if found.get("reason") else ""


def pairs_html(rows: Mapping[str, str]) -> str:
    """Names and values as a table."""
    return Table(["", ""], [[Cell(name.replace("_", " "), "head"), value] for name, value in rows.items()]).to_html()


# --- three and more axes ---


def parallel_svg(sweep: Sweep, identities: Sequence[str]) -> str:
    """Parallel coordinates: each point a line through its values on all axes and through its metrics; SVG in HTML.

    Args:
        sweep: of three or more axes.
        identities: its points that are finished.
    """
    from matplotlib import rc_context

    from svdlab.notebook.figures import new_plot

    table = sweep.table().set_index("point").loc[list(identities)]
    scales = [_Scale.over_values(axis_name(axis), values) for axis, values in sweep.plan.axes.items()]
    places = [
        [values.index(sweep.plan.points[i].value(a)) for a, values in sweep.plan.axes.items()] for i in identities
    ]
    columns = [np.array(column, dtype=float) for column in zip(*places, strict=True)]
    metrics = {"motion": "motion\n(grey levels)", "divergence_ratio": "noise ratio"}
    for name in [name for name in metrics if name in table and table[name].notna().any()]:
        values = table[name].to_numpy(dtype=float)
        columns.append(np.log10(values) if name == "divergence_ratio" else values)
        scales.append(_Scale.over_numbers(metrics[name], columns[-1], name == "divergence_ratio"))
    # Room for the longest text on the left of each.
    gaps = [0.6 + 0.08 * max(len(text) for _, text in scale.ticks) for scale in scales]
    at = np.cumsum([max(1.1, gap) for gap in gaps])
    width, height = float(at[-1]) + 0.7, 3.2
    plot = new_plot(width, height, "")
    plot.set_layout_engine("none")
    ax = plot.add_axes((0.0, 0.06, 1.0, 0.76), xlim=(0.0, width), ylim=(0.0, 1.0))
    ax.set_axis_off()
    for i, identity in enumerate(identities):
        heights = [scale.at(column[i]) for scale, column in zip(scales, columns, strict=True)]
        colour = _PALETTE[places[i][0] % len(_PALETTE)]
        (line,) = ax.plot(at, heights, color=colour, linewidth=1.6, clip_on=False)
        line.set_gid(f"point-{identity}")
    for x, scale in zip(at, scales, strict=True):
        ax.plot([x, x], [0, 1], color="#888888", linewidth=1, clip_on=False)
        ax.text(x, 1.08, scale.name, ha="center", va="bottom", fontsize=9, fontweight="bold")
        for tick, text in scale.ticks:
            ax.text(x - 0.06, tick, text, ha="right", va="center", fontsize=9)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        plot.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'id="point-([0-9a-f]+)"', r'data-point="\1"', svg)
    svg = re.sub(r' id="[^"]*"', "", svg).replace("<svg ", '<svg role="img" aria-label="Parallel coordinates" ', 1)
    first = next(iter(sweep.plan.axes)).replace("_", " ")
    about = f"Every line is a point; its colour is its {first}. A click marks it everywhere."
    return f"<p><b>All axes at once.</b> {escape(about)}</p><div class='scroll lines'>{svg}</div>"


@dataclass(frozen=True)
class _Scale:
    """A vertical axis: where a number is on it, in [0, 1], and the texts beside it."""

    name: str
    low: float
    high: float
    ticks: list[tuple[float, str]]

    @classmethod
    def over_values(cls, name: str, values: Sequence[Any]) -> _Scale:
        """Values at equal distances."""
        last = len(values) - 1
        return cls(name, 0.0, last, [(i / last if last else 0.5, text_of(value)) for i, value in enumerate(values)])

    @classmethod
    def over_numbers(cls, name: str, numbers: np.ndarray, logarithms: bool) -> _Scale:
        """Numbers from the smallest to the largest."""
        low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
        texts = [f"{10**v if logarithms else v:.3g}" for v in (low, high)]
        return cls(name, low, high, [(0.0, texts[0]), (1.0, texts[1])] if high > low else [(0.5, texts[0])])

    def at(self, number: float) -> float:
        return (number - self.low) / (self.high - self.low) if self.high > self.low else 0.5


# --- two sweeps ---


def comparison_html(before: Sweep, after: Sweep) -> str:
    """Two sweeps side by side: the same points of both on one clock, and which clips changed. HTML.

    Raises:
        SvdlabError: see ``compare_sweeps``.
    """
    found = compare_sweeps(before, after)
    view, boards = View(before), (Board(before), Board(after))
    change = {before.at(**p.at): p for p in found.points}
    other = {key: after.at(**p.at) for key, p in change.items()}
    # Of a row that the second does not have there is nothing to say.
    common = [(head, identities) for head, identities in view.rows() if any(i in change for i in identities)]
    rows: list[tuple[str, list[Tile]]] = []
    for head, identities in common:
        for which, board in zip(("before", "after"), boards, strict=True):
            tiles = [_tile_of(board, which, i, change, other) for i in identities]
            rows.append((", ".join(filter(None, (head, which))), tiles))
    known = {key: p.mean for key, p in change.items() if p.mean is not None}
    largest = {key: float(p.largest) for key, p in change.items() if p.largest is not None}
    maps = [
        HeatMap(title, unit, _numbers(common, values), _from_zero(max(values.values(), default=0.0)))
        for title, unit, values in (
            ("Mean change", "grey levels", known),
            ("Largest change", "grey levels, of a pixel", largest),
        )
    ]
    details = {key: _change_html(before, after, key, other[key]) for key in change}
    shapes = [boards[0].film(key)[1] for key in change] + [boards[1].film(own)[1] for own in other.values()]
    return board_html(
        view.corner(),
        view.heads(),
        rows,
        maps,
        details,
        fps=min(p.settings.fps for p in before.plan.points.values()),
        shapes=shapes,
        caption=found.summary(),
    )


def _tile_of(
    board: Board, which: str, identity: str | None, change: Mapping[str, Any], other: Mapping[str, str]
) -> Tile:
    if identity is None or identity not in change:
        return Tile(None, word="not in both")
    own = identity if which == "before" else other[identity]
    film, _ = board.film(own)
    note = ("changed" if change[identity].moved() else "the same") if which == "after" else ""
    return Tile(identity, f"{place_of(board.sweep, own)}, {which}", film=film, note=note)


def _change_html(before: Sweep, after: Sweep, key: str, other: str) -> str:
    was, now = before.metrics(key), after.metrics(other)
    rows: list[list[str | Cell]] = [
        [Cell("motion", "head"), f"{was['motion']:.3g}", f"{now['motion']:.3g}"],
        [Cell("computed in", "head"), f"{was['seconds']:.2f} s", f"{now['seconds']:.2f} s"],
    ]
    heads: list[str | Column] = ["", "before", "after"]
    table = Table(heads, rows).to_html()
    return _beside(f"<p class='place'>{escape(place_of(before, key))}</p>", table)
