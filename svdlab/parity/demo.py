"""A port with six bugs at once, diagnosed: ``svdlab demo``.

svdlab itself plays the port, on the embedded checkpoint. Each bug is in another stage, and the first five are such that
the usual threshold on the frames, MSE < 1e-3, sees neither one of them nor all five together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdlab.parity.bugs import BUGS
from svdlab.parity.candidate import capture
from svdlab.parity.compare import compare
from svdlab.parity.diagnose import CatalogueRow, Diagnosis, diagnose, row_of
from svdlab.parity.lab import Lab
from svdlab.parity.trace import Trace
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.tables import Cell, Column, Table

# The threshold misses these, alone and together, at ``SETTINGS``.
MISSED = (
    "frame_resize_bicubic",
    "clip_no_antialias",
    "quick_gelu",
    "noise_aug_after_encode",
    "transformer_alpha_swapped",
)
SIX = (*MISSED, "time_ids_reordered")
SETTINGS = GenerationSettings(height=64, width=64, num_frames=4, num_inference_steps=3, seed=5)


@dataclass(frozen=True)
class Demo:
    """What the usual threshold and ``diagnose`` say of one port.

    Attributes:
        alone: each of its bugs alone in svdlab.
        missed: those together that the threshold misses alone, their names joined by " + "; None for fewer than two.
        port: all of them together.
        diagnosis: of the port's trace.
    """

    alone: list[CatalogueRow]
    missed: CatalogueRow | None
    port: CatalogueRow
    diagnosis: Diagnosis

    @property
    def named(self) -> list[str]:
        """The port's bugs that the diagnosis names."""
        return [row.bug for row in self.alone if row.bug in self.diagnosis.named]

    def table(self) -> Table:
        """What the usual threshold says of each bug, and of all together."""
        return threshold_table(self.alone, self.missed, self.port)

    def summary(self) -> str:
        """The diagnosis, and how many of the port's bugs it names."""
        others = [name for name in self.diagnosis.named if name not in self.named]
        text = f"{len(self.named)} of the port's {len(self.alone)} bugs named"
        if others:
            text += f", and not in it: {', '.join(others)}"
        return f"{self.diagnosis.summary()}\n{text}"

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as ``svdlab diagnose --json`` writes it, and under "port" what was injected."""
        return {**self.diagnosis.to_dict(), "port": {**_row_dict(self.port), "alone": [*map(_row_dict, self.alone)]}}


def play(pipe: SVDPipeline, reference: Trace, truth: Trace, *bugs: str) -> tuple[Trace, CatalogueRow]:
    """A port with bugs, played by svdlab: its trace, and what the usual threshold and the noise ratio say of it.

    Args:
        pipe: svdlab with the weights of the reference.
        reference: diffusers' trace with its source image; ``truth`` the same in float64.
        bugs: names of ``bugs.BUGS``; none: svdlab as it is. The row's ``bug`` has " + " between them.

    Raises:
        SvdlabError: bugs that are not known or exclude each other.
    """
    trace = capture(pipe.with_bugs(*bugs), replay=reference, preprocess=True)
    return trace, row_of(" + ".join(bugs), compare(reference, trace, truth))


def play_each(
    pipe: SVDPipeline, reference: Trace, truth: Trace, *bugs: str
) -> tuple[list[CatalogueRow], CatalogueRow | None]:
    """Every bug alone, and together those that the usual threshold misses alone, None for fewer than two: ``play``."""
    alone = [play(pipe, reference, truth, name)[1] for name in bugs]
    passing = [row.bug for row in alone if row.passes_mse_bar]
    return alone, play(pipe, reference, truth, *passing)[1] if len(passing) > 1 else None


def threshold_table(alone: Sequence[CatalogueRow], missed: CatalogueRow | None, port: CatalogueRow) -> Table:
    """What the usual threshold says of each bug alone, of those that it misses, and of all: see ``Demo``."""
    passing = sum(row.passes_mse_bar for row in alone)
    rows = [(row.bug, BUGS[row.bug].stage, row) for row in alone]
    rows += [(f"the {passing} that pass", "together", missed)] if missed else []
    rows.append((f"all {len(alone)}", "together", port))
    return Table(
        ["bug", "stage", Column("frames MSE", "right"), "MSE < 1e-3"],
        [(name, stage, f"{row.frames_mse:.1e}", _said(row)) for name, stage, row in rows],
        "A port, played by svdlab, against diffusers: what the usual threshold on the frames says",
    )


def demo(
    bugs: Sequence[str] = SIX,
    settings: GenerationSettings = SETTINGS,
    folder: str | os.PathLike[str] | None = None,
    *,
    progress: bool = False,
) -> Demo:
    """Inject bugs into svdlab with the embedded checkpoint, and diagnose what it gives against diffusers.

    Args:
        bugs: names of ``bugs.BUGS``, no two of which exclude each other.
        settings: which generation.
        folder: keep ``reference``, ``truth`` and ``port.safetensors`` here; made if it does not exist.
        progress: show a bar over the diagnosis's replays.

    Raises:
        SvdlabError: bugs that are not known or exclude each other, a folder that cannot be written.
    """
    lab = Lab(dtype=settings.dtype)
    settings = lab.pipe.resolve(settings)
    reference, truth = lab.reference(settings), lab.truth(settings)

    trace, whole = play(lab.pipe, reference, truth, *bugs)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, made in (("reference", reference), ("truth", truth), ("port", trace)):
            made.save(Path(folder) / f"{name}.safetensors")
    alone, missed = play_each(lab.pipe, reference, truth, *bugs)
    return Demo(alone, missed, whole, diagnose(reference, trace, truth, pipe=lab.pipe, progress=progress))


def _said(row: CatalogueRow) -> Cell:
    return Cell("passes", "bad") if row.passes_mse_bar else Cell("fails", "good")


def _row_dict(row: CatalogueRow) -> dict[str, Any]:
    return {
        "bugs": row.bug.split(" + "),
        "first_divergence": row.first_divergence,
        "ratio": row.ratio,
        "mse": row.frames_mse,
        "passes_mse_bar": row.passes_mse_bar,
    }
