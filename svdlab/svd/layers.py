"""The layers that the UNet, the VAE and the CLIP tower are made of, over (batch, frame, height, width, channel).

Attribute names are the checkpoint's keys. Additions are made in place on tensors that were computed one line
above and that autograd does not keep, so that training works and inference touches memory once less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.svd import layout

GROUPS = 32


class Packed(nn.Module):
    """A layer whose weight oneDNN keeps in its own blocked order on CPUs, made at the first inference call.

    Without it oneDNN reorders the weight in every call, which costs more than the product where activations are
    small; the price is a second copy of the weights in memory. Training, other devices and ``torch.compile`` read the
    plain weight.
    """

    _blocked: list[Tensor] | None = None
    _blocked_version = -1  # of the weight that was blocked: an optimizer changes it in place

    def _apply(self, fn: Callable, recurse: bool = True) -> Packed:
        self._blocked = None  # the weight is about to change its dtype or device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the blocked weight behind; it is made again where it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_blocked"}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._blocked = None
        super()._load_from_state_dict(*args, **kwargs)

    def _reordered(self, weight: Tensor, reorder: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        if self._blocked is None or self._blocked_version != weight._version:
            self._blocked, self._blocked_version = reorder(weight), weight._version
        return self._blocked

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` of (..., in) with a view of this layer's weight (out, in).

        Unlike MKL's, oneDNN's product is fast on AMD's processors.
        """
        if not _packs(x):
            return F.linear(x, weight, bias)
        (blocked,) = self._reordered(weight, lambda w: [_onednn._reorder_linear_weight(w)])
        return _product(x, blocked, bias)

    def convolve(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: int | tuple[int, int],
        stride: int = 1,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """``F.conv2d`` of channels_last images (N, C, H, W) with a view of this layer's weight (O, I, kH, kW).

        A layer always asks for the same arrangement of its weight, which is made when the weight is blocked.
        """
        if not _packs(images):
            return F.conv2d(images, arrange(weight) if arrange else weight, bias, stride=stride, padding=padding)
        pads = [padding, padding] if isinstance(padding, int) else list(padding)
        strides, dilation = [stride, stride], [1, 1]

        def reorder(weight: Tensor) -> list[Tensor]:
            kernel = arrange(weight) if arrange else weight
            return [_onednn._reorder_convolution_weight(kernel, pads, strides, dilation, 1, list(images.shape))]

        (blocked,) = self._reordered(weight, reorder)
        return _onednn._convolution_pointwise(images, blocked, bias, pads, strides, dilation, 1, "none", [], "")


_onednn = torch.ops.mkldnn


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in oneDNN; the weight blocked or contiguous."""
    return _onednn._linear_pointwise(x, weight, bias, "none", [], "")


def _packs(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


# Numbers of an activation that are worked on at a time: on CPUs, so that what a layer makes is still in the cache, or
# at least in memory that the process holds already, when the next one reads it; elsewhere, for the memory.
AT_A_TIME = {"cpu": 2**20}
AT_A_TIME_ELSEWHERE = 2**24


def at_a_time(x: Tensor, size: int, at_least: int = 1) -> int:
    """How many parts of ``size`` numbers of a tensor to work on at a time; on CPUs, where few are best, one will do."""
    if x.device.type == "cpu":
        return max(1, AT_A_TIME["cpu"] // size)
    return max(1, at_least, AT_A_TIME_ELSEWHERE // size)


def over_frames(function: Callable[..., Tensor], frames: Sequence[Tensor], *per_video: Tensor | None) -> Tensor:
    """``function(*frames, *per_video)`` for a function that treats every frame alone, a few frames at a time.

    Training and ``torch.compile`` see one call.

    Args:
        function: of tensors (B, F, H, W, C) and of ``per_video``; gives (B, F, H', W', C').
        frames: its arguments (B, F, H, W, C).
        per_video: further arguments, (B, ...) each, or None.
    """
    videos, count = frames[0].shape[:2]
    step = at_a_time(frames[0], frames[0][0, 0].numel())
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole or videos * count <= step:
        return function(*frames, *per_video)
    step = math.ceil(count / math.ceil(count / step))  # pieces of a size
    result = None
    for video in range(videos):
        one = slice(video, video + 1)
        constants = [None if c is None else c[one] for c in per_video]
        for start in range(0, count, step):
            few = slice(start, start + step)
            y = function(*(x[one, few] for x in frames), *constants)
            if result is None:
                result = y.new_empty(videos, count, *y.shape[2:])
            result[one, few] = y
    assert result is not None
    return result


def sinusoids(values: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosines first: (N,) -> (N, dim) in float32.

    Source: diffusers ``models/embeddings.py:get_timestep_embedding`` with ``flip_sin_to_cos=True`` and
    ``downscale_freq_shift=0``.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=values.device))
    angles = values[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class Linear(Packed, nn.Linear):
    """A linear layer over the channel axis: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias)

    def gated(self, x: Tensor, approximate: str) -> Tensor:
        """The result's first half of channels times the GELU of its second half, each touched once if possible."""
        if not _packs(x):
            value, gate = F.linear(x, self.weight, self.bias).chunk(2, dim=-1)
            return value * F.gelu(gate, approximate=approximate)
        blocked = self._reordered(self.weight, lambda w: [_onednn._reorder_linear_weight(half) for half in w.chunk(2)])
        value_bias, gate_bias = self.bias.chunk(2)
        gate = _onednn._linear_pointwise(x, blocked[1], gate_bias, "gelu", [], approximate)
        return _onednn._linear_pointwise.binary(x, gate, blocked[0], value_bias, "mul")


class Conv2d(Packed, nn.Conv2d):
    """A spatial convolution of every frame: (B, F, H, W, in) -> (B, F, H', W', out)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            return self.multiply(x, self.weight.flatten(1), self.bias)
        padding, stride = int(self.padding[0]), self.stride[0]
        return layout.from_images(
            self.convolve(layout.as_images(x), self.weight, self.bias, padding, stride), x.shape[0]
        )


class TemporalConv(Packed, nn.Conv3d):
    """A (3, 1, 1) convolution over frames, run as a (3, 1) conv2d: (B, F, H, W, in) -> (B, F', H, W, out)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(layout.as_time_strips(x), self.weight[..., 0], self.bias, (1, 0))
        return layout.from_time_strips(y, x.shape[2])


# A norm of so few numbers is bound by the count of its operations, and the transposed copy stays in the cache.
FEW_NUMBERS = 2**18


def group_norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of (N, P, C) over P positions and the channels of a group: the same shape.

    On CPUs torch takes the variance of channels-last float32 as a difference of two sums, which loses the digits that
    diffusers' contiguous tensors keep wherever a group's mean is large beside its spread. Here it is taken about the
    mean, channel by channel. Half precision rounds more coarsely than that, and GPU kernels do not have the flaw.
    """
    on_cpu = rows.device.type == "cpu"
    if on_cpu and rows.numel() <= FEW_NUMBERS:
        images = rows.transpose(1, 2).contiguous()
        return F.group_norm(images, GROUPS, weight, bias, eps).transpose(1, 2).contiguous()
    if not on_cpu or rows.dtype != torch.float32:
        images = rows[:, :, None].permute(0, 3, 1, 2)  # channels_last, in which the kernel reads and writes
        return F.group_norm(images, GROUPS, weight, bias, eps).permute(0, 2, 3, 1)[:, :, 0]
    mean, variance = channel_moments(rows)
    group_mean, group_variance = merged_moments(mean, variance)
    scale = (group_variance + eps).rsqrt() * weight
    return torch.addcmul((bias - group_mean * scale)[:, None], rows, scale[:, None])


def channel_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (N, P, C) over P positions, in float32 or wider: (N, C) each."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    parts = rows.split(at_a_time(rows, rows[:, 0].numel()), dim=1)
    mean = _total(part.to(wide).sum(1) for part in parts) / rows.shape[1]
    squares = ((part.to(wide) - mean[:, None]).square_().sum(1) for part in parts)
    return mean, _total(squares) / rows.shape[1]


def _total(terms: Iterator[Tensor]) -> Tensor:
    return sum(terms, next(terms))


def merged_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """A group's mean and variance from those of its channels, (..., C) each, repeated for every channel.

    Source: Chan, Golub and LeVeque 1983, parts of equal size.
    """
    means, variances = (m.unflatten(-1, (GROUPS, -1)) for m in (mean, variance))
    group_mean = means.mean(-1, keepdim=True)
    group_variance = (variances + (means - group_mean).square()).mean(-1, keepdim=True)
    return group_mean.expand_as(means).flatten(-2), group_variance.expand_as(means).flatten(-2)


class FrameGroupNorm(nn.GroupNorm):
    """Group norm with statistics of each frame: (B, F, H, W, C) -> the same shape."""

    def __init__(self, channels: int, eps: float):
        super().__init__(GROUPS, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x.flatten(0, 1).flatten(1, 2), self.weight, self.bias, self.eps).reshape(x.shape)


class VideoGroupNorm(nn.GroupNorm):
    """Group norm with statistics of the whole video: (B, F, H, W, C) -> the same shape."""

    def __init__(self, channels: int, eps: float):
        super().__init__(GROUPS, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x.flatten(1, 3), self.weight, self.bias, self.eps).reshape(x.shape)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) of the normalisation of one video (F, H, W, C), whatever chunk is normalised later.

        Frame by frame in a fixed order: the result does not depend on a chunk size.
        """
        means, variances = channel_moments(x.flatten(1, 2))
        mean = means.mean(0)
        group_mean, variance = merged_moments(mean, (variances + (means - mean).square()).mean(0))
        scale = (variance + self.eps).rsqrt() * self.weight
        return scale, self.bias - group_mean * scale


class TimestepEmbedding(nn.Module):
    """Two linear layers around a SiLU: (N, in) -> (N, out)."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int | None = None):
        super().__init__()
        self.linear_1 = Linear(in_channels, hidden)
        self.linear_2 = Linear(hidden, out_channels or hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """The spatial residual block: (B, F, H, W, in) -> (B, F, H, W, out).

    Source: diffusers ``models/resnet.py:ResnetBlock2D``. ``emb`` (B, E) is the time embedding after its SiLU.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int | None, eps: float):
        super().__init__()
        self.norm1 = FrameGroupNorm(in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(emb_channels, out_channels) if emb_channels else None
        self.norm2 = FrameGroupNorm(out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        if self.time_emb_proj is not None and emb is not None:
            emb = self.time_emb_proj(emb)[:, None, None, None]
        return over_frames(self._frames, [x], emb)

    def _frames(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if emb is not None:
            h += emb
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class TemporalResnetBlock(nn.Module):
    """The temporal residual block's update, WITHOUT its residual: (B, F, H, W, C) -> the same shape.

    Source: diffusers ``models/resnet.py:TemporalResnetBlock``, which returns ``x + update``. The blend that follows
    is between ``x`` and ``x + update``, which is ``x`` plus a share of the update: see ``AlphaBlender.add``.
    """

    def __init__(self, channels: int, emb_channels: int | None, eps: float):
        super().__init__()
        self.norm1 = VideoGroupNorm(channels, eps)
        self.conv1 = TemporalConv(channels, channels)
        self.time_emb_proj = Linear(emb_channels, channels) if emb_channels else None
        self.norm2 = VideoGroupNorm(channels, eps)
        self.conv2 = TemporalConv(channels, channels)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None and emb is not None:
            h += self.time_emb_proj(emb)[:, None, None, None]
        return self.conv2(F.silu(self.norm2(h), inplace=True))

    def add_to(self, x: Tensor, share: Tensor) -> None:
        """``x += share * self(x)`` for one video (F, H, W, C), in place, some pixels of all frames at a time.

        A temporal conv looks at no other pixel, and the norms take the whole video's statistics, so the numbers are
        those of ``forward``. Beside ``x`` it holds one more video. Inference only.
        """
        h = torch.empty_like(x)
        few = at_a_time(x, x[:, 0, 0].numel())
        parts = list(zip(x.flatten(1, 2).split(few, dim=1), h.flatten(1, 2).split(few, dim=1), strict=True))
        scale, shift = self.norm1.statistics(x)
        for part, changed in parts:
            changed.copy_(_convolve_activated(self.conv1, part, scale, shift))
        scale, shift = self.norm2.statistics(h)
        for part, changed in parts:
            part.addcmul_(_convolve_activated(self.conv2, changed, scale, shift), share)


def _convolve_activated(conv: TemporalConv, pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``conv(silu(pixels * scale + shift))`` of some pixels of one video (F, P, C)."""
    wide = torch.addcmul(shift, pixels.to(scale.dtype), scale)
    return conv(F.silu(wide, inplace=True).to(pixels.dtype)[None, :, :, None])[0, :, :, 0]


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

    def add(self, spatial: Tensor, update: Tensor) -> Tensor:
        """The blend of ``spatial`` and ``spatial + update``."""
        return torch.addcmul(spatial, update, self.temporal_share().to(spatial.dtype))


class SpatioTemporalResBlock(nn.Module):
    """A spatial residual block, a temporal one, and their blend: (B, F, H, W, in) -> (B, F, H, W, out).

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
        return self.time_mixer.add(x, self.temporal_res_block(x, emb))


LONG = 512  # positions
SCORES = 2**20  # that are held at a time: they stay in the cache


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of (N, heads, L, d) among all L positions: the same shape.

    On CPUs torch's kernel is slower in bfloat16 than in float32, and takes its products from MKL in small blocks. Here
    bfloat16 goes through it in float32, a few heads at a time, and long sequences have the scores of some queries at a
    time from oneDNN, in float32 as that kernel has them.
    """
    n, heads, length, d = q.shape
    if not _packs(q) or (q.dtype == torch.float32 and length < LONG):
        return F.scaled_dot_product_attention(q, k, v)
    result = q.new_empty(n, length, heads, d).transpose(1, 2)
    if length < LONG:
        few = max(1, FEW_NUMBERS // (n * length * d))
        for attended, *inputs in zip(*(t.split(few, dim=1) for t in (result, q, k, v)), strict=True):
            attended.copy_(F.scaled_dot_product_attention(*(t.float() for t in inputs)))
        return result
    few = max(1, SCORES // length)
    for i, head in itertools.product(range(n), range(heads)):
        keys, values = k[i, head].float() * d**-0.5, v[i, head].T.contiguous()
        for queries, attended in zip(q[i, head].split(few), result[i, head].split(few), strict=True):
            scores = _product(queries.float(), keys)
            attended.copy_(_product(scores.softmax(-1).to(q.dtype), values))
    return result


class Attention(nn.Module):
    """Multi-head attention weights in the checkpoint's names; which axis attends is the caller's choice of view.

    Source: diffusers ``models/attention_processor.py:Attention`` and ``AttnProcessor2_0``.
    """

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=bias)
        self.to_k = Linear(context_channels or channels, channels, bias=bias)
        self.to_v = Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def over_space(self, x: Tensor) -> Tensor:
        """Self-attention among the pixels of each frame: (B, F, H, W, C) -> the same shape."""
        q, k, v = (layout.spatial_heads(p(x), self.heads) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](layout.from_spatial_heads(attend(q, k, v), x.shape))

    def over_time(self, x: Tensor) -> Tensor:
        """Self-attention among the frames at each pixel: (B, F, H, W, C) -> the same shape."""
        q, k, v = (layout.temporal_heads(p(x), self.heads) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](layout.from_temporal_heads(attend(q, k, v), x.shape))

    def to_single_token(self, context: Tensor) -> Tensor:
        """Cross-attention to ONE context token: (B, 1, D) -> (B, 1, 1, 1, C), the same for every query.

        The softmax over a single key is 1, so the result is the projected value; queries, keys and the norm before
        them have weights in the checkpoint and no influence.
        """
        return self.to_out[0](self.to_v(context))[:, :, None, None]


class GEGLU(nn.Module):
    """Gated GELU: (..., C) -> (..., inner). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = Linear(channels, 2 * inner)
        self.approximate = "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.proj.gated(x, self.approximate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back: (..., C) -> (..., C). The checkpoint numbers them 0 and 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Spatial attention, the image token, feed-forward: (B, F, H, W, C) -> the same shape.

    Source: diffusers ``models/attention.py:BasicTransformerBlock``. ``norm2``, ``attn2.to_q`` and ``attn2.to_k``
    are in the checkpoint and never run (see ``Attention.to_single_token``).
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, image_token: Tensor) -> Tensor:
        return over_frames(self._frames, [x], image_token)

    def _frames(self, x: Tensor, image_token: Tensor) -> Tensor:
        x = self.attn1.over_space(self.norm1(x)).add_(x).add_(image_token)
        return self.ff(self.norm3(x)).add_(x)


class TemporalTransformerBlock(nn.Module):
    """Feed-forward, temporal attention, the image token, feed-forward: (B, F, H, W, C) -> the same shape.

    Source: diffusers ``models/attention.py:TemporalBasicTransformerBlock``.
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.ff_in = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, image_token: Tensor) -> Tensor:
        x = over_frames(lambda frames: self.ff_in(self.norm_in(frames)).add_(frames), [x])
        x = self.attn1.over_time(self.norm1(x)).add_(x).add_(image_token)
        return over_frames(lambda frames: self.ff(self.norm3(frames)).add_(frames), [x])


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
        self.channels = channels
        self.norm = FrameGroupNorm(channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        blocks = [TransformerBlock(channels, heads, context_channels) for _ in range(depth)]
        temporal = [TemporalTransformerBlock(channels, heads, context_channels) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.temporal_transformer_blocks = nn.ModuleList(temporal)
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels)
        self.time_mixer = AlphaBlender()
        self.proj_out = Linear(channels, channels)

    def condition(self, image_embeddings: Tensor, num_frames: int) -> TransformerConditioning:
        """Everything that depends on the image token (B, 1, D) and the frame count alone."""
        frames = torch.arange(num_frames, device=image_embeddings.device)
        positions = sinusoids(frames, self.channels).to(image_embeddings.dtype)
        return TransformerConditioning(
            self.time_pos_embed(positions)[None, :, None, None],
            [block.attn2.to_single_token(image_embeddings) for block in self.transformer_blocks],  # type: ignore[union-attr, operator]
            [block.attn2.to_single_token(image_embeddings) for block in self.temporal_transformer_blocks],  # type: ignore[union-attr, operator]
        )

    def forward(self, x: Tensor, conditioning: TransformerConditioning) -> Tensor:
        h = over_frames(lambda frames: self.proj_in(self.norm(frames)), [x])
        layers = zip(
            self.transformer_blocks,
            self.temporal_transformer_blocks,
            conditioning.spatial_tokens,
            conditioning.temporal_tokens,
            strict=True,
        )
        for spatial, temporal, spatial_token, temporal_token in layers:
            h = spatial(h, spatial_token)
            h = self.time_mixer(h, temporal(h + conditioning.frame_positions, temporal_token))
        return self.proj_out(h).add_(x)


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


class EnlargingConv2d(Conv2d):
    """A 3x3 convolution of an image enlarged to its nearest neighbours: (B, F, H, W, in) -> (B, F, H', W', out).

    Where both sides double, the three taps along a side meet two different pixels only. Inference on CPUs adds up,
    once, the taps that meet the same one: the four pixels that a pixel becomes are then channels of one 2x2
    convolution of the small image, with 4/9 of the multiplications.
    """

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        b, _, height, width, _ = x.shape
        images = layout.as_images(x)
        if not _packs(x) or size != (2 * height, 2 * width):
            y = F.conv2d(F.interpolate(images, size=size), self.weight, self.bias, padding=1)
            return layout.from_images(y, b)
        bias = None if self.bias is None else self.bias.repeat(4)
        y = self.convolve(images, self.weight, bias, padding=1, arrange=_taps_of_quarters)
        return layout.from_quarters(layout.from_images(y, b))


def _taps_of_quarters(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (4 O, I, 2, 2): upper left, upper right, lower left and lower right pixel of every four."""
    met = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)
    taps = torch.einsum("ihy,jwx,ocyx->ijochw", met, met, weight.float())
    return taps.flatten(0, 2).to(weight.dtype)


class Upsample(nn.Module):
    """Nearest-neighbour to ``size`` (height, width), or twice as large, then a convolution.

    Source: diffusers ``models/upsampling.py:Upsample2D``.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = EnlargingConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(x, size or (2 * x.shape[2], 2 * x.shape[3]))
