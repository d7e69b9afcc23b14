"""Damaged images of every format that PIL writes: an RGB image, or an error in a line, in time and in memory."""

from __future__ import annotations

import io
import random
import struct
import warnings
from pathlib import Path

import pytest
from fuzzing import damage_bytes, fuzz
from PIL import Image, features

from svdlab.samples import read_image
from svdlab.svd.images import as_list, resize, resize_with_antialiasing, to_tensor

SAVED = [
    *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")),
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("TIFF", mode) for mode in ("RGB", "F", "CMYK", "LAB")),
    *(
        (kind, "RGB")
        for kind in ("BMP", "DDS", "GIF", "ICNS", "ICO", "IM", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA")
    ),
    *((kind, "RGB") for kind in ("WEBP", "AVIF", "EPS", "DIB")),
    *(("SPIDER", "F"), ("MSP", "1"), ("XBM", "1")),
]
# Sizes and counts that a header may claim.
CLAIMS = (0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


@pytest.fixture(scope="module")
def files(photo: Image.Image) -> list[bytes]:
    """A small picture in every format, as far as PIL has it here."""
    found = []
    small = photo.resize((24, 20))
    for kind, mode in SAVED:
        if kind == "AVIF" and not features.check("avif"):
            continue
        image = small.convert("I").convert(mode) if mode == "I;16" else _converted(small, mode)
        buffer = io.BytesIO()
        image.save(buffer, kind)
        found.append(buffer.getvalue())
    assert len(found) > 24
    return found


def _converted(image: Image.Image, mode: str) -> Image.Image:
    return Image.new("LAB", image.size, (90, 5, 5)) if mode == "LAB" else image.convert(mode)


def _claims(chance: random.Random, data: bytes) -> bytes:
    """Numbers of 2 or 4 bytes near the start, in either order, replaced by what a size may be."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 2, 4))):
        kind = chance.choice("<H >H <I >I".split())
        size = struct.calcsize(kind)
        at = chance.randrange(max(1, min(len(changed) - size, 128)))
        changed[at : at + size] = struct.pack(kind, chance.choice(CLAIMS) % 2 ** (8 * size))
    return bytes(changed)


def test_images(files: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "image"

    def damaged_images(chance: random.Random) -> None:
        data = chance.choice(files)
        way = chance.randrange(3)
        data = (
            _claims(chance, data)
            if way == 0
            else damage_bytes(chance, data, chance.choice((1, 3)))
            if way == 1
            else data
        )
        if way == 2:  # the head of one and the rest of another
            cut = chance.randrange(64)
            data = data[:cut] + chance.choice(files)[cut:]
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # another line on standard error
            image = read_image(path)
        assert image.mode == "RGB"
        (one,) = as_list(image)
        if image.width * image.height < 2**20:
            assert resize(one, 16, 16).isfinite().all()
            assert resize_with_antialiasing(to_tensor(one) * 2 - 1, 16).isfinite().all()

    # An image of 2**26 pixels is three bytes a pixel, and what PIL reads it from.
    tally = fuzz(damaged_images, memory=4 * 3 * 2**26)
    assert sum(tally.values()) < 300 or min(tally["accepted"], tally["refused"]) > 50
