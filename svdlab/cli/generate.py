"""``svdlab generate``: one clip from one image."""

from __future__ import annotations

import time
from typing import Any

import click

from svdlab.cli.options import DEVICE, FORCE, JSON, MODEL, check_memory, settings_options
from svdlab.errors import SvdlabError
from svdlab.files import check_outputs, write_json
from svdlab.samples import read_image
from svdlab.svd.settings import GenerationSettings


@click.command()
@click.argument("image")
@click.option("--out", required=True, metavar="CLIP", help="Where the clip goes: .mp4 or .gif.")
@MODEL
@DEVICE
@click.option("--offload", is_flag=True, help="Keep each network on the device only while it runs.")
@click.option("--variant", help="Weights' file name variant, such as fp16.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@FORCE
@JSON
@settings_options
def generate(
    image: str,
    out: str,
    model: str,
    device: str,
    offload: bool,
    variant: str | None,
    revision: str | None,
    force: bool,
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Generate one clip from IMAGE."""
    from svdlab.svd.video import check_suffix

    settings = GenerationSettings(**given)
    target = check_suffix(out, settings.fps)
    check_outputs(out, json_path, inputs=[image, model])
    if settings.num_videos_per_prompt != 1:
        raise SvdlabError(
            f"num_videos_per_prompt: got {settings.num_videos_per_prompt}, allowed here: 1 (one clip per file)"
        )
    picture = read_image(image)
    if not force:
        check_memory(model, settings, device, revision)
    from svdlab.svd.pipeline import SVDPipeline

    started = time.perf_counter()
    pipe = SVDPipeline.from_pretrained(
        model,
        dtype=settings.torch_dtype,
        device="cpu" if offload else device,
        variant=variant,
        revision=revision,
    )
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    (clip,) = pipe.generate(picture, settings)
    clip.save(target)
    seconds = time.perf_counter() - started
    made = clip.settings or settings
    click.echo(f"{target}: {len(clip)} frames of {made.width}x{made.height} at {clip.fps} fps in {seconds:.1f} s")
    if json_path:
        write_json(json_path, {"settings": made.model_dump(), "seconds": seconds, "path": str(target)})
