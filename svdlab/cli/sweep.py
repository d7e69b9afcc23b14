"""``svdlab sweep`` and ``svdlab sweep-compare``.

Exit code 0: every point is there, no clip changed. 1: a point failed, a clip changed. 2: bad input, or a sweep that was
halted. 130: interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from svdlab.cli.options import ANY_DEVICE, FORCE, IMAGE, JSON, MODEL, check_device, settings_options
from svdlab.errors import SvdlabError
from svdlab.files import check_outputs, write_json
from svdlab.samples import read_image
from svdlab.svd.settings import GenerationSettings

if TYPE_CHECKING:
    from svdlab.sweep.folder import Sweep
    from svdlab.sweep.run import Backend, OnProgress, Progress


@click.command()
@click.option(
    "--out", metavar="DIR", help="Where the sweep goes; points that are there already are not computed again."
)
@click.option(
    "--grid",
    "axes",
    multiple=True,
    metavar="NAME=VALUES",
    help="An axis: a setting, rules (injected bugs) or approximation (of svdlab frontier), and its values, such as "
    "fps=7,14,28 or seed=5-9 or fps=7:28:7 (from, to, step); repeatable, the last one varies fastest.",
)
@click.option(
    "--points", metavar="FILE", help="Instead of a grid: a JSON list of objects, each the settings of one point."
)
@click.option("--resume", metavar="DIR", help="Resume a sweep; what failed is tried again.")
@IMAGE
@click.option("--divergence", is_flag=True, help="Measure the distance from diffusers at each point, too.")
@click.option("--workers", type=click.IntRange(1), help="Processes on this machine; default: this one.")
@click.option("--scheduler", metavar="ADDRESS", help="A Dask scheduler: tcp://HOST:PORT, tls://HOST:PORT, or its file.")
@click.option("--tls-ca-file", metavar="PEM", help="With --scheduler tls://: who signs the cluster's certificates.")
@click.option("--tls-cert", metavar="PEM", help="With --scheduler tls://: this process's certificate.")
@click.option("--tls-key", metavar="PEM", help="With --scheduler tls://: its private key.")
@click.option("--threads", type=click.IntRange(1), help="Torch's, in each process; default: the cores, divided.")
@click.option(
    "--scaling", is_flag=True, help="Print points per minute with 1 worker and with --workers, at one thread each."
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@MODEL
@ANY_DEVICE
@FORCE
@JSON
@settings_options
def sweep(
    out: str | None,
    axes: Sequence[str],
    points: str | None,
    resume: str | None,
    image: str | None,
    divergence: bool,
    workers: int | None,
    scheduler: str | None,
    tls_ca_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    threads: int | None,
    scaling: bool,
    revision: str | None,
    model: str,
    device: str,
    force: bool,
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Generate a clip at every point of a grid, in a resumable folder."""
    from svdlab.sweep.plan import grid, make_points, parse_axis, remarks
    from svdlab.sweep.run import resume_sweep, run_sweep

    context = click.get_current_context()
    asked = [p for p in context.params if context.get_parameter_source(p) is click.core.ParameterSource.COMMANDLINE]
    check_outputs(json_path, folders=[out], inputs=[image, points])
    tls = (tls_ca_file, tls_cert, tls_key)
    if any(tls) and not all(tls):
        raise SvdlabError("--tls-ca-file, --tls-cert, --tls-key: allowed: all three, or none")
    if any(tls) and not scheduler:
        raise SvdlabError("--tls-ca-file: only with --scheduler; --workers makes certificates of its own")
    if workers and scheduler:
        raise SvdlabError("--workers: not together with --scheduler, which has its own")
    if workers and device.startswith("cuda"):
        raise SvdlabError("--workers: not together with --device cuda; one worker per GPU: docs/clusters.md")
    check_device(device, here=scheduler is None)
    if resume is not None:
        where = {"resume", "workers", "scheduler", "tls_ca_file", "tls_cert", "tls_key", "force", "json_path"}
        if others := [name for name in asked if name not in where]:
            option = next(p.opts[0] for p in context.command.params if p.name == others[0])
            raise SvdlabError(f"{option}: not together with --resume, which reads it from DIR")
        with _bar(resume) as on_progress, _backend(workers, scheduler, tls, threads) as backend:
            done = resume_sweep(resume, force=force, backend=backend, on_progress=on_progress)
        sys.exit(_report(done, json_path))
    if bool(axes) == bool(points):
        raise SvdlabError("sweep: give --grid NAME=VALUES, or --points FILE, or --resume DIR")
    if (out is None) is not scaling:
        raise SvdlabError("sweep: give --out DIR, or --scaling, which keeps nothing")
    named = [parse_axis(text) for text in axes]
    if len(dict(named)) < len(named):
        raise SvdlabError(f"--grid: {', '.join(name for name, _ in named)}: an axis twice, allowed: once each")
    changes = _read_points(points) if points else grid(dict(named))
    settings = GenerationSettings(**given)
    make_points(settings, changes)  # refused before any worker starts
    options: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "device": device,
        "image": read_image(image) if image else None,
        "divergence": divergence,
        "force": force,
    }
    if scaling:
        from svdlab.sweep.scaling import measure_scaling

        measured = measure_scaling(changes, settings, workers or 2, options)
        for row in measured:
            click.echo(str(row))
        if json_path:
            write_json(json_path, {"cases": [asdict(row) for row in measured]})
        return
    assert out is not None
    with _bar(out, remarks(dict(named))) as on_progress, _backend(workers, scheduler, tls, threads) as backend:
        done = run_sweep(out, changes, settings, threads=threads, backend=backend, on_progress=on_progress, **options)
    sys.exit(_report(done, json_path))


