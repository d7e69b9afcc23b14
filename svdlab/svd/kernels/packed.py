"""Products on CPUs with weights that oneDNN keeps in its own blocked order, made at the first call.

Without it oneDNN reorders a weight in every call, which costs more than the product where activations are small. The
price is a second copy of the weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from svdlab.svd import layout
from svdlab.svd.kernels.registry import CPU_FLOATS, Kernel, Trial, WeightCache, register, replaces, usable
from svdlab.svd.layers import GEGLU, Conv2d, TemporalConv

onednn = torch.ops.mkldnn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in oneDNN, which unlike MKL is fast on AMD's processors; the weight blocked or contiguous."""
    return onednn._linear_pointwise(x, weight, bias, "none", [], "")


class Packed:
    """A layer with a packed weight."""

    cache: WeightCache  # given by ``use_kernels``

    def convolve(
        self,
        images: Tensor,
        weight: Tensor,
        padding: tuple[int, int],
        stride: int = 1,
        bias: Tensor | None = None,
        arrange: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> Tensor:
        """``F.conv2d`` of channels_last images (N, C, H, W) with this layer's weight (O, I, kH, kW).

        A layer always asks for the same arrangement of its weight, which is made when the weight is blocked.
        """
        pads, strides, dilation = list(padding), [stride, stride], [1, 1]

        def reorder(weight: Tensor) -> list[Tensor]:
            kernel = arrange(weight)
            return [onednn._reorder_convolution_weight(kernel, pads, strides, dilation, 1, list(images.shape))]

        (blocked,) = self.cache.get(weight, reorder)
        return onednn._convolution_pointwise(images, blocked, bias, pads, strides, dilation, 1, "none", [], "")


@replaces(nn.Linear)
class PackedLinear(nn.Linear, Packed):
    """A linear layer over the channel axis."""

    def forward(self, x: Tensor) -> Tensor:
        if not usable(LINEAR, x):
            return super().forward(x)
        (blocked,) = self.cache.get(self.weight, lambda w: [onednn._reorder_linear_weight(w)])
        return linear(x, blocked, self.bias)


@replaces(Conv2d)
class PackedConv2d(Conv2d, Packed):
    """A spatial convolution; one of a single pixel is a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        if not usable(CONVOLUTION, x):
            return super().forward(x)
        if self.kernel_size == (1, 1):
            (blocked,) = self.cache.get(self.weight, lambda w: [onednn._reorder_linear_weight(w.flatten(1))])
            return linear(x, blocked, self.bias)
        padding = int(self.padding[0])
        images = layout.as_images(x)
        y = self.convolve(images, self.weight, (padding, padding), self.stride[0], self.bias)
        return layout.from_images(y, x.shape[0])


@replaces(TemporalConv)
class PackedTemporalConv(TemporalConv, Packed):
    """A temporal convolution, as a 2d one."""

    def forward(self, x: Tensor) -> Tensor:
        if not usable(CONVOLUTION, x):
            return super().forward(x)
        y = self.convolve(layout.as_time_strips(x), self.weight[..., 0], (1, 0), bias=self.bias)
        return layout.from_time_strips(y, x.shape[2])


@replaces(GEGLU)
class FusedGEGLU(GEGLU, Packed):
    """Two products: the GELU is applied while the gate is written, and the gate while the value is."""

    def forward(self, x: Tensor) -> Tensor:
        if not usable(FUSED_GEGLU, x):
            return super().forward(x)
        blocked = self.cache.get(
            self.proj.weight, lambda w: [onednn._reorder_linear_weight(half) for half in w.chunk(2)]
        )
        value_bias, gate_bias = self.proj.bias.chunk(2)
        gate = onednn._linear_pointwise(x, blocked[1], gate_bias, "gelu", [], self.approximate)
        return onednn._linear_pointwise.binary(x, gate, blocked[0], value_bias, "mul")


def _linear_trial() -> Trial:
    return nn.Linear(48, 40), (torch.randn(2, 3, 48),)


def _convolution_trial() -> Trial:
    layers = (Conv2d(32, 48, 3, padding=1), Conv2d(48, 32, 1), Conv2d(32, 32, 3, stride=2), TemporalConv(32, 32))
    return nn.Sequential(*layers), (torch.randn(1, 3, 6, 5, 32),)


def _geglu_trial() -> Trial:
    return GEGLU(32, 48), (torch.randn(2, 5, 32),)


LINEAR = register(Kernel("packed_linear", "linear layers with weights in oneDNN's order", CPU_FLOATS, _linear_trial))
CONVOLUTION = register(
    Kernel("packed_convolution", "convolutions with weights in oneDNN's order", CPU_FLOATS, _convolution_trial)
)
FUSED_GEGLU = register(Kernel("fused_geglu", "GEGLU in two products that do the rest", CPU_FLOATS, _geglu_trial))
