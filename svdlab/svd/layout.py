"""One layout: every activation is one contiguous tensor (batch, frame, height, width, channel).

What an operation wants instead is a view of that memory, made here and nowhere else.
B batch, F frames, H height, W width, C channels, d = C / heads.
"""

from __future__ import annotations

from torch import Tensor


def from_channels_first(x: Tensor) -> Tensor:
    """(B, F, C, H, W) as diffusers keeps latents -> (B, F, H, W, C). The one copy on the way in."""
    return x.permute(0, 1, 3, 4, 2).contiguous()


def to_channels_first(x: Tensor) -> Tensor:
    """(B, F, H, W, C) -> (B, F, C, H, W). The one copy on the way out."""
    return x.permute(0, 1, 4, 2, 3).contiguous()


def as_images(x: Tensor) -> Tensor:
    """(B, F, H, W, C) -> (B*F, C, H, W) in channels_last: what spatial convs take."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def from_images(y: Tensor, batch: int) -> Tensor:
    """(B*F, C, H, W) -> (B, F, H, W, C). ``contiguous`` copies nothing when ``y`` is channels_last."""
    return y.permute(0, 2, 3, 1).contiguous().unflatten(0, (batch, -1))


def as_time_strips(x: Tensor) -> Tensor:
    """(B, F, H, W, C) -> (B, C, F, H*W) in channels_last: time is the height of an image.

    A (3, 1, 1) conv3d becomes a (3, 1) conv2d.
    """
    return x.flatten(2, 3).permute(0, 3, 1, 2)


def from_time_strips(y: Tensor, height: int) -> Tensor:
    """(B, C, F, H*W) -> (B, F, H, W, C)."""
    return y.permute(0, 2, 3, 1).contiguous().unflatten(2, (height, -1))


def spatial_heads(x: Tensor, heads: int) -> Tensor:
    """(B, F, H, W, C) -> (B*F, heads, H*W, d): each frame attends to its own pixels."""
    return x.flatten(2, 3).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)


def temporal_heads(x: Tensor, heads: int) -> Tensor:
    """(B, F, H, W, C) -> (B, H*W*heads, F, d): each pixel attends to itself in the other frames.

    Pixels stand on the head axis: with frames outside pixels in memory, no view has (B*H*W) as its batch.
    """
    b, f, h, w, _ = x.shape
    return x.view(b, f, h * w * heads, -1).transpose(1, 2)


def from_heads(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The result of attention, as ``spatial_heads`` or ``temporal_heads`` -> ``shape`` = (B, F, H, W, C)."""
    return y.transpose(1, 2).reshape(shape)
