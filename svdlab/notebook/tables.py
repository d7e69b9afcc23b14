"""The numbers of a case, as notebooks print them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from svdlab.parity.compare import THRESHOLD
from svdlab.tables import Cell, Column, Table

if TYPE_CHECKING:
    from IPython.display import Markdown

    from svdlab.parity.compare import Comparison
    from svdlab.parity.diagnose import CatalogueRow
    from svdlab.parity.lab import Case, Choice


def ratio_text(comparison: Comparison) -> str:
    """The worst noise ratio, as tables and widgets show it: 1.30, 2.4e+04."""
    ratio = comparison.worst.ratio
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.1e}"


def number_html(case: Case, which: Choice) -> str:
    """The verdict's number, and what it means: HTML.

    Args:
        case: of ``Lab.case``.
        which: svdlab with the fix, with the bug injected, or with the reader's functions.
    """
    of = case.comparison(which)
    name = {"on": "Fix on", "off": f"Fix off ({case.bug})", "own": "Your code"}[which]
    mse = f"Frames MSE {of.frames_mse:.1e}: {'below' if of.passes_mse_bar else 'above'} the usual threshold of 1e-3."
    if not case.measured:
        return (
            f"<div>{escape(name)}</div><div><b>noise ratio not known yet</b></div>"
            f"<p>It takes diffusers in float64 to say what is rounding. {mse}</p>"
        )
    first = f" First above {of.threshold:g}: {of.first_divergence}." if of.first_divergence else ""
    meaning = (
        f"At {of.worst.name}, where it is worst, svdlab is {ratio_text(of)} times as far from diffusers in float64 as "
        f"diffusers in {of.dtype} is; up to {of.threshold:g} is rounding.{first}"
    )
    return (
        f'<div>{escape(name)}</div><div><b>noise ratio <output style="font-size:1.6em">{ratio_text(of)}</output>, '
        f"{of.verdict}</b></div><p>{escape(meaning)} {mse}</p>"
    )


def where_it_shows(*cases: Case) -> Markdown:
    """Where each bug leaves the noise, and which tensors behind that are within it all the same.

    Args:
        cases: of ``Lab.case``, one per bug.
    """
    from IPython.display import Markdown

    return Markdown("\n".join(f"- `{case.bug}`: {_propagation(case.off)}" for case in cases))


def _propagation(off: Comparison) -> str:
    if off.first_divergence is None:
        return f"no tensor is above {off.threshold:g} at these settings"
    names = [p.name for p in off.probes]
    after = off.probes[names.index(off.first_divergence) + 1 :]
    text = f"the first tensor above {off.threshold:g} is `{off.first_divergence}`"
    if not after:
        return f"{text}, which is the last one"
    within = [f"`{p.name}`" for p in after if p.ratio <= off.threshold]
    text = f"{text}; of the {len(after)} behind it {len(after) - len(within)} are above {off.threshold:g} as well"
    return text + (f", and these are not: {', '.join(within)}" if within else "")


def fix_row(case: Case, seen: Sequence[Case]) -> dict[str, Any]:
    """A fix as ``report.record`` takes it: what its bug does at the tensor at which it shows, with and without it.

    Args:
        case: at the first settings.
        seen: the same bug at all settings that were computed.
    """
    at = case.off.first_divergence
    shows = [c.off for c in seen if c.off.verdict != "parity"]
    return {
        "bug": case.bug,
        "ratio_on": case.on[at].ratio if at else case.on.worst.ratio,
        "ratio_off": case.off[at].ratio if at else case.off.worst.ratio,
        "first_divergence": at,
        "frames_mse": case.off.frames_mse,
        "shown_at": len(shows),
        "missed_at": sum(bool(off.passes_mse_bar) for off in shows),
    }


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
