"""What the commands share: options made from ``GenerationSettings``, the model, the device, results as JSON."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click

from svdlab.errors import SvdlabError, short
from svdlab.svd.settings import GenerationSettings

MODEL = click.option(
    "--model",
    default="embedded",
    show_default=True,
    help="Checkpoint: embedded, a folder, a single .safetensors file, or a folder's or file's name on the hub.",
)


def check_device(device: str, here: bool = True) -> None:
    """Refuse what is no device.

    Args:
        device: as torch names it.
        here: it must be in this machine, too.

    Raises:
        SvdlabError: no name of a device, or none that is here.
    """
    if device == "cpu":  # and no torch to wait for
        return
    import torch

    try:
        kind, index = (found := torch.device(device)).type, found.index
    except RuntimeError:
        raise SvdlabError(f"--device: got {short(device)}, allowed: cpu, cuda, cuda:1, mps") from None
    if not here:
        return
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (index or 0) >= count.get(kind, 0):
        there = [name for name, n in count.items() for name in ([name, f"{name}:{n - 1}"] if n > 1 else [name] * n)]
        raise SvdlabError(f"--device: got {device!r}, but torch sees no such device here; allowed: {', '.join(there)}")


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    check_device(value)
    return value


DEVICE = click.option(
    "--device", default="cpu", show_default=True, callback=_device, help="Where to run: cpu, cuda, cuda:1, mps."
)
# Where it runs is not known before the other options are.
ANY_DEVICE = click.option("--device", default="cpu", show_default=True, help="Where to run: cpu, cuda, cuda:1, mps.")
IMAGE = click.option(
    "--image",
    metavar="IMAGE",
    help="The image to start from; default: a frame of a moving shape for the embedded model, "
    "matplotlib's sample photograph for any other.",
)
PLOT = click.option("--plot", "plot_path", metavar="FILE", help="Draw the result: .png, .svg or .pdf.")
JSON = click.option("--json", "json_path", metavar="FILE", help="Write what the table prints.")

FORCE = click.option("--force", is_flag=True, help="Try even what by an estimate cannot fit into the memory.")


class _NumberOrAuto(click.ParamType):
    name = "integer or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.INT.convert(value, param, ctx)


def check_plot(path: str | None) -> None:
    """Refuse a ``--plot`` that no figure can be saved as."""
    if path and not path.endswith((".png", ".svg", ".pdf")):
        raise SvdlabError(f"--plot: got {path!r}, allowed: .png, .svg, .pdf")


def check_memory(model: str, settings: GenerationSettings, device: str, revision: str | None = None) -> None:
    """Refuse what cannot fit a device, from the checkpoint's configs alone.

    Raises:
        SvdlabError: see ``svd.memory.check_fits``; no such checkpoint.
    """
    from svdlab.svd.checkpoint import load_configs, resolve_size
    from svdlab.svd.memory import check_fits

    configs = load_configs(model, revision)
    check_fits(configs, resolve_size(settings, configs.unet, configs.vae), device)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every field of ``GenerationSettings``; those that were given arrive as ``given``, a dict."""

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> Any:
        fields = {name: arguments.pop(name) for name in GenerationSettings.model_fields}
        given = {name: value for name, value in fields.items() if value is not None}
        if "sigmas" in given:
            given["sigmas"] = _numbers(given["sigmas"])
        return command(given=given, **arguments)

    for name, field in reversed(GenerationSettings.model_fields.items()):
        kinds = [k for k in (get_args(field.annotation) or (field.annotation,)) if k is not type(None)]
        kind: Any = kinds[0] if kinds[0] in (int, float) else str
        if get_origin(field.annotation) is Literal:
            kind = click.Choice(get_args(field.annotation))
        elif name == "decode_chunk_size":
            kind = _NumberOrAuto()
        default = "" if field.default is None else f" [default: {field.default}]"
        option = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=f"{field.description}{default}")
        wrapped = option(wrapped)
    return wrapped


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SvdlabError(f"sigmas: got {text!r}, allowed: numbers with commas between them, falling") from None
