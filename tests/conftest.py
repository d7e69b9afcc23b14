"""Shared fixtures: a random tiny checkpoint, a photograph, and one thread per process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from svdlab.samples import sample_photo
from svdlab.svd.random_checkpoint import write_random_checkpoint

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint in diffusers' layout; read only."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A real photograph, larger than what CLIP is fed: matplotlib's sample of Grace Hopper."""
    return sample_photo()
