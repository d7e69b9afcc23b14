"""The images that are there without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdlab.errors import SvdlabError
from svdlab.samples import read_image, sample_photo, sample_picture
from svdlab.training.data import sample_image


def test_the_embedded_checkpoint_gets_a_held_out_frame_of_its_own_data() -> None:
    assert sample_picture("embedded").size == (512, 512)
    np.testing.assert_array_equal(np.array(sample_picture("embedded")), np.array(sample_image(0)))


def test_any_other_checkpoint_gets_a_photograph() -> None:
    photo = sample_picture("stabilityai/stable-video-diffusion-img2vid-xt")
    assert photo.size == (512, 600) and photo.tobytes() == sample_photo().tobytes()
    assert len(photo.getcolors(2**20) or []) > 10_000


def test_an_image_of_any_mode_is_read_as_rgb(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png")
    assert image.mode == "RGB" and image.size == (256, 256)
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("nowhere.png", "no such file"), ("text.png", "not an image that can be read")):
        with pytest.raises(SvdlabError, match=f"image: .*{name}: {message}"):
            read_image(tmp_path / name)
