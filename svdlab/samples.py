"""Images to start from: a file of the user's, or a sample that is there without a network."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from svdlab.errors import SvdlabError, about, requires
from svdlab.reading import check_file

if TYPE_CHECKING:
    from PIL import Image

# What PIL has to say of a broken file stands in our error: without a handler it would be further lines.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# A held-out first frame, larger than what CLIP is fed, as photographs are: ``training.data.sample_image()``.
_EMBEDDED = Path(__file__).parent / "checkpoint" / "sample.png"


def sample_picture(model: str) -> Image.Image:
    """What is animated when no image is given: a moving shape for the embedded checkpoint, a photograph for others.

    Raises:
        SvdlabError: the photograph's package is not installed.
    """
    return read_image(_EMBEDDED) if model == "embedded" else sample_photo()


def sample_photo() -> Image.Image:
    """A real photograph: Grace Hopper, 512 by 600, of matplotlib's sample data.

    Raises:
        SvdlabError: matplotlib is not installed.
    """
    requires("matplotlib")
    from matplotlib.cbook import get_sample_data

    return read_image(get_sample_data("grace_hopper.jpg", asfileobj=False))


def read_image(path: str | Path, data: bytes | None = None) -> Image.Image:
    """An RGB image from a file, upright: turned as its EXIF orientation says, as diffusers' ``load_image`` does.

    Args:
        path: the file.
        data: what is in it, where it is not on this machine.

    Raises:
        SvdlabError: no such file, no image, or see ``svd.images.to_rgb``.
    """
    from PIL import Image, ImageOps

    from svdlab.svd.images import SIZES, to_rgb

    if data is None:
        with about("image"):
            check_file(path, "an image")
    with about(f"image: {path}"):
        Image.init()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large and of odd files: they are refused, or they are fine
            try:
                # For EPS, PIL starts Ghostscript.
                formats = [name for name in Image.ID if name != "EPS"]
                opened = Image.open(path if data is None else io.BytesIO(data), formats=formats)
            except Image.DecompressionBombError:
                raise SvdlabError(f"has more pixels than PIL opens, allowed: {SIZES}") from None
            except Exception:  # broken files make PIL's readers raise almost anything
                raise SvdlabError("not an image that can be read") from None
            with opened:
                return ImageOps.exif_transpose(to_rgb(opened))
