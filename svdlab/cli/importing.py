"""``svdlab import``: a port's own dump into a trace."""

from __future__ import annotations

from collections.abc import Sequence

import click

from svdlab.cli.options import JSON
from svdlab.errors import SvdlabError
from svdlab.files import check_folder, write_json


@click.command("import")
@click.argument("files", nargs=-1, required=True)
@click.option("--reference", metavar="TRACE", required=True, help="The trace that the port replayed: its settings.")
@click.option("--out", metavar="FILE", help="The trace to write, a safetensors file.")
@click.option("--map", "map_path", metavar="TOML", help="Which tensor is what: docs/importing.md.")
@JSON
def import_(files: Sequence[str], reference: str, out: str | None, map_path: str | None, json_path: str | None) -> None:
    """Turn FILES (.npy, .npz, .bin, .safetensors, or folders of them) into a trace."""
    from svdlab.parity.importers import Map, import_trace
    from svdlab.parity.trace import Trace

    for path in (out, json_path):
        check_folder(path)
    if out is None:
        raise SvdlabError("--out: is missing, allowed: the trace to write")
    if map_path is None:
        raise SvdlabError("--map: is missing, allowed: a TOML file")
    mapping = Map.open(map_path)
    made = import_trace(files, Trace.open(reference), mapping, out)
    trace = made.trace
    click.echo(f"{out}: {len(trace.probes)} probes, {len(trace.taps)} taps, {trace.implementation} {trace.dtype}")
    for name, steps in made.absent.items():
        click.echo(f"  {name}: no tensor for step {', '.join(map(str, steps))}")
    for label in made.unused:
        click.echo(f"  not used: {label}")
    if json_path:
        result = {"path": out, "probes": list(trace.probes), "taps": list(trace.taps), "map": map_path}
        write_json(json_path, {**result, "unused": made.unused, "absent": made.absent})
