"""``svdlab kernels``: which fast kernels this machine runs, and why not the others."""

from __future__ import annotations

import click

from svdlab.cli.options import DEVICE, JSON
from svdlab.files import check_outputs, write_json


@click.command()
@DEVICE
@JSON
def kernels(device: str, json_path: str | None) -> None:
    """Tell which fast kernels this machine runs in each dtype, and why not the others.

    Each is tried here on a few numbers and compared with the plain layer. SVDLAB_KERNELS_OFF=all, or names with commas
    between them, switches kernels off; the plain layers run instead.
    """
    import torch
    from rich.console import Console

    from svdlab.svd.kernels import table
    from svdlab.tables import Table

    check_outputs(json_path)
    rows = table(device)
    cells = [[row["name"], row["dtype"], "yes" if row["used"] else "no", row["why"]] for row in rows]
    # What oneDNN itself is held to by ONEDNN_MAX_CPU_ISA shows in the trials alone.
    instruction_set = torch.backends.cpu.get_cpu_capability()
    Console().print(
        Table(("kernel", "dtype", "used", "why"), cells, f"torch's instruction set here: {instruction_set}")
    )
    if json_path:
        write_json(json_path, {"device": device, "instruction_set": instruction_set, "kernels": rows})
