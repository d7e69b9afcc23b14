"""``svdlab train-tiny`` and ``svdlab evaluate``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import click

from svdlab.cli.options import DEVICE, JSON, MODEL
from svdlab.errors import SvdlabError
from svdlab.files import check_outputs, write_json, write_text


@click.command("train-tiny")
@click.option("--out", required=True, metavar="DIR", help="Where the checkpoint goes; must not exist.")
@click.option("--work", metavar="DIR", help="Files to resume from; default: DIR.work beside the checkpoint.")
@click.option("--smoke", is_flag=True, help="The same phases in a minute: to check that it runs, not to get a model.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of all draws.")
@DEVICE
@JSON
def train_tiny(out: str, work: str | None, smoke: bool, seed: int, device: str, json_path: str | None) -> None:
    """Train the embedded checkpoint from nothing; run it again to resume after an interruption."""
    target = Path(out)
    if target.exists():
        raise SvdlabError(f"--out: {target} exists, allowed: a new folder")
    steps = Path(work) if work else target.with_name(f"{target.name}.work")
    check_outputs(json_path, folders=[target, steps])
    import torch

    from svdlab.training.recipe import Recipe
    from svdlab.training.train import train

    recipe = replace(Recipe(), seed=seed)
    started = time.perf_counter()
    losses = train(
        recipe.smoke() if smoke else recipe,
        steps,
        target,
        torch.device(device),
    )
    seconds = time.perf_counter() - started
    for name, values in losses.items():
        shown = f"{_mean(values[:10]):.4f} -> {_mean(values[-10:]):.4f}" if values else "done before"
        click.echo(f"{name:14} loss {shown}")
    click.echo(f"{target}: {seconds / 60:.1f} minutes")
    if json_path:
        write_json(json_path, {"path": str(target), "seconds": seconds, "losses": losses})


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@click.command()
@MODEL
@DEVICE
@click.option("--images", default=32, show_default=True, type=click.IntRange(2), help="Held-out first frames.")
@click.option("--steps", default=25, show_default=True, type=click.IntRange(1), help="Denoising steps.")
@click.option("--card", metavar="FILE", help="Write the checkpoint's model card, in Markdown.")
@JSON
def evaluate(model: str, device: str, images: int, steps: int, card: str | None, json_path: str | None) -> None:
    """Measure a checkpoint of moving shapes through diffusers' pipeline: motion, direction, guidance, conditioning."""
    check_outputs(card, json_path, inputs=[model])
    from svdlab.training.evaluate import evaluate as measure
    from svdlab.training.evaluate import model_card

    figures = measure(model, images=images, steps=steps, device=device)
    for figure in figures:
        click.echo(f"{'yes' if figure.passed else 'NO ':4}{figure.name:36} {figure.numbers()}  ({figure.bar})")
    if card:
        write_text(card, model_card(model, figures, images, steps))
    if json_path:
        write_json(json_path, {"figures": [figure.to_dict() for figure in figures]})
    raise SystemExit(0 if all(figure.passed for figure in figures) else 1)
