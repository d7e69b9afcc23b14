"""Replaying a trace: the random draws and pixels that another run starts from, in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.parity.trace import Trace
from svdlab.svd.settings import GenerationSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from svdlab.svd.pipeline import Inputs, SVDPipeline


def inputs_to_replay(trace: Trace, preprocess: bool = False) -> dict[str, Tensor]:
    """The inputs of ``trace`` that another run replays, by name: the random draws and the preprocessed image.

    With ``preprocess`` the preprocessing is redone from ``input.source`` instead, and only the draws are
    replayed.

    Raises:
        SvdlabError: an input is missing, or the source is no 8-bit image.
    """
    pixels = ["input.image", "input.clip_pixels"]
    draws = ["input.noise", "input.latents"]
    if preprocess:
        trace.require(["input.source"], "to redo the preprocessing")
        source_images(trace["input.source"])
    trace.require(draws if preprocess else pixels + draws, "to replay")
    names = draws if preprocess else pixels + draws
    return {name: trace[name] for name in ["input.source", *names] if name in trace}


def is_8bit(source: Tensor) -> bool:
    """Whether an image in [0, 1] holds 8-bit levels / 255, as PIL can hold them."""
    levels = source.double() * 255
    whole = bool(((levels - levels.round()).abs() < 1e-3).all())
    return whole and float(source.min()) >= 0 and float(source.max()) <= 1


def source_images(source: Tensor) -> list[Image]:
    """PIL images of a source (B, 3, H, W) in [0, 1].

    Raises:
        SvdlabError: it is not an 8-bit image, which PIL could not hold without loss.
    """
    from PIL import Image as pil

    if source.ndim != 4 or source.shape[1] != 3 or not is_8bit(source):
        raise SvdlabError(
            f"image: got a tensor of shape {tuple(source.shape)}, allowed: (batch, 3, height, width) "
            "of 8-bit levels / 255"
        )
    pixels = (source.double() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [pil.fromarray(frame) for frame in pixels]


def replay_images(tensors: Mapping[str, Tensor], settings: GenerationSettings) -> list[Image]:
    """PIL images for a replay: the source, or black ones where the replayed pixels override them anyway."""
    from PIL import Image as pil

    source = tensors.get("input.source")
    if source is not None and is_8bit(source):
        return source_images(source)
    return [pil.new("RGB", (settings.width or 8, settings.height or 8))] * len(tensors["input.noise"])


def replay_inputs(
    pipe: SVDPipeline, settings: GenerationSettings, replay: Trace, preprocess: bool = False, image: Any = None
) -> Inputs:
    """What svdlab runs on when it replays a trace.

    Args:
        pipe: whose preprocessing is used where it is redone.
        settings: resolved.
        replay: the trace.
        preprocess: redo the preprocessing from the source image, replay only the draws.
        image: instead of the trace's source image.

    Raises:
        SvdlabError: an input is missing or has another shape.
    """
    tensors = inputs_to_replay(replay, preprocess)
    inputs = pipe.prepare(replay_images(tensors, settings) if image is None else image, settings)
    values = {}
    for field in fields(inputs):
        tensor = tensors.get(f"input.{field.name}")
        drawn = getattr(inputs, field.name)
        if tensor is None or field.name == "source":
            continue
        if tensor.shape != drawn.shape:
            raise SvdlabError(
                f"{replay.label}: input.{field.name}: shape {tuple(tensor.shape)}, allowed: {tuple(drawn.shape)}"
            )
        values[field.name] = tensor.to(drawn)
    return replace(inputs, **values)
