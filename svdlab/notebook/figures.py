"""Pictures that are no line charts (those are in ``charts``): maps, strips of frames, a benchmark.

One visual language for both: a colour means the same thing everywhere, in print too. Colours are Okabe and Ito's,
which colour-blind readers can tell apart; line styles differ as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from svdlab.svd.images import to_levels
from svdlab.svd.video import data_url

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from svdlab.bench.frontier import Row

DIFFUSERS, SVDLAB, FIX_OFF, FLOOR = "#0072B2", "#009E73", "#D55E00", "#666666"
_DPI = 144


class Plot(Figure):
    """A figure that no window system owns, so that any thread can draw it; a page gets it with a text beside it.

    Attributes:
        alt: what it shows, for those who cannot see it.
    """

    alt: str = ""

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self.savefig(buffer, format="webp", dpi=_DPI, pil_kwargs={"lossless": True})
        width = round(self.get_figwidth() * 100)
        src = data_url("image/webp", buffer.getvalue())
        return f'<img style="width:{width}px;max-width:100%" alt="{escape(self.alt)}" src="{src}">'


def new_plot(width: float, height: float, alt: str) -> Plot:
    """An empty figure of that many inches, with its text."""
    plot = Plot(figsize=(width, height), layout="constrained")
    plot.alt = alt
    return plot


def label_axes(ax: Axes, x: str, y: str, title: str = "") -> None:
    """Name the axes, and leave out the frame's upper and right side."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def plot_ramps(ramps: Mapping[str, Tensor]) -> Plot:
    """The guidance scale of every frame at every denoising step, one map per way to make it.

    Args:
        ramps: (steps, frames) by name.
    """
    alt = "; ".join(
        f"{name}: first step {scale[0].tolist()}, last step {scale[-1].tolist()}" for name, scale in ramps.items()
    )
    plot = new_plot(10.0, 2.6, f"Guidance scale of every frame at every step. {alt}.")
    low, high = min(float(s.min()) for s in ramps.values()), max(float(s.max()) for s in ramps.values())
    for ax, (name, scale) in zip(plot.subplots(1, len(ramps), sharey=True), ramps.items(), strict=True):
        steps, frames = scale.shape
        shown = ax.imshow(scale.numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto")
        if steps * frames <= 64:
            for (step, frame), value in np.ndenumerate(scale.numpy()):
                colour = "black" if value > (low + high) / 2 else "white"
                ax.text(frame, step, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_xticks(range(frames), [str(i + 1) for i in range(frames)])
        ax.set_yticks(range(steps), [str(i + 1) for i in range(steps)])
        label_axes(ax, "frame", "denoising step" if ax.get_subplotspec().is_first_col() else "", name)
    plot.colorbar(shown, ax=plot.axes, label="guidance scale")
    return plot


def plot_film(rows: Mapping[str, Tensor]) -> Plot:
    """Clips as strips of frames below each other.

    Args:
        rows: (F, 3, H, W) in about [-1, 1] by name, all of one shape.
    """
    frames, _, height, width = next(iter(rows.values())).shape
    plot = new_plot(
        10.0, 0.7 + len(rows) * 8.6 / frames * height / width, f"{frames} frames each of {', '.join(rows)}."
    )
    axes = plot.subplots(len(rows), frames, squeeze=False)
    for line, (name, clip) in zip(axes, rows.items(), strict=True):
        for i, (ax, frame) in enumerate(zip(line, to_levels(clip), strict=True)):
            ax.imshow(frame, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(f"frame {i + 1}" if line is axes[-1] else "", fontsize=8)
        line[0].set_ylabel(name, fontsize=8)
    return plot


def plot_frontier(rows: Sequence[Row]) -> Plot:
    """What speed costs: how many times as fast as the exact clip, against the frames' noise ratio.

    Args:
        rows: of ``bench.frontier.frontier``.
    """
    from svdlab.parity.compare import THRESHOLD

    plot = new_plot(8.0, 4.4, f"Noise ratio against speed: {', '.join(row.name for row in rows)}.")
    ax = plot.subplots()
    ax.axhspan(0.1, THRESHOLD, color=FLOOR, alpha=0.12, lw=0, label=f"parity: up to {THRESHOLD:g}")
    for row in rows:
        colour = SVDLAB if row.noise_ratio <= THRESHOLD else FIX_OFF
        reach = np.abs(np.array([row.speedup_range]).T - row.speedup)
        ax.errorbar(row.speedup, row.noise_ratio, xerr=reach, fmt="o", color=colour, ms=5, capsize=2, lw=1)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.1)
    label_axes(ax, "times as fast as the exact clip", "noise ratio of the frames")
    ax.legend(fontsize=8, loc="lower right")
    _name_points(plot, ax, {row.name: (row.speedup, row.noise_ratio) for row in rows})
    return plot


def _name_points(plot: Plot, ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each point's name beside it, where it covers no other name and no other point."""
    plot.draw_without_rendering()  # the layout, which says where the points are
    places = ax.transData.transform(list(points.values()))
    half = 3 * plot.dpi / 72
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in places]
    offsets = [(dx, dy) for far in (4, 10, 18, 26) for dy in (far, -far) for dx in (4, -4)]

    def put(label: Annotation, dx: int, dy: int) -> Bbox:
        """Where the name then is, without its line."""
        label.set(position=(dx, dy), ha="left" if dx > 0 else "right", va="bottom" if dy > 0 else "top")
        return Text.get_window_extent(label)

    def cost(label: Annotation, dx: int, dy: int) -> int:
        box = put(label, dx, dy)
        return box.count_overlaps(taken) + 2 * (ax.bbox.count_contains(box.corners()) < 4)

    for name, at in points.items():
        line = dict(arrowstyle="-", lw=0.5, color=FLOOR, shrinkA=0, shrinkB=3)
        label = ax.annotate(name, at, (0, 0), textcoords="offset points", fontsize=7, arrowprops=line)
        label.set_in_layout(False)
        label.get_window_extent()  # from here on it knows where its point is
        best = min(offsets, key=lambda offset: cost(label, *offset))
        taken.append(put(label, *best).padded(3))


def plot_bench(found: Mapping[str, Any]) -> Plot:
    """A benchmark: how many times as long as svdlab diffusers takes, how near both are to the limit, how cost grows.

    Args:
        found: the JSON of ``svdlab bench``.
    """
    cases, growth = found["cases"], found["growth"]
    height = max(3.4, 0.42 * len(cases) + 1.8)
    plot = new_plot(11.0, height, "Speed of svdlab and diffusers, and their distance from the limit.")
    axes = plot.subplots(1, 3 if growth else 2, width_ratios=(1.2, 1, 1)[: 3 if growth else 2])
    _draw_ratios(axes[0], cases)
    _draw_limits(axes[1], cases)
    if growth:
        _draw_growth(axes[2], growth)
    return plot


def _draw_ratios(ax: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    at = range(len(cases))
    shown = (
        ("", "o", DIFFUSERS, "diffusers"),
        ("compiled_", "^", DIFFUSERS, "diffusers, compiled"),
        ("svdlab_compiled_", "s", SVDLAB, "svdlab, compiled"),
    )
    for prefix, marker, color, label in shown:
        rows = [(y, case) for y, case in zip(at, cases, strict=True) if f"{prefix}ratio" in case]
        if rows:
            medians = np.array([case[f"{prefix}ratio"] for _, case in rows])
            reach = np.abs(np.array([case[f"{prefix}ratio_range"] for _, case in rows]).T - medians)
            ys = [y for y, _ in rows]
            ax.errorbar(medians, ys, xerr=reach, fmt=marker, color=color, capsize=3, label=label)
    ax.axvline(1, ls="--", color=SVDLAB, lw=1.5, label="svdlab")
    ax.set_yticks(at, [f"{case['name']} {case['dtype']}" for case in cases], fontsize=8)
    ax.set_xlim(left=0)
    _below(ax, at, "times as long as svdlab", "time: median and range of the pairs")


def _draw_limits(ax: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    at = range(len(cases))
    for name, colour, shift in (("svdlab", SVDLAB, -0.18), ("diffusers", DIFFUSERS, 0.18)):
        share = [100 * case[f"{name}_of_matrix_peak"] for case in cases]
        ax.barh([y + shift for y in at], share, height=0.34, color=colour, label=name)
    ax.axvline(100, ls="--", color=FLOOR, lw=1.5, label="peak GEMM throughput")
    ax.set_yticks(at, [""] * len(cases))
    _below(ax, at, "% of peak GEMM throughput", "distance to the limit")


def _below(ax: Axes, at: range, x: str, title: str) -> None:
    """Cases from top to bottom, and a legend that hides none of them."""
    ax.set_ylim(len(at) - 0.5, -0.5)
    label_axes(ax, x, "", title)
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _draw_growth(ax: Axes, growth: Sequence[Mapping[str, Any]]) -> None:
    for row in growth:
        x = np.array(row["values"]) / row["values"][0]
        for name, colour in (("svdlab", SVDLAB), ("diffusers", DIFFUSERS)):
            label = f"{name}, {row['axis']}, {row['dtype']}: {row[f'{name}_exponent']:.2f}"
            seconds = np.array(row[f"{name}_s"])
            style = "o-" if row["axis"] == "frames" else "s--"
            ax.loglog(x, seconds / seconds[0], style, color=colour, ms=4, lw=1, label=label)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    ax.tick_params(which="both", labelsize=7)
    label_axes(
        ax, "frames or pixels, over the fewest", "seconds of a UNet step, over the shortest", "growth, with exponents"
    )
    ax.legend(fontsize=6)
