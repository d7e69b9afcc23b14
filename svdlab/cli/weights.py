"""``svdlab weights``: which weights a port loaded wrong."""

from __future__ import annotations

import sys

import click

from svdlab.cli.options import JSON
from svdlab.errors import SvdlabError
from svdlab.files import check_outputs, write_json


@click.command()
@click.argument("checkpoint")
@click.option("--check", metavar="DUMP", help="A port's weights in .safetensors, or checksums of them in .json.")
@click.option("--out", metavar="FILE", help="Write the checkpoint's own checksums, which a port can check itself by.")
@JSON
def weights(checkpoint: str, check: str | None, out: str | None, json_path: str | None) -> None:
    """Compare the weights that a port has loaded with CHECKPOINT, key by key.

    CHECKPOINT is a folder, a single file, a name on the hub, or "embedded". A checksum is sha256 of the values as
    float32, little-endian, in row-major order.
    """
    from rich.console import Console

    from svdlab.parity.weights import check_weights, checkpoint_weights, checksum
    from svdlab.svd.checkpoint import checkpoint_path

    if (check is None) == (out is None):
        raise SvdlabError("--check and --out: got both or none, allowed: one of them")
    check_outputs(json_path, out, inputs=[checkpoint, check])
    path = checkpoint_path(checkpoint)
    if out is not None:
        sums = {key: checksum(tensor) for key, tensor in checkpoint_weights(path)}
        write_json(out, sums)
        click.echo(f"{out}: {len(sums)} checksums")
        return
    assert check is not None
    report = check_weights(path, check, progress=True)
    if report.bad:
        Console().print(report.table())
    else:
        click.echo(report.summary())
    if json_path:
        write_json(json_path, report.to_dict())
    sys.exit(1 if report.bad else 0)
