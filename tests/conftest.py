"""Shared fixtures: a random tiny checkpoint, a photograph, and one thread per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from svdlab.samples import sample_photo
from svdlab.svd.kernels import OFF, registry
from svdlab.svd.random_checkpoint import write_random_checkpoint

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests of what kernels do: on, also where the suite runs with ``SVDLAB_KERNELS_OFF=all``."""
    if OFF not in os.environ:
        yield
        return
    with monkeypatch.context() as patch:
        patch.delenv(OFF)
        registry.forget()
        yield
    registry.forget()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint in diffusers' layout; read only."""
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A real photograph, larger than what CLIP is fed: matplotlib's sample of Grace Hopper."""
    return sample_photo()
