"""``svdlab ranges``: how far a trace's tensors are from the limits of narrow dtypes."""

from __future__ import annotations

import click

from svdlab.cli.options import JSON
from svdlab.files import check_outputs, write_json


@click.command()
@click.argument("trace")
@click.option("--every", is_flag=True, help="Print every tensor of a long trace.")
@JSON
def ranges(trace: str, every: bool, json_path: str | None) -> None:
    """Tell where float16, bfloat16 or float8 would overflow.

    For every probe and tap of TRACE: the largest magnitude, and by which factor each dtype's limit is above it.
    Record taps to see inside the networks.
    """
    from rich.console import Console

    from svdlab.parity.ranges import ranges as measure
    from svdlab.parity.trace import Trace

    check_outputs(json_path, inputs=[trace])
    found = measure(Trace.open(trace), progress=True)
    Console().print(found.table(every))
    if json_path:
        write_json(json_path, found.to_dict())
