"""The spatio-temporal UNet: noisy latents, image latents and conditioning in, the v-prediction out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.svd import layout
from svdlab.svd.config import PLAIN_BLOCKS, UNetConfig, per_level
from svdlab.svd.layers import (
    Conv2d,
    Downsample,
    FrameGroupNorm,
    Sinusoids,
    SpatioTemporalResBlock,
    SpatioTemporalTransformer,
    TimestepEmbedding,
    TransformerConditioning,
    Upsample,
)
from svdlab.svd.modules import Network, no_effect


@dataclass(frozen=True)
class Conditioning:
    """What one generation computes once and every denoising step reads.

    Attributes:
        added_time_embedding: (B, E), the embedded fps - 1, motion bucket and noise augmentation strength.
        transformers: one entry per transformer, in the order in which the UNet runs them.
    """

    added_time_embedding: Tensor
    transformers: list[TransformerConditioning]

    def halves(self) -> tuple[Conditioning, Conditioning]:
        """The unconditional and the conditional half of a batch that holds both."""
        first, second = self.added_time_embedding.chunk(2)
        pairs = [t.halves() for t in self.transformers]
        return Conditioning(first, [a for a, _ in pairs]), Conditioning(second, [b for _, b in pairs])


def _depths(value: int | Sequence[int], resnets: int) -> Sequence[int]:
    return (value,) * resnets if isinstance(value, int) else value[:resnets]


class DownBlock(nn.Module):
    """Resnets, each with a transformer behind it where ``transformers`` has one, then a downsampler."""

    def __init__(self, resnets: list, transformers: list, downsample: int | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(transformers)
        self.downsamplers = nn.ModuleList([Downsample(downsample)] if downsample else [])

    def forward(
        self, x: Tensor, emb: Tensor, conditioning: Iterator[TransformerConditioning]
    ) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, next(conditioning))
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, resnets: list, transformer: SpatioTemporalTransformer):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([transformer])

    def forward(self, x: Tensor, emb: Tensor, conditioning: Iterator[TransformerConditioning]) -> Tensor:
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, next(conditioning))
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Resnets over the concatenation with a skip each, a transformer behind each where there is one, an upsampler."""

    def __init__(self, resnets: list, transformers: list, upsample: int | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(transformers)
        self.upsamplers = nn.ModuleList([Upsample(upsample)] if upsample else [])

    def forward(
        self, x: Tensor, skips: list[Tensor], emb: Tensor, conditioning: Iterator[TransformerConditioning]
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=-1), emb)
            if self.attentions:
                x = self.attentions[i](x, next(conditioning))
        for upsampler in self.upsamplers:
            # The size of the skip that comes next, so that odd sizes find their way back.
            x = upsampler(x, (skips[-1].shape[2], skips[-1].shape[3]))
        return x


class Prediction(NamedTuple):
    """What the UNet returns in diffusers' form: ``sample`` (B, F, out_channels, h, w), the v-prediction."""

    sample: Tensor


