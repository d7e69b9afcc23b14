"""The exact decode in chunks: what decoding all frames at once gives, in the memory of one video and a chunk.

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

# Devices with more memory than time.
ROOMY = ("cpu",)


@replaces(VAE)
class ChunkedVAE(VAE):
    """A VAE whose decoder holds ``chunk`` frames of what it can treat frame by frame."""

    def decode_videos(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        if chunk is None or not usable(CHUNKED_DECODE, latents):
            return super().decode_videos(latents)
        return layout.to_channels_first(in_chunks(self.decoder, layout.from_channels_first(latents), chunk))


def in_chunks(decoder: TemporalDecoder, z: Tensor, chunk: int) -> Tensor:
    """What ``decoder(z)`` gives, with activations of ``chunk`` frames wherever a layer does not look across frames.

    At its peak it holds one video of the widest layer, and what the layers before it make of a chunk: the temporal
    blocks need all frames, and nothing else does.
    """
    return torch.stack([_decode_video(decoder, video, chunk) for video in z])


def _decode_video(decoder: TemporalDecoder, z: Tensor, chunk: int) -> Tensor:
    def to_pixels(x: Tensor) -> Tensor:
        return decoder.conv_out(F.silu(decoder.conv_norm_out(x), inplace=True))

    pieces, per_frame = [z], [decoder.conv_in]
    for module in decoder.modules_in_order():
        if isinstance(module, SpatioTemporalResBlock):
            _map_frames([*per_frame, module.spatial_res_block], pieces, chunk)
            add_temporal_update(module.temporal_res_block, pieces, module.time_mixer.temporal_share())
            per_frame = []
        else:
            per_frame.append(module)  # type: ignore[arg-type]
    _map_frames([*per_frame, to_pixels], pieces, chunk)
    return decoder.time_conv_out(torch.cat(pieces)[None])[0]


def _map_frames(functions: list[Callable[[Tensor], Tensor]], pieces: list[Tensor], chunk: int) -> None:
    """Apply functions of single frames to a video's pieces (F', H, W, C), ``chunk`` frames or more at a time.

    Each result takes the place of its piece in the list, so that the piece is let go of.
    """
    step = piece_length(pieces[0], pieces[0][0].numel(), at_least=chunk)
    pieces[:] = [part for piece in pieces for part in piece.split(step)]
    for i, piece in enumerate(pieces):
        y = piece[None]
        for function in functions:
            y = function(y)
        pieces[i] = y[0]


def add_temporal_update(block: TemporalResnetBlock, pieces: list[Tensor], share: Tensor) -> None:
    """A video becomes the blend of itself and ``block`` of it, some pixels at a time.

    The second norm needs all of what the first convolution gives. A CPU keeps it, one more video; an accelerator
    convolves once for the norm's statistics and once more for the result.

    Args:
        block: without a time embedding, as in the decoder.
        pieces: the video's frames in order, (F', H, W, C) each; changed in place.
        share: of the block in the blend, (1,).
    """
    rows = [piece.view(len(piece), -1, piece.shape[-1]) for piece in pieces]
    lengths, share = [len(piece) for piece in pieces], share.to(pieces[0].dtype)
    few = piece_length(rows[0], sum(lengths) * rows[0].shape[2])
    parts = [slice(start, start + few) for start in each(range(0, rows[0].shape[1], few))]

    def pixels(part: slice) -> Tensor:
        return torch.cat([frames[:, part] for frames in rows])

    norm1 = video_scale_and_shift(block.norm1, map(pixels, parts))

    def convolved(part: slice) -> Tensor:
        return _convolve_activated(block.conv1, pixels(part), *norm1)

    hidden = convolved
    if rows[0].device.type in ROOMY:
        kept = rows[0].new_empty(sum(lengths), *rows[0].shape[1:])
        for part in parts:
            kept[:, part] = convolved(part)
        hidden = lambda part: kept[:, part]  # noqa: E731
    norm2 = video_scale_and_shift(block.norm2, map(hidden, parts))
    for part in parts:
        update = _convolve_activated(block.conv2, hidden(part), *norm2)
        for frames, change in zip(rows, update.split(lengths), strict=True):
            frames[:, part].addcmul_(change, share)


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
