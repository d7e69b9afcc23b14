"""The layers that the UNet and the VAE are made of, over (batch, frame, height, width, channel).

Attribute names are the checkpoint's keys. This is the network as one would print it: nothing here knows of devices,
caches or chunks. How it runs fast is ``svdlab.svd.kernels``'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.svd import layout

GROUPS = 32


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosines first: (N,) -> (N, dim) in float32.

    Source: diffusers ``models/embeddings.py:get_timestep_embedding`` with ``flip_sin_to_cos=True`` and
    ``downscale_freq_shift=0``.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=values.device))
    angles = values[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class Sinusoids(nn.Module):
    """``sinusoids`` as a module without weights, so that it has a name in a trace: (N,) -> (N, dim) in float32.

    Source: diffusers ``models/embeddings.py:Timesteps``.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, values: Tensor) -> Tensor:
        return sinusoids(values, self.dim)


class TimestepEmbedding(nn.Module):
    """Two linear layers around a SiLU: (N, in) -> (N, out)."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, hidden)
        self.linear_2 = nn.Linear(hidden, out_channels or hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Conv2d(nn.Conv2d):
    """A spatial convolution of every frame: (B, F, H, W, in) -> (B, F, H', W', out)."""

    def forward(self, x: Tensor) -> Tensor:
        return layout.from_images(super().forward(layout.as_images(x)), x.shape[0])


class TemporalConv(nn.Conv3d):
    """A (3, 1, 1) convolution over frames, run as a (3, 1) conv2d: (B, F, H, W, in) -> (B, F, H, W, out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(layout.as_time_strips(x), self.weight[..., 0], self.bias, padding=(1, 0))
        return layout.from_time_strips(y, x.shape[2])


class GroupNorm(nn.GroupNorm):
    """Group norm of (N, P, C) over P positions and the channels of a group: the same shape."""

    def __init__(self, channels: int, eps: float):
        super().__init__(GROUPS, channels, eps=eps)

    def normalize(self, rows: Tensor) -> Tensor:
        # A contiguous copy: of channels-last float32 torch's CPU kernel takes the variance as a difference of two
        # sums, which loses digits wherever a group's mean is large beside its spread.
        return super().forward(rows.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()


class FrameGroupNorm(GroupNorm):
    """Group norm with statistics of each frame: (B, F, H, W, C) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x.flatten(0, 1).flatten(1, 2)).reshape(x.shape)


class VideoGroupNorm(GroupNorm):
    """Group norm with statistics of the whole video: (B, F, H, W, C) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x.flatten(1, 3)).reshape(x.shape)


class ResnetBlock(nn.Module):
    """The spatial residual block: (B, F, H, W, in) -> (B, F, H, W, out).

    Source: diffusers ``models/resnet.py:ResnetBlock2D``. ``emb`` (B, E) is the time embedding after its SiLU.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int | None, eps: float):
        super().__init__()
        self.norm1 = FrameGroupNorm(in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_channels, out_channels) if emb_channels else None
        self.norm2 = FrameGroupNorm(out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and emb is not None:
            h = h + self.time_emb_proj(emb)[:, None, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class TemporalResnetBlock(nn.Module):
    """The temporal residual block: (B, F, H, W, C) -> the same shape.

    Source: diffusers ``models/resnet.py:TemporalResnetBlock``.
    """

    def __init__(self, channels: int, emb_channels: int | None, eps: float):
        super().__init__()
        self.norm1 = VideoGroupNorm(channels, eps)
        self.conv1 = TemporalConv(channels, channels)
        self.time_emb_proj = nn.Linear(emb_channels, channels) if emb_channels else None
        self.norm2 = VideoGroupNorm(channels, eps)
        self.conv2 = TemporalConv(channels, channels)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and emb is not None:
            h = h + self.time_emb_proj(emb)[:, None, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class AlphaBlender(nn.Module):
    """The learned blend of a spatial and a temporal path; ``mix_factor`` (1,) goes through a sigmoid.

    Source: diffusers ``models/resnet.py:AlphaBlender``. In the VAE the two paths change places
    (``switch_spatial_to_temporal_mix``), in the UNet they do not.
    """

    def __init__(self, switch_spatial_to_temporal_mix: bool = False):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))
        self.switch_spatial_to_temporal_mix = switch_spatial_to_temporal_mix

    def temporal_share(self) -> Tensor:
        """The temporal path's weight (1,), in 0..1."""
        return torch.sigmoid(self.mix_factor if self.switch_spatial_to_temporal_mix else -self.mix_factor)

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        return torch.lerp(spatial, temporal, self.temporal_share().to(spatial.dtype))


class SpatioTemporalResBlock(nn.Module):
    """A spatial residual block, a temporal one behind it, and their blend: (B, F, H, W, in) -> (B, F, H, W, out).

    Source: diffusers ``models/resnet.py:SpatioTemporalResBlock``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int | None,
        eps: float,
        temporal_eps: float | None = None,
        switch_spatial_to_temporal_mix: bool = False,
    ):
        super().__init__()
        self.spatial_res_block = ResnetBlock(in_channels, out_channels, emb_channels, eps)
        self.temporal_res_block = TemporalResnetBlock(out_channels, emb_channels, temporal_eps or eps)
        self.time_mixer = AlphaBlender(switch_spatial_to_temporal_mix)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        x = self.spatial_res_block(x, emb)
        return self.time_mixer(x, self.temporal_res_block(x, emb))


class Attention(nn.Module):
    """Multi-head attention's weights in the checkpoint's names; a subclass says what attends to what.

    Source: diffusers ``models/attention_processor.py:Attention`` and ``AttnProcessor2_0``.
    """

    scaled_dot_product_attention: ClassVar[Callable[..., Tensor]] = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])


class SpatialSelfAttention(Attention):
    """Self-attention among the pixels of each frame: (B, F, H, W, C) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layout.spatial_heads(p(x), self.heads) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](layout.from_heads(self.scaled_dot_product_attention(q, k, v), x.shape))


