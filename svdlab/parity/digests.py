"""Digests by which two traces are known to be of the same weights and of the same inputs: sha256, in hexadecimal."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.svd.checkpoint import open_weights
from svdlab.tensors import Tensors

# Fields of the trace's header.
DIGESTS = ("checkpoint", "inputs")
_HEX = re.compile(r"[0-9a-f]{64}")
# Inputs that a run replays bit by bit, whatever dtype it runs in; the image is left out where it is not known.
_DRAWS = ("input.noise", "input.latents")
_INPUTS = ("input.source", *_DRAWS)


def checkpoint_digest(checkpoint: str | os.PathLike[str], variant: str | None = None) -> str:
    """Of all weights of a checkpoint as stored: every tensor's name in a folder, dtype, shape and bytes.

    How the tensors are spread over files, and in which order they are in a file, does not matter: a single file has
    the digest of the folder with its weights. Every byte is read, in as many threads as there are cores: 0.9 s per GB
    were measured on one busy core.

    Args:
        checkpoint: a folder in diffusers' layout, or a single file.
        variant: file name variant ("fp16").

    Raises:
        SvdlabError: a component without weights, or a file that is no whole safetensors file.
    """
    found: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for component, weights in open_weights(Path(checkpoint), variant).items():
            digests = pool.map(partial(_tensor_digest, weights), weights.entries)
            found |= {f"{component}/{key}": value for key, value in zip(weights.entries, digests, strict=True)}
    return _combined(found)


def _tensor_digest(weights: Tensors, key: str) -> str:
    entry = weights.entries[key]
    made = hashlib.sha256(json.dumps([entry.dtype, entry.shape]).encode())
    for part in weights.parts(key):
        made.update(part)
    return made.hexdigest()


def _combined(found: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


class InputsDigest:
    """Of the random draws and of the image as given: every tensor's name, shape and values, in float64.

    A run in another dtype that replays the same tensors has the same digest.
    """

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take an input in; other tensors, and one that is there already, are ignored."""
        if name in _INPUTS and name not in self._found:
            made = hashlib.sha256(json.dumps(list(tensor.shape)).encode())
            if math.prod(tensor.shape):
                flat = tensor.detach().to("cpu", torch.float64).contiguous().reshape(-1)
                made.update(flat.view(torch.uint8).numpy().data)
            self._found[name] = made.hexdigest()

    @property
    def hex(self) -> str | None:
        """The digest; None before both draws are known."""
        return _combined(self._found) if all(name in self._found for name in _DRAWS) else None


def check_digests(value: object) -> dict[str, str]:
    """A header's ``digests``.

    Raises:
        SvdlabError: not an object of known names and 64 hexadecimal digits each.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SvdlabError(f"digests: got {type(value).__name__}, allowed: an object")
    for name, text in value.items():
        if name not in DIGESTS:
            raise SvdlabError(f"digests: got the name {name!r:.40}, allowed: {', '.join(DIGESTS)}")
        if not isinstance(text, str) or not _HEX.fullmatch(text):
            raise SvdlabError(f"digests: {name}: got {text!r:.40}, allowed: 64 hexadecimal digits in lower case")
    return dict(value)


def check_versions(value: object) -> dict[str, str]:
    """A header's ``versions``.

    Raises:
        SvdlabError: not an object of strings.
    """
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise SvdlabError("versions: got something else, allowed: an object of strings, a version for every package")
    return dict(value)
