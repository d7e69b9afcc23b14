"""A convolution behind an enlargement, on CPUs: as a smaller convolution of the small image.

Where both sides double, the three taps along a side meet two different pixels only. Added up once, the taps that meet
the same one make the four pixels that a pixel becomes the channels of one 2x2 convolution of the small image, with 4/9
of the multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdlab.svd import layout
from svdlab.svd.kernels.packed import Packed
from svdlab.svd.kernels.registry import CPU_FLOATS, Kernel, Trial, register, replaces, usable
from svdlab.svd.layers import Upsample


@replaces(Upsample)
class SmallImageUpsample(Upsample, Packed):
    """Doubles both sides by a convolution of the small image; other sizes go the plain way."""

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        doubled = (2 * x.shape[2], 2 * x.shape[3])
        if (size or doubled) != doubled or not usable(UPSAMPLE, x):
            return super().forward(x, size)
        bias = None if self.conv.bias is None else self.conv.bias.repeat(4)
        images = layout.as_images(x)
        y = self.convolve(images, self.conv.weight, (1, 1), bias=bias, arrange=summed_taps)
        return interleave(layout.from_images(y, x.shape[0]))


def summed_taps(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) -> (4 O, I, 2, 2): upper left, upper right, lower left and lower right pixel of every four."""
    met = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)
    taps = torch.einsum("ihy,jwx,ocyx->ijochw", met, met, weight.float())
    return taps.flatten(0, 2).to(weight.dtype)


def interleave(y: Tensor) -> Tensor:
    """(B, F, H + 1, W + 1, 4 C) -> (B, F, 2 H, 2 W, C): a quarter of the channels for each pixel of every four.

    The lower pixels lie one row further, the right ones one column.
    """
    b, f, height, width, channels = y.shape
    height, width, quarters = height - 1, width - 1, y.unflatten(-1, (4, channels // 4))
    result = y.new_empty(b, f, height, 2, width, 2, channels // 4)
    for i in range(2):
        for j in range(2):
            result[:, :, :, i, :, j] = quarters[:, :, i : i + height, j : j + width, 2 * i + j]
    return result.flatten(4, 5).flatten(2, 3)


def _trial() -> Trial:
    return Upsample(32), (torch.randn(1, 2, 3, 4, 32),)


UPSAMPLE = register(
    Kernel("small_image_upsample", "enlarge and convolve as a 2x2 convolution of the small image", CPU_FLOATS, _trial)
)
