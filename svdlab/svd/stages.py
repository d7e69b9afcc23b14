"""The stages of a generation that run a network, as functions of that network."""

from __future__ import annotations

import torch
from torch import Tensor

from svdlab.svd.unet import Conditioning, UNet
from svdlab.svd.vae import VAE


def predict_noise(
    unet: UNet, model_input: Tensor, timestep: Tensor, conditioning: Conditioning, cfg: str = "batched"
) -> Tensor:
    """The v-prediction (G, F, 4, h, w) of both guidance halves, in one forward pass or, for less memory, in two.

    Source: ``pipeline_stable_video_diffusion.py:__call__``, 9.

    Args:
        unet: the network.
        model_input: (G, F, 8, h, w); G is the number of videos, twice that with guidance (unconditional half first).
        timestep: 0.25 * ln(sigma).
        conditioning: of ``unet.condition``, with the same batch.
        cfg: "batched", or "sequential": one pass per half, the same result for half the activation memory.
    """
    if cfg == "batched":
        return unet(model_input, timestep, conditioning)
    halves = zip(model_input.chunk(2), conditioning.halves(), strict=True)
    return torch.cat([unet(x, timestep, c) for x, c in halves])


def decode_latents(vae: VAE, latents: Tensor, chunk: int | None, exact: bool) -> Tensor:
    """Frames (B, F, 3, H, W) of scaled-back latents, one video after the other so that no two are ever blended.

    ``exact``: what decoding all frames at once gives, ``chunk`` frames in memory (default 2). Else what diffusers
    gives for that chunk size (``decode_latents``): each chunk is a clip of its own. No chunk size means all at once
    in both, and is computed exactly.
    """
    videos = [v[None] for v in latents]
    if exact or chunk is None:
        return torch.cat([vae.decode(v, chunk or 2) for v in videos])
    return torch.cat([torch.cat([vae.decode(c) for c in v.split(chunk, dim=1)], dim=1) for v in videos])
