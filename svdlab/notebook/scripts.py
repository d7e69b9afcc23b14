"""The scripts and style sheets beside these modules, for widgets and for pages."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path


def joined(*names: str) -> str:
    """Files of this folder, one after the other: a module of a widget imports nothing."""
    return "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def source_expression(script: str) -> str:
    """What a page's policy names a script by: it runs, and nothing else does."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
