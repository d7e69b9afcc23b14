"""The scripts and style sheets beside these modules, for widgets and for pages."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any


def joined(*names: str) -> str:
    """Files of this folder, one after the other: a module of a widget imports nothing."""
    return "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def packed(data: Any) -> str:
    """JSON for a page to carry, in gzip in base64, since it repeats itself; ``unpacked.js`` reads it."""
    return base64.b64encode(gzip.compress(json.dumps(data, allow_nan=False).encode(), mtime=0)).decode()


def policy(*scripts: str) -> str:
    """The Content-Security-Policy of a page that carries all it needs: these scripts run, by their hashes, no other."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    runs = "".join(["script-src", *(f" 'sha256-{one}'" for one in hashes), "; "]) if scripts else ""
    carried = "img-src data:; media-src data:; font-src data:; style-src 'unsafe-inline'"
    return f"default-src 'none'; {runs}{carried}; base-uri 'none'; form-action 'none'"
