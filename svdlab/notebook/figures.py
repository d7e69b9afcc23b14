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
from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, NullLocator

from svdlab.svd.images import to_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from svdlab.bench.frontier import Row
    from svdlab.parity.compare import Comparison, ProbeResult
    from svdlab.parity.diagnose import CatalogueRow
    from svdlab.parity.lab import Chunk

DIFFUSERS, SVDLAB, FIX_OFF, FLOOR = "#0072B2", "#009E73", "#D55E00", "#666666"
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


def plot_divergence(
    comparison: Comparison, fix_off: Comparison | None = None, fix_off_label: str = "fix off", inputs: bool = True
) -> Plot:
    """How far candidates are from the truth along the probes, with the noise floor and the parity tolerance.

    Args:
        comparison: svdlab's, of ``parity.compare``.
        fix_off: that of a candidate with a bug, against the same reference.
        fix_off_label: its name in the legend.
        inputs: whether to show the probes that only replay or count (``input.*``, sigmas, timesteps, guidance).

    Returns:
        A figure; the horizontal axis is the order of execution, the vertical one logarithmic.
    """
    there = {p.name for p in (fix_off or comparison).probes}  # a port may have written some tensors only
    probes = [p for p in _shown(comparison, inputs) if p.name in there]
    plot = new_plot(max(8.5, 0.2 * len(probes)), 4.0, comparison.summary())
    _draw_probes(plot.subplots(), probes, comparison, fix_off, fix_off_label)
    return plot