@contextmanager
def _backend(
    workers: int | None, scheduler: str | None, tls: tuple[str | None, ...], threads: int | None
) -> Iterator[Backend | None]:
    if scheduler:
        from svdlab.sweep.cluster import remote_cluster

        with remote_cluster(scheduler, *tls) as cluster:
            if not cluster.name.startswith("tls://"):
                warning = f"{cluster.name}: without TLS whoever reaches this port can run code as you: docs/clusters.md"
                click.echo(f"warning: {warning}", err=True)
            yield cluster
    elif workers:
        from svdlab.sweep.cluster import local_cluster

        with local_cluster(workers, threads) as cluster:
            yield cluster
    else:
        yield None


@contextmanager
def _bar(out: str, notes: Sequence[str] = ()) -> Iterator[OnProgress]:
    """A progress bar with points per minute and the time left; notes above it."""
    from tqdm import tqdm

    from svdlab.sweep.folder import Sweep

    bar = None

    def show(progress: Progress) -> None:
        nonlocal bar
        # Not before there is something to show: bad input is one line.
        if bar is None:
            for note in notes:
                click.echo(f"note: {note}", err=True)
            bar = tqdm(bar_format="{percentage:3.0f}%|{bar}| {desc}", total=1.0)
        bar.n = progress.fraction
        bar.set_description_str(str(progress), refresh=False)
        bar.update(0)

    try:
        yield show
    except KeyboardInterrupt:
        if bar is not None:
            bar.close()
            sweep = Sweep.open(out)
            finished = sum(map(sweep.finished, sweep.plan.points))
            left = f"{finished} of {len(sweep.plan.points)} points are finished"
            click.echo(f"{left}; resume with: svdlab sweep --resume {out}", err=True)
        raise
    finally:
        if bar is not None:
            bar.close()


def _read_points(path: str) -> list[dict[str, Any]]:
    from svdlab.errors import about
    from svdlab.reading import read_json

    with about("--points"):
        points = read_json(path)
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise SvdlabError(f'--points: {path}: allowed: a list of objects, such as [{{"fps": 7}}, {{"fps": 14}}]')
    return points


def _report(sweep: Sweep, json_path: str | None) -> int:
    """Say what there is, and what the exit code is."""
    import json

    table = sweep.table()
    for reason in sweep.discarded:
        click.echo(f"note: {reason}: the point was damaged, and has been computed again", err=True)
    for reason, number in sweep.unplanned_points().items():
        click.echo(f"note: {number} points in {sweep.folder} {reason}: kept, not in the table", err=True)
    failed = table[table["status"] == "failed"] if len(table) else table
    for _, row in failed.iterrows():
        at = ", ".join(f"{axis}={row[axis]}" for axis in sweep.plan.axes)
        click.echo(f"failed: {at}: {row['error']}")
    click.echo(f"{sweep.folder / 'table.csv'}: {len(table) - len(failed)} points finished, {len(failed)} failed")
    if json_path:
        rows = json.loads(table.to_json(orient="records"))
        write_json(json_path, {"folder": str(sweep.folder), "points": rows})
    return 1 if len(failed) else 0


@click.command("sweep-compare")
@click.argument("before")
@click.argument("after")
@click.option(
    "--tolerance",
    type=click.IntRange(0, 255),
    help="Grey levels of 255 that a pixel may change; default: no bit, not even before rounding.",
)
@click.option("--export", metavar="FILE", help="Both side by side, on one clock: a page (.html) that opens offline.")
@JSON
def sweep_compare(before: str, after: str, tolerance: int | None, export: str | None, json_path: str | None) -> None:
    """Compare two sweeps over the same axes point by point: did a change move anything?"""
    from rich.console import Console

    from svdlab.sweep.compare import compare_sweeps
    from svdlab.sweep.folder import Sweep

    if export is not None:
        from svdlab.notebook.sweep_export import SUFFIXES, check_export, export_comparison

        check_export(export, SUFFIXES[:1])
    check_outputs(json_path, export, inputs=[before, after])
    found = compare_sweeps(Sweep.open(before), Sweep.open(after))
    Console().print(found.table(tolerance))
    for name, (was, now) in found.differs.items():
        click.echo(f"made with another {name}: {was}, then {now}")
    if export is not None:
        click.echo(str(export_comparison(Sweep.open(before), Sweep.open(after), export)))
    if json_path:
        write_json(json_path, found.to_dict(tolerance))
    sys.exit(1 if found.moved(tolerance) else 0)


@click.command("sweep-export")
@click.argument("folder", metavar="SWEEP")
@click.argument("file")
def sweep_export(folder: str, file: str) -> None:
    """Write a sweep's clips and heat maps as one page that opens offline (.html), or its grid as a GIF (.gif)."""
    from svdlab.notebook.sweep_export import check_export, export_sweep
    from svdlab.sweep.folder import Sweep

    check_export(file)
    check_outputs(file, inputs=[folder])
    target = export_sweep(Sweep.open(folder), file)
    click.echo(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")
