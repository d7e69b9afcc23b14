"""The code that made a sweep's points: its version, file by file, so that a change can be named."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# What makes a clip, folders with all below: a change here makes other points, a change of a plot or a widget does not.
CLIP_CODE = ("svd", "tensors.py", "parity/bugs.py", "parity/edits.py", "parity/probes.py", "parity/taps.py")
# What measures its distance from diffusers, where that is asked for.
DIVERGENCE_CODE = ("parity",)
_PACKAGE = Path(__file__).parent.parent
_SHOWN_FILES = 5


@dataclass(frozen=True)
class Code:
    """What computed a point.

    Attributes:
        svdlab: its version; in a checkout that alone says little.
        torch: its version, without what it was built for (CPU, CUDA).
        files: the digest of every file that the result depends on, by its path in the package.
    """

    svdlab: str
    torch: str
    files: Mapping[str, str] = field(repr=False)

    def __str__(self) -> str:
        """Version and digest, such as "0.1.0+3f6c0a11": equal for equal files of one version."""
        digest = hashlib.sha256("\n".join(f"{name} {self.files[name]}" for name in sorted(self.files)).encode())
        return f"{self.svdlab}+{digest.hexdigest()[:8]}"

    @property
    def identity(self) -> str:
        """Everything about it, in one line."""
        return f"{self}, torch {self.torch}"

    def changes(self, since: Code) -> str:
        """What is not the same, in words; empty for the same code."""
        versions = (("svdlab", since.svdlab, self.svdlab), ("torch", since.torch, self.torch))
        said = [f"{name} {was} -> {now}" for name, was, now in versions if was != now]
        paths = sorted(self.files.keys() | since.files.keys())
        if changed := [path for path in paths if self.files.get(path) != since.files.get(path)]:
            more = f" and {len(changed) - _SHOWN_FILES} more" if len(changed) > _SHOWN_FILES else ""
            said.append(f"changed: {', '.join(changed[:_SHOWN_FILES])}{more}")
        return "; ".join(said)


@functools.cache
def code_version(divergence: bool) -> Code:
    """The code of this process.

    Args:
        divergence: with what measures the distance from diffusers.
    """
    names = (*CLIP_CODE, *DIVERGENCE_CODE) if divergence else CLIP_CODE
    torch = importlib.metadata.version("torch").partition("+")[0]
    return Code(importlib.metadata.version("svdlab"), torch, file_digests(_PACKAGE, names))


def file_digests(package: Path, names: tuple[str, ...]) -> dict[str, str]:
    """A digest of every Python file that is named or is in a folder that is named, by its path in the package."""
    paths = [package / name for name in names]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return {file.relative_to(package).as_posix(): _digest(file) for file in files}


def _digest(file: Path) -> str:
    # A checkout on Windows may end its lines otherwise.
    return hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:12]
