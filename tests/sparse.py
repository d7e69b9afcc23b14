"""safetensors files of any size that take no room on the disk: their data is a hole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

BYTES = {"F32": 4, "F16": 2, "I32": 4}


def sparse_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", metadata: Mapping[str, str] | None = None
) -> Path:
    """A file of tensors of these shapes, all zeros."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path