def plot_fix(on: Comparison, off: Comparison, bug: str) -> Plot:
    """The same with the fix on and off, along the probes and, on the right, along the denoising steps.

    Args:
        on: svdlab's comparison with the fix.
        off: with the bug injected, against the same reference.
        bug: its name in the catalogue.
    """
    plot = new_plot(10.0, 4.2, f"Distance from diffusers float64. Fix on: {on.summary()}. Fix off: {off.summary()}.")
    left, right = plot.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    _draw_probes(left, _shown(on, inputs=True), on, off, f"fix off ({bug})")
    left.set_title("every tensor", fontsize=10, loc="left")
    handles = left.get_legend_handles_labels()
    left.get_legend().remove()
    plot.legend(*handles, fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    steps = [p for p in on.probes if p.name.startswith("latents.")]
    _draw_lines(right, range(1, len(steps) + 1), steps, on, off, "")
    # The axis is shared: it has room for what either side shows.
    _logarithmic(left, _zero(_shown(on, inputs=True), on, off))
    right.set_xticks(range(1, len(steps) + 1, max(1, len(steps) // 6)))
    label_axes(right, "denoising step", "", "latents after each step")
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
    label_axes(ax, "probe, in order of execution", _DISTANCE)
    ax.legend(fontsize=8, loc="lower right", framealpha=0.9)


def _draw_lines(
    ax: Axes,
    at: Sequence[int],
    probes: Sequence[ProbeResult],
    on: Comparison,
    off: Comparison | None,
    off_label: str,
) -> None:
    """The grey band of parity, the floor, and one line per candidate."""
    floor = [p.floor for p in probes]
    tolerance = [on.threshold * f for f in floor]
    zero = _zero(probes, on, off)
    ax.fill_between(at, tolerance, 1e-30, color=FLOOR, alpha=0.12, lw=0)
    ax.semilogy(at, tolerance, ":", color=FLOOR, lw=1.5, label=f"parity tolerance: {on.threshold:g} x floor")
    ax.semilogy(at, floor, "--", color=DIFFUSERS, lw=1.5, label=f"diffusers {on.dtype} (the noise floor)")
    # The wider line lies below the narrower one, so that both are seen where they coincide.
    fix_on = ", fix on" if off is not None and off_label.startswith("fix off") else ""
    lines = [(f"svdlab {on.dtype}{fix_on}", on, SVDLAB, "o-", 2.0)]
    if off is not None:
        lines.append((off_label, off, FIX_OFF, "s-", 1.0))
    for label, of, colour, style, width in lines:
        distance = [max(of[p.name].divergence, zero) for p in probes]
        ax.semilogy(at, distance, style, color=colour, ms=2 + width, lw=width, label=label)
    _logarithmic(ax, zero)


def _zero(probes: Sequence[ProbeResult], *comparisons: Comparison | None) -> float:
    """Where a distance of zero is drawn on a logarithmic axis: a decade below the smallest of the others."""
    found = [c[p.name].divergence for c in comparisons if c is not None for p in probes] + [p.floor for p in probes]
    return float(10 ** (np.floor(np.log10(min(d for d in found if d > 0))) - 1))


def _logarithmic(ax: Axes, zero: float) -> None:
    """Decades down to ``zero``, whose tick says 0."""

    class Formatter(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return "0" if x < 2 * zero else super().__call__(x, pos)

    ax.set_ylim(bottom=zero / 2)
    decades = round(np.log10(ax.get_ylim()[1] / zero))
    ax.yaxis.set_major_locator(
        FixedLocator([zero, *(zero * 10.0**k for k in range(decades, 0, -max(1, decades // 5)))])
    )
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(Formatter())


def plot_grid(values: Sequence[Any], on: Sequence[Comparison], off: Mapping[str, Sequence[Comparison]], x: str) -> Plot:
    """The noise ratio of the frames against a setting, with the fix on and with each bug injected.

    Args:
        values: the setting's; anything that prints.
        on: a comparison for each value.
        off: by bug, a comparison for each value.
        x: the setting's name and unit.
    """
    plot = new_plot(6.5, 3.2, f"Noise ratio of the frames against {x}, fix on and off.")
    ax = plot.subplots()
    at = range(len(values))
    threshold = on[0].threshold
    ax.axhspan(1e-3, threshold, color=FLOOR, alpha=0.12, lw=0)
    ax.axhline(threshold, ls=":", color=FLOOR, lw=1.5, label=f"parity tolerance: {threshold:g}")
    for (bug, comparisons), style in zip(off.items(), ("s-", "D--", "^:"), strict=False):
        ax.semilogy(at, _frame_ratios(comparisons), style, color=FIX_OFF, ms=5, lw=1, label=f"fix off ({bug})")
    ax.semilogy(at, _frame_ratios(on), "o-", color=SVDLAB, ms=5, lw=1, label="fix on")
    ax.set_xticks(list(at), [str(v) for v in values])
    ax.set_ylim(bottom=0.1)
    label_axes(ax, x, "noise ratio of the frames")
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
    """What a formula gives, diffusers' (the first curve) and the bugs' (the others).

    Args:
        x: common to all curves.
        curves: by name.
        labels: of the axes, with units.
        log_x, log_y: logarithmic axes.
        band: a range of the vertical axis to shade, and what it is.
    """
    plot = new_plot(6.5, 3.2, f"{labels[1]} against {labels[0]}: {', '.join(curves)}.")
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
        ax.set_ylim(0, 1.1 * max(map(max, curves.values())))  # a small change shall look small
    label_axes(ax, *labels)
    ax.legend(fontsize=8)
    return plot


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


def plot_frames(on: Comparison, off: Comparison, bug: str) -> Plot:
    """How far each frame of the clip is from diffusers float64, with the fix on and off."""
    traces = {"reference": on.traces["reference"], "on": on.traces["candidate"], "off": off.traces["candidate"]}
    truth = on.traces["truth"]["frames"].double()
    plot = new_plot(6.5, 3.2, f"Distance of each frame from diffusers float64, fix on and off ({bug}).")
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
        ax.semilogy(at, distance, style, color=colour, ms=4, lw=1.2, label=label)
    ax.set_xticks(at)
    label_axes(ax, "frame", _DISTANCE)
    ax.legend(fontsize=8)
    return plot


def plot_chunks(chunks: Sequence[Chunk]) -> Plot:
    """How far frames decoded in chunks are from those decoded at once, for every chunk size.

    Args:
        chunks: of ``lab.every_chunk``.
    """
    plot = new_plot(6.5, 3.2, "Distance of the frames from diffusers float64 decoded at once, against the chunk size.")
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
    label_axes(ax, "chunk size (frames)", _DISTANCE)
    ax.legend(fontsize=8)
    return plot


def plot_steps(comparison: Comparison) -> Plot:
    """How far every tensor of a denoising step is from the truth, over the steps.

    Args:
        comparison: svdlab's, of ``parity.compare``.
    """
    plot = new_plot(10.0, 3.6, f"Distance from diffusers float64 over the steps: {comparison.summary()}.")
    kinds = ("model_input", "noise_pred_uncond", "noise_pred_cond", "noise_pred", "latents")
    for ax, kind in zip(plot.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        probes = [p for p in comparison.probes if p.name.rpartition(".")[0] == kind]
        at = range(1, len(probes) + 1)
        _draw_lines(ax, at, probes, comparison, None, "")
        ax.set_xticks(at[:: max(1, len(at) // 4)])
        label_axes(ax, "step", _DISTANCE if kind == kinds[0] else "", kind)
    plot.legend(*ax.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=3, frameon=False)
    return plot


def plot_catalogue(rows: Sequence[CatalogueRow]) -> Plot:
    """What two tests of a port say of every bug: each bug is a point, each test's threshold a line.

    Args:
        rows: of ``parity.diagnose.catalogue``.
    """
    from svdlab.parity.compare import MSE_BAR, THRESHOLD

    missed = [row.bug for row in rows if row.passes_mse_bar and row.ratio > THRESHOLD]
    plot = new_plot(
        9.0, 5.0, f"Noise ratio against mean squared error, one point per bug. Only the ratio catches {missed}."
    )
    ax = plot.subplots()
    # Equal to the last bit has no place on a logarithmic axis: it is drawn at its left end.
    smallest = min((row.frames_mse for row in rows if row.frames_mse > 0), default=MSE_BAR) / 3
    looks = {True: ("o", FIX_OFF, "missed by the mean squared error"), False: ("s", FLOOR, "caught by it")}
    for passes, (marker, colour, label) in looks.items():
        chosen = [row for row in rows if row.passes_mse_bar is passes]
        at = [(max(row.frames_mse, smallest), row.ratio) for row in chosen]
        ax.loglog(*zip(*at, strict=True), marker, color=colour, ms=5, label=f"{len(chosen)} {label}")
        for i, (row, point) in enumerate(zip(chosen, at, strict=True)):
            if passes:  # above and below in turns, so that neighbours can be read
                place = (6, -9 if i % 2 else 3)
                paper = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
                ax.annotate(row.bug, point, xytext=place, textcoords="offset points", fontsize=7, bbox=paper)
    ax.axvline(MSE_BAR, ls=":", color=DIFFUSERS, lw=1.5, label=f"the usual threshold: MSE < {MSE_BAR:g}")
    ax.axhline(THRESHOLD, ls=":", color=SVDLAB, lw=1.5, label=f"parity tolerance: noise ratio {THRESHOLD:g}")
    label_axes(ax, "mean squared error of the frames, in [-1, 1]", "largest noise ratio of all probes")
    ax.legend(fontsize=8, loc="lower right")
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
        ax.annotate(row.name, (row.speedup, row.noise_ratio), (4, 4), textcoords="offset points", fontsize=7)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.1)
    label_axes(ax, "times as fast as the exact clip", "noise ratio of the frames")
    ax.legend(fontsize=8, loc="lower right")
    return plot


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
