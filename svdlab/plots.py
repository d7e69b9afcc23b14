"""One visual language for every figure: the same colour means the same thing everywhere, in print too.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; line styles differ as well.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from svdlab.lab import Chunk
    from svdlab.parity.compare import Comparison, ProbeResult
    from svdlab.parity.diagnose import CatalogueRow

DIFFUSERS, SVDLAB, FIX_OFF, FLOOR = "#0072B2", "#009E73", "#D55E00", "#666666"
_BOTTOM = 1e-9  # what is equal to the last bit is drawn here, just below the axis
_DISTANCE = "distance from diffusers float64,\nrelative to its norm"
_SCALARS = ("input.", "sigmas", "timesteps", "guidance_scale")
_DPI = 144


class Plot(Figure):
    """A figure that no window system owns, so that any thread can draw it; a page gets it with a text beside it.

    Attributes:
        alt: what it shows, for those who cannot see it.
    """

    alt: str = ""

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_DPI)
        width = round(self.get_figwidth() * 100)
        data = base64.b64encode(buffer.getvalue()).decode()
        return (
            f'<img style="width:{width}px;max-width:100%" alt="{escape(self.alt)}" src="data:image/png;base64,{data}">'
        )


def _plot(width: float, height: float, alt: str) -> Plot:
    plot = Plot(figsize=(width, height), layout="constrained")
    plot.alt = alt
    return plot


def _tidy(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def plot_divergence(
    comparison: Comparison, fix_off: Comparison | None = None, fix_off_label: str = "fix off", inputs: bool = True
) -> Plot:
    """How far candidates are from the truth along the probes, with the noise floor and the bar of parity.

    Args:
        comparison: svdlab's, of ``parity.compare``.
        fix_off: that of a candidate with a bug, against the same reference.
        fix_off_label: its name in the legend.
        inputs: whether to show the probes that only replay or count (``input.*``, sigmas, timesteps, guidance).

    Returns:
        A figure; the horizontal axis is the order of execution, the vertical one logarithmic.
    """
    probes = _shown(comparison, inputs)
    plot = _plot(max(8.5, 0.2 * len(probes)), 4.0, comparison.summary())
    _draw_probes(plot.subplots(), probes, comparison, fix_off, fix_off_label)
    return plot


def plot_fix(on: Comparison, off: Comparison, bug: str) -> Plot:
    """The same with the fix on and off, along the probes and, on the right, along the denoising steps.

    Args:
        on: svdlab's comparison with the fix.
        off: with the bug in its place, against the same reference.
        bug: its name in the catalogue.
    """
    plot = _plot(10.0, 4.2, f"Distance from diffusers float64. Fix on: {on.summary()}. Fix off: {off.summary()}.")
    left, right = plot.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    _draw_probes(left, _shown(on, inputs=True), on, off, f"fix off ({bug})")
    left.set_title("every tensor", fontsize=10, loc="left")
    handles = left.get_legend_handles_labels()
    left.get_legend().remove()
    plot.legend(*handles, fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    steps = [p for p in on.probes if p.name.startswith("latents.")]
    _draw_lines(right, range(1, len(steps) + 1), steps, on, off, "")
    right.set_xticks(range(1, len(steps) + 1, max(1, len(steps) // 6)))
    _tidy(right, "denoising step", "", "latents after each step")
    return plot


def _shown(comparison: Comparison, inputs: bool) -> list[ProbeResult]:
    scalars = () if inputs else _SCALARS
    return [p for p in comparison.probes if not p.zero_reference and not p.name.startswith(scalars)]


def _draw_probes(
    ax: Axes, probes: Sequence[ProbeResult], on: Comparison, off: Comparison | None, off_label: str
) -> None:
    at = range(len(probes))
    _draw_lines(ax, at, probes, on, off, off_label)
    ax.set_xlim(-0.5, len(probes) - 0.5)
    ax.set_xticks(list(at), [p.name for p in probes], rotation=90, fontsize=7)
    _tidy(ax, "probe, in order of execution", _DISTANCE)
    ax.legend(fontsize=8, loc="lower right", framealpha=0.9)


def _draw_lines(
    ax: Axes,
    at: Sequence[int],
    probes: Sequence[ProbeResult],
    on: Comparison,
    off: Comparison | None,
    off_label: str,
) -> None:
    """The grey band of parity, the floor, and one line a candidate."""
    floor = [p.floor for p in probes]
    bar = [on.threshold * f for f in floor]
    ax.fill_between(at, bar, _BOTTOM, color=FLOOR, alpha=0.12, lw=0)
    ax.semilogy(at, bar, ":", color=FLOOR, lw=1.5, label=f"bar of parity: {on.threshold:g} x floor")
    ax.semilogy(at, floor, "--", color=DIFFUSERS, lw=1.5, label=f"diffusers {on.dtype} (the noise floor)")
    # The wider line lies below the narrower one, so that both are seen where they coincide.
    fix_on = ", fix on" if off is not None and off_label.startswith("fix off") else ""
    lines = [(f"svdlab {on.dtype}{fix_on}", on, SVDLAB, "o-", 2.0)]
    if off is not None:
        lines.append((off_label, off, FIX_OFF, "s-", 1.0))
    for label, of, colour, style, width in lines:
        distance = [max(of[p.name].divergence, _BOTTOM) for p in probes]
        ax.semilogy(at, distance, style, color=colour, ms=2 + width, lw=width, label=label)
    ax.set_ylim(bottom=2 * _BOTTOM)


def plot_grid(values: Sequence[Any], on: Sequence[Comparison], off: Mapping[str, Sequence[Comparison]], x: str) -> Plot:
    """The noise ratio of the frames against a setting, with the fix on and with each bug in its place.

    Args:
        values: the setting's; anything that prints.
        on: a comparison for each value.
        off: by bug, a comparison for each value.
        x: the setting's name and unit.
    """
    plot = _plot(6.5, 3.2, f"Noise ratio of the frames against {x}, fix on and off.")
    ax = plot.subplots()
    at = range(len(values))
    threshold = on[0].threshold
    ax.axhspan(1e-3, threshold, color=FLOOR, alpha=0.12, lw=0)
    ax.axhline(threshold, ls=":", color=FLOOR, lw=1.5, label=f"bar of parity: {threshold:g}")
    for (bug, comparisons), style in zip(off.items(), ("s-", "D--", "^:"), strict=False):
        ax.semilogy(at, _frame_ratios(comparisons), style, color=FIX_OFF, ms=5, lw=1, label=f"fix off ({bug})")
    ax.semilogy(at, _frame_ratios(on), "o-", color=SVDLAB, ms=5, lw=1, label="fix on")
    ax.set_xticks(list(at), [str(v) for v in values])
    ax.set_ylim(bottom=0.1)
    _tidy(ax, x, "noise ratio of the frames")
    ax.legend(fontsize=8)
    return plot


def _frame_ratios(comparisons: Sequence[Comparison]) -> list[float]:
    return [max(c["frames"].ratio, 0.1) for c in comparisons]


def plot_curves(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    *,
    log_x: bool = False,
    log_y: bool = False,
    band: tuple[float, float, str] | None = None,
) -> Plot:
    """What a rule computes, beside its twins: the first curve is diffusers', the others the bugs'.

    Args:
        x: common to all curves.
        curves: by name.
        labels: of the axes, with units.
        log_x, log_y: logarithmic axes.
        band: a range of the vertical axis to shade, and what it is.
    """
    plot = _plot(6.5, 3.2, f"{labels[1]} against {labels[0]}: {', '.join(curves)}.")
    ax = plot.subplots()
    if band:
        ax.axhspan(*band[:2], color=FLOOR, alpha=0.12, lw=0, label=band[2])
    for i, ((name, y), style) in enumerate(zip(curves.items(), ("o-", "s--", "D:", "^-."), strict=False)):
        ax.plot(x, y, style, color=DIFFUSERS if i == 0 else FIX_OFF, ms=4, lw=1.2, label=name)
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    elif min(map(min, curves.values())) >= 0:
        ax.set_ylim(bottom=0)  # a small change shall look small
    _tidy(ax, *labels)
    ax.legend(fontsize=8)
    return plot


def plot_frames(on: Comparison, off: Comparison, bug: str) -> Plot:
    """How far each frame of the clip is from diffusers float64, with the fix on and off."""
    traces = {"reference": on.traces["reference"], "on": on.traces["candidate"], "off": off.traces["candidate"]}
    truth = on.traces["truth"]["frames"].double()
    plot = _plot(6.5, 3.2, f"Distance of each frame from diffusers float64, fix on and off ({bug}).")
    ax = plot.subplots()
    norm = truth.flatten(2).norm(dim=2).mean(0)
    looks = (
        ("reference", "--", DIFFUSERS, f"diffusers {on.dtype} (the noise floor)"),
        ("on", "o-", SVDLAB, "fix on"),
        ("off", "s-", FIX_OFF, f"fix off ({bug})"),
    )
    for name, style, colour, label in looks:
        distance = (traces[name]["frames"].double() - truth).flatten(2).norm(dim=2).mean(0) / norm
        at = np.arange(1, len(distance) + 1)
        ax.semilogy(at, distance.clamp_min(_BOTTOM), style, color=colour, ms=4, lw=1.2, label=label)
    ax.set_xticks(at)
    _tidy(ax, "frame", _DISTANCE)
    ax.legend(fontsize=8)
    return plot


def plot_chunks(chunks: Sequence[Chunk]) -> Plot:
    """How far frames decoded in chunks are from those decoded at once, for every chunk size.

    Args:
        chunks: of ``lab.every_chunk``.
    """
    plot = _plot(6.5, 3.2, "Distance of the frames from diffusers float64 decoded at once, against the chunk size.")
    ax = plot.subplots()
    looks = (
        ("diffusers", "D-", DIFFUSERS, 8, "diffusers in chunks"),
        ("parity", "s--", FIX_OFF, 4, "svdlab, the same chunks"),
        ("exact", "o-", SVDLAB, 5, "svdlab, exact"),
        ("floor", "--", FLOOR, 0, "diffusers at once (the noise floor)"),
    )
    sizes = [c.size for c in chunks]
    for name, style, colour, size, label in looks:
        ax.semilogy(sizes, [c.distance[name] for c in chunks], style, color=colour, ms=size, lw=1.2, label=label)
    ax.set_xticks(sizes)
    _tidy(ax, "chunk size (frames)", _DISTANCE)
    ax.legend(fontsize=8)
    return plot


def plot_steps(comparison: Comparison) -> Plot:
    """How far every tensor of a denoising step is from the truth, over the steps.

    Args:
        comparison: svdlab's, of ``parity.compare``.
    """
    plot = _plot(10.0, 3.6, f"Distance from diffusers float64 over the steps: {comparison.summary()}.")
    kinds = ("model_input", "noise_pred_uncond", "noise_pred_cond", "noise_pred", "latents")
    for ax, kind in zip(plot.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        probes = [p for p in comparison.probes if p.name.rpartition(".")[0] == kind]
        at = range(1, len(probes) + 1)
        _draw_lines(ax, at, probes, comparison, None, "")
        ax.set_xticks(at[:: max(1, len(at) // 4)])
        _tidy(ax, "step", _DISTANCE if kind == kinds[0] else "", kind)
    plot.legend(*ax.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=3, frameon=False)
    return plot


def plot_catalogue(rows: Sequence[CatalogueRow]) -> Plot:
    """What two bars say of every bug: each is a point, and each bar a line that it has to cross to be caught.

    Args:
        rows: of ``parity.diagnose.catalogue``.
    """
    from svdlab.parity.compare import MSE_BAR, THRESHOLD

    missed = [row.bug for row in rows if row.passes_mse_bar and row.ratio > THRESHOLD]
    plot = _plot(9.0, 5.0, f"Noise ratio against mean squared error, a point a bug. Only the ratio catches {missed}.")
    ax = plot.subplots()
    # Equal to the last bit has no place on a logarithmic axis: it is drawn at its left end.
    smallest = min((row.frames_mse for row in rows if row.frames_mse > 0), default=MSE_BAR) / 3
    looks = {True: ("o", FIX_OFF, "let through by the mean squared error"), False: ("s", FLOOR, "caught by it")}
    for passes, (marker, colour, label) in looks.items():
        chosen = [row for row in rows if row.passes_mse_bar is passes]
        at = [(max(row.frames_mse, smallest), row.ratio) for row in chosen]
        ax.loglog(*zip(*at, strict=True), marker, color=colour, ms=5, label=f"{len(chosen)} {label}")
        for i, (row, point) in enumerate(zip(chosen, at, strict=True)):
            if passes:  # above and below in turns, so that neighbours can be read
                place = (6, -9 if i % 2 else 3)
                ax.annotate(row.bug, point, xytext=place, textcoords="offset points", fontsize=7)
    ax.axvline(MSE_BAR, ls=":", color=DIFFUSERS, lw=1.5, label=f"usual bar: mean squared error {MSE_BAR:g}")
    ax.axhline(THRESHOLD, ls=":", color=SVDLAB, lw=1.5, label=f"bar of parity: noise ratio {THRESHOLD:g}")
    _tidy(ax, "mean squared error of the frames, in [-1, 1]", "largest noise ratio of all probes")
    ax.legend(fontsize=8, loc="lower right")
    return plot


def plot_bench(found: Mapping[str, Any]) -> Plot:
    """A benchmark: how many times as long as svdlab diffusers takes, how near both are to the limit, how cost grows.

    Args:
        found: the JSON of ``svdlab bench``.
    """
    cases, growth = found["cases"], found["growth"]
    height = max(3.4, 0.42 * len(cases) + 1.8)
    plot = _plot(11.0, height, "Speed of svdlab and diffusers, and their distance from the limit.")
    axes = plot.subplots(1, 3 if growth else 2, width_ratios=(1.2, 1, 1)[: 3 if growth else 2])
    _draw_ratios(axes[0], cases)
    _draw_limits(axes[1], cases)
    if growth:
        _draw_growth(axes[2], growth)
    return plot


def _draw_ratios(ax: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    at = range(len(cases))
    for prefix, marker, label in (("", "o", "diffusers"), ("compiled_", "^", "diffusers, compiled")):
        rows = [(y, case) for y, case in zip(at, cases, strict=True) if f"{prefix}ratio" in case]
        if rows:
            medians = np.array([case[f"{prefix}ratio"] for _, case in rows])
            reach = np.abs(np.array([case[f"{prefix}ratio_range"] for _, case in rows]).T - medians)
            ys = [y for y, _ in rows]
            ax.errorbar(medians, ys, xerr=reach, fmt=marker, color=DIFFUSERS, capsize=3, label=label)
    ax.axvline(1, ls="--", color=SVDLAB, lw=1.5, label="svdlab")
    ax.set_yticks(at, [f"{case['name']} {case['dtype']}" for case in cases], fontsize=8)
    ax.set_xlim(left=0)
    _below(ax, at, "times as long as svdlab", "time: median and range of the pairs")


def _draw_limits(ax: Axes, cases: Sequence[Mapping[str, Any]]) -> None:
    at = range(len(cases))
    for name, colour, shift in (("svdlab", SVDLAB, -0.18), ("diffusers", DIFFUSERS, 0.18)):
        share = [100 * case[f"{name}_of_matrix_peak"] for case in cases]
        ax.barh([y + shift for y in at], share, height=0.34, color=colour, label=name)
    ax.axvline(100, ls="--", color=FLOOR, lw=1.5, label="matrix peak")
    ax.set_yticks(at, [""] * len(cases))
    _below(ax, at, "FLOP/s, % of the matrix peak", "distance to the limit")


def _below(ax: Axes, at: range, x: str, title: str) -> None:
    """Cases from top to bottom, and a legend that hides none of them."""
    ax.set_ylim(len(at) - 0.5, -0.5)
    _tidy(ax, x, "", title)
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
    _tidy(
        ax, "frames or pixels, over the fewest", "seconds of a UNet step, over the shortest", "growth, with exponents"
    )
    ax.legend(fontsize=6)
