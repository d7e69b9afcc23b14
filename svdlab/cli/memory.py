"""``svdlab memory``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from svdlab.cli.options import JSON, check_device, settings_options
from svdlab.errors import SvdlabError
from svdlab.files import check_outputs, write_json
from svdlab.svd.architectures import ARCHITECTURES
from svdlab.svd.settings import GIB, RESERVE_GIB, GenerationSettings
from svdlab.tables import Column, Table

if TYPE_CHECKING:
    from svdlab.svd.memory import Footprint, Option, Simulation


@click.command()
@click.option(
    "--model",
    default="svd-xt",
    show_default=True,
    help=f"Whose architecture: {', '.join(ARCHITECTURES)}, embedded, a folder, a single file, or a name on the hub.",
)
@click.option("--device", default="cuda", show_default=True, help="Where it would run; it need not be here.")
@click.option(
    "--budget-gib",
    type=click.FloatRange(0, min_open=True),
    help="Say what fits a device with this much memory.",
)
@click.option(
    "--reserve-gib",
    default=RESERVE_GIB,
    show_default=True,
    type=click.FloatRange(0, 1e6),
    help="Of the budget, what no simulation counts: a CUDA context and kernels' workspaces.",
)
@JSON
@settings_options
def memory(
    model: str,
    device: str,
    budget_gib: float | None,
    reserve_gib: float,
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Tell the peak memory of every stage of a generation, without weights and without a GPU.

    With a budget: which ways to run it fit, each with its largest decode chunk, and exit code 1 when none does.
    """
    from rich.console import Console

    from svdlab.svd.checkpoint import load_configs, resolve_size
    from svdlab.svd.memory import simulate
    from svdlab.svd.workloads import WORKLOADS

    settings = GenerationSettings(**given)
    if budget_gib is not None and not reserve_gib < budget_gib:
        raise SvdlabError(f"--reserve-gib: got {reserve_gib:g}, allowed: less than --budget-gib, {budget_gib:g}")
    check_outputs(json_path)
    check_device(device, here=False)
    configs = load_configs(model)
    settings = resolve_size(settings, configs.unet, configs.vae)
    simulation = simulate(configs, settings, device)
    chunk = settings.decode_chunk_size if isinstance(settings.decode_chunk_size, int) else None
    footprints = [simulation.footprint(name, chunk) for name in WORKLOADS]

    console = Console()
    size = f"{settings.num_frames} frames of {settings.width}x{settings.height}, {settings.dtype}"
    console.print(_footprints_table(f"{model}: {size}; GiB", simulation, footprints))
    result: dict[str, Any] = {
        "model": model,
        "device": device,
        "settings": settings.model_dump(),
        "weights_gib": {name: size / GIB for name, size in simulation.weights.items()},
        "stages": [
            {
                "name": f.name,
                "decode_chunk_size": f.chunk,
                "weights_gib": f.weights / GIB,
                "activations_gib": f.activations / GIB,
                "peak_gib": f.peak / GIB,
                "peak_beside_all_weights_gib": simulation.peak(f, offload=False) / GIB,
            }
            for f in footprints
        ],
    }
    best = None
    if budget_gib is not None:
        options = simulation.options((budget_gib - reserve_gib) * GIB)
        best = next((o for o in options if o.fits), None)
        console.print(_options_table(f"within {budget_gib:g} GiB, {reserve_gib:g} of them reserved", options))
        if best:
            offload = ", component offload" if best.offload else ""
            click.echo(
                f"fits: {best.cfg} guidance{offload}, {best.decode} decode in chunks of {best.decode_chunk_size}: "
                f"{best.peak / GIB:.2f} GiB and {reserve_gib:g} reserved of {budget_gib:g}, weights included"
            )
        else:
            least = min(o.peak for o in options)
            click.echo(
                f"nothing fits {budget_gib:g} GiB: the least is {least / GIB:.2f} GiB and {reserve_gib:g} reserved"
            )
        result |= {
            "budget_gib": budget_gib,
            "reserve_gib": reserve_gib,
            "fits": best is not None,
            "decode_chunk_size": best and best.decode_chunk_size,
            "best": best and _option_dict(best),
            "options": [_option_dict(o) for o in options],
        }
    if json_path:
        write_json(json_path, result)
    sys.exit(1 if budget_gib is not None and best is None else 0)


def _footprints_table(title: str, simulation: Simulation, footprints: Sequence[Footprint]) -> Table:
    numbers = ("chunk", "weights", "activations", "peak", "beside all weights")
    rows = []
    for f in footprints:
        sizes = (f.weights, f.activations, f.peak, simulation.peak(f, offload=False))
        rows.append([f.name, str(f.chunk or ""), *(f"{size / GIB:.2f}" for size in sizes)])
    return Table([Column("stage"), *(Column(name, "right") for name in numbers)], rows, title)


def _options_table(title: str, options: Sequence[Option]) -> Table:
    texts, numbers = ("guidance", "offload", "decode"), ("largest chunk", "peak GiB", "fits")
    rows = []
    for o in options:
        cells = (o.cfg, "yes" if o.offload else "no", o.decode, str(o.decode_chunk_size or "none"))
        rows.append([*cells, f"{o.peak / GIB:.2f}", "yes" if o.fits else "no"])
    return Table([*map(Column, texts), *(Column(name, "right") for name in numbers)], rows, title)


def _option_dict(option: Option) -> dict[str, Any]:
    fields = asdict(option)
    return {**fields, "peak_gib": fields.pop("peak") / GIB}
