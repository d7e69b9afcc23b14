"""What a subclass overrides of diffusers' methods takes the stages' places in a call.

Code that was written for diffusers changes its pipeline by a subclass, or by setting a method on the object. An
override that no call asks would be worse than an error: each is honoured, or refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.svd import images
from svdlab.svd.interface import DiffusersInterface
from svdlab.svd.settings import GenerationSettings

if TYPE_CHECKING:
    from svdlab.svd.pipeline import Generators, Inputs, SVDPipeline

OVERRIDABLE = ("_encode_image", "_encode_vae_image", "_get_add_time_ids", "prepare_latents", "decode_latents")
# Properties that a call does not ask.
_FIXED = ("guidance_scale", "do_classifier_free_guidance", "num_timesteps", "video_processor")


def overridden(pipe: SVDPipeline) -> list[str]:
    """The methods of ``OVERRIDABLE`` that are not the pipeline's own.

    Raises:
        SvdlabError: a property is overridden that a call does not ask.
    """
    for name in _FIXED:
        if getattr(type(pipe), name) is not getattr(DiffusersInterface, name):
            raise SvdlabError(f"{name}: overridden, allowed in a subclass: {', '.join(OVERRIDABLE)}, check_inputs")
    own = {name: getattr(DiffusersInterface, name) for name in OVERRIDABLE}
    return [name for name in OVERRIDABLE if getattr(getattr(pipe, name), "__func__", None) is not own[name]]


def start(
    pipe: SVDPipeline, image: Any, settings: GenerationSettings, generator: Generators, latents: Tensor | None
) -> tuple[SVDPipeline, Inputs]:
    """The inputs of a call, and the pipeline to run them: ``pipe``, or a copy with its overrides in the stages' places.

    Args:
        pipe: whose methods may be overridden.
        image, generator, latents: of the call.
        settings: resolved.

    Raises:
        SvdlabError: as ``SVDPipeline.prepare``.
    """
    names = overridden(pipe)
    if not names:
        return pipe, pipe.prepare(image, settings, generator, latents)
    runner = copy.copy(pipe)
    runner.overrides_run = True
    stages = _stages(pipe, image, settings)
    runner.put_stages({**pipe.replaced, **{stage: function for name, stage, function in stages if name in names}})
    if "prepare_latents" not in names:
        return runner, runner.prepare(image, settings, generator, latents)
    # It draws after the noise of the augmentation, and scales what it draws.
    assert settings.num_frames and settings.height and settings.width
    factor, channels = pipe.vae_scale_factor, pipe.unet.config.in_channels
    videos = len(images.as_list(image)) * settings.num_videos_per_prompt
    blank = torch.zeros(videos, settings.num_frames, channels // 2, settings.height // factor, settings.width // factor)
    inputs = runner.prepare(image, settings, generator, blank)
    size = (videos, settings.num_frames, channels, settings.height, settings.width)
    first = pipe.prepare_latents(*size, pipe.dtype, pipe.device, generator, latents)
    runner.put_stages({**runner.replaced, "initial_latents": lambda latents, sigmas: latents})
    return runner, replace(inputs, latents=first)


def _stages(
    pipe: SVDPipeline, image: Any, settings: GenerationSettings
) -> list[tuple[str, str, Callable[..., Tensor]]]:
    """Each method, the stage whose place it takes, and the stage made of it."""
    guided = pipe.is_guided(settings)

    def image_embedding(clip_pixels: Tensor, settings: GenerationSettings) -> Tensor:
        made = pipe._encode_image(image, pipe.device, settings.num_videos_per_prompt, guided)
        return _conditional("_encode_image", made, guided).to(pipe.device, pipe.dtype)

    def image_latents(image: Tensor, noise: Tensor, settings: GenerationSettings) -> Tensor:
        pixels = image + settings.noise_aug_strength * noise
        made = _conditional("_encode_vae_image", pipe._encode_vae_image(pixels, pipe.device, 1, guided), guided)
        return made.to(pipe.device, pipe.dtype).repeat_interleave(settings.num_videos_per_prompt, 0)

    def time_ids(settings: GenerationSettings) -> Tensor:
        ids = settings.fps - 1, settings.motion_bucket_id, settings.noise_aug_strength
        made = pipe._get_add_time_ids(*ids, pipe.dtype, 1, 1, guided)
        if guided and not torch.equal(*made.chunk(2)):
            raise SvdlabError("_get_add_time_ids: its two halves differ, allowed: equal halves")
        return made[:1]

    def decode(latents: Tensor, settings: GenerationSettings) -> Tensor:
        frames, chunk = latents.shape[1], settings.decode_chunk_size
        return pipe.decode_latents(latents, frames, chunk if isinstance(chunk, int) else frames).transpose(1, 2)

    return [
        ("_encode_image", "image_embedding", image_embedding),
        ("_encode_vae_image", "image_latents", image_latents),
        ("_get_add_time_ids", "time_ids", time_ids),
        ("decode_latents", "decode", decode),
    ]


def _conditional(name: str, made: Tensor, guided: bool) -> Tensor:
    """The conditional half of what an overridden method made."""
    if not guided:
        return made
    unconditional, conditional = made.chunk(2)
    if unconditional.any():
        raise SvdlabError(f"{name}: its unconditional half is not zero, allowed: zeros")
    return conditional
