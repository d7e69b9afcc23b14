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
from svdlab.model.layers import ResnetBlock, TemporalResnetBlock
from svdlab.training.recipe import Recipe


class Autoencoder(nn.Module):
    """Frames (B, F, 3, H, W) to their reconstruction and the posterior's mean and standard deviation."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = self.vae.encode(frames.flatten(0, 1))
        latents = (mean + std * noise.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return self.vae.decode(latents), mean, std


def initialise_(vae: VAE) -> VAE:
    """Residual branches start at zero, and the temporal ones stay there while single images train the spatial ones.

    The posterior starts narrow: at the unit width of an untrained layer its noise would drown what the mean says. The
    first biases are large: beside a constant pattern that dominates a group's statistics, the norms are nearly linear
    in the picture, and a flat colour, which they would otherwise take away, gets through from the start.
    """
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        nn.init.normal_(conv.bias)  # type: ignore[arg-type]
    for module in vae.modules():
        if isinstance(module, (ResnetBlock, TemporalResnetBlock)):
            nn.init.zeros_(module.conv2.weight)
            module.conv2.bias.data.zero_()  # type: ignore[union-attr]
    vae.quant_conv.bias.data[vae.config.latent_channels :] = -8.0  # type: ignore[union-attr]
    identity = vae.decoder.time_conv_out
    nn.init.zeros_(identity.weight)
    identity.bias.data.zero_()  # type: ignore[union-attr]
    with torch.no_grad():
        identity.weight[:, :, 1, 0, 0] = torch.eye(len(identity.weight))
    return vae


def loss(
    recipe: Recipe, batch: int, num_frames: int, size: int, latent: tuple[int, int]
) -> Callable[[Callable[..., Any], torch.Generator], Tensor]:
    """Mean absolute and squared error, the shape's pixels weighted, and the KL to a unit Gaussian.

    Args:
        recipe: weights and ranges.
        batch: clips, or single images, a step.
        num_frames: of each.
        size: of the square window that is trained on, pixels.
        latent: the VAE's latent channels and pixels per latent.
    """
    channels, factor = latent

    def of(call: Callable[..., Any], generator: torch.Generator) -> Tensor:
        drawn = [draw(generator, recipe, num_frames, size) for _ in range(batch)]
        frames, weight = map(torch.stack, zip(*drawn, strict=True))
        noise = torch.randn(batch, num_frames, channels, size // factor, size // factor, generator=generator)
        rebuilt, mean, std = call(frames, noise)
        error = (rebuilt - frames.to(rebuilt.device)).abs()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1).mean()
        return ((error + 4 * error.square()) * weight.to(error.device)).mean() + recipe.kl_weight * kl

    return of


def draw(generator: torch.Generator, recipe: Recipe, num_frames: int, size: int) -> tuple[Tensor, Tensor]:
    """Frames (F, 3, size, size) in [-1, 1] of a window of one scene, and each pixel's weight (F, 1, size, size).

    The shape starts anywhere in the window, which lies anywhere in the picture.
    """
    scene = Scene.from_seed(int(torch.randint(2**31, (1,), generator=generator)))
    x, y = torch.randint(SIZE - size + 1, (2,), generator=generator).tolist()
    start = torch.empty(2).uniform_(2, size - 2, generator=generator).numpy() + (x, y)
    step = displacement(*draw_motion(generator, recipe)) * np.array(DIRECTIONS[scene.direction])
    centres = start + np.arange(num_frames)[:, None] * step
    body = torch.from_numpy(scene.coverage(centres)[0]).float()
    # Two pixels around the shape count as the shape: edges are what moves.
    weight = 1 + recipe.shape_weight * F.max_pool2d(body[:, None], 5, stride=1, padding=2)
    window = (..., slice(y, y + size), slice(x, x + size))
    return to_tensor(scene.render(centres))[window], weight[window]


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
