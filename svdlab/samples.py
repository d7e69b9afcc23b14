"""Images to start from: a file of the user's, or a sample that is there without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdlab.errors import SvdlabError, requires

if TYPE_CHECKING:
    from PIL import Image

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


def read_image(path: str | Path) -> Image.Image:
    """An RGB image from a file.

    Raises:
        SvdlabError: no such file, or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not an image that can be read"
        raise SvdlabError(f"image: {path}: {reason}") from None
