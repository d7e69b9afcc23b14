"""Clips on one clock, and the clips and pictures of a case, for a notebook to show."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets
from PIL import Image
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.notebook.controls import is_live
from svdlab.notebook.figures import Plot, plot_film
from svdlab.notebook.scripts import joined
from svdlab.svd.video import LOSSLESS_BYTES, Clip, codec_cost, data_url, enlarged, side_by_side

if TYPE_CHECKING:
    from IPython.display import HTML

    from svdlab.parity.lab import Case, Choice

# What a page needs to play the figures of ``Player.to_html``.
SCRIPT, STYLE = (joined(f"clock.{kind}", f"player.{kind}") for kind in ("js", "css"))
CHOICES: Mapping[Choice, str] = {"off": "fix off", "on": "fix on", "own": "your code"}
_PICTURE_HEIGHT = 192  # pixels


class Player(anywidget.AnyWidget):
    """Clips of one size on one clock, pixel for pixel: a widget where there is a kernel, HTML in a page.

    Attributes:
        frame: the one that was stopped at, or is to be shown; from 0.
        playing: whether the clock runs; setting it stops or starts all clips.

    Args:
        clips: by title, in the order in which they are shown; tensors are (F, 3, H, W) in about [-1, 1].
        fps: frames a second.
        columns: how many clips stand beside each other; default: all.
        blink: offer to show the second clip in the place of the first, in turns.

    Raises:
        SvdlabError: clips of different sizes, or none; fewer than two to blink between.
    """

    _esm = SCRIPT
    _css = STYLE
    content = traitlets.Dict().tag(sync=True)
    frame = traitlets.Int(0).tag(sync=True)
    playing = traitlets.Bool(True).tag(sync=True)

    def __init__(
        self, clips: Mapping[str, Clip | Tensor], fps: int, *, columns: int | None = None, blink: bool = False
    ):
        super().__init__(content=_content(clips, fps, columns, blink))

    def show(
        self, clips: Mapping[str, Clip | Tensor], fps: int, *, columns: int | None = None, blink: bool = False
    ) -> None:
        """Put other clips in the place of these, at the same frame. Arguments and errors are the class's."""
        self.content = _content(clips, fps, columns, blink)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return super()._repr_mimebundle_(**kwargs) if is_live() else {"text/html": self.to_html()}

    def to_html(self) -> str:
        """A figure that carries all frames; ``SCRIPT`` plays it, and without scripts it shows the first of each."""
        about = {name: value for name, value in self.content.items() if name != "clips"}
        look = f"overflow:hidden;aspect-ratio:{about['width']}/{about['height']}"
        views = "".join(
            f'<div class="view"><div class="title">{escape(clip["title"])}</div><div style="{look}">'
            f'<img style="display:block;width:100%;image-rendering:pixelated" alt="{escape(clip["title"])}" '
            f'src="{clip["src"]}"></div></div>'
            for clip in self.content["clips"]
        )
        titles = escape(", ".join(clip["title"] for clip in self.content["clips"]))
        return (
            f'<figure class="svdlab-player" aria-label="{titles}" data-player="{escape(json.dumps(about))}">'
            f'<div class="views" style="display:grid;gap:8px;grid-template-columns:{about["columns"]}">{views}</div>'
            f"</figure>"
        )


def _content(clips: Mapping[str, Clip | Tensor], fps: int, columns: int | None, blink: bool) -> dict[str, Any]:
    """What player.js draws: the clips' frames, one below the other in one picture, and how."""
    made = [clip if isinstance(clip, Clip) else Clip.from_tensor(clip, fps) for clip in clips.values()]
    if len({clip.shape for clip in made}) != 1:
        raise SvdlabError(f"clips: got {[clip.shape for clip in made]}, allowed: one or more of one size")
    if blink and len(made) < 2:
        raise SvdlabError("blink: got one clip, allowed: two or more")
    frames, height, width, _ = made[0].shape
    sprites = [_sprite(clip) for clip in made]
    return {
        "clips": [{"title": title, "src": src} for title, (src, _) in zip(clips, sprites, strict=True)],
        "frames": frames,
        "height": height,
        "width": width,
        "fps": fps,
        "columns": f"repeat({columns or len(made)},minmax(0,{width * enlarged(height)}px))",
        "blink": blink,
        "note": "; ".join(f"{title}: {note}" for title, (_, note) in zip(clips, sprites, strict=True) if note),
    }


def _sprite(clip: Clip) -> tuple[str, str]:
    """A clip's frames below each other as a data URL, and what a codec costs where they are too large without loss."""
    levels = clip.frames.reshape(-1, *clip.shape[2:])
    # WebP without loss is a fifth smaller than PNG and as fast, but has no taller pictures.
    kind, options = ("WEBP", {"lossless": True, "method": 2, "quality": 50}) if len(levels) < 2**14 else ("PNG", {})
    data, note = _encoded(levels, kind, **options), ""
    if len(data) > LOSSLESS_BYTES:
        data = _encoded(levels, "JPEG", quality=90, subsampling=0)
        with Image.open(io.BytesIO(data)) as image:
            note = codec_cost(levels, np.asarray(image))
    return data_url(f"image/{'jpeg' if note else kind.lower()}", data), note


def _encoded(levels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, kind, **options)
    return buffer.getvalue()


def case_clips(case: Case, which: Choice) -> dict[str, Tensor]:
    """diffusers, svdlab and their difference, brightened: frames (F, 3, H, W) by title.

    Args:
        case: of ``Lab.case``.
        which: svdlab with the fix, with the bug injected, or with the reader's functions.
    """
    reference, candidate = (case.comparison(which).traces[name]["frames"][0] for name in ("reference", "candidate"))
    # Brightened as far as the difference without the fix allows, the same for all.
    title, shown = difference(reference, candidate, case.off.traces["candidate"]["frames"][0])
    return {"diffusers": reference, f"svdlab, {CHOICES[which]}": candidate, title: shown}


def difference(one: Tensor, other: Tensor, bright: Tensor) -> tuple[str, Tensor]:
    """How far two clips are apart at every pixel, as a clip, and its title.

    Args:
        one, other: (F, 3, H, W) in about [-1, 1].
        bright: the clip whose distance from ``one`` may be as bright as white.
    """
    peak = np.quantile((bright.double() - one.double()).abs() / 2, 0.99)
    gain = float(2 ** np.clip(np.floor(-np.log2(max(peak, 1e-9))), 0, 10))
    title = f"difference, {gain:g} times" if gain > 1 else "difference"
    return title, (other.double() - one.double()).abs() * gain - 1


def plot_case_frames(case: Case, which: Choice) -> Plot:
    """The same frame by frame, on paper."""
    return plot_film(case_clips(case, which))


def picture(alt: str, *images: Tensor) -> HTML:
    """Images (1, 3, H, W) in about [-1, 1] next to each other, enlarged pixel for pixel.

    Args:
        alt: what they show, for those who cannot see it.
        images: of one size.
    """
    from IPython.display import HTML

    strip = side_by_side([Clip.from_tensor(image, 1) for image in images]).to_pil()[0]
    scale = max(1, _PICTURE_HEIGHT // strip.height)
    large = strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST)
    src = data_url("image/png", _encoded(np.asarray(large), "PNG"))
    return HTML(f'<img style="max-width:100%" alt="{escape(alt)}" src="{src}">')
