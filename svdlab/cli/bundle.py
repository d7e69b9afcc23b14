"""``svdlab bundle``: inputs, outputs and weights of one stage or module, for a port's own unit tests."""

from __future__ import annotations

import click

from svdlab.cli.options import DEVICE, JSON, MODEL
from svdlab.files import check_new_folder, check_outputs, write_json


@click.command()
@click.argument("what")
@click.argument("reference")
@click.option("--out", metavar="DIR", required=True, help="A new folder.")
@click.option("--step", default=0, show_default=True, help="Which denoising step, for what runs in every step.")
@JSON
@MODEL
@DEVICE
def bundle(what: str, reference: str, out: str, step: int, json_path: str | None, model: str, device: str) -> None:
    """Write what one stage or module is given, what it gives, and its weights, as plain safetensors files.

    WHAT is a stage (such as image_latents or euler_step), unet, vae.encoder, vae.decoder, image_encoder, or a module
    (such as unet.down_blocks.0.resnets.0); a pattern gives a folder for each module. The inputs of the trace REFERENCE
    are replayed.
    """
    from svdlab.parity.bundle import make_bundles, write_bundles
    from svdlab.parity.trace import DTYPES, Trace
    from svdlab.svd.pipeline import SVDPipeline

    check_new_folder(out)
    check_outputs(json_path, folders=[out], inputs=[reference, model])
    trace = Trace.open(reference)
    pipe = SVDPipeline.from_pretrained(model, dtype=DTYPES[trace.dtype], device=device, compat="diffusers")
    bundles = make_bundles(pipe, what, trace, step)
    source = f"Made by svdlab from the checkpoint `{model}` in {trace.dtype}, from the inputs of `{trace.label}`."
    folders = write_bundles(bundles, out, source)
    for made, folder in zip(bundles, folders, strict=True):
        click.echo(f"{folder}: {len(made.inputs)} inputs, {len(made.outputs)} outputs, {len(made.weights)} weights")
    if json_path:
        about = [
            {
                "name": made.name,
                "step": made.step,
                "path": str(folder),
                "inputs": list(made.inputs),
                "outputs": list(made.outputs),
                "weights": list(made.weights),
            }
            for made, folder in zip(bundles, folders, strict=True)
        ]
        write_json(json_path, {"bundles": about})
