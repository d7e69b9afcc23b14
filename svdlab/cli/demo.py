"""``svdlab demo``: a port with six bugs, diagnosed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from svdlab.cli.options import JSON
from svdlab.files import check_outputs, write_json


@click.command()
@click.option("--keep", metavar="DIR", help="Keep the traces of reference, truth and port in this folder.")
@JSON
def demo(keep: str | None, json_path: str | None) -> None:
    """Diagnose a port that has six bugs at once.

    svdlab plays the port, with the embedded checkpoint and a small clip. First what the usual threshold on the frames,
    MSE < 1e-3, says of each bug and of all; then what the diagnosis says. Exit code 1: it found bugs.
    """
    check_outputs(json_path, folders=[keep])
    from rich.console import Console

    from svdlab.parity.demo import demo as run_demo

    found = run_demo(folder=keep, progress=True)
    Console().print(found.table())
    click.echo(f"\n{found.summary()}")
    if keep:
        reference, port, truth = (Path(keep) / f"{name}.safetensors" for name in ("reference", "port", "truth"))
        click.echo(f"the same again: svdlab diagnose {reference} {port} --truth {truth}")
    if json_path:
        write_json(json_path, found.to_dict())
    sys.exit(0 if found.diagnosis.verdict == "parity" else 1)
