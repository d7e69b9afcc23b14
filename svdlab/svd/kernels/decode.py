"""The exact decode in chunks: what decoding all frames at once gives, in the memory of two videos and a chunk.

Most layers of the decoder treat frames alone and run on ``chunk`` frames at a time. The temporal blocks look at all
frames, but at no other pixel: with the norms' statistics of the whole video they run on some pixels of all frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from svdlab.svd import layout
from svdlab.svd.config import VAEConfig
from svdlab.svd.kernels.norm import video_scale_and_shift
from svdlab.svd.kernels.pieces import each, piece_length
from svdlab.svd.kernels.registry import FLOATS, Kernel, Trial, register, replaces, usable
from svdlab.svd.layers import SpatioTemporalResBlock, TemporalConv, TemporalResnetBlock
from svdlab.svd.vae import VAE, TemporalDecoder


@replaces(VAE)
class ChunkedVAE(VAE):
    """A VAE whose decoder holds ``chunk`` frames of what it can treat frame by frame."""

    def decode_videos(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        if chunk is None or chunk >= latents.shape[1] or not usable(CHUNKED_DECODE, latents):
            return super().decode_videos(latents)
        return layout.to_channels_first(in_chunks(self.decoder, layout.from_channels_first(latents), chunk))


def in_chunks(decoder: TemporalDecoder, z: Tensor, chunk: int) -> Tensor:
    """What ``decoder(z)`` gives, with activations of ``chunk`` frames wherever a layer does not look across frames."""

    def to_pixels(x: Tensor) -> Tensor:
        return decoder.conv_out(F.silu(decoder.conv_norm_out(x), inplace=True))

    x, per_frame = z.clone(), [decoder.conv_in]  # what follows works in place
    for module in decoder.modules_in_order():
        if isinstance(module, SpatioTemporalResBlock):
            x = _map_frames([*per_frame, module.spatial_res_block], x, chunk)
            share = module.time_mixer.temporal_share()
            for video in x:
                add_temporal_update(module.temporal_res_block, video, share)
            per_frame = []
        else:
            per_frame.append(module)  # type: ignore[arg-type]
    return decoder.time_conv_out(_map_frames([*per_frame, to_pixels], x, chunk))


def _map_frames(functions: list[Callable[[Tensor], Tensor]], x: Tensor, chunk: int) -> Tensor:
    """Apply functions that treat every frame alone to (B, F, ...), ``chunk`` frames at a time or more small ones.

    Where they keep a frame's shape, the result takes the place of ``x``.
    """
    step = piece_length(x, x[0, 0].numel(), at_least=chunk)
    frames = x.flatten(0, 1)
    result = None
    for start in each(range(0, len(frames), step)):
        y = frames[None, start : start + step]
        for function in functions:
            y = function(y)
        if result is None:
            result = frames if y.shape[2:] == frames.shape[1:] else y.new_empty(len(frames), *y.shape[2:])
        result[start : start + step] = y[0]
    assert result is not None
    return result.unflatten(0, x.shape[:2])


def add_temporal_update(block: TemporalResnetBlock, x: Tensor, share: Tensor) -> None:
    """``x`` becomes the blend of itself and ``block(x)``, for one video (F, H, W, C), some pixels at a time.

    Beside ``x`` it holds one more video.

    Args:
        block: without a time embedding, as in the decoder.
        x: changed in place.
        share: of the block in the blend, (1,).
    """
    h = torch.empty_like(x)
    few = piece_length(x, x[:, 0, 0].numel())
    before, after = x.flatten(1, 2), h.flatten(1, 2)
    parts = [slice(start, start + few) for start in each(range(0, before.shape[1], few))]
    scale, shift = video_scale_and_shift(block.norm1, x)
    for part in parts:
        after[:, part] = _convolve_activated(block.conv1, before[:, part], scale, shift)
    scale, shift = video_scale_and_shift(block.norm2, h)
    share = share.to(x.dtype)
    for part in parts:
        before[:, part].addcmul_(_convolve_activated(block.conv2, after[:, part], scale, shift), share)


def _convolve_activated(conv: TemporalConv, pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``conv(silu(pixels * scale + shift))`` of some pixels of one video (F, P, C)."""
    wide = torch.addcmul(shift, pixels.to(scale.dtype), scale)
    return conv(F.silu(wide, inplace=True).to(pixels.dtype)[None, :, :, None])[0, :, :, 0]


class _TwoFrames(torch.nn.Module):
    """Decodes in chunks of two frames: what the trial runs."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = VAE(VAEConfig(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2))

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode_videos(latents, chunk=2)


def _trial() -> Trial:
    return _TwoFrames(), (torch.randn(1, 3, 4, 2, 3),)


CHUNKED_DECODE = register(
    Kernel("chunked_decode", "the exact decode in chunks of frames", FLOATS, _trial, accelerators=True)
)
