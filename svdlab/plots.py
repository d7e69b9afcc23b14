"""One visual language for every figure: the same colour means the same thing everywhere, in print too.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; line styles differ as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from svdlab.parity.compare import Comparison

DIFFUSERS, SVDLAB, FIX_OFF, FLOOR = "#0072B2", "#009E73", "#D55E00", "#666666"
_BOTTOM = 1e-9  # what is equal to the last bit is drawn here, just below the axis


def plot_divergence(
    comparison: Comparison, fix_off: Comparison | None = None, fix_off_label: str = "fix off", inputs: bool = True
) -> Figure:
    """How far candidates are from the truth along the probes, with the noise floor and the bar of parity.

    Args:
        comparison: svdlab's, of ``parity.compare``.
        fix_off: that of a candidate with a bug, against the same reference.
        fix_off_label: its name in the legend.
        inputs: whether to show the probes that only replay or count (``input.*``, sigmas, timesteps, guidance).

    Returns:
        A matplotlib figure; the horizontal axis is the order of execution, the vertical one logarithmic.
    """
    scalars = () if inputs else ("input.", "sigmas", "timesteps", "guidance_scale")
    probes = [p for p in comparison.probes if not p.zero_reference and not p.name.startswith(scalars)]
    at, floor = range(len(probes)), [p.floor for p in probes]
    figure, ax = plt.subplots(figsize=(max(8.5, 0.2 * len(probes)), 4.0), layout="constrained")
    bar = [comparison.threshold * f for f in floor]
    ax.fill_between(at, bar, _BOTTOM, color=FLOOR, alpha=0.12, lw=0)
    ax.semilogy(at, bar, ":", color=FLOOR, lw=1.5, label="bar of parity: 4 x floor")
    ax.semilogy(at, floor, "--", color=DIFFUSERS, lw=1.5, label=f"diffusers {comparison.dtype} (the noise floor)")
    lines = [(f"svdlab {comparison.dtype}", comparison, SVDLAB, "o-")]
    if fix_off is not None:
        lines.append((fix_off_label, fix_off, FIX_OFF, "s-"))
    for label, of, colour, style in lines:
        ax.semilogy(
            at, [max(of[p.name].divergence, _BOTTOM) for p in probes], style, color=colour, ms=3, lw=1, label=label
        )
    ax.set_ylim(bottom=2 * _BOTTOM)
    ax.set_xlim(-0.5, len(probes) - 0.5)
    ax.set_xticks(list(at), [p.name for p in probes], rotation=90, fontsize=7)
    ax.set_xlabel("probe, in order of execution")
    ax.set_ylabel("distance from diffusers float64,\nrelative to its norm")
    ax.legend(fontsize=8, loc="lower right", framealpha=0.9)
    ax.spines[["top", "right"]].set_visible(False)
    plt.close(figure)  # a notebook shows it once, as the cell's result
    return figure
