"""The command line: ``svdlab COMMAND``. Exit 0 is fine, 1 means that the answer is no, 2 bad input."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import click

from svdlab.errors import SvdlabError
from svdlab.options import DEVICE, JSON, MODEL, read_image, settings_options
from svdlab.settings import GenerationSettings

# Where a command lives, so that asking for one does not import the others.
_ELSEWHERE = {
    "parity": "svdlab.parity.commands",
    "trace": "svdlab.parity.commands",
    "compare": "svdlab.parity.commands",
    "diagnose": "svdlab.parity.commands",
    "report": "svdlab.report",
    "sweep": "svdlab.sweep.commands",
    "sweep-compare": "svdlab.sweep.commands",
    "memory": "svdlab.memory",
    "bench": "svdlab.bench",
    "train-tiny": "svdlab.training.commands",
    "evaluate": "svdlab.training.commands",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            return getattr(importlib.import_module(_ELSEWHERE[cmd_name]), cmd_name.replace("-", "_"))
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="svdlab")
def commands() -> None:
    """Stable Video Diffusion, its parity with diffusers, and what explains a difference."""


@commands.command()
@click.argument("image")
@click.option("--out", required=True, metavar="CLIP", help="Where the clip goes: .mp4 or .gif.")
@MODEL
@DEVICE
@click.option("--offload", is_flag=True, help="Keep each network on the device only while it runs.")
@click.option("--variant", help="Weights' file name variant, such as fp16.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
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
    json_path: str | None,
    given: dict[str, Any],
) -> None:
    """Generate one clip from IMAGE."""
    from svdlab.clip import check_suffix
    from svdlab.files import check_folder, write_json

    settings = GenerationSettings(**given)
    target = check_suffix(out)
    for path in (out, json_path):
        check_folder(path)
    if settings.num_videos_per_prompt != 1:
        raise SvdlabError(
            f"num_videos_per_prompt: got {settings.num_videos_per_prompt}, allowed here: 1 (one clip a file)"
        )
    picture = read_image(image)
    from svdlab.pipeline import SVDPipeline

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


def main() -> None:
    """The console script."""
    try:
        commands(standalone_mode=False)
    except SvdlabError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
