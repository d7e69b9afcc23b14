"""A checkpoint in both implementations, loaded once in a process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from svdlab.parity.reference import load_diffusers
from svdlab.svd.pipeline import SVDPipeline


@functools.cache
def loaded(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, SVDPipeline]:
    """diffusers, also in float64, and svdlab; what is planted in the first is taken out again."""
    wide = load_diffusers(folder, torch.float64, weights_dtype=dtype)
    return load_diffusers(folder, dtype), wide, SVDPipeline.from_pretrained(folder, dtype=dtype)
