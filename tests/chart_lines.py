"""What a chart's lines say, without how they are drawn."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping
from typing import Any


def unpacked(text: str) -> Any:
    """What ``scripts.packed`` made, as a page reads it."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def drawn(spec: Mapping[str, Any], title: str | None = None) -> dict[str, dict[Any, float]]:
    """By line, the height of every point by its place: probe, step or number.

    Args:
        spec: Vega-Lite.
        title: of the one chart of several side by side; default: the first.
    """
    charts = spec.get("hconcat", [spec])
    chart = next(c for c in charts if title is None or c.get("title") == title)
    lines: dict[str, dict[Any, float]] = {}
    for layer in _layers(chart):
        if layer["mark"]["type"] != "line":
            continue
        field = layer["encoding"]["x"]["field"]
        for row in spec["datasets"][layer["data"]["name"]]:
            lines.setdefault(row["line"], {})[row[field]] = row["shown"]
    return lines


def _layers(chart: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for layer in chart.get("layer", [chart]):
        if "layer" in layer:
            yield from _layers(layer)
        else:
            yield layer
