"""``svdlab parity``, ``trace``, ``compare`` and ``diagnose``: 0 is parity (or a trace written), 1 divergence."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from svdlab.cli.options import DEVICE, FORCE, IMAGE, JSON, MODEL, check_memory, settings_options
from svdlab.errors import SvdlabError
from svdlab.files import check_outputs, write_json, write_text
from svdlab.samples import read_image, sample_picture
from svdlab.svd.settings import GenerationSettings

if TYPE_CHECKING:
    from svdlab.parity.compare import Comparison

_TAPS = click.option(
    "--taps",
    multiple=True,
    metavar="PATTERN",
    help="Record inner modules, too, such as 'unet.down_blocks.*'; repeatable.",
)
_UNTIL = click.option("--until", metavar="PROBE", help="Stop after this probe, such as noise_pred.000.")


def _rules(question: str) -> Any:
    return click.option(
        "--reference",
        "rules",
        type=click.Choice(["diffusers", "stability"]),
        default="diffusers",
        show_default=True,
        help=f"{question}: diffusers', or those of Stability's own code where diffusers departs from it.",
    )


_RULES = _rules("Whose choices svdlab makes")
_DEPARTURES = click.option(
    "--departure",
    "departures",
    multiple=True,
    metavar="NAME",
    help="With --reference stability: depart from diffusers here only, such as fps_not_decremented; repeatable.",
)
_EVERY = click.option("--every", is_flag=True, help="Print every probe of a long run.")


def _departures(rules: str, given: Sequence[str]) -> tuple[str, ...]:
    """The departures from diffusers that were asked for.

    Raises:
        SvdlabError: a name that is not one, or names without ``--reference stability``.
    """
    if rules == "diffusers":
        if given:
            raise SvdlabError("--departure: only together with --reference stability")
        return ()
    from svdlab.parity.bugs import DEPARTURES, departures

    departures(*given)
    return tuple(name for name in DEPARTURES if not given or name in given)


def _report(comparison: Comparison, json_path: str | None, every: bool) -> None:
    from rich.console import Console

    Console().print(comparison.table(every))
    if json_path:
        write_json(json_path, comparison.to_dict())
    sys.exit(1 if comparison.verdict == "divergence" else 0)


@click.command()
@IMAGE
@click.option("--keep", metavar="DIR", help="Keep the three traces in this folder.")
@_TAPS
@_UNTIL
@_RULES
@_DEPARTURES
@_EVERY
@JSON
@MODEL
@DEVICE
@FORCE
@settings_options
def parity(
    image: str | None,
    keep: str | None,
    rules: str,
    departures: Sequence[str],
    taps: Sequence[str],
    until: str | None,
    every: bool,
    json_path: str | None,
    model: str,
    device: str,
    force: bool,
    given: dict[str, Any],
) -> None:
    """Compare svdlab with diffusers, measured against diffusers in float64.

    With --reference stability svdlab does what Stability's own code does with its defaults: how far is diffusers from
    that?
    """
    settings = GenerationSettings(**given)
    chosen = _departures(rules, departures)
    check_outputs(json_path, folders=[keep], inputs=[image, model])
    picture = read_image(image) if image else sample_picture(model)
    if not force:
        check_memory(model, settings, device)
    from svdlab.parity.three_way import three_way

    comparison = three_way(
        model,
        picture,
        settings,
        device=device,
        taps=taps,
        until=until,
        folder=keep,
        progress=True,
        departures=chosen,
    )
    _report(comparison, json_path, every)


def _check_writer(path: str, json_path: str | None) -> NoReturn:
    from rich.console import Console

    from svdlab.parity.identity import check_writer

    check_outputs(json_path, inputs=[path])
    found = check_writer(path)
    Console().print(found.table())
    click.echo(f"{path}: the writer is {'right' if found.right else 'wrong'}")
    if json_path:
        write_json(json_path, found.to_dict())
    sys.exit(0 if found.right else 1)


@click.command()
@click.option("--implementation", type=click.Choice(["diffusers", "svdlab"]), help="Whose tensors.")
@click.option("--out", metavar="FILE", help="The trace, a safetensors file.")
@click.option(
    "--check-writer",
    metavar="FILE",
    help="Record nothing: tell whether FILE, which a port's writer made of the test tensors, is right.",
)
@click.option("--inputs", metavar="TRACE", help="Replay this trace's inputs and settings; options given here override.")
@click.option(
    "--preprocess",
    is_flag=True,
    help="With --inputs: redo the preprocessing from its source image, replay only the draws.",
)
@IMAGE
@_TAPS
@_UNTIL
@_RULES
@_DEPARTURES
@click.option("--optional", is_flag=True, help="Record the optional probes of the trace format, too.")
@JSON
@MODEL
@DEVICE
@FORCE
@settings_options
def trace(
    implementation: str | None,
    out: str | None,
    check_writer: str | None,
    inputs: str | None,
    preprocess: bool,
    image: str | None,
    taps: Sequence[str],
    until: str | None,
    rules: str,
    departures: Sequence[str],
    optional: bool,
    json_path: str | None,
    model: str,
    device: str,
    force: bool,
    given: dict[str, Any],
) -> None:
    """Record every intermediate tensor of one generation in a trace file."""
    if check_writer is not None:
        if implementation is not None or out is not None:
            raise SvdlabError("--check-writer: not together with --implementation and --out, it records nothing")
        _check_writer(check_writer, json_path)
    if implementation is None:
        raise SvdlabError("--implementation: is missing, allowed: diffusers, svdlab")
    if out is None:
        raise SvdlabError("--out: is missing, allowed: the trace to write")
    if rules == "stability" and implementation == "diffusers":
        raise SvdlabError("--reference stability: not with --implementation diffusers, allowed: svdlab")
    chosen = _departures(rules, departures)
    from svdlab.parity.trace import DTYPES, Trace
    from svdlab.svd.checkpoint import checkpoint_path

    if inputs is not None and image is not None:
        raise SvdlabError("--image: not together with --inputs, which replays that trace's image")
    check_outputs(out, json_path, inputs=[inputs, image, model])
    replay = None if inputs is None else Trace.open(inputs)
    settings = GenerationSettings(**given) if replay is None else replay.settings.replace(**given)
    picture = None if replay is not None else read_image(image) if image else sample_picture(model)
    if not force:
        check_memory(model, settings, device)
    shared: dict[str, Any] = {
        "replay": replay,
        "preprocess": preprocess,
        "taps": taps,
        "until": until,
        "path": out,
        "checkpoint": checkpoint_path(model),
        "optional": optional,
    }
    if implementation == "svdlab":
        from svdlab.parity.candidate import capture
        from svdlab.svd.pipeline import SVDPipeline

        pipe = SVDPipeline.from_pretrained(
            shared["checkpoint"], dtype=settings.torch_dtype, device=device, compat="diffusers"
        )
        made = capture(pipe, picture, settings, progress=True, departures=chosen, **shared)
    else:
        import torch

        from svdlab.parity.reference import capture_diffusers, load_diffusers

        # A truth has the weights of the run that it is the truth of.
        weights = settings.torch_dtype if replay is None else DTYPES[replay.dtype]
        if torch.finfo(weights).eps < torch.finfo(settings.torch_dtype).eps:
            weights = settings.torch_dtype
        diffusers = load_diffusers(shared["checkpoint"], settings.torch_dtype, device, weights_dtype=weights)
        made = capture_diffusers(diffusers, picture, settings, progress=True, **shared)
    click.echo(f"{out}: {len(made.probes)} probes, {len(made.taps)} taps, {made.implementation} {made.dtype}")
    if json_path:
        write_json(json_path, {"path": out, "probes": list(made.probes), "taps": list(made.taps)})


@click.command()
@click.argument("reference")
@click.argument("candidate")
@click.option("--truth", metavar="TRACE", help="The reference in float64, from the same inputs.")
@click.option(
    "--rerun",
    is_flag=True,
    help="Without a truth: measure the floor by rerunning diffusers, perturbed (--model).",
)
@_EVERY
@JSON
@MODEL
@DEVICE
def compare(
    reference: str,
    candidate: str,
    truth: str | None,
    rerun: bool,
    every: bool,
    json_path: str | None,
    model: str,
    device: str,
) -> None:
    """Compare two traces: the verdict, and the first probe that diverges."""
    from svdlab.parity.compare import compare as compare_traces
    from svdlab.parity.trace import DTYPES, Trace

    if truth is not None and rerun:
        raise SvdlabError("--rerun: not together with --truth, which is the better floor")
    check_outputs(json_path, inputs=[reference, candidate, truth, model])
    one, other = Trace.open(reference), Trace.open(candidate)
    exact = None if truth is None else Trace.open(truth)
    perturbed = None
    if rerun:
        from svdlab.parity.reference import capture_diffusers, load_diffusers
        from svdlab.svd.checkpoint import checkpoint_path

        path = checkpoint_path(model)
        diffusers = load_diffusers(path, DTYPES[one.dtype], device)
        perturbed = capture_diffusers(diffusers, replay=one, perturb=0, progress=True, checkpoint=path)
    _report(compare_traces(one, other, exact, perturbed=perturbed, progress=True), json_path, every)


@click.command()
@click.argument("reference")
@click.argument("candidate")
@click.option("--truth", metavar="TRACE", help="The reference in float64, from the same inputs.")
@click.option(
    "--candidate-truth",
    metavar="TRACE",
    help="The candidate's own code in float64, from the same inputs: how much it rounds.",
)
@click.option(
    "--seconds",
    default=40.0,
    show_default=True,
    help="Then try no further set of several bugs; single bugs are all tried.",
)
@click.option("--junit", metavar="FILE", help="Write one test case for each stage, for continuous integration.")
@_rules("Whose choices are right")
@JSON
@MODEL
@DEVICE
def diagnose(
    reference: str,
    candidate: str,
    truth: str | None,
    candidate_truth: str | None,
    seconds: float,
    junit: str | None,
    rules: Literal["diffusers", "stability"],
    json_path: str | None,
    model: str,
    device: str,
) -> None:
    """Judge every stage of a candidate's trace from its own tensors, and name every known bug in it."""
    from svdlab.parity.diagnose import diagnose as explain
    from svdlab.parity.trace import DTYPES, Trace
    from svdlab.svd.pipeline import SVDPipeline

    check_outputs(json_path, junit, inputs=[reference, candidate, truth, candidate_truth, model])
    one, other = Trace.open(reference), Trace.open(candidate)
    exact = None if truth is None else Trace.open(truth)
    pipe = SVDPipeline.from_pretrained(model, dtype=DTYPES[one.dtype], device=device, compat="diffusers")
    own = None if candidate_truth is None else Trace.open(candidate_truth)
    found = explain(one, other, exact, pipe=pipe, candidate_truth=own, rules=rules, seconds=seconds, progress=True)
    click.echo(found.summary())
    if json_path:
        write_json(json_path, {**found.to_dict(), "command": shlex.join(["svdlab", *sys.argv[1:]])})
    if junit:
        write_text(junit, found.to_junit())
    sys.exit(0 if found.verdict == "parity" else 1)
