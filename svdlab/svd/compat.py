"""Where svdlab mends diffusers, and how to have diffusers' frames all the same: ``compat="diffusers"``.

docs/compatibility.md has the table of both. Diffusers' way is a change of stages: the correct code knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from svdlab.errors import SvdlabError, short
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import Change

if TYPE_CHECKING:
    from svdlab.svd.pipeline import SVDPipeline

Decode = Callable[[Tensor, GenerationSettings], Tensor]


def _all_images_in_turn(
    pipe: SVDPipeline, stage: Callable[..., Tensor], image: Tensor, noise: Tensor, settings: GenerationSettings
) -> Tensor:
    """``image_latents`` in the order a b a b beside embeddings in the order a a b b. Source: ``_encode_vae_image``."""
    videos = settings.num_videos_per_prompt
    return stage(image, noise, settings)[::videos].repeat(videos, 1, 1, 1)


def _chunks_across_videos(pipe: SVDPipeline, stage: Decode, latents: Tensor, settings: GenerationSettings) -> Tensor:
    """All videos' frames in one row, cut into chunks wherever they end. Source: ``decode_latents``."""
    if settings.decode == "exact" or not isinstance(settings.decode_chunk_size, int):
        return stage(latents, settings)
    return stage(latents.flatten(0, 1)[None], settings)[0].unflatten(0, latents.shape[:2])


COMPAT: Mapping[str, Change] = {
    "diffusers": Change(wrap={"image_latents": _all_images_in_turn, "decode": _chunks_across_videos})
}


def check_compat(compat: str | None) -> None:
    """Raises: SvdlabError for anything but None and the names in ``COMPAT``."""
    if compat is not None and compat not in COMPAT:
        raise SvdlabError(f"compat: got {short(compat)}, allowed: none, {', '.join(COMPAT)}")


def check_image(image: Any) -> None:
    """Refuse what diffusers misreads; what it fails at is svdlab's to judge.

    Raises:
        SvdlabError: an array, a list of others than PIL images, a tensor with negative values.
    """
    many = image if isinstance(image, list) else [image]
    allowed = 'allowed with compat="diffusers": PIL images, a tensor in [0, 1]'
    for one in many:
        if not isinstance(one, Image.Image) and (one is not image or not isinstance(one, Tensor)):
            raise SvdlabError(f"image: got {'a list of ' * (one is not image)}{type(one).__name__}, {allowed}")
        if isinstance(one, Tensor) and one.numel() and torch.min(one) < 0:
            raise SvdlabError(f"image: got negative values, {allowed}")
