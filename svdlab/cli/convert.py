"""``svdlab convert``."""

from __future__ import annotations

import click

from svdlab.cli.options import JSON
from svdlab.errors import SvdlabError, short
from svdlab.files import check_outputs, write_json


@click.command()
@click.argument("source")
@click.option(
    "--out",
    required=True,
    metavar="TARGET",
    help="A name that ends with .safetensors is a single file, any other a new folder.",
)
@click.option(
    "--set",
    "given",
    multiple=True,
    metavar="NAME=VALUE",
    help="What a single file's weights do not say, with the value as JSON: unet.num_frames=14, "
    "unet.num_attention_heads=[5,10,20,20], image_encoder.num_attention_heads=16, vae.scaling_factor=0.18215, "
    'image_encoder.hidden_act="gelu", scheduler.sigma_max=700, and the other options of a config.json.',
)
@click.option("--variant", help="A folder's weights' file name variant, such as fp16.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@JSON
def convert(
    source: str, out: str, given: tuple[str, ...], variant: str | None, revision: str | None, json_path: str | None
) -> None:
    """Write a checkpoint as a single file in Stability's naming, or as a folder in diffusers' format.

    SOURCE is a folder, a single file, a name of one of these on the hub, or "embedded". Every weight is as it was, bit
    by bit.
    """
    from svdlab.reading import parse
    from svdlab.svd.convert import convert as convert_checkpoint
    from svdlab.svd.convert import is_single_file

    options: dict[str, dict[str, object]] = {}
    for text in given:
        name, _, value = text.partition("=")
        component, _, option = name.partition(".")
        if not option or not value:
            raise SvdlabError(f"--set: got {short(text)}, allowed: COMPONENT.OPTION=VALUE, as unet.num_frames=14")
        options.setdefault(component, {})[option] = parse(value, f"--set {name}")
    single = is_single_file(out)
    check_outputs(json_path, out if single else None, folders=[None if single else out], inputs=[source])
    made = convert_checkpoint(source, out, options=options, variant=variant, revision=revision)
    unused = f"; {len(made.unused)} more that no network reads are left out" if made.unused else ""
    click.echo(f"{made.target}: {made.weights} weights of {made.source}{unused}")
    if json_path:
        written = {"path": str(made.target), "source": str(made.source), "weights": made.weights}
        write_json(json_path, {**written, "unused": list(made.unused)})
