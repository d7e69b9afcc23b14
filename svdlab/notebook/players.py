"""Clips and pictures of a case, for a notebook to show."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from svdlab.notebook.figures import Plot, plot_film
from svdlab.svd.video import Clip, side_by_side

if TYPE_CHECKING:
    from IPython.display import HTML

    from svdlab.parity.lab import Case

_PICTURE_HEIGHT = 192  # pixels


def clips_html(case: Case, fix: bool) -> str:
    """diffusers, svdlab and their difference in one player, so that they stay in step: HTML.

    Args:
        case: of ``Lab.case``.
        fix: svdlab with the fix, or with the bug injected.
    """
    rows = _rows(case, fix)
    heads = "".join(f"<span style='flex:1;text-align:center'>{escape(title)}</span>" for title in rows)
    player = side_by_side([Clip.from_tensor(frames, case.settings.fps) for frames in rows.values()])
    return (
        f"<div role='group' aria-label='{escape(', '.join(rows))}' style='display:inline-block;max-width:100%'>"
        f"<div style='display:flex'>{heads}</div>{player._repr_html_()}</div>"
    )


def plot_case_frames(case: Case, fix: bool) -> Plot:
    """The same frame by frame, on paper."""
    return plot_film(_rows(case, fix))


def _rows(case: Case, fix: bool) -> dict[str, Tensor]:
    """Frames (F, 3, H, W) by title; the difference brightened."""
    of, gain = case.comparison(fix), _gain(case)
    reference, candidate = (of.traces[name]["frames"][0].double() for name in ("reference", "candidate"))
    return {
        "diffusers": reference,
        f"svdlab, fix {'on' if fix else 'off'}": candidate,
        f"difference{f', {gain:g} times' if gain > 1 else ''}": (candidate - reference).abs() * gain - 1,
    }


def _gain(case: Case) -> float:
    """By how much the difference is brightened: as far as the one without the fix allows, the same for both."""
    reference, candidate = (case.off.traces[name]["frames"].double() for name in ("reference", "candidate"))
    peak = np.quantile((candidate - reference).abs() / 2, 0.99)
    return float(2 ** np.clip(np.floor(-np.log2(max(peak, 1e-9))), 0, 10))


def picture(alt: str, *images: Tensor) -> HTML:
    """Images (1, 3, H, W) in about [-1, 1] next to each other, enlarged pixel for pixel.

    Args:
        alt: what they show, for those who cannot see it.
        images: of one size.
    """
    from IPython.display import HTML
    from PIL import Image

    strip = side_by_side([Clip.from_tensor(image, 1) for image in images]).to_pil()[0]
    scale = max(1, _PICTURE_HEIGHT // strip.height)
    buffer = io.BytesIO()
    strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return HTML(f'<img style="max-width:100%" alt="{escape(alt)}" src="data:image/png;base64,{data}">')
