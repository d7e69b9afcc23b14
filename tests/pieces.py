"""Small videos taken apart as large ones are, which no small test would reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from svdlab.svd.kernels import decode, pieces


@contextmanager
def in_pieces(numbers: int, roomy: tuple[str, ...] = ()) -> Iterator[None]:
    """Take videos apart as GPUs do, in chunks, and those into pieces of so many numbers.

    Args:
        numbers: of a piece.
        roomy: devices on which the decode keeps a second video.
    """
    chunks = patch.object(decode, "piece_length", lambda x, size, at_least=0: at_least or max(1, numbers // size))
    with chunks, patch.object(decode, "ROOMY", roomy), patch.dict(pieces.NUMBERS, cpu=numbers):
        yield
