"""What goes in and what comes out: images of every kind to tensors, frames to the kind that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from svdlab.errors import SvdlabError, about

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# A side of one pixel cannot be reflected, which the resize for CLIP does; 64 Mpx take 0.8 GB as a tensor.
_LEAST_SIDE, _MOST_PIXELS = 2, 2**26
SIZES = f"sides of at least {_LEAST_SIDE}, at most {_MOST_PIXELS} pixels"
# Rows of an image that are shrunk at a time.
_BAND = 64
_KINDS = "a PIL image, a list of them, numpy (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W)"


def check_output_type(output_type: str | None) -> None:
    """Raises: SvdlabError for anything but the four output types."""
    if output_type not in OUTPUT_TYPES:
        raise SvdlabError(f"output_type: got {output_type!r}, allowed: {', '.join(OUTPUT_TYPES)}")


def as_list(image: Any) -> list[Image.Image | Tensor]:
    """The images that a user gave, one by one: RGB PIL images, or float32 tensors (1, 3, H0, W0) in [0, 1].

    Args:
        image: see ``SVDPipeline.__call__``.

    Raises:
        SvdlabError: another kind of object, no image at all, a wrong shape, NaN, values outside the range, or see
            ``to_rgb``.
    """
    many = list(image) if isinstance(image, (list, tuple)) else [image]
    if not many:
        raise SvdlabError(f"image: got an empty list, allowed: {_KINDS}")
    found: list[Image.Image | Tensor] = []
    for one in many:
        with about("image"):
            found += [to_rgb(one)] if isinstance(one, Image.Image) else _from_array(one).split(1)
    return found


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB, read whole.

    Raises:
        SvdlabError: a side below 2 pixels, more than 2**26 pixels, more than 8 bits a channel (which PIL would cut off
            at white), or data that cannot be read.
    """
    _check_size(*image.size)
    if image.mode.startswith(("I", "F")):
        raise SvdlabError(f"got mode {image.mode}, allowed: 8 bits a channel, such as RGB, L or CMYK")
    try:
        return image.convert("RGB")
    except Exception as error:  # broken files make PIL's readers raise almost anything
        raise SvdlabError(f"not an image that can be read ({type(error).__name__})") from None


def _check_size(width: int, height: int) -> None:
    if min(width, height) < _LEAST_SIDE or width * height > _MOST_PIXELS:
        raise SvdlabError(f"got {width}x{height} pixels, allowed: {SIZES}")


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """One of ``as_list`` as float32 (1, 3, H0, W0) in [0, 1]."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div_(255)


def resize(image: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """One of ``as_list`` for the VAE: float32 (1, 3, height, width) in [-1, 1].

    PIL images are resized with Lanczos, arrays and tensors by nearest neighbour.

    Source: diffusers ``image_processor.py:VaeImageProcessor.preprocess``.
    """
    if isinstance(image, Tensor):
        return F.interpolate(image, size=(height, width)) * 2 - 1
    return to_tensor(image.resize((width, height), Image.Resampling.LANCZOS)) * 2 - 1


def _from_array(image: Any) -> Tensor:
    """Numpy or tensor to (B, 3, H, W) float32 in [0, 1].

    Where some values are negative they are taken to be in [-1, 1], as diffusers takes them
    (``image_processor.py:VaeImageProcessor.preprocess``).
    """
    if isinstance(image, np.ndarray) and image.ndim in (3, 4) and image.shape[-1] == 3:
        if (image.dtype.kind not in "bf" and image.dtype != np.uint8) or image.dtype.itemsize > 8:
            raise SvdlabError(f"got numpy {image.dtype}, allowed: uint8, or floats in [0, 1] or [-1, 1]")
        tensor = torch.from_numpy(np.moveaxis(image, -1, -3).astype(image.dtype.newbyteorder("="), order="C"))
    elif isinstance(image, Tensor) and image.ndim in (3, 4) and image.shape[-3] == 3:
        tensor = image.detach().cpu()
    elif isinstance(image, (np.ndarray, Tensor)):
        raise SvdlabError(f"got a {type(image).__name__} of shape {tuple(image.shape)}, allowed: {_KINDS}")
    else:
        raise SvdlabError(f"got {type(image).__name__}, allowed: {_KINDS}")
    if not (tensor.is_floating_point() or tensor.dtype in (torch.uint8, torch.bool)):
        raise SvdlabError(f"got {tensor.dtype}, allowed: uint8, or floats in [0, 1] or [-1, 1]")
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not tensor.isfinite().all():
        raise SvdlabError("got NaN or infinity, allowed: values in [0, 1] or [-1, 1]")
    if 0 in tensor.shape or tensor.min() < -1 or tensor.max() > 1:
        span = "no pixels" if 0 in tensor.shape else f"values in [{tensor.min():.3g}, {tensor.max():.3g}]"
        raise SvdlabError(f"got {span}, allowed: values in [0, 1] or [-1, 1] (or uint8)")
    if tensor.min() < 0:
        tensor = tensor / 2 + 0.5
    _check_size(tensor.shape[-1], tensor.shape[-2])
    return tensor[None] if tensor.ndim == 3 else tensor


def randn(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Unit Gaussian, drawn where the generator lives (or on ``device``), one generator a row if a list is given.

    Source: diffusers ``utils/torch_utils.py:randn_tensor``.
    """
    if isinstance(generator, Sequence):
        if len(generator) > 1:
            rows = [randn((1, *shape[1:]), g, device, dtype) for g in generator[: shape[0]]]
            return torch.cat(rows)
        generator = generator[0]
    where = generator.device if generator else device
    return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)


