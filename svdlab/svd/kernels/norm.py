"""Group norm without the contiguous copy, and as exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from svdlab.svd.kernels.pieces import each, piece_length
from svdlab.svd.kernels.registry import FLOATS, Kernel, Trial, register, replaces, usable
from svdlab.svd.layers import GROUPS, FrameGroupNorm, GroupNorm, VideoGroupNorm

# A norm of so few numbers is bound by the count of its operations, and the plain layer's copy stays in the cache.
FEW_NUMBERS = 2**18


class FastGroupNorm(GroupNorm):
    """On CPUs float32 is normalised about the mean, channel by channel; all else in torch's channels-last kernel.

    Half precision rounds more coarsely than that kernel's difference of sums, and GPU kernels do not have the flaw.
    """

    def normalize(self, rows: Tensor) -> Tensor:
        on_cpu = rows.device.type == "cpu"
        if (on_cpu and rows.numel() <= FEW_NUMBERS) or not usable(GROUP_NORM, rows):
            return super().normalize(rows)
        if on_cpu and rows.dtype == torch.float32:
            return about_the_mean(rows, self.weight, self.bias, self.eps)
        return channels_last(rows, self.weight, self.bias, self.eps)


@replaces(FrameGroupNorm)
class FastFrameGroupNorm(FastGroupNorm, FrameGroupNorm):
    """Of each frame."""


@replaces(VideoGroupNorm)
class FastVideoGroupNorm(FastGroupNorm, VideoGroupNorm):
    """Of the whole video."""


def channels_last(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of (N, P, C) in the layout that torch's kernel reads and writes."""
    images = rows[:, :, None].permute(0, 3, 1, 2)
    return F.group_norm(images, GROUPS, weight, bias, eps).permute(0, 2, 3, 1)[:, :, 0]


def about_the_mean(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of (N, P, C), the variance taken about the mean."""
    mean, variance = merged_moments(*channel_moments(rows))
    scale = (variance + eps).rsqrt() * weight
    return torch.addcmul((bias - mean * scale)[:, None], rows, scale[:, None])


def channel_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (N, P, C) over P positions, in float32 or wider: (N, C) each."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    few = piece_length(rows, rows[:, 0].numel())
    parts = [rows[:, start : start + few] for start in each(range(0, rows.shape[1], few))]
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


def video_scale_and_shift(norm: VideoGroupNorm, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of the normalisation of one video, whatever part is normalised later.

    Args:
        norm: whose normalisation.
        parts: all pixels of the video, some of each frame at a time: (F, P, C), of any P.
    """
    counts, means, variances = zip(*((part.shape[1], *channel_moments(part)) for part in parts), strict=True)
    mean, variance = torch.stack(means), torch.stack(variances)
    weight = mean.new_tensor(counts).div_(sum(counts) * mean.shape[1])[:, None, None]
    total = (mean * weight).sum((0, 1))
    group_mean, variance = merged_moments(total, ((variance + (mean - total).square()) * weight).sum((0, 1)))
    scale = (variance + norm.eps).rsqrt() * norm.weight
    return scale, norm.bias - group_mean * scale


def _trial() -> Trial:
    return FrameGroupNorm(64, 1e-6), (1 + torch.randn(1, 2, 48, 48, 64),)


GROUP_NORM = register(
    Kernel("group_norm", "group norm of channels-last activations", FLOATS, _trial, accelerators=True)
)
