"""``svdlab bench``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from svdlab.bench import CASES
from svdlab.cli.options import DEVICE, JSON, MODEL, PLOT, check_plot, settings_options
from svdlab.errors import SvdlabError
from svdlab.files import atomic_path, check_outputs, write_json
from svdlab.svd.settings import GenerationSettings


@click.command()
@click.option(
    "--case", "cases", type=click.Choice(CASES), multiple=True, help="Which; default: all that fit the device."
)
@click.option(
    "--pairs", type=click.IntRange(1), help="Timed runs of each implementation. [default: 3 on CPUs, else 10]"
)
@click.option("--compile", is_flag=True, help="Time both under torch.compile, too (of svdlab's decode nothing).")
@click.option(
    "--beside",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Beside N busy processes: what is left of the ratio on a machine that does other work, too.",
)
@click.option(
    "--profile", is_flag=True, help="Run each case anew and tell which operations take its time (of growth nothing)."
)
@click.option("--quick", is_flag=True, help="Tiny networks and sizes: tries the command in a minute, measures nothing.")
@PLOT
@MODEL
@DEVICE
@JSON
@settings_options
def bench(
    cases: Sequence[str],
    pairs: int | None,
    compile: bool,
    beside: int | None,
    profile: bool,
    quick: bool,
    plot_path: str | None,
    model: str,
    device: str,
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Time svdlab against diffusers, in turns in one process, and tell how far both are from the machine's limit.

    Each case has a process of its own. The networks are of full size with random weights; "generation" runs --model.
    Without --dtype: float32 and bfloat16 on CPUs, float16 on CUDA. "full-generation" runs by default on CUDA alone:
    14 frames of 1024x576 in 25 steps. On two quiet CPU cores expect half an hour and 16 GiB; height, width and number
    of frames change the sizes.
    """
    import torch
    from rich.console import Console

    from svdlab.bench.cases import Bench, Plan
    from svdlab.bench.tables import tables

    GenerationSettings(**given)
    check_outputs(json_path, plot_path)
    check_plot(plot_path)
    if given.get("decode_chunk_size") == "auto":
        raise SvdlabError("decode_chunk_size: got 'auto', allowed here: integer >= 1 (the same work on every machine)")
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise SvdlabError(f"--device: got {device!r}, allowed here: cpu, cuda")
    plan = Plan.quick() if quick else Plan.for_device(kind)
    times = pairs or plan.pairs
    runner = Bench(plan, model, device, pairs=times, compile=compile, profile=profile, given=given)
    dtypes = [given["dtype"]] if "dtype" in given else ["float16"] if kind == "cuda" else ["float32", "bfloat16"]
    found = {"quick": quick, **runner.run_all(cases or plan.cases, dtypes, quick, beside or 0)}
    console = Console()
    console.width = max(console.width, 150)
    for table in tables(found):
        console.print(table)
    if json_path:
        write_json(json_path, found)
    if plot_path:
        from svdlab.notebook.figures import plot_bench

        with atomic_path(plot_path) as temporary:
            plot_bench(found).savefig(temporary, dpi=144)
