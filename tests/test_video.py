"""Clips: what is written is what a player would show."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from svdlab.errors import SvdlabError
from svdlab.svd.video import Clip, side_by_side


def clip(height: int = 64, width: int = 48, frames: int = 5, fps: int = 7) -> Clip:
    """A square that moves over a slope."""
    f, y, x = np.mgrid[:frames, :height, :width]
    levels = np.stack([255 * x / width, 255 * y / height, 255 * (abs(x - 8 * f - 8) < 6)], axis=-1)
    return Clip(levels.astype(np.uint8), fps)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (33, 47)])
def test_mp4(tmp_path: Path, height: int, width: int) -> None:
    made = clip(height, width)
    path = made.save(tmp_path / "clip.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 7
    assert len(frames) == 5
    assert frames[0].shape == (height + height % 2, width + width % 2, 3)
    shown = np.stack(frames)[:, :height, :width].astype(float)
    assert np.abs(shown - made.frames).mean() < 8


def test_gif(tmp_path: Path) -> None:
    path = clip().save(tmp_path / "clip.gif")
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (5, (48, 64), 0)
        assert image.info["duration"] == pytest.approx(1000 / 7, abs=10)


def carried(html: str, kind: str) -> io.BytesIO:
    (data,) = re.findall(rf' src="data:{kind};base64,([^"]+)"', html)
    return io.BytesIO(base64.b64decode(data))


def test_what_a_notebook_shows_are_the_frames() -> None:
    made = clip()
    html = made._repr_html_()
    assert "http" not in html and "width:192px" in html and "image-rendering:pixelated" in html
    with Image.open(carried(html, "image/webp")) as image:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
        assert image.info["loop"] == 0 and image.info["duration"] == 143
    assert np.array_equal(frames, made.frames), "to the last bit"


def test_a_large_clip_is_a_video_that_says_what_its_codec_costs() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 512, 511, 3), dtype=np.uint8)
    html = Clip(frames, 7)._repr_html_()
    with av.open(carried(html, "video/mp4")) as container:
        played = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])[:, :, :511]
    off = np.abs(played.astype(float) - frames)
    assert off.mean() > 1, "noise is what the codec cannot keep"
    assert f"off by {off.mean():.2g} grey levels of 255 on average, at most {off.max():.0f}<" in html


def test_from_tensor_rounds_as_diffusers() -> None:
    frames = torch.tensor([-2.0, -1.0, 0.0, 0.2, 1.0, 3.0]).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    assert Clip.from_tensor(frames, 7).frames[:, 0, 0, 0].tolist() == [0, 0, 128, 153, 255, 255]


def test_side_by_side() -> None:
    assert side_by_side([clip(), clip()]).shape == (5, 64, 48 + 4 + 48, 3)
    with pytest.raises(SvdlabError, match="clips: got"):
        side_by_side([clip(), clip(frames=4)])


def test_bad_clips_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SvdlabError, match="suffix '.webm', allowed: .mp4, .gif"):
        clip().save(tmp_path / "clip.webm")
    with pytest.raises(SvdlabError, match="fps: got 101, allowed in a .gif: at most 100"):
        Clip(clip().frames, 101).save(tmp_path / "clip.gif")
    Clip(clip().frames, 100).save(tmp_path / "fast.gif").unlink()
    with pytest.raises(SvdlabError, match="cannot be written"):
        clip().save(tmp_path / "nowhere" / "clip.mp4")
    with pytest.raises(SvdlabError, match="frames: got float64"):
        Clip(np.zeros((1, 2, 2, 3)), 7)
    with pytest.raises(SvdlabError, match="fps: got 0"):
        Clip(np.zeros((1, 2, 2, 3), np.uint8), 0)

    def fail(self: Clip) -> bytes:
        raise KeyboardInterrupt

    (tmp_path / "clip.mp4").write_bytes(b"before")
    monkeypatch.setattr(Clip, "to_mp4", fail)
    with pytest.raises(KeyboardInterrupt):
        clip().save(tmp_path / "clip.mp4")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]
