"""A checkpoint that is damaged where no reader sees it: NaN in a weight."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def poisoned(tiny: Path, folder: Path, network: str, key: str) -> Path:
    """The tiny checkpoint with NaN in one weight."""
    shutil.copytree(tiny, folder)
    (file,) = (folder / network).glob("*.safetensors")
    tensors = load_file(file)
    tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, file)
    return folder