def resize_with_antialiasing(images: Tensor, size: int) -> Tensor:
    """Gaussian blur by the shrink factor, then bicubic with aligned corners: (B, 3, H, W) -> (B, 3, size, size).

    Both work on each axis by itself: rows are shrunk in bands, and what is left of them along the columns, so that a
    large image takes no memory beside its own. Source: diffusers
    ``pipeline_stable_video_diffusion.py:_resize_with_antialiasing``.

    Args:
        images: in [-1, 1].
        size: in pixels.
    """
    narrow = torch.cat([_shrink(band, size, -1) for band in images.split(_BAND, dim=-2)], dim=-2)
    return _shrink(narrow, size, -2)


def _shrink(images: Tensor, size: int, axis: int) -> Tensor:
    sides = list(images.shape[-2:])
    sides[axis] = size
    return F.interpolate(_blur(images, size, axis), size=sides, mode="bicubic", align_corners=True)


def blur_for(images: Tensor, size: int) -> Tensor:
    """The blur before a resize to ``size``: a Gaussian as wide as each side shrinks; the same shape.

    Source: diffusers ``pipeline_stable_video_diffusion.py:_gaussian_blur2d``.
    """
    return _blur(_blur(images, size, -1), size, -2)


def _blur(images: Tensor, size: int, axis: int) -> Tensor:
    sigma = max((images.shape[axis] / size - 1) / 2, 0.001)
    width = int(max(4 * sigma, 3)) | 1
    taps = torch.exp(-((torch.arange(width, dtype=images.dtype) - width // 2) ** 2) / (2 * sigma**2)).to(images)
    pad = (width // 2, width // 2, 0, 0) if axis == -1 else (0, 0, width // 2, width // 2)
    kernel = (taps / taps.sum()).view(1, 1, 1, -1) if axis == -1 else (taps / taps.sum()).view(1, 1, -1, 1)
    padded = F.pad(images, pad, mode="reflect")
    return F.conv2d(padded, kernel.expand(images.shape[1], 1, -1, -1), groups=images.shape[1])


def normalize_for_clip(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """CLIP's channel statistics applied to (B, 3, S, S) in [0, 1].

    Source: diffusers ``pipeline_stable_video_diffusion.py:_encode_image``, the feature extractor.
    """
    shift, scale = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels - shift) / scale


def to_unit(frames: Tensor) -> Tensor:
    """Frames of any shape in about [-1, 1] to [0, 1], clamped; in float32 or wider.

    Source: diffusers ``image_processor.py:VaeImageProcessor.denormalize``.
    """
    return (frames.to(torch.promote_types(frames.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def check_finite(name: str, values: Tensor, why: Callable[[], str] = str) -> None:
    """Refuse NaN and infinity.

    Args:
        name: of the values, for the error.
        values: of any shape.
        why: called where there are some; its text ends the error.

    Raises:
        SvdlabError: with how many there are.
    """
    if not (finite := values.isfinite()).all():
        bad = int((~finite).sum())
        raise SvdlabError(f"{name}: {bad} of {values.numel()} values are NaN or infinite{why()}")


def to_levels(frames: Tensor) -> np.ndarray:
    """Frames (..., 3, H, W) in about [-1, 1] to 8-bit levels, uint8 (..., H, W, 3), rounded as diffusers does.

    Source: diffusers ``image_processor.py:VaeImageProcessor.numpy_to_pil``.

    Raises:
        SvdlabError: NaN or infinity, which would be black or white.
    """
    check_finite("frames", frames)
    unit = to_unit(frames).float().movedim(-3, -1).cpu().numpy()
    return (unit * 255).round().astype(np.uint8)


def to_8bit(frames: Tensor) -> Tensor:
    """``to_levels`` with the channels where they were: uint8 (..., 3, H, W)."""
    return torch.from_numpy(to_levels(frames)).movedim(-1, -3)


def postprocess(frames: Tensor, output_type: str | None, levels: Callable[[Tensor], Tensor] = to_8bit) -> Any:
    """Frames (B, F, 3, H, W) in about [-1, 1] to "pt" (the same shape in [0, 1]), "np" (B, F, H, W, 3), or "pil".

    The levels of "pil" are made by ``levels``, which gives uint8 of the same shape.

    Source: diffusers ``video_processor.py:VideoProcessor.postprocess_video``.
    """
    if output_type == "pil":
        return [[Image.fromarray(frame) for frame in video] for video in levels(frames).movedim(-3, -1).numpy()]
    unit = to_unit(frames).float()
    return unit if output_type == "pt" else unit.movedim(-3, -1).cpu().numpy()
