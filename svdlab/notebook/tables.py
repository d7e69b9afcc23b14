"""The numbers of a case, as notebooks print them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from svdlab.parity.bugs import BUGS, DEPARTURES
from svdlab.parity.compare import THRESHOLD
from svdlab.tables import Cell, Column, Style, Table

if TYPE_CHECKING:
    from IPython.display import Markdown

    from svdlab.parity.compare import Comparison
    from svdlab.parity.diagnose import CatalogueRow, Diagnosis
    from svdlab.parity.lab import Case, Choice

# The notebook about a bug, where there is one.
NOTEBOOK_OF = {
    "fps_not_decremented": "01_fps_conditioning",
    **dict.fromkeys(["timestep_unscaled", "timestep_negated"], "02_timestep_scaling"),
    **dict.fromkeys(["noise_aug_after_encode", "noise_aug_missing"], "03_noise_augmentation"),
    **dict.fromkeys(["guidance_per_step", "guidance_constant"], "04_per_frame_guidance"),
    "decode_chunked": "05_decode_chunking",
    "guidance_swapped": "06_cfg_batching",
}


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


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Every stage as it was judged: its bugs, and what they leave unexplained, with the taps to write next."""
    rows: list[list[str | Cell]] = []
    for stage in diagnosis.stages:
        style: Style = {"right": "good", "wrong": "bad"}.get(stage.status, "")  # type: ignore[assignment]
        left = []
        if stage.status == "wrong" and not stage.explained:
            left += [f"wrong module: {stage.modules[0]}"] if stage.modules else []
            left += [f"{stage.related} is {stage.relation.text}"] if stage.relation else []
            left += [f"write these taps next: {', '.join(stage.next_taps)}"] if stage.next_taps else []
        rows.append(
            [
                stage.stage,
                Cell(stage.status.replace("_", " "), style),
                "" if stage.ratio is None else f"{stage.ratio:.3g}",
                " or ".join(" + ".join(names) for names in stage.bugs),
                "; ".join(left),
            ]
        )
    return Table(["stage", "status", Column("noise ratio", "right"), "bugs", "unexplained"], rows)


def verdict_html(diagnosis: Diagnosis, suffix: str = ".html") -> str:
    """A diagnosis's verdict in large print, and every bug with its cause and the notebook about it: HTML.

    Args:
        diagnosis: of ``parity.diagnose``.
        suffix: of the notebooks that it links to: ".html" between a report's pages, ".ipynb" where they can be opened.
    """
    colour = "#009e73" if diagnosis.verdict == "parity" else "#d55e00"
    look = f"font-size:1.7em;font-weight:600;line-height:1.25;border-left:.3em solid {colour};padding-left:.5em"
    sets = [e.bugs for e in diagnosis.explanations] if len(diagnosis.explanations) > 1 else [tuple(diagnosis.named)]
    lists = "<p>or</p>".join(f"<ul>{''.join(_bug_html(name, suffix) for name in names)}</ul>" for names in sets)
    return f"<p style='{look}'>{escape(_headline(diagnosis))}</p>{lists}<p>{escape(diagnosis.coverage)}</p>"


def _headline(diagnosis: Diagnosis) -> str:
    left = _counted(sum(not stage.explained for stage in diagnosis.wrong), "wrong stage")
    bugs = len(diagnosis.named) - len(diagnosis.departures)
    found = [_counted(bugs, "bug")] if bugs else []
    found += [_counted(len(diagnosis.departures), "choice") + " of the original's"] if diagnosis.departures else []
    named = " and ".join(found)
    if diagnosis.verdict == "parity":
        every = all(stage.status == "right" for stage in diagnosis.stages)
        return "At parity: nothing is wrong" if every else "Nothing is wrong in the stages that could be judged"
    if diagnosis.verdict == "explained":
        if len(diagnosis.explanations) > 1:
            return (
                f"{len(diagnosis.explanations)} sets of bugs explain all of it, and this trace cannot tell them apart"
            )
        return f"{named} explain{'s' * (len(diagnosis.named) == 1)} all that is wrong"
    if not diagnosis.wrong:
        return "Every stage is right, and the whole is not: it ran on other inputs"
    if diagnosis.verdict == "partly":
        return f"{named} named, {left} not explained"
    return f"{left}, and no known bug explains what is wrong"


def _bug_html(name: str, suffix: str) -> str:
    notebooks = [NOTEBOOK_OF[name]] if name in NOTEBOOK_OF else []
    notebooks += ["10_where_diffusers_departs"] if name in DEPARTURES else []
    links = "".join(f" <a href='{notebook}{suffix}'>{notebook}</a>" for notebook in notebooks)
    return f"<li><b>{escape(name)}</b>: {escape(BUGS[name].said)}{links}</li>"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


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
