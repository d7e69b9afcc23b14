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


def plot_divergence(comparison: Comparison, candidate: str = "svdlab", colour: str = SVDLAB) -> Figure:
    """The candidate's distance from the truth along the probes, with the noise floor and the bar of parity.

    Args:
        comparison: of ``parity.compare``.
        candidate: its name in the legend.
        colour: ``SVDLAB``, or ``FIX_OFF`` for a candidate with a bug.

    Returns:
        A matplotlib figure; the horizontal axis is the order of execution, the vertical one logarithmic.
    """
    probes = [p for p in comparison.probes if not p.zero_reference]
    at = range(len(probes))
    floor = [p.floor for p in probes]
    figure, ax = plt.subplots(figsize=(max(7.0, 0.2 * len(probes)), 4.2), layout="constrained")
    ax.fill_between(at, [comparison.threshold * f for f in floor], 1e-9, color=FLOOR, alpha=0.12, lw=0)
    ax.semilogy(
        at, [comparison.threshold * f for f in floor], ":", color=FLOOR, lw=1.5, label="bar of parity: 4 x floor"
    )
    ax.semilogy(at, floor, "--", color=DIFFUSERS, lw=1.5, label="diffusers (the noise floor)")
    ax.semilogy(at, [max(p.divergence, 1e-9) for p in probes], "o-", color=colour, ms=3.5, lw=1, label=candidate)
    ax.set_ylim(bottom=2e-9)
    ax.set_xlim(-0.5, len(probes) - 0.5)
    ax.set_xticks(list(at), [p.name for p in probes], rotation=90, fontsize=7)
    ax.set_xlabel("probe, in order of execution")
    ax.set_ylabel("distance from the float64 run,\nrelative to its norm")
    ax.legend(fontsize=8, loc="lower right", framealpha=0.9)
    ax.spines[["top", "right"]].set_visible(False)
    plt.close(figure)  # a notebook shows it once, as the cell's result
    return figure
