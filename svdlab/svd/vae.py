"""The VAE: an image encoder, and a temporal decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.svd import layout
from svdlab.svd.config import VAEConfig
from svdlab.svd.images import randn
from svdlab.svd.layers import (
    Conv2d,
    Downsample,
    FrameGroupNorm,
    ResnetBlock,
    SpatialSelfAttention,
    SpatioTemporalResBlock,
    TemporalConv,
    Upsample,
)
from svdlab.svd.modules import Network


class AttentionBlock(SpatialSelfAttention):
    """One-head self-attention among a frame's pixels, with its norm and residual: (B, F, H, W, C) -> the same."""

    def __init__(self, channels: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = FrameGroupNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.group_norm(x))


class EncoderBlock(nn.Module):
    """Resnets, then a downsampler that pads at the end."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, downsample: bool):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(c, out_channels, None, 1e-6) for c in inputs])
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        return x


class EncoderMidBlock(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, None, 1e-6) for _ in range(2)])
        self.attentions = nn.ModuleList([AttentionBlock(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Images to the moments of their latents: (B, F, H, W, 3) -> (B, F, h, w, 2 * latent).

    Source: diffusers ``models/autoencoders/vae.py:Encoder``.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderBlock(widths[max(i - 1, 0)], width, config.layers_per_block, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = EncoderMidBlock(widths[-1])
        self.conv_norm_out = FrameGroupNorm(widths[-1], eps=1e-6)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DecoderBlock(nn.Module):
    """The modules of one decoder level; ``TemporalDecoder`` runs them."""

    def __init__(self, inputs: list[int], out_channels: int, attention: bool = False, upsample: bool = False):
        super().__init__()
        # Temporal norms have another eps than spatial ones here, and the blend is switched.
        self.resnets = nn.ModuleList(
            SpatioTemporalResBlock(c, out_channels, None, 1e-6, 1e-5, switch_spatial_to_temporal_mix=True)
            for c in inputs
        )
        self.attentions = nn.ModuleList([AttentionBlock(out_channels)] if attention else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])


class TemporalDecoder(nn.Module):
    """Latents to frames: (B, F, h, w, latent) -> (B, F, H, W, 3).

    Source: diffusers ``models/autoencoders/autoencoder_kl_temporal_decoder.py:TemporalDecoder``.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, layers = config.block_out_channels[::-1], config.layers_per_block
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = DecoderBlock([widths[0]] * layers, widths[0], attention=True)
        self.up_blocks = nn.ModuleList(
            DecoderBlock([widths[max(i - 1, 0)]] + [width] * layers, width, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = FrameGroupNorm(widths[-1], eps=1e-6)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.time_conv_out = TemporalConv(config.out_channels, config.out_channels)

    def modules_in_order(self) -> Iterator[nn.Module]:
        """Every module between ``conv_in`` and ``conv_norm_out``, in execution order.

        diffusers pairs the mid block's resnets after the first with its single attention, so a third one and later
        ones never run there (``unet_3d_blocks.py:MidBlockTemporalDecoder.forward``); nor do they here.
        """
        yield self.mid_block.resnets[0]
        for attention, resnet in zip(self.mid_block.attentions, self.mid_block.resnets[1:], strict=False):
            yield attention
            yield resnet
        for block in self.up_blocks:
            yield from block.resnets  # type: ignore[misc]
            yield from block.upsamplers  # type: ignore[misc]

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for module in self.modules_in_order():
            x = module(x)
        return self.time_conv_out(self.conv_out(F.silu(self.conv_norm_out(x))))


class Posterior(NamedTuple):
    """A diagonal Gaussian over the latents of B images: ``mean`` and ``std`` (B, latent, h, w) each.

    Source: diffusers ``models/autoencoders/vae.py:DiagonalGaussianDistribution``.
    """

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn from it."""
        return self.mean + self.std * randn(self.mean.shape, generator, self.mean.device, self.mean.dtype)


class Encoded(NamedTuple):
    """What ``VAE.encode`` returns, in diffusers' form."""

    latent_dist: Posterior


class Decoded(NamedTuple):
    """What ``VAE.decode`` returns, in diffusers' form: ``sample`` (B * F, 3, H, W) in about [-1, 1]."""

    sample: Tensor


class VAE(Network):
    """SVD's autoencoder.

    Source: diffusers ``models/autoencoders/autoencoder_kl_temporal_decoder.py:AutoencoderKLTemporalDecoder``.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = TemporalDecoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def encode(self, images: Tensor, return_dict: bool = True) -> Encoded:
        """The posterior of images (B, 3, H, W) in [-1, 1].

        Args:
            images: that.
            return_dict: diffusers'; what is returned is a tuple either way.
        """
        moments = self.quant_conv(self.encoder(layout.from_channels_first(images[:, None])))
        mean, log_variance = layout.to_channels_first(moments)[:, 0].chunk(2, dim=1)
        return Encoded(Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))))

    def decode(self, z: Tensor, num_frames: int, return_dict: bool = True) -> Decoded:
        """diffusers' form of ``decode_videos``.

        Args:
            z: latents (B * F, latent, h, w), divided by the scaling factor.
            num_frames: F.
            return_dict: as for ``encode``.

        Raises:
            SvdlabError: latents that are no whole number of videos.
        """
        if z.ndim != 4 or len(z) % num_frames:
            raise SvdlabError(f"z: got shape {tuple(z.shape)}, allowed: (videos * {num_frames}, latent, h, w)")
        return Decoded(self.decode_videos(z.unflatten(0, (-1, num_frames))).flatten(0, 1))

    def decode_videos(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Frames of whole videos, each decoded as one: the result does not depend on ``chunk``.

        Args:
            latents: (B, F, latent, h, w), divided by the scaling factor.
            chunk: how many frames to hold at a time, for the memory: ``kernels.decode`` makes use of it. The plain
                network holds all of them.

        Returns:
            (B, F, 3, H, W) in about [-1, 1].
        """
        return layout.to_channels_first(self.decoder(layout.from_channels_first(latents)))
