"""``svdlab import``: a port's own dump into a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from svdlab.cli.options import JSON
from svdlab.errors import SvdlabError
from svdlab.files import check_outputs, write_json, write_text


@click.command("import")
@click.argument("files", nargs=-1, required=True)
@click.option("--reference", metavar="TRACE", required=True, help="The trace that the port replayed: its settings.")
@click.option("--out", metavar="FILE", help="The trace to write, a safetensors file.")
@click.option("--map", "map_path", metavar="TOML", help="Which tensor is what: docs/importing.md.")
@click.option("--propose", metavar="TOML", help="Write the map that names, shapes and values suggest, and stop.")
@JSON
def import_(
    files: Sequence[str],
    reference: str,
    out: str | None,
    map_path: str | None,
    propose: str | None,
    json_path: str | None,
) -> None:
    """Turn FILES (.npy, .npz, .bin, .safetensors, or folders of them) into a trace.

    Without a map one is proposed from names, shapes and the reference's values; what is ambiguous is left out.
    """
    from svdlab.parity.foreign import Source, expand
    from svdlab.parity.importers import Map, import_trace
    from svdlab.parity.proposals import Proposal
    from svdlab.parity.proposals import propose as guess
    from svdlab.parity.trace import Trace

    if out is None and propose is None:
        raise SvdlabError("--out: is missing, allowed: the trace to write, or --propose and a map to write")
    if out is not None and propose is not None:
        raise SvdlabError("--propose: not together with --out, it stops at the map")
    if propose is not None and map_path is not None:
        raise SvdlabError("--propose: not together with --map, which is one")
    check_outputs(out, json_path, propose, inputs=[*files, reference, map_path])
    mapping = None if map_path is None else Map.open(map_path)
    origin = Trace.open(reference)
    found = Proposal()
    if mapping is None:
        found = guess([Source(path) for path in expand(files)], origin)
        mapping = found.map()
        for line in [*(f"guessed: {said}" for said in found.said), *found.left_out]:
            click.echo(line)
        click.echo(f"\n{found.mapping}")
    result: dict[str, Any] = {"map": map_path or propose, "guessed": found.said, "left_out": found.left_out}
    if propose is not None:
        write_text(propose, found.mapping)
        click.echo(f"{propose}: the proposed map")
        result["path"] = None
    elif out is not None:
        made = import_trace(files, origin, mapping, out)
        trace = made.trace
        click.echo(f"{out}: {len(trace.probes)} probes, {len(trace.taps)} taps, {trace.implementation} {trace.dtype}")
        for name, steps in made.absent.items():
            click.echo(f"  {name}: no tensor for step {', '.join(map(str, steps))}")
        for label in made.unused:
            click.echo(f"  not used: {label}")
        result |= {"path": out, "probes": list(trace.probes), "taps": list(trace.taps)}
        result |= {"unused": made.unused, "absent": made.absent}
    if json_path:
        write_json(json_path, result)