class UNet(Network):
    """SVD's denoiser.

    Source: diffusers ``models/unets/unet_spatio_temporal_condition.py:UNetSpatioTemporalConditionModel``.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, levels = config.block_out_channels, len(config.block_out_channels)
        emb_channels = 4 * widths[0]
        layers = per_level("layers_per_block", config.layers_per_block, levels)
        heads = per_level("num_attention_heads", config.num_attention_heads, levels)
        context = per_level("cross_attention_dim", config.cross_attention_dim, levels)
        depth = per_level("transformer_layers_per_block", config.transformer_layers_per_block, levels)

        def transformer(level: int, layer_depth: int) -> SpatioTemporalTransformer:
            return SpatioTemporalTransformer(widths[level], heads[level], layer_depth, context[level])

        def transformers(kind: str, level: int, count: int) -> list[SpatioTemporalTransformer]:
            if kind in PLAIN_BLOCKS:
                return []
            return [transformer(level, d) for d in _depths(depth[level], count)]

        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj = Sinusoids(widths[0])
        self.time_embedding = TimestepEmbedding(widths[0], emb_channels)
        self.add_time_proj = Sinusoids(config.addition_time_embed_dim)
        self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, emb_channels)

        self.down_blocks = nn.ModuleList()
        previous = widths[0]
        for level, kind in enumerate(config.down_block_types):
            # The group-norm eps of diffusers' blocks as instantiated: 1e-6 with cross-attention, 1e-5 without.
            eps = 1e-5 if kind in PLAIN_BLOCKS else 1e-6
            inputs = [previous] + [widths[level]] * (layers[level] - 1)
            resnets = [SpatioTemporalResBlock(c, widths[level], emb_channels, eps) for c in inputs]
            last = level == levels - 1
            self.down_blocks.append(
                DownBlock(resnets, transformers(kind, level, layers[level]), None if last else widths[level])
            )
            previous = widths[level]

        mid = [SpatioTemporalResBlock(previous, previous, emb_channels, 1e-5) for _ in range(2)]
        self.mid_block = MidBlock(mid, transformer(levels - 1, _depths(depth[-1], 1)[0]))

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
            width, below, count = widths[level], widths[max(level - 1, 0)], layers[level] + 1
            skips = [width] * (count - 1) + [below]
            inputs = [previous] + [width] * (count - 1)
            resnets = [
                SpatioTemporalResBlock(c + s, width, emb_channels, 1e-6) for c, s in zip(inputs, skips, strict=True)
            ]
            self.up_blocks.append(UpBlock(resnets, transformers(kind, level, count), width if level else None))
            previous = width

        self.conv_norm_out = FrameGroupNorm(widths[0], eps=1e-5)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def transformers(self) -> list[SpatioTemporalTransformer]:
        """Every transformer, in the order in which ``forward`` runs them."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [t for block in blocks for t in block.attentions]

    def condition(self, image_embeddings: Tensor, added_time_ids: Tensor, num_frames: int) -> Conditioning:
        """Compute once what every denoising step of a generation shares.

        Args:
            image_embeddings: (B, 1, D), one CLIP token an image; zeros for the unconditional half.
            added_time_ids: (B, 3): fps - 1, motion bucket, noise augmentation strength.
            num_frames: F.

        Raises:
            SvdlabError: more than one context token. The collapsed cross-attention is exact for one token only; a
                model that needs more would show here first.
        """
        if image_embeddings.ndim != 3 or image_embeddings.shape[1] != 1:
            raise SvdlabError(
                f"image_embeddings: got shape {tuple(image_embeddings.shape)}, allowed: (batch, 1, channels); "
                "cross-attention to several context tokens is not implemented"
            )
        ids = self.add_time_proj(added_time_ids.flatten())
        ids = ids.reshape(len(added_time_ids), -1).to(image_embeddings.dtype)
        added = self.add_embedding(ids)
        return Conditioning(added, [t.condition(image_embeddings, num_frames) for t in self.transformers()])

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | Conditioning,
        added_time_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """``forward``, or with tensors diffusers' form of it, which computes the conditioning anew in every call.

        Args:
            sample, timestep: of ``forward``.
            encoder_hidden_states: ``image_embeddings`` of ``condition``; or ``forward``'s conditioning.
            added_time_ids: of ``condition``.
            return_dict: False returns a plain tuple.

        Returns:
            ``forward``'s result; in diffusers' form a ``Prediction``.
        """
        if isinstance(encoder_hidden_states, Conditioning):
            return super().__call__(sample, timestep, encoder_hidden_states)
        if added_time_ids is None:
            raise SvdlabError("added_time_ids: got none, allowed: (batch, 3): fps - 1, motion bucket, augmentation")
        conditioning = self.condition(encoder_hidden_states, added_time_ids, sample.shape[1])
        made = super().__call__(sample, timestep, conditioning)
        return Prediction(made) if return_dict else (made,)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """diffusers', which here has no effect."""
        no_effect("enable_forward_chunking", "feed-forward layers run in pieces wherever these would be large")

    def disable_forward_chunking(self) -> None:
        """The inverse of ``enable_forward_chunking``, without an effect."""

    def embedding(self, timestep: Tensor | float, conditioning: Conditioning, x: Tensor) -> Tensor:
        """What every resnet adds: (B, E), of the noise level and of the added time ids, for activations ``x``."""
        timesteps = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
        emb = self.time_embedding(self.time_proj(timesteps).to(x.dtype))
        return F.silu(emb + conditioning.added_time_embedding)

    def forward(self, sample: Tensor, timestep: Tensor | float, conditioning: Conditioning) -> Tensor:
        """One denoising step's network pass.

        Args:
            sample: (B, F, in_channels, h, w), scaled noisy latents and image latents concatenated along channels.
            timestep: a scalar or (B,), 0.25 * ln(sigma).
            conditioning: from ``condition`` with the same batch and frame count.

        Returns:
            (B, F, out_channels, h, w), the v-prediction.
        """
        x = layout.from_channels_first(sample)
        emb = self.embedding(timestep, conditioning, x)
        transformers = iter(conditioning.transformers)

        x = self.conv_in(x)
        skips = [x]
        for down_block in self.down_blocks:
            x, outputs = down_block(x, emb, transformers)
            skips += outputs
        x = self.mid_block(x, emb, transformers)
        for up_block in self.up_blocks:
            x = up_block(x, skips, emb, transformers)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return layout.to_channels_first(x)
