"""``docs/catalogue.md``: every bug that ``svdlab diagnose`` knows, and what the usual threshold says of each.

Run ``python docs/make_catalogue.py``: it measures each bug on the embedded checkpoint and writes the whole page.
"""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from svdlab.bench.timing import machine
from svdlab.parity.bugs import BUGS, DEPARTURES, Bug
from svdlab.parity.compare import MSE_BAR, THRESHOLD
from svdlab.parity.demo import SETTINGS
from svdlab.parity.diagnose import CatalogueRow, catalogue
from svdlab.parity.lab import Lab
from svdlab.tables import Column, Table

PAGE = Path(__file__).with_name("catalogue.md")
# What it takes to see those that do nothing at the settings of the page.
NEEDS = {
    "vae_not_upcast": "shows in float16 and bfloat16",
    "init_noise_unscaled": "shows at a low first sigma; at 700 both factors are the same to within rounding",
    "clips_repeated_after_guidance": "shows with `num_videos_per_prompt` of 2 or more",
    "head_counts": "shows where the last level but one has another number of heads than the level before it",
    "frames_truncated": "shows in the optional probe `frames_8bit`",
}
_SOURCES = {
    "diffusers": "https://github.com/huggingface/diffusers/blob/v{}/src/diffusers/",
    "transformers": "https://github.com/huggingface/transformers/blob/v{}/src/transformers/",
}


def place(bug: Bug) -> str:
    """A link to where the original does it right."""
    path, _, name = bug.diffusers.partition(":")
    library = "transformers" if path.startswith("../transformers/") else "diffusers"
    path = path.removeprefix("../transformers/")
    source = _SOURCES[library].format(importlib.metadata.version(library))
    return f"[`{path.rpartition('/')[2]}:{name}`]({source}{path})"


def bug_table() -> Table:
    """What every bug is: nothing here is measured."""
    rows = [(f"`{b.name}`", b.cause, f"`{b.stage}`", place(b), b.met) for b in BUGS.values()]
    return Table(["bug", "cause: what the port did", "stage", "right in", "met in"], rows)


def departure_table() -> Table:
    """What the original does, and what diffusers does instead."""
    rows = [(f"`{name}`", o.does, o.diffusers, f"`{o.source}`") for name, o in DEPARTURES.items()]
    return Table(["departure", "the original", "diffusers", "in generative-models at 0ad7de9"], rows)


def figure_table(rows: Sequence[CatalogueRow]) -> Table:
    """What was measured.

    Raises:
        ValueError: a bug that shows nothing and has no note, or has a note and shows.
    """
    silent = {row.bug for row in rows if row.first_divergence is None}
    if silent != set(NEEDS):
        raise ValueError(f"notes for {sorted(NEEDS)}, but what does nothing is {sorted(silent)}")
    cells = []
    for row in rows:
        if row.first_divergence is None:
            cells.append((f"`{row.bug}`", NEEDS[row.bug]))
            continue
        said = "passes" if row.passes_mse_bar else "fails"
        cells.append((f"`{row.bug}`", f"`{row.first_divergence}`", f"{row.ratio:.2g}", f"{row.frames_mse:.2e}", said))
    numbers = (Column(name, "right") for name in ("noise ratio", "frames MSE"))
    return Table(["bug", "first divergence", *numbers, "MSE < 1e-3"], cells)


def main() -> None:
    """Measure, and write the page."""
    lab = Lab(dtype=SETTINGS.dtype)
    settings = lab.settings(**SETTINGS.model_dump(exclude_none=True))
    rows = catalogue(lab.reference(settings), lab.truth(settings), lab.pipe, progress=True)
    shown = [row for row in rows if row.first_divergence is not None]
    missed = sum(row.passes_mse_bar for row in shown)
    on = ", ".join(f"{name} {value}" for name, value in machine("cpu").items())
    PAGE.write_text(
        f"""# The catalogue of bugs

`svdlab diagnose` names these bugs in a port's trace, `SVDPipeline.with_bugs` injects them, and the notebooks' sliders
show what they do. This page is generated: `python docs/make_catalogue.py`.

- [The bugs](#the-bugs)
- [What is no bug](#what-is-no-bug)
- [What the usual threshold says of each](#what-the-usual-threshold-says-of-each)

## The bugs

{len(BUGS)} bugs, in the catalogue's order, which is nearly the pipeline's. The stage is the first one whose result the
bug changes; "right in" is where diffusers, or transformers for CLIP, does it right; "met in" is a port, a report or a
document, where one is known. Many are met in several forms, such as another eps or another filter:
`svdlab/parity/bugs.py` has them all, and the diagnosis tries each.

{bug_table().to_markdown()}
## What is no bug

Stability AI's own code, with which the model was trained, does what {len(DEPARTURES)} of these entries say: there it is
diffusers that departs from the original. The diagnosis says so ("no bug, the original's choice"), and lists them apart
from the bugs. With `--reference stability` it takes the original's side, and `svdlab trace` and `svdlab parity` let
svdlab do as the original does, in all of these or, with `--departure NAME`, in some
([diagnosis.md](diagnosis.md#the-originals-choices)).

{departure_table().to_markdown()}
## What the usual threshold says of each

Each bug alone in svdlab, in its first form, against diffusers on the embedded checkpoint: {settings.num_frames} frames
of {settings.width}x{settings.height}, {settings.num_inference_steps} steps, seed {settings.seed}, {settings.dtype},
the other settings at their defaults. Measured on: {on}.

The noise ratio is the largest of any tensor: its distance from diffusers in float64, over diffusers' own; parity is at
most {THRESHOLD:g}. The first divergence is the first tensor above that. The usual threshold is a mean squared error of
the frames, in about [-1, 1], below {MSE_BAR:g}: **of the {len(shown)} bugs that show at these settings it misses
{missed}**. A clip of more frames or steps, or another checkpoint, gives other figures.

{figure_table(rows).to_markdown()}""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
