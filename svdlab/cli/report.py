"""``svdlab report``: every notebook into HTML pages with an index."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from svdlab.cli.options import DEVICE, JSON, MODEL, settings_options
from svdlab.errors import SvdlabError, short
from svdlab.files import check_outputs, write_json
from svdlab.reading import parse
from svdlab.report.provenance import made_with
from svdlab.report.results import changes, read_previous
from svdlab.report.run import notebooks_at_a_time, parameters_of, run_report
from svdlab.report.shipped import shipped_notebooks
from svdlab.svd.settings import GenerationSettings


@click.command()
@click.option("--out", default="reports", show_default=True, metavar="DIR", help="Where the pages go.")
@click.option(
    "--notebooks",
    "chosen",
    multiple=True,
    metavar="PATH",
    help="A folder of notebooks, or one notebook; repeatable. Default: svdlab's own.",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Notebooks that run at once; default: 2 where the memory allows."
)
@click.option(
    "--timeout", default=1800.0, show_default=True, type=click.FloatRange(1, 1e6), help="Seconds per notebook."
)
@click.option("--previous", metavar="DIR", help="An earlier report: show what changed, exit 1 on a regression.")
@click.option("-p", "--parameter", nargs=2, multiple=True, metavar="NAME VALUE", help="Any other papermill parameter.")
@MODEL
@DEVICE
@JSON
@settings_options
def report(
    out: str,
    chosen: Sequence[str],
    workers: int | None,
    timeout: float,
    previous: str | None,
    parameter: Sequence[tuple[str, str]],
    model: str,
    device: str,
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Run every notebook into HTML pages with an index.

    Each notebook takes the settings that its parameters cell names.
    """
    check_outputs(json_path, folders=[out], inputs=[previous] if previous != out else [])
    if math.isnan(timeout):
        raise SvdlabError("--timeout: got nan, allowed: 1 to 1000000 seconds")
    sources = [Path(path) for path in chosen] or shipped_notebooks()
    notebooks = [p for source in sources for p in (sorted(source.glob("*.ipynb")) if source.is_dir() else [source])]
    for path in notebooks:
        if path.suffix != ".ipynb" or not path.is_file():
            raise SvdlabError(f"--notebooks: {path} is none, allowed: a folder or an *.ipynb")
    if not notebooks:
        raise SvdlabError(f"--notebooks: {sources[0]} holds no *.ipynb")
    if repeated := {p.stem for p in notebooks if sum(q.stem == p.stem for q in notebooks) > 1}:
        raise SvdlabError(f"--notebooks: {min(repeated)} is given twice, allowed: names that differ")
    if parameter and (unknown := sorted({name for name, _ in parameter} - (known := parameters_of(notebooks)))):
        raise SvdlabError(f"-p {short(unknown[0])}: no notebook has it, allowed: {', '.join(sorted(known)) or 'none'}")
    GenerationSettings(**given)  # refused here rather than in every notebook
    parameters = {"model": model, "device": device, **given, **{name: _value(text) for name, text in parameter}}
    before = read_previous(previous) if previous else None
    by = made_with(sys.argv[1:], model, device)
    workers = workers or notebooks_at_a_time(model, device)
    results = run_report(notebooks, Path(out), parameters, workers, timeout, before, by)
    for r in results:
        click.echo(f"{r.status:7} {r.seconds:5.0f} s  {r.name}  {r.error}")
        for v in r.verdicts:
            click.echo(f"        {'yes' if v['passed'] else 'NO '}  {v['name']}")
    changed = changes(results, before) if before else []
    for change in changed:
        word = "REGRESSION" if change.regression else "changed"
        click.echo(f"{word}: {change.notebook}: {change.verdict}: was {change.was}, is {change.now}")
    click.echo(f"{Path(out) / 'index.html'}")
    if json_path:
        write_json(json_path, {"notebooks": [r.to_dict() for r in results], "changes": [asdict(c) for c in changed]})
    good = all(r.status == "passed" for r in results) and not any(c.regression for c in changed)
    sys.exit(0 if good else 1)


def _value(text: str) -> Any:
    """A parameter's value: JSON where it is JSON (numbers, true, null), else the text."""
    try:
        return parse(text, "-p")
    except SvdlabError:
        return text
