"""Blocks that work in place and on a few frames at a time, so that their activations stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from svdlab.svd.kernels.registry import FLOATS, Kernel, Trial, register, replaces, usable
from svdlab.svd.layers import (
    ResnetBlock,
    SpatioTemporalResBlock,
    SpatioTemporalTransformer,
    TemporalResnetBlock,
    TemporalTransformerBlock,
    TransformerBlock,
    TransformerConditioning,
)

# Numbers of an activation that are worked on at a time: on CPUs, so that what a layer makes is still in the cache, or
# at least in memory that the process holds already, when the next one reads it; elsewhere, for the memory.
NUMBERS = {"cpu": 2**20}
NUMBERS_ELSEWHERE = 2**24


def piece_length(x: Tensor, size: int, at_least: int = 1) -> int:
    """How many parts of ``size`` numbers of a tensor to work on at a time; on CPUs, where few are best, one will do."""
    if x.device.type == "cpu":
        return max(1, NUMBERS["cpu"] // size)
    return max(1, at_least, NUMBERS_ELSEWHERE // size)


# Set by a simulation of memory.
simulating: ContextVar[bool] = ContextVar("simulating", default=False)


def each(pieces: range) -> list[int]:
    """Pieces of a size, but for the last: all, or in a simulation, where all take as much, the first two and the last.

    A simulated piece takes as long as one of any size, and there are up to a hundred thousand.
    """
    return [*pieces[:2], *pieces[2:][-1:]] if simulating.get() else list(pieces)


def by_frames(function: Callable[..., Tensor], x: Tensor, *per_video: Tensor | None) -> Tensor:
    """``function(x, *per_video)`` for a function that treats every frame alone, a few frames at a time.

    Args:
        function: of a tensor (B, F, H, W, C) and of ``per_video``; gives (B, F, H', W', C').
        x: (B, F, H, W, C).
        per_video: further arguments, (B, ...) each, or None.
    """
    videos, count = x.shape[:2]
    step = piece_length(x, x[0, 0].numel())
    if videos * count <= step:
        return function(x, *per_video)
    step = math.ceil(count / math.ceil(count / step))  # pieces of a size
    result = None
    for video in each(range(videos)):
        one = slice(video, video + 1)
        constants = [None if c is None else c[one] for c in per_video]
        for start in each(range(0, count, step)):
            frames = slice(start, start + step)
            y = function(x[one, frames], *constants)
            if result is None:
                result = y.new_empty(videos, count, *y.shape[2:])
            result[one, frames] = y
    assert result is not None
    return result


@replaces(ResnetBlock)
class PiecewiseResnetBlock(ResnetBlock):
    """One pass through both halves of the block for each piece."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        if not usable(IN_PLACE, x):
            return super().forward(x, emb)
        if self.time_emb_proj is not None and emb is not None:
            emb = self.time_emb_proj(emb)[:, None, None, None]
        return by_frames(self._piece, x, emb)

    def _piece(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if emb is not None:
            h += emb
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


@replaces(TemporalResnetBlock)
class InPlaceTemporalResnetBlock(TemporalResnetBlock):
    """Its norms look at the whole video, so it cannot be taken apart."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        if not usable(IN_PLACE, x):
            return super().forward(x, emb)
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None and emb is not None:
            h += self.time_emb_proj(emb)[:, None, None, None]
        return self.conv2(F.silu(self.norm2(h), inplace=True)).add_(x)


@replaces(SpatioTemporalResBlock)
class InPlaceSpatioTemporalResBlock(SpatioTemporalResBlock):
    """The blend takes the temporal block's place in memory."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        if not usable(IN_PLACE, x):
            return super().forward(x, emb)
        x = self.spatial_res_block(x, emb)
        spatial_share = 1 - self.time_mixer.temporal_share()
        return self.temporal_res_block(x, emb).lerp_(x, spatial_share.to(x.dtype))


@replaces(TransformerBlock)
class PiecewiseTransformerBlock(TransformerBlock):
    """Frames attend to themselves only: the whole block runs on each piece."""

    def forward(self, x: Tensor, image_token: Tensor) -> Tensor:
        if not usable(IN_PLACE, x):
            return super().forward(x, image_token)
        return by_frames(self._piece, x, image_token)

    def _piece(self, x: Tensor, image_token: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)).add_(x).add_(image_token)
        return self.ff(self.norm3(x)).add_(x)


@replaces(TemporalTransformerBlock)
class PiecewiseTemporalTransformerBlock(TemporalTransformerBlock):
    """The feed-forward layers run on pieces, the attention on all frames."""

    def forward(self, x: Tensor, image_token: Tensor) -> Tensor:
        if not usable(IN_PLACE, x):
            return super().forward(x, image_token)
        x = by_frames(lambda frames: self.ff_in(self.norm_in(frames)).add_(frames), x)
        x = self.attn1(self.norm1(x)).add_(x).add_(image_token)
        return by_frames(lambda frames: self.ff(self.norm3(frames)).add_(frames), x)


@replaces(SpatioTemporalTransformer)
class PiecewiseTransformer(SpatioTemporalTransformer):
    """Its first norm and product run on pieces."""

    def forward(self, x: Tensor, conditioning: TransformerConditioning) -> Tensor:
        if not usable(IN_PLACE, x):
            return super().forward(x, conditioning)
        # Passed on without a name, so that it is let go of once the first block has read it.
        return self.proj_out(self.blocks(by_frames(self._projected, x), conditioning)).add_(x)

    def _projected(self, frames: Tensor) -> Tensor:
        return self.proj_in(self.norm(frames))


class _Blocks(torch.nn.Module):
    """What the trial tries together: a residual block and a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = SpatioTemporalResBlock(32, 64, 16, 1e-5)
        self.transformer = SpatioTemporalTransformer(64, 2, 1, 16)

    def forward(self, x: Tensor, emb: Tensor, token: Tensor) -> Tensor:
        return self.transformer(self.resnet(x, emb), self.transformer.condition(token, x.shape[1]))


def _trial() -> Trial:
    return _Blocks(), (torch.randn(2, 3, 4, 5, 32), torch.randn(2, 16), torch.randn(2, 1, 16))


IN_PLACE = register(
    Kernel("in_place", "blocks that work in place, a few frames at a time", FLOATS, _trial, accelerators=True)
)
