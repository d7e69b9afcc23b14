"""A sweep's board as one file: a page that opens offline and is as alive as the widget, or an animated GIF."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from svdlab.errors import SvdlabError
from svdlab.files import atomic_path, write_text
from svdlab.notebook.scripts import policy
from svdlab.notebook.sweep_view import SCRIPT, Board, View, comparison_html, enlargement, pairs_html, reduced, text_of
from svdlab.sweep.folder import Sweep

SUFFIXES = (".html", ".gif")
_TEXT, _GAP = 14, 4  # pixels, of a GIF's heads and between its clips


def check_export(path: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The path, if its suffix is one that a board can be written as.

    Raises:
        SvdlabError: another suffix.
    """
    if (target := Path(path)).suffix.lower() not in suffixes:
        raise SvdlabError(f"{target}: suffix {target.suffix!r}, allowed: {', '.join(suffixes)}")
    return target


def export_sweep(sweep: Sweep, path: str | os.PathLike[str], view: View | None = None) -> Path:
    """Write the board of a sweep as a page (.html) or as an animated picture (.gif), whole or not at all.

    Args:
        sweep: with one finished point at least.
        path: of the file.
        view: of the axes; default: all of them.

    Raises:
        SvdlabError: another suffix, no finished point, a folder that cannot be written.
    """
    target, view = check_export(path), view or View(sweep)
    if not any(i and sweep.finished(i) for _, identities in view.rows() for i in identities):
        raise SvdlabError(f"{sweep.folder}: no point is finished, allowed: one or more")
    if target.suffix.lower() == ".gif":
        with atomic_path(target) as temporary:
            temporary.write_bytes(grid_gif(view))
    else:
        axes = ", ".join(axis.replace("_", " ") for axis in sweep.plan.axes)
        write_text(target, board_page(f"A sweep over {axes}", Board(sweep).html(view), _made_with(sweep)))
    return target


def export_comparison(before: Sweep, after: Sweep, path: str | os.PathLike[str]) -> Path:
    """Write two sweeps side by side as a page (.html), whole or not at all.

    Raises:
        SvdlabError: another suffix, what ``compare_sweeps`` raises, a folder that cannot be written.
    """
    target = check_export(path, SUFFIXES[:1])
    made = _made_with(before, "before: made with") + _made_with(after, "after: made with")
    write_text(target, board_page("Two sweeps side by side", comparison_html(before, after), made))
    return target


def _made_with(sweep: Sweep, title: str = "made with") -> str:
    """What all points share, and what made them: HTML."""
    source, first = sweep.plan.source, next(iter(sweep.plan.points.values()))
    shared = {
        n: text_of(v) for n, v in first.settings.model_dump().items() if v is not None and n not in sweep.plan.axes
    }
    about = {
        "svdlab": str(source.code),
        "torch": source.code.torch,
        "model": f"{source.model.name}, {source.model.fingerprint[:12]}",
        "device": source.device,
    }
    return f"<details><summary>{title}</summary>{pairs_html({**about, **shared})}</details>"


def board_page(title: str, board: str, below: str) -> str:
    """A board as a page of its own, of which nothing is on the network, and whose policy allows its own script only.

    Args:
        title: a heading.
        board: of ``Board.html`` or ``comparison_html``.
        below: HTML under it.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(SCRIPT)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<style>body { margin: 16px; font: 15px/1.5 system-ui, sans-serif; } h1 { font-size: 22px; }</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{board}{below}</main>"
        f'<script type="module">{SCRIPT}</script></body></html>\n'
    )


def grid_gif(view: View) -> bytes:
    """The grid of clips with its heads, all at the same frame, as an animated GIF.

    A shorter clip holds its last frame; clips are enlarged or reduced as on the board, and a GIF has 256 colours.

    Raises:
        SvdlabError: a clock of over 100 frames a second, which no GIF has.
    """
    sweep, rows, heads = view.sweep, view.rows(), view.heads()
    there = [i for _, identities in rows for i in identities if i is not None]
    clips = {i: _enlarged(sweep.frames(i)) for i in there if sweep.finished(i)}
    fps = min(sweep.plan.points[i].settings.fps for i in there)
    if fps > 100:
        raise SvdlabError(f"fps: got {fps}, allowed in a .gif: at most 100; .html holds more")
    font = ImageFont.load_default(_TEXT)
    high, wide = (max(clip.shape[axis] for clip in clips.values()) for axis in (1, 2))
    wide = max(wide, *(int(font.getlength(head)) + 1 for head in heads))
    left = max(int(font.getlength(text)) for text in (*(head for head, _ in rows), "")) + 2 * _GAP
    top = 3 * (_TEXT + _GAP)
    paper = Image.new("RGB", (left + len(heads) * (wide + _GAP), top + len(rows) * (high + _GAP)), "white")
    draw = ImageDraw.Draw(paper)
    draw.text((_GAP, _GAP), view.corner().replace("→", "across").replace("↓", "down"), "black", font)
    for column, head in enumerate(heads):
        draw.text((left + column * (wide + _GAP) + wide / 2, top - _GAP), head, "black", font, anchor="mb")
    for row, (head, _) in enumerate(rows):
        draw.text((left - _GAP, top + row * (high + _GAP) + high / 2), head, "black", font, anchor="rm")
    frames = []
    for i in range(max(map(len, clips.values()))):
        frame = paper.copy()
        for row, (_, identities) in enumerate(rows):
            for column, identity in enumerate(identities):
                if identity in clips:
                    clip, at = clips[identity], (left + column * (wide + _GAP), top + row * (high + _GAP))
                    frame.paste(Image.fromarray(clip[min(i, len(clip) - 1)]), at)
        frames.append(frame)
    buffer = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": round(1000 / fps)}
    frames[0].save(buffer, "GIF", **options)
    return buffer.getvalue()


def _enlarged(frames: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) as large as on the board."""
    small = reduced(frames)
    times = enlargement(small.shape[1])
    return small.repeat(times, axis=1).repeat(times, axis=2)
