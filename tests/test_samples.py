"""The images that are there without a network."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, ExifTags, Image

from svdlab.errors import SvdlabError, printable
from svdlab.samples import read_image, sample_photo, sample_picture
from svdlab.svd.images import as_list, blur_for, resize_with_antialiasing
from svdlab.svd.memory import measured_peak
from svdlab.training.data import sample_image


def test_the_embedded_checkpoint_gets_a_held_out_frame_of_its_own_data() -> None:
    assert sample_picture("embedded").size == (512, 512)
    np.testing.assert_array_equal(np.array(sample_picture("embedded")), np.array(sample_image(0)))


def test_any_other_checkpoint_gets_a_photograph() -> None:
    photo = sample_picture("stabilityai/stable-video-diffusion-img2vid-xt")
    assert photo.size == (512, 600) and photo.tobytes() == sample_photo().tobytes()
    assert len(photo.getcolors(2**20) or []) > 10_000


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("L", 90, "png", (90, 90, 90)),
        ("LA", (90, 10), "png", (90, 90, 90)),
        ("1", 1, "png", (255, 255, 255)),
        ("P", 0, "png", (0, 0, 0)),
        # As in diffusers' load_image, what is transparent keeps its colour.
        ("RGBA", (200, 100, 50, 0), "png", (200, 100, 50)),
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
    ],
)
def test_an_image_of_any_mode_is_read_as_rgb(
    tmp_path: Path, mode: str, colour: Any, kind: str, expected: tuple[int, int, int]
) -> None:
    Image.new(mode, (4, 3), colour).save(tmp_path / f"file.{kind}")
    image = read_image(tmp_path / f"file.{kind}")
    assert image.mode == "RGB" and image.size == (4, 3) and image.getpixel((1, 1)) == expected


def test_a_large_image_takes_no_memory_beside_its_own() -> None:
    """What CLIP sees of it is shrunk in bands, to what the whole would be."""
    source = torch.rand(1, 3, 1024, 3000, generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []
    peak = measured_peak(lambda: found.append(resize_with_antialiasing(source, 224)), "cpu")
    assert peak < source.nbytes
    whole = torch.nn.functional.interpolate(
        blur_for(source.double(), 224), size=(224, 224), mode="bicubic", align_corners=True
    )
    torch.testing.assert_close(found[0].double(), whole, atol=1e-5, rtol=0)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
"""


def test_a_file_that_is_no_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "postscript.png").write_bytes(EPS)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("another program was started"))
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (1, 300)).save(tmp_path / "line.png")
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path / "deep.png")  # PIL makes it white
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")  # and this one black
    (tmp_path / "bomb.ppm").write_bytes(b"P6 100000 100000 255\n" + bytes(100))
    (tmp_path / "large.ppm").write_bytes(b"P6 10000 9000 255\n" + bytes(100))
    (tmp_path / "huge.ppm").write_bytes(b"P6 14000 14000 255\n" + bytes(100))
    for name, message in {
        "nowhere.png": "no such file",
        "a\0b.png": "no such file",
        ".": "no regular file, allowed: an image",
        "pipe.png": "no regular file, allowed: an image",
        "text.png": "not an image that can be read",
        "postscript.png": "not an image that can be read",
        "dot.png": "got 1x1 pixels, allowed: sides of at least 2, at most 67108864 pixels",
        "line.png": "got 1x300 pixels, allowed: sides of at least 2",
        "deep.png": "got mode I;16, allowed: 8 bits a channel, such as RGB, L or CMYK",
        "float.tiff": "got mode F, allowed: 8 bits a channel",
        "bomb.ppm": "has more pixels than PIL opens, allowed: sides of at least 2, at most 67108864 pixels",
        "huge.ppm": "has more pixels than PIL opens, allowed: sides of at least 2, at most 67108864 pixels",
        "large.ppm": "got 10000x9000 pixels, allowed: sides of at least 2, at most 67108864 pixels",
    }.items():
        path = tmp_path / name
        with warnings.catch_warnings(), pytest.raises(SvdlabError) as error:
            warnings.simplefilter("error")
            read_image(path)
        assert str(error.value).startswith(printable(f"image: {path}: {message}"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_read_upright(tmp_path: Path, orientation: int) -> None:
    """Cameras store what the sensor saw, and how to turn it."""
    upright = Image.fromarray(
        np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[0] * 3, [120] * 3, [250] * 3]], np.uint8)
    )
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(turned[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "camera.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "camera.png")), np.asarray(upright))


def test_an_image_in_memory_is_refused_likewise() -> None:
    truncated = io.BytesIO()
    sample_photo().save(truncated, "JPEG")
    for image, message in (
        (Image.new("RGB", (1, 1)), "got 1x1 pixels, allowed"),
        (Image.new("F", (4, 4)), "got mode F, allowed"),
        (Image.open(io.BytesIO(truncated.getvalue()[:2000])), r"not an image that can be read \(OSError\)"),
        (np.zeros((1, 4, 3), np.uint8), "got 4x1 pixels, allowed"),
        (torch.zeros(3, 1, 1), "got 1x1 pixels, allowed"),
        (np.zeros((4, 4, 3), object), "got numpy object, allowed"),
        (np.zeros((4, 4, 3), np.uint16), "got numpy uint16, allowed: uint8, or floats in"),
        (torch.ones(3, 4, 4, dtype=torch.int32), "got torch.int32, allowed: uint8, or floats in"),
        (np.zeros((4, 4, 3), complex), "got numpy complex128, allowed"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "got torch.complex64, allowed"),
    ):
        with pytest.raises(SvdlabError, match=f"^image: {message}"):
            as_list(image)
    swapped = np.full((4, 4, 3), 0.5, ">f4")
    (tensor,) = as_list(swapped)
    assert isinstance(tensor, torch.Tensor) and float(tensor.mean()) == 0.5
