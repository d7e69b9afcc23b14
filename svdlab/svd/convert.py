"""A checkpoint from one form into the other: diffusers' folder, or a single file in the original naming."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from svdlab.errors import SvdlabError, about
from svdlab.files import atomic_folder, atomic_path, check_outputs
from svdlab.svd.checkpoint import Folder, checkpoint_path, weights_path, write_configs
from svdlab.svd.single_file import Options, SingleFile, unsaid_options, write_single_file
from svdlab.tensors import write_tensors

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source: the folder or file that was read.
        target: what was written.
        weights: how many the three networks have.
        unused: names in the source that no network reads; they are not in the target.
    """

    source: Path
    target: Path
    weights: int
    unused: Sequence[str]


def is_single_file(target: str | os.PathLike[str]) -> bool:
    """Whether what is written there is a single file, by its name."""
    return Path(target).suffix == _SUFFIX


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    options: Options = MappingProxyType({}),
    variant: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write a checkpoint once more, every weight as it is stored, one in memory at a time.

    Args:
        source: as ``checkpoint.checkpoint_path`` takes it.
        target: a name that ends with ``.safetensors`` is a single file; any other a folder in diffusers' format.
        options: of a single file, what its weights do not say: see ``single_file.SingleFile``.
        variant, revision: of a folder, as ``checkpoint.load_components``.

    Raises:
        SvdlabError: a source that does not load, a folder that is there already, a file that is an input, options of a
            folder, whose configs say all; or an architecture for which the other form has no words.
    """
    target, single = Path(target), is_single_file(target)
    check_outputs(target if single else None, folders=[None if single else target], inputs=[source])
    if not single and os.path.lexists(target):
        raise SvdlabError(f"{target}: is there already, allowed: a new folder, or a file whose name ends in {_SUFFIX}")
    path = checkpoint_path(os.fspath(source), variant, revision)
    if path.is_dir() and options:
        raise SvdlabError(f"options: got {', '.join(options)} for the folder {path}, allowed: only for a single file")
    checkpoint = SingleFile(path, options) if path.is_file() else Folder(path, variant)
    configs, weights = checkpoint.configs, checkpoint.weights
    if single:
        unsaid = unsaid_options(configs, checkpoint.scheduler, checkpoint.feature_extractor)
        with atomic_path(target) as temporary, about(str(path)):
            write_single_file(temporary, weights, configs, unsaid)
    else:
        if configs.unet.num_frames is None:
            raise SvdlabError(f"{path}: unet.num_frames: its weights do not say it; allowed: 14 for SVD, 25 for SVD-XT")
        with atomic_folder(target) as temporary:
            write_configs(temporary, configs, checkpoint.scheduler, checkpoint.feature_extractor)
            for name, tensors in weights.items():
                write_tensors(weights_path(temporary, name), tensors.entries, tensors.read, {"format": "pt"})
    unused = checkpoint.unused if isinstance(checkpoint, SingleFile) else []
    return Conversion(path, target, sum(len(tensors.entries) for tensors in weights.values()), unused)
