"""Small clips taken apart as large ones are, which no small test would reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from svdlab.svd import layers, vae


@contextmanager
def in_pieces(numbers: int) -> Iterator[None]:
    """Take clips apart as GPUs do, in chunks, and those into pieces of so many numbers."""
    chunks = patch.object(vae, "at_a_time", lambda x, size, at_least: at_least)
    with chunks, patch.dict(layers.AT_A_TIME, cpu=numbers):
        yield
