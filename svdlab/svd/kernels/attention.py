"""Attention on CPUs, a few heads or queries at a time.

torch's kernel is slower in bfloat16 than in float32, and takes its products from MKL in small blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from svdlab.svd.kernels.packed import linear
from svdlab.svd.kernels.pieces import each
from svdlab.svd.kernels.registry import CPU_FLOATS, Kernel, Trial, register, replaces, usable
from svdlab.svd.layers import SpatialSelfAttention, TemporalSelfAttention
from svdlab.svd.vae import AttentionBlock

LONG = 512  # positions
SCORES = 2**20  # numbers that are held at a time, so that they stay in the cache
HEADS = 2**18  # likewise


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``F.scaled_dot_product_attention`` of (N, heads, L, d) among all L positions: the same shape."""
    if q.shape[2] >= LONG and usable(LONG_ATTENTION, q):
        return _by_queries(q, k, v)
    if usable(WIDE_ATTENTION, q):
        return _by_heads(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float32, a few heads at a time."""
    n, heads, length, d = q.shape
    result = q.new_empty(n, length, heads, d).transpose(1, 2)
    few = max(1, HEADS // (n * length * d))
    for start in each(range(0, heads, few)):
        part = slice(start, start + few)
        query, key, value = (t[:, part].float() for t in (q, k, v))
        result[:, part] = F.scaled_dot_product_attention(query, key, value)
    return result


def _by_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores of some queries at a time from oneDNN, in float32 as torch's kernel has them."""
    n, heads, length, d = q.shape
    result = q.new_empty(n, length, heads, d).transpose(1, 2)
    few = max(1, SCORES // length)
    for i, head in itertools.product(each(range(n)), each(range(heads))):
        keys, values = k[i, head].float() * d**-0.5, v[i, head].T.contiguous()
        for start in each(range(0, length, few)):
            queries = slice(start, start + few)
            scores = linear(q[i, head, queries].float(), keys)
            result[i, head, queries] = linear(scores.softmax(-1).to(q.dtype), values)
    return result


class FastAttention:
    """Self-attention through the function above."""

    scaled_dot_product_attention: ClassVar[Callable[..., Tensor]] = staticmethod(scaled_dot_product_attention)


@replaces(SpatialSelfAttention)
class FastSpatialSelfAttention(FastAttention, SpatialSelfAttention):
    """Among pixels."""


@replaces(TemporalSelfAttention)
class FastTemporalSelfAttention(FastAttention, TemporalSelfAttention):
    """Among frames."""


@replaces(AttentionBlock)
class FastAttentionBlock(FastAttention, AttentionBlock):
    """The VAE's."""


def _wide_trial() -> Trial:
    return TemporalSelfAttention(32, 2), (torch.randn(1, 5, 2, 3, 32),)


def _long_trial() -> Trial:
    return SpatialSelfAttention(32, 2), (torch.randn(1, 1, LONG // 16, 16, 32),)


WIDE_ATTENTION = register(
    Kernel("wide_attention", "bfloat16 attention in float32, a few heads at a time", (torch.bfloat16,), _wide_trial)
)
LONG_ATTENTION = register(
    Kernel("long_attention", f"attention of {LONG} positions and more, some queries at a time", CPU_FLOATS, _long_trial)
)
