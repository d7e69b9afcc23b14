"""The VAE with its temporal decoder: reconstruction and a small KL, on images first and on clips after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.data import DIRECTIONS, SIZE, Scene, displacement
from svdlab.model import VAE
from svdlab.model.layers import TemporalResnetBlock
from svdlab.training.recipe import Recipe


class Autoencoder(nn.Module):
    """Frames (B, F, 3, H, W) to their reconstruction and the posterior's mean and standard deviation."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        frames = frames.to(self.vae.quant_conv.weight.dtype)
        mean, std = self.vae.encode(frames.flatten(0, 1))
        latents = (mean + std * noise.flatten(0, 1).to(mean.dtype)).unflatten(0, frames.shape[:2])
        return self.vae.decode(latents), mean, std


def initialise_(vae: VAE) -> VAE:
    """Temporal layers start as the identity, so that single images train the spatial ones."""
    for module in vae.modules():
        if isinstance(module, TemporalResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            module.conv2.bias.data.zero_()  # type: ignore[union-attr]
    identity = vae.decoder.time_conv_out
    nn.init.zeros_(identity.weight)
    identity.bias.data.zero_()  # type: ignore[union-attr]
    with torch.no_grad():
        identity.weight[:, :, 1, 0, 0] = torch.eye(len(identity.weight))
    return vae


def loss(recipe: Recipe, images: bool) -> Callable[[Callable[..., Any], torch.Generator], Tensor]:
    """Mean absolute and squared error, the shape's pixels weighted, and the KL to a unit Gaussian."""
    batch = recipe.vae_images.batch if images else recipe.vae_clips.batch

    def of(call: Callable[..., Any], generator: torch.Generator) -> Tensor:
        frames, weight = map(torch.stack, zip(*(draw(generator, recipe, images) for _ in range(batch)), strict=True))
        factor = 8
        noise = torch.randn(*frames.shape[:2], 4, SIZE // factor, SIZE // factor, generator=generator)
        rebuilt, mean, std = (t.float() for t in call(frames, noise))
        error = (rebuilt - frames.to(rebuilt.device)).abs()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1).mean()
        return ((error + 4 * error.square()) * weight.to(error.device)).mean() + recipe.kl_weight * kl

    return of


def draw(generator: torch.Generator, recipe: Recipe, image: bool) -> tuple[Tensor, Tensor]:
    """Frames (F, 3, H, W) in [-1, 1] of one scene anywhere in the picture, and each pixel's weight (F, 1, H, W)."""
    scene = Scene.from_seed(int(torch.randint(2**31, (1,), generator=generator)))
    start = torch.empty(2).uniform_(2, SIZE - 2, generator=generator).numpy()
    step = displacement(*draw_motion(generator, recipe)) * np.array(DIRECTIONS[scene.direction])
    centres = start + np.arange(1 if image else 8)[:, None] * step
    body = torch.from_numpy(scene.coverage(centres)[0]).float()
    # Two pixels around the shape count as the shape: edges are what moves.
    near = F.max_pool2d(body[:, None], 5, stride=1, padding=2)
    return to_tensor(scene.render(centres)), 1 + recipe.shape_weight * near


def draw_motion(generator: torch.Generator, recipe: Recipe) -> tuple[int, int]:
    """Frames per second (log-uniform) and a motion bucket (uniform) whose displacement the picture can hold."""
    while True:
        low, high = np.log(recipe.fps[0]), np.log(recipe.fps[1] + 1)
        fps = int(np.exp(low + (high - low) * torch.rand(1, generator=generator).item()))
        first, last = recipe.motion_bucket_id
        bucket = int(torch.randint(first, last + 1, (1,), generator=generator))
        if displacement(fps, bucket) <= recipe.max_displacement:
            return fps, bucket


def to_tensor(frames: np.ndarray) -> Tensor:
    """Float (F, H, W, 3) in [0, 1] to (F, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() * 2 - 1
