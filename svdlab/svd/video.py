"""A generated clip: play it in a notebook, save it, take its frames."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.files import atomic_path
from svdlab.svd.images import to_levels
from svdlab.svd.settings import GenerationSettings

SUFFIXES = (".mp4", ".gif")
# A GIF's frame lasts a whole number of hundredths of a second.
_GIF_FPS = 100
# Small clips are enlarged to at least this height, pixel for pixel, so that one sees what there is.
_SHOWN_HEIGHT = 256
# A notebook carries a clip without loss up to this size.
LOSSLESS_BYTES = 3 * 2**20


def check_suffix(path: str | os.PathLike[str], fps: int) -> Path:
    """The path, if its suffix is one that a clip of this frame rate can be saved as.

    Raises:
        SvdlabError: another suffix, or a GIF of over 100 frames a second.
    """
    if (target := Path(path)).suffix.lower() not in SUFFIXES:
        raise SvdlabError(f"{target}: suffix {target.suffix!r}, allowed: {', '.join(SUFFIXES)}")
    if target.suffix.lower() == ".gif" and fps > _GIF_FPS:
        raise SvdlabError(f"fps: got {fps}, allowed in a .gif: at most {_GIF_FPS}; .mp4 holds more")
    return target


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames and their rate.

    Attributes:
        frames: uint8 (F, H, W, 3).
        fps: frames a second.
        settings: what made them, where known.
    """

    frames: np.ndarray
    fps: int
    settings: GenerationSettings | None = None

    def __post_init__(self) -> None:
        f = self.frames
        if f.dtype != np.uint8 or f.ndim != 4 or f.shape[-1] != 3 or 0 in f.shape:
            raise SvdlabError(f"frames: got {f.dtype} {f.shape}, allowed: uint8 (frames, height, width, 3)")
        if self.fps < 1:
            raise SvdlabError(f"fps: got {self.fps}, allowed: integer >= 1")

    @classmethod
    def from_tensor(cls, frames: Tensor, fps: int, settings: GenerationSettings | None = None) -> Clip:
        """From (F, 3, H, W) in about [-1, 1], clamped and rounded as diffusers does for PIL output."""
        return cls(to_levels(frames), fps, settings)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def shape(self) -> tuple[int, ...]:
        """(F, H, W, 3)."""
        return self.frames.shape

    def to_numpy(self) -> np.ndarray:
        """uint8 (F, H, W, 3)."""
        return self.frames

    def to_pil(self) -> list[Image.Image]:
        """One image a frame."""
        return [Image.fromarray(frame) for frame in self.frames]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.mp4`` (H.264, at the clip's fps) or ``.gif`` (looping), whole or not at all.

        Raises:
            SvdlabError: another suffix, a GIF of over 100 frames a second, a folder that cannot be written.
        """
        target = check_suffix(path, self.fps)
        with atomic_path(target) as temporary:
            if target.suffix.lower() == ".mp4":
                temporary.write_bytes(self.to_mp4())
            else:
                first, *rest = self.to_pil()
                options = {"save_all": True, "append_images": rest, "loop": 0}
                first.save(temporary, format="GIF", duration=round(1000 / self.fps), **options)
        return target

    @classmethod
    def from_video(cls, path: str | os.PathLike[str]) -> Clip:
        """Read a video file; one that ``to_mkv`` wrote gives back the very same frames.

        Raises:
            SvdlabError: no such file, or no video.
        """
        try:
            return cls(*_decoded(os.fspath(path)))
        except (OSError, IndexError, ValueError) as error:
            raise SvdlabError(f"{path}: not a video that can be read: {str(error).splitlines()[0]}") from None

    def to_mp4(self) -> bytes:
        """H.264, as browsers play it."""
        # H.264 with half-resolution chroma needs even sizes: repeat the last row or column.
        height, width = self.frames.shape[1:3]
        frames = np.pad(self.frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        return _video(frames, self.fps, "mp4", "libx264", "yuv420p", {"crf": "12"})

    def to_mkv(self) -> bytes:
        """FFV1: lossless, about half the size of the frames, for programs rather than for browsers."""
        return _video(self.frames, self.fps, "matroska", "ffv1", "bgr0", {})

    def to_webp(self, height: int) -> bytes:
        """A small animated picture that loops, no higher than ``height`` pixels."""
        shown = self.to_pil()
        if (scale := height / self.frames.shape[1]) < 1:
            size = (max(1, round(self.frames.shape[2] * scale)), height)
            shown = [image.resize(size, Image.Resampling.BOX) for image in shown]
        return self._animation(shown, quality=85)

    def _repr_html_(self) -> str:
        """The frames as they are, looping, for notebooks and for pages read offline; the first one alone for those
        who want no motion. A clip that is large without loss is a video, which says what its codec costs.
        """
        height, width = self.frames.shape[1:3]
        look = f'style="width:{width * enlarged(height)}px;max-width:100%;image-rendering:pixelated"'
        if len(data := self._animation(self.to_pil(), lossless=True)) > LOSSLESS_BYTES:
            video = self.to_mp4()
            cost = codec_cost(self.frames, _decoded(io.BytesIO(video))[0][:, :height, :width])
            src = data_url("video/mp4", video)
            return f'<video {look} loop muted controls playsinline src="{src}"></video><p>{cost}</p>'
        still = data_url("image/webp", self._animation(self.to_pil()[:1], lossless=True))
        return (
            f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">'
            f'<img {look} alt="a clip of {len(self)} frames" src="{data_url("image/webp", data)}"></picture>'
        )

    def _animation(self, images: Sequence[Image.Image], **options: Any) -> bytes:
        """Frames as a WebP that loops at the clip's rate."""
        buffer = io.BytesIO()
        first, *rest = images
        first.save(
            buffer, "WEBP", save_all=True, append_images=rest, loop=0, duration=round(1000 / self.fps), **options
        )
        return buffer.getvalue()


def enlarged(height: int) -> int:
    """How many times as large a clip is shown, pixel for pixel: at least 256 pixels high."""
    return -(-_SHOWN_HEIGHT // height)


def codec_cost(frames: np.ndarray, decoded: np.ndarray) -> str:
    """What a lossy codec changes, as text; both arrays are uint8 of one shape."""
    off = np.abs(frames.astype(np.int16) - decoded)
    return f"encoded with loss: off by {off.mean():.2g} grey levels of 255 on average, at most {off.max()}"


def data_url(kind: str, data: bytes) -> str:
    """A file as the address that a page carries it under; ``kind`` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _decoded(video: str | io.BytesIO) -> tuple[np.ndarray, int]:
    """Frames (F, H, W, 3) of a video, and their rate."""
    import av

    with av.open(video) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), round(rate or 1)


def _video(
    frames: np.ndarray, fps: int, container_format: str, codec: str, pixels: str, options: dict[str, str]
) -> bytes:
    """Frames (F, H, W, 3) as the bytes of a video file."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def side_by_side(clips: Sequence[Clip], gap: int = 4) -> Clip:
    """Clips of one size next to each other, in one player so that they stay in step.

    Raises:
        SvdlabError: clips of different sizes or rates, or none.
    """
    if len({(c.shape, c.fps) for c in clips}) != 1:
        raise SvdlabError(f"clips: got {[c.shape for c in clips]}, allowed: one or more of one size and rate")
    white = np.full((*clips[0].shape[:2], gap, 3), 255, dtype=np.uint8)
    parts = [part for clip in clips for part in (white, clip.frames)][1:]
    return Clip(np.concatenate(parts, axis=2), clips[0].fps)
