"""The VAE with its temporal decoder: reconstruction and a small KL, on images first and on clips after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.svd import VAE, layout
from svdlab.svd.layers import (
    AlphaBlender,
    Downsample,
    ResnetBlock,
    SpatioTemporalResBlock,
    TemporalResnetBlock,
    Upsample,
)
from svdlab.svd.vae import AttentionBlock
from svdlab.training.data import DIRECTIONS, SIZE, Scene, displacement
from svdlab.training.fit import products_in_bfloat16
from svdlab.training.recipe import Recipe


class Autoencoder(nn.Module):
    """Frames (B, F, 3, H, W) to their reconstruction and the posterior's mean and standard deviation.

    Products run in bfloat16 where that is faster. A single frame passes the temporal branches by: they start as
    the identity, and clips teach them at the end.
    """

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with products_in_bfloat16(frames.device):
            mean, std = self.vae.encode(frames.flatten(0, 1)).latent_dist
            latents = (mean + std * noise.flatten(0, 1)).unflatten(0, frames.shape[:2])
            rebuilt = self.vae.decode_videos(latents) if frames.shape[1] > 1 else self._decode_images(latents)
        return rebuilt.float(), mean.float(), std.float()

    def _decode_images(self, latents: Tensor) -> Tensor:
        decoder = self.vae.decoder
        x = decoder.conv_in(layout.from_channels_first(latents))
        for module in decoder.modules_in_order():
            x = module.spatial_res_block(x) if isinstance(module, SpatioTemporalResBlock) else module(x)
        return layout.to_channels_first(decoder.conv_out(F.silu(decoder.conv_norm_out(x))))


class TemporalDecoder(nn.Module):
    """The decoder's temporal branches alone, on latents that are disturbed in every frame by itself.

    What the sampler leaves differs from frame to frame, and the frames beside one tell it from motion. Everything else
    stays as it is, the encoder too, and with it the latents that the UNet learns.

    Args:
        vae: whose branches are trained.
        disturbance: standard deviation of the noise, in that of a clip's latents.
    """

    def __init__(self, vae: VAE, disturbance: float):
        super().__init__()
        self.vae, self.disturbance = vae, disturbance
        vae.requires_grad_(False)
        for module in vae.decoder.modules():
            if isinstance(module, (TemporalResnetBlock, AlphaBlender)):
                module.requires_grad_(True)
        vae.decoder.time_conv_out.requires_grad_(True)

    def forward(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with products_in_bfloat16(frames.device):
            mean, std = self.vae.encode(frames.flatten(0, 1)).latent_dist
            latents = mean + self.disturbance * mean.std() * noise.flatten(0, 1)
            rebuilt = self.vae.decode_videos(latents.unflatten(0, frames.shape[:2]))
        return rebuilt.float(), mean.float(), std.float()


def initialise_(vae: VAE) -> VAE:
    """Start as a blurred copy: what a shape's colour and place are is there to be read from the first step on.

    Residual branches start at zero; what is left averages on the way down and repeats on the way up. The latents start
    at about unit size, and the posterior narrow: at the unit width of an untrained layer its noise would drown what the
    mean says. The first biases are large: next to a constant pattern that dominates a group's statistics, the norms are
    nearly linear in the picture, and a flat colour, which they would otherwise take away, gets through.
    """
    encoder, decoder, latent = vae.encoder, vae.decoder, vae.config.latent_channels
    corner, centre = (slice(2), slice(2)), (1, 1)
    for module in vae.modules():
        if isinstance(module, Downsample):
            _pass_through_(module.conv, corner, 0.25)
        elif isinstance(module, Upsample):
            _pass_through_(module.conv, centre)
        elif isinstance(module, AttentionBlock):
            _zero_(module.to_out[0].weight)
        elif isinstance(module, (ResnetBlock, TemporalResnetBlock)):
            _zero_(module.conv2.weight)
            _zero_(module.conv2.bias)
            if isinstance(module, ResnetBlock) and module.conv_shortcut is not None:
                _pass_through_(module.conv_shortcut, (0, 0))
    with torch.no_grad():
        cast(Tensor, encoder.conv_in.bias).normal_()
        cast(Tensor, decoder.conv_in.bias).normal_(std=0.7)
        encoder.conv_out.weight[:latent] *= 6
        encoder.conv_out.weight[latent:] *= 0.1
        decoder.conv_in.weight *= 3
    _pass_through_(vae.quant_conv, (0, 0))
    vae.quant_conv.bias.data[latent:] = -8.0  # type: ignore[union-attr]
    _pass_through_(decoder.time_conv_out, (1, 0, 0))
    return vae


@torch.no_grad()
def _zero_(parameter: Any) -> None:
    parameter.zero_()


@torch.no_grad()
def _pass_through_(conv: nn.Module, taps: tuple[int | slice, ...], weight: float = 1.0) -> None:
    """Each output channel starts as one input channel at the given taps of the kernel, in turns."""
    kernel, bias = cast(Tensor, conv.weight), cast(Tensor, conv.bias)
    for channel in range(len(kernel)):
        kernel[channel] = 0
        place = (channel, channel % kernel.shape[1], *taps)
        kernel[place] = weight
    bias.zero_()


def loss(
    recipe: Recipe, batch: int, num_frames: int, size: int, latent: tuple[int, int]
) -> Callable[[Callable[..., Any], torch.Generator], Tensor]:
    """Mean absolute and squared error, the shape's pixels weighted, and the KL to a unit Gaussian.

    The mean of the error over each latent's pixels counts once more: edges dominate the rest, and a background that is
    a shade off would cost next to nothing.

    Args:
        recipe: weights and ranges.
        batch: clips, or single images, per step.
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
        difference = rebuilt - frames.to(rebuilt.device)
        error, shade = difference.abs(), F.avg_pool2d(difference.flatten(0, 1), factor).abs().mean()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1).mean()
        error = ((error + 4 * error.square()) * weight.to(error.device)).mean()
        return error + recipe.shade_weight * shade + recipe.kl_weight * kl

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
