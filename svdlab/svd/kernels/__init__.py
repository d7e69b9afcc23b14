"""How fast the network runs, apart from what it computes: classes that take the place of the plain layers.

``use_kernels(network)`` swaps them in, which loading a checkpoint for inference does; ``plain(network)`` gives the
network without them. Weights, names and results stay the same. ``svdlab kernels`` shows which run on this machine.
"""

from __future__ import annotations

from typing import Any

import torch

from svdlab.svd.kernels import attention, decode, norm, packed, pieces, upsample  # noqa: F401 - they register kernels
from svdlab.svd.kernels.registry import (
    FLOATS,
    KERNELS,
    OFF,
    drop_kernels,
    plain,
    unedited_weights,
    use_kernels,
    verdict,
)

__all__ = ["KERNELS", "OFF", "drop_kernels", "plain", "table", "unedited_weights", "use_kernels"]


def table(device: str = "cpu") -> list[dict[str, Any]]:
    """Every kernel in every dtype on a kind of device: ``name``, ``summary``, ``dtype``, ``used``, ``why``."""
    rows = []
    for kernel in KERNELS.values():
        for dtype in FLOATS:
            found = verdict(kernel, torch.device(device).type, dtype)
            name = str(dtype).removeprefix("torch.")
            about = {"name": kernel.name, "summary": kernel.summary, "dtype": name}
            rows.append({**about, "used": found.used, "why": found.why})
    return rows
