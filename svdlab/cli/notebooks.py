"""``svdlab notebooks``: copies of the notebooks, to work with."""

from __future__ import annotations

import click

from svdlab.files import check_new_folder, write_folder


@click.command()
@click.argument("folder", metavar="DIR")
def notebooks(folder: str) -> None:
    """Copy svdlab's notebooks into a new folder, DIR; then: jupyter lab DIR."""
    from svdlab.report.shipped import shipped_notebooks

    check_new_folder(folder)
    copies = {path.name: path.read_bytes() for path in shipped_notebooks()}
    write_folder(folder, copies)
    click.echo(f"{len(copies)} notebooks: jupyter lab {folder}")