class TemporalSelfAttention(Attention):
    """Self-attention among the frames at each pixel: (B, F, H, W, C) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layout.temporal_heads(p(x), self.heads) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](layout.from_heads(self.scaled_dot_product_attention(q, k, v), x.shape))


class SingleTokenCrossAttention(Attention):
    """Cross-attention to ONE context token: (B, 1, D) -> (B, 1, 1, 1, C), the same for every query.

    The softmax over a single key is 1, so the result is the projected value; ``to_q``, ``to_k`` and the norm before
    them have weights in the checkpoint and no influence.
    """

    def forward(self, context: Tensor) -> Tensor:
        return self.to_out[0](self.to_v(context))[:, :, None, None]


class GEGLU(nn.Module):
    """Gated GELU: (..., C) -> (..., inner). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)
        self.approximate = "none"

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate=self.approximate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back: (..., C) -> (..., C). The checkpoint numbers them 0 and 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Spatial attention, the image token, feed-forward: (B, F, H, W, C) -> the same shape.

    Source: diffusers ``models/attention.py:BasicTransformerBlock``. ``image_token`` (B, 1, 1, 1, C) is the result of
    ``attn2``, which no step changes; ``norm2`` is in the checkpoint and never runs.
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SpatialSelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = SingleTokenCrossAttention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, image_token: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + image_token
        return x + self.ff(self.norm3(x))


