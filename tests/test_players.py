"""Players carry the frames themselves, and say so where they do not."""

from __future__ import annotations

import base64
import io
import json
import re
from html import unescape

import numpy as np
import pytest
import torch
from PIL import Image

from svdlab.errors import SvdlabError
from svdlab.notebook import Player
from svdlab.svd.images import to_levels
from svdlab.svd.video import Clip


def frames(height: int = 32, width: int = 48, count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def carried(src: str, count: int) -> np.ndarray:
    """The frames in a sprite's data URL, (F, H, W, 3)."""
    with Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))) as image:
        levels = np.asarray(image.convert("RGB"))
    return levels.reshape(count, -1, *levels.shape[1:])


def test_the_clips_are_the_frames() -> None:
    one, two = frames(), frames(seed=1)
    player = Player({"<one>": one, "two": Clip.from_tensor(two, 7)}, fps=7)
    html = player.to_html()
    sources = re.findall(r'<img [^>]*src="([^"]+)"', html)
    assert sources == [clip["src"] for clip in player.content["clips"]], "the widget and the page carry the same"
    for source, made in zip(sources, (one, two), strict=True):
        assert np.array_equal(carried(source, 5), to_levels(made)), "to the last bit"
    (about,) = (json.loads(unescape(text)) for text in re.findall(r'data-player="([^"]+)"', html))
    assert (about["frames"], about["height"], about["width"], about["fps"]) == (5, 32, 48, 7)
    assert "&lt;one&gt;" in html and "<one>" not in html and "minmax(0,384px)" in html, "eight times as large"


def test_a_clip_too_large_to_be_carried_whole_says_what_the_codec_costs() -> None:
    made = frames(700, 700, 3)
    (clip,) = (player := Player({"noise": made}, fps=7)).content["clips"]
    off = np.abs(carried(clip["src"], 3).astype(float) - to_levels(made))
    assert off.mean() > 0.5
    assert f"noise: encoded with loss: off by {off.mean():.2g} grey levels" in player.content["note"]
    player.show({"even": torch.zeros(3, 3, 700, 700)}, fps=7)
    assert player.content["note"] == ""


def test_clips_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(SvdlabError, match=r"clips: got \[\(5, 32, 48, 3\), \(4, 32, 48, 3\)\]"):
        Player({"a": frames(), "b": frames(count=4)}, fps=7)
    with pytest.raises(SvdlabError, match=r"clips: got \[\]"):
        Player({}, fps=7)
    with pytest.raises(SvdlabError, match="blink: got one clip"):
        Player({"a": frames()}, fps=7, blink=True)


def test_without_a_kernel_a_player_is_html() -> None:
    player = Player({"a": frames()}, fps=7)
    assert player._repr_mimebundle_() == {"text/html": player.to_html()}
