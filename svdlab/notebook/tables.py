"""The numbers of a case, as notebooks print them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from svdlab.parity.compare import THRESHOLD
from svdlab.tables import Cell, Column, Table

if TYPE_CHECKING:
    from svdlab.parity.compare import Comparison
    from svdlab.parity.diagnose import CatalogueRow
    from svdlab.parity.lab import Case


def ratio_text(comparison: Comparison) -> str:
    """The worst noise ratio, as tables and widgets show it: 1.30, 2.4e+04."""
    ratio = comparison.worst.ratio
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.1e}"


def number_html(case: Case, fix: bool) -> str:
    """The verdict's number with what it means: HTML.

    Args:
        case: of ``Lab.case``.
        fix: svdlab with the fix, or with the bug injected.
    """
    of = case.comparison(fix)
    name = f"Fix {'on' if fix else f'off ({case.bug})'}"
    mse = f"frames MSE {of.frames_mse:.1e}, {'below' if of.passes_mse_bar else 'above'} the usual threshold of 1e-3"
    if not case.measured:
        return f"<p>{escape(name)}: {mse}; the noise floor is being measured</p>"
    where = f"worst at {of.worst.name}" if of.verdict == "parity" else f"first above 4 at {of.first_divergence}"
    return (
        f"<p>{escape(name)}: <b>noise ratio <output>{ratio_text(of)}</output>, {of.verdict}</b> "
        f"({escape(where)}); {mse}</p>"
    )


def caught(by_it: bool) -> Cell:
    """Whether a test of a port catches a bug; a false negative is marked."""
    return Cell("catches it") if by_it else Cell("misses it", "marked")


def grid_table(axis: str, labels: Sequence[str], rows: Sequence[Sequence[Case]]) -> Table:
    """Cases at several settings: what each bug does there, and which test catches it.

    Args:
        axis: the settings' names and unit.
        labels: of each row.
        rows: of each label, the case of every bug.
    """
    numbers = [Column(name, "right") for name in ("ratio, fix off", "ratio, fix on", "frames MSE, fix off")]
    cells: list[list[str | Cell]] = [
        [
            label,
            case.bug,
            case.off.first_divergence or "none",
            ratio_text(case.off),
            ratio_text(case.on),
            f"{case.off.frames_mse:.1e}",
            "" if case.off.verdict == "parity" else caught(not case.off.passes_mse_bar),
        ]
        for label, row in zip(labels, rows, strict=True)
        for case in row
    ]
    return Table([axis, "bug", "first above 4", *numbers, "MSE < 1e-3"], cells)


def catalogue_table(rows: Sequence[CatalogueRow]) -> Table:
    """Which of two tests catches which bug, the usual threshold on the frames or the noise ratio.

    Args:
        rows: of ``parity.diagnose.catalogue``.
    """
    numbers = [Column(name, "right") for name in ("noise ratio", "frames MSE")]
    cells: list[list[str | Cell]] = [
        [
            row.bug,
            row.first_divergence or "none",
            f"{row.ratio:.3g}",
            f"{row.frames_mse:.1e}",
            caught(not row.passes_mse_bar),
            caught(row.ratio > THRESHOLD),
        ]
        for row in rows
    ]
    missed = sum(row.passes_mse_bar for row in rows), sum(row.ratio <= THRESHOLD for row in rows)
    caption = f"Of {len(rows)} bugs MSE < 1e-3 misses {missed[0]}, the noise ratio {missed[1]}."
    return Table(["bug", "first tensor above 4", *numbers, "MSE < 1e-3", "noise ratio <= 4"], cells, caption=caption)


def stage_table(comparison: Comparison) -> Table:
    """The stages that a port is usually judged by: the worst probe of each."""
    rows = []
    for stage, prefix in (
        ("image embedding", "image_embeddings"),
        ("image latents", "image_latents"),
        ("noise prediction, every step", "noise_pred."),
        ("frames", "frames"),
    ):
        probes = [p for p in comparison.probes if p.name.startswith(prefix)]
        worst = max(probes, key=lambda p: p.ratio)
        mse, largest = max(p.mse for p in probes), max(p.max_abs for p in probes)
        numbers = f"{worst.ratio:.2f}", f"{worst.floor:.1e}", f"{largest:.1e}", f"{mse:.1e}"
        rows.append((stage, str(len(probes)), *numbers))
    heads = ("tensors", "worst noise ratio", "its noise floor", "largest difference", "mean squared error")
    return Table(["stage", *(Column(name, "right") for name in heads)], rows)