class TemporalTransformerBlock(nn.Module):
    """Feed-forward, temporal attention, the image token, feed-forward: (B, F, H, W, C) -> the same shape.

    Source: diffusers ``models/attention.py:TemporalBasicTransformerBlock``.
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.ff_in = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = TemporalSelfAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = SingleTokenCrossAttention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, image_token: Tensor) -> Tensor:
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        x = x + image_token
        return x + self.ff(self.norm3(x))


@dataclass(frozen=True)
class TransformerConditioning:
    """What one transformer needs that no denoising step changes.

    Attributes:
        frame_positions: (1, F, 1, 1, C), the embedded frame numbers.
        spatial_tokens: per layer (B, 1, 1, 1, C), the spatial cross-attention's result.
        temporal_tokens: per layer (B, 1, 1, 1, C), the temporal cross-attention's result.
    """

    frame_positions: Tensor
    spatial_tokens: list[Tensor]
    temporal_tokens: list[Tensor]

    def halves(self) -> tuple[TransformerConditioning, TransformerConditioning]:
        """Split the batch in two."""
        spatial = [t.chunk(2) for t in self.spatial_tokens]
        temporal = [t.chunk(2) for t in self.temporal_tokens]
        first, second = (([s[i] for s in spatial], [t[i] for t in temporal]) for i in (0, 1))
        return (
            TransformerConditioning(self.frame_positions, *first),
            TransformerConditioning(self.frame_positions, *second),
        )


class SpatioTemporalTransformer(nn.Module):
    """Spatial and temporal transformer blocks in turn, blended: (B, F, H, W, C) -> the same shape.

    Source: diffusers ``models/transformers/transformer_temporal.py:TransformerSpatioTemporalModel``.
    """

    def __init__(self, channels: int, heads: int, depth: int, context_channels: int):
        super().__init__()
        self.norm = FrameGroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        blocks = [TransformerBlock(channels, heads, context_channels) for _ in range(depth)]
        temporal = [TemporalTransformerBlock(channels, heads, context_channels) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.temporal_transformer_blocks = nn.ModuleList(temporal)
        self.time_proj = Sinusoids(channels)
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels)
        self.time_mixer = AlphaBlender()
        self.proj_out = nn.Linear(channels, channels)

    def condition(self, image_embeddings: Tensor, num_frames: int) -> TransformerConditioning:
        """Everything that depends on the image token (B, 1, D) and the frame count alone."""
        frames = torch.arange(num_frames, device=image_embeddings.device)
        positions = self.time_proj(frames).to(image_embeddings.dtype)
        return TransformerConditioning(
            self.time_pos_embed(positions)[None, :, None, None],
            [block.attn2(image_embeddings) for block in self.transformer_blocks],  # type: ignore[operator]
            [block.attn2(image_embeddings) for block in self.temporal_transformer_blocks],  # type: ignore[operator]
        )

    def forward(self, x: Tensor, conditioning: TransformerConditioning) -> Tensor:
        return x + self.proj_out(self.blocks(self.proj_in(self.norm(x)), conditioning))

    def layers(self, conditioning: TransformerConditioning) -> Iterator[tuple[nn.Module, nn.Module, Tensor, Tensor]]:
        """Each layer's spatial and temporal block, and the image token of each (B, 1, 1, 1, C)."""
        return zip(
            self.transformer_blocks,
            self.temporal_transformer_blocks,
            conditioning.spatial_tokens,
            conditioning.temporal_tokens,
            strict=True,
        )

    def blocks(self, h: Tensor, conditioning: TransformerConditioning) -> Tensor:
        """Between the projections: a spatial and a temporal block in turn."""
        for spatial, temporal, spatial_token, temporal_token in self.layers(conditioning):
            h = spatial(h, spatial_token)
            h = self.time_mixer(h, temporal(h + conditioning.frame_positions, temporal_token))
        return h


class Downsample(nn.Module):
    """Halve height and width (rounded up): a stride-2 convolution.

    Source: diffusers ``models/downsampling.py:Downsample2D``. With ``padding=0`` one row and one column of zeros
    are added at the bottom and at the right (the VAE encoder), so odd sizes are rounded down.
    """

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad_end = padding == 0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 1, 0, 1)) if self.pad_end else x)


class Upsample(nn.Module):
    """Nearest-neighbour to ``size`` (height, width), by default twice as large, then a convolution.

    Source: diffusers ``models/upsampling.py:Upsample2D``.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        images = F.interpolate(layout.as_images(x), size=size or (2 * x.shape[2], 2 * x.shape[3]))
        return self.conv(layout.from_images(images, x.shape[0]))
