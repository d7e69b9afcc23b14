"""``svdlab frontier``."""

from __future__ import annotations

import click

from svdlab.cli.options import DEVICE, JSON, MODEL, PLOT, check_plot
from svdlab.files import atomic_path, check_outputs, write_json


@click.command()
@click.option("--images", default=4, show_default=True, type=click.IntRange(1, 1000), help="Held-out first frames.")
@click.option("--pairs", default=3, show_default=True, type=click.IntRange(1, 1000), help="Timed runs of each variant.")
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1, 100), help="Of the exact clip.")
@click.option(
    "--small-decoder", metavar="MODEL", help="An AutoencoderTiny, such as madebyollin/taesd; default: the model's own."
)
@PLOT
@MODEL
@DEVICE
@JSON
def frontier(
    images: int,
    pairs: int,
    steps: int,
    small_decoder: str | None,
    plot_path: str | None,
    model: str,
    device: str,
    json_path: str | None,
) -> None:
    """Tell what speed costs: seconds of a clip against its noise ratio, for every approximation there is.

    Fewer steps, another schedule or solver, guidance in an interval of sigmas, deep features that serve two steps,
    a small decoder, narrower dtypes: each beside the exact clip, and beside the converged solution of the ODE.
    """
    check_outputs(json_path, plot_path, inputs=[model, small_decoder])
    check_plot(plot_path)
    from rich.console import Console

    from svdlab.bench.frontier import frontier as measure
    from svdlab.bench.frontier import frontier_table, to_json

    settings = {"num_inference_steps": steps}
    rows = measure(model, images=images, pairs=pairs, settings=settings, decoder=small_decoder, device=device)
    console = Console()
    console.width = max(console.width, 130)
    console.print(frontier_table(rows))
    if not any(row.name == "small decoder" for row in rows):
        click.echo("Without a small decoder: the model has none of its own; --small-decoder takes one.")
    if json_path:
        write_json(json_path, to_json(rows, device, images))
    if plot_path:
        from svdlab.notebook.figures import plot_frontier

        with atomic_path(plot_path) as temporary:
            plot_frontier(rows).savefig(temporary, dpi=144)
