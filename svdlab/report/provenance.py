"""What a report was made with: the command, the code, the checkpoint, the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import svdlab

_PACKAGES = ("svdlab", "torch", "diffusers", "transformers", "numpy", "papermill")


def made_with(arguments: Sequence[str], model: str, device: str) -> dict[str, str]:
    """What is to be the same for a report to be made again.

    Args:
        arguments: of the command ``svdlab``.
        model: a checkpoint, as ``checkpoint_path`` takes it; all of its bytes are read.
        device: where the notebooks run.

    Raises:
        SvdlabError: there is no such checkpoint.
    """
    from svdlab.bench.timing import machine
    from svdlab.parity.digests import checkpoint_digest
    from svdlab.svd.checkpoint import checkpoint_path
    from svdlab.sweep.code import code_version

    about = machine(device)
    return {
        "command": shlex.join(["svdlab", *arguments]),
        "commit": _commit() or "no clone",
        "code that generates": str(code_version(divergence=True)),
        "checkpoint": f"{model}, sha256 {checkpoint_digest(checkpoint_path(model))[:16]}",
        "processor": ", ".join(str(about[name]) for name in ("model", "instruction_set", "device") if name in about),
        "cores": str(os.cpu_count()),
    }


def versions() -> dict[str, str]:
    """Of Python and of what the notebooks rest on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    """The commit of the clone that svdlab runs from, and whether files differ from it; nothing without a clone."""
    root = Path(svdlab.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
