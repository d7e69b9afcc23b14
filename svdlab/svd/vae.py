"""The VAE: an image encoder, and a temporal decoder that gives the same frames for any chunk size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.svd import layout
from svdlab.svd.config import check_groups
from svdlab.svd.layers import (
    Attention,
    Conv2d,
    Downsample,
    FrameGroupNorm,
    ResnetBlock,
    SpatioTemporalResBlock,
    TemporalConv,
    Upsample,
    at_a_time,
)


@dataclass(frozen=True)
class VAEConfig:
    """``vae/config.json``, with the names and defaults of diffusers' ``AutoencoderKLTemporalDecoder``."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True

    def __post_init__(self) -> None:
        check_groups("block_out_channels", self.block_out_channels)
        if len(self.down_block_types) != len(self.block_out_channels):
            raise SvdlabError(
                f"down_block_types has {len(self.down_block_types)} entries, block_out_channels has "
                f"{len(self.block_out_channels)}: they must agree"
            )
        for block in self.down_block_types:
            if block != "DownEncoderBlock2D":
                raise SvdlabError(f"down_block_types: {block!r} is not implemented; allowed: DownEncoderBlock2D")

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encoder_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the encoder runs in: the published one overflows in float16, and ``force_upcast`` says so."""
        return torch.float32 if dtype == torch.float16 and self.force_upcast else dtype


class AttentionBlock(Attention):
    """One-head self-attention among a frame's pixels, with its norm and residual: (B, F, H, W, C) -> the same."""

    def __init__(self, channels: int):
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = FrameGroupNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.over_space(self.group_norm(x)).add_(x)


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
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


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
        """All frames at once. Trains, too."""
        x = self.conv_in(z)
        for module in self.modules_in_order():
            x = module(x)
        return self.time_conv_out(self._to_pixels(x))

    def in_chunks(self, z: Tensor, chunk: int) -> Tensor:
        """What ``forward`` gives, with activations of ``chunk`` frames wherever a layer does not look across frames.

        The layers that do are run by ``TemporalResnetBlock.add_to``. Inference only.
        """
        x, per_frame = z.clone(), [self.conv_in]  # what follows works in place
        for module in self.modules_in_order():
            if isinstance(module, SpatioTemporalResBlock):
                x = _map_frames([*per_frame, module.spatial_res_block], x, chunk)
                share = module.time_mixer.temporal_share()
                for video in x:
                    module.temporal_res_block.add_to(video, share)
                per_frame = []
            else:
                per_frame.append(module)  # type: ignore[arg-type]
        return self.time_conv_out(_map_frames([*per_frame, self._to_pixels], x, chunk))

    def _to_pixels(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


def _map_frames(functions: list[Callable[[Tensor], Tensor]], x: Tensor, chunk: int) -> Tensor:
    """Apply functions that treat every frame alone to (B, F, ...), ``chunk`` frames at a time or more small ones.

    Where they keep a frame's shape, the result takes the place of ``x``.
    """
    step = at_a_time(x, x[0, 0].numel(), at_least=chunk)
    frames = x.flatten(0, 1)
    result = None
    for start in range(0, len(frames), step):
        y = frames[None, start : start + step]
        for function in functions:
            y = function(y)
        if result is None:
            result = frames if y.shape[2:] == frames.shape[1:] else y.new_empty(len(frames), *y.shape[2:])
        result[start : start + step] = y[0]
    assert result is not None
    return result.unflatten(0, x.shape[:2])


class VAE(nn.Module):
    """SVD's autoencoder.

    Source: diffusers ``models/autoencoders/autoencoder_kl_temporal_decoder.py:AutoencoderKLTemporalDecoder``.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = TemporalDecoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images (B, 3, H, W) in [-1, 1]: (B, latent, h, w) each."""
        moments = self.quant_conv(self.encoder(layout.from_channels_first(images[:, None])))
        mean, log_variance = layout.to_channels_first(moments)[:, 0].chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Frames of whole clips, each decoded as one video: the result does not depend on ``chunk``.

        Args:
            latents: (B, F, latent, h, w), divided by the scaling factor.
            chunk: frames to hold at a time in the layers that treat frames alone; None or F and more: all.

        Returns:
            (B, F, 3, H, W) in about [-1, 1].
        """
        z = layout.from_channels_first(latents)
        if chunk is None or chunk >= latents.shape[1]:
            return layout.to_channels_first(self.decoder(z))
        return layout.to_channels_first(self.decoder.in_chunks(z, chunk))
