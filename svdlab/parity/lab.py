"""What the notebooks about one fix share: diffusers and svdlab on one image, with the fix and without it.

``Lab`` computes, once for each setting; ``Case`` is one position of the sliders; ``Grid`` is several of them.
"""

from __future__ import annotations

import base64
import io
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from svdlab.cli.options import sample_picture
from svdlab.parity.bugs import check_bugs
from svdlab.parity.compare import THRESHOLD, Comparison, compare
from svdlab.parity.trace import Trace, capture
from svdlab.svd.checkpoint import EMBEDDED, checkpoint_folder
from svdlab.svd.memory import measured_peak
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import predict_noise
from svdlab.svd.video import Clip, side_by_side

if TYPE_CHECKING:
    from PIL import Image

    from svdlab.notebook.figures import Plot
    from svdlab.parity.diagnose import CatalogueRow

Watch = Callable[[float, str], None]
# Traces are kept while they fit; beyond that the oldest go. A case needs four.
_CACHE_BYTES, _CASE_TRACES = 2**30, 4
# Where a case's parts begin and end on its progress bar: float64 costs as much as the rest.
_PARTS = {
    "reference": (0.0, 0.15, "diffusers"),
    "on": (0.15, 0.3, "svdlab, fix on"),
    "off": (0.3, 0.45, "svdlab, fix off"),
    "truth": (0.45, 1.0, "diffusers in float64"),
}
_PICTURE_HEIGHT = 192  # pixels


class Stopped(Exception):  # noqa: N818 - it is no error
    """Leaves a computation that a newer one, or the stop button, has made superfluous."""


@dataclass(frozen=True)
class Case:
    """One position of the sliders.

    Attributes:
        settings: resolved.
        bug: what stands in the fix's place with the fix off, a name of ``rules.BUGS``.
        on, off: svdlab with the fix and without it, against the same reference; measured once there is a truth.
    """

    settings: GenerationSettings
    bug: str
    on: Comparison
    off: Comparison

    @property
    def measured(self) -> bool:
        """Whether the noise floor is known: the float64 run is done."""
        return self.on.floor_from == "truth"

    def comparison(self, fix: bool) -> Comparison:
        """``on`` or ``off``."""
        return self.on if fix else self.off

    def clips(self, fix: bool) -> str:
        """diffusers, svdlab and their difference in one player, so that they stay in step: HTML."""
        rows = self._rows(fix)
        heads = "".join(f"<span style='flex:1;text-align:center'>{escape(title)}</span>" for title in rows)
        player = side_by_side([Clip.from_tensor(frames, self.settings.fps) for frames in rows.values()])
        return (
            f"<div role='group' aria-label='{escape(', '.join(rows))}' style='display:inline-block;max-width:100%'>"
            f"<div style='display:flex'>{heads}</div>{player._repr_html_()}</div>"
        )

    def film(self, fix: bool) -> Plot:
        """The same frame by frame, on paper."""
        from svdlab.notebook.figures import plot_film

        return plot_film(self._rows(fix))

    def _rows(self, fix: bool) -> dict[str, Tensor]:
        """Frames (F, 3, H, W) by title; the difference brightened."""
        of, gain = self.comparison(fix), self._gain()
        reference, candidate = (of.traces[name]["frames"][0].double() for name in ("reference", "candidate"))
        return {
            "diffusers": reference,
            f"svdlab, fix {'on' if fix else 'off'}": candidate,
            f"difference{f', {gain:g} times' if gain > 1 else ''}": (candidate - reference).abs() * gain - 1,
        }

    def _gain(self) -> float:
        """By how much the difference is brightened: as far as the one without the fix allows, the same for both."""
        frames = [self.off.traces[name]["frames"].double() for name in ("reference", "candidate")]
        peak = np.quantile((frames[1] - frames[0]).abs() / 2, 0.99)
        return float(2 ** np.clip(np.floor(-np.log2(max(peak, 1e-9))), 0, 10))

    def number(self, fix: bool) -> str:
        """The verdict's number with what it means: HTML."""
        of = self.comparison(fix)
        name = f"Fix {'on' if fix else f'off ({self.bug})'}"
        mse = f"frames MSE {of.frames_mse:.1e}, {'below' if of.passes_mse_bar else 'above'} the usual bar of 1e-3"
        if not self.measured:
            return f"<p>{escape(name)}: {mse}; the noise floor is being measured</p>"
        where = f"worst at {of.worst.name}" if of.verdict == "parity" else f"first above 4 at {of.first_divergence}"
        return (
            f"<p>{escape(name)}: <b>noise ratio <output>{ratio_text(of)}</output>, {of.verdict}</b> "
            f"({escape(where)}); {mse}</p>"
        )

    def plot(self) -> Plot:
        """The divergence along probes and steps, fix off and on."""
        from svdlab.notebook.figures import plot_fix

        return plot_fix(self.on, self.off, self.bug)


def ratio_text(comparison: Comparison) -> str:
    """The worst noise ratio, as tables and widgets show it: 1.30, 2.4e+04."""
    ratio = comparison.worst.ratio
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.1e}"


class Lab:
    """One checkpoint in diffusers and in svdlab, and every trace that was made of it.

    One computation at a time: a second thread waits, and finds what the first one made.

    Args:
        model: "embedded", a checkpoint folder, or a name on the hub.
        device: where both run.
        dtype: the working dtype; the truth is float64.
        image: what the clips start from; default: ``options.sample_picture``.

    Raises:
        SvdlabError: a checkpoint that does not load, a dtype that is not known.
    """

    def __init__(
        self, model: str = EMBEDDED, device: str = "cpu", dtype: str = "float32", image: Image.Image | None = None
    ):
        self.image = image or sample_picture(model)
        self._folder, self._device = checkpoint_folder(model), device
        self.dtype = GenerationSettings(dtype=dtype).torch_dtype
        self.pipe = SVDPipeline.from_pretrained(self._folder, dtype=self.dtype, device=device)
        self._diffusers: Any = None
        self._traces: OrderedDict[Any, Trace] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def parameters(self) -> int:
        """Weights of the three networks, by which one knows whether a slider can answer at once."""
        networks = (self.pipe.unet, self.pipe.vae, self.pipe.image_encoder)
        return sum(p.numel() for network in networks for p in network.parameters())

    def settings(self, **given: Any) -> GenerationSettings:
        """Settings of this checkpoint and dtype, with what is left out filled in."""
        dtype = str(self.dtype).removeprefix("torch.")
        return self.pipe.resolve(GenerationSettings(**{**given, "dtype": dtype}))

    def case(self, settings: GenerationSettings, bug: str) -> Case:
        """Everything about one position of the sliders."""
        *_, case = self.cases(settings, bug)
        return case

    def cases(self, settings: GenerationSettings, bug: str, watch: Watch | None = None) -> Iterator[Case]:
        """The case as soon as there are clips, and again once the float64 run has measured the noise floor.

        Args:
            settings: which generation.
            bug: a name of ``rules.BUGS``.
            watch: called with the progress in [0, 1] and a text at every layer that runs; may raise ``Stopped``.

        Raises:
            SvdlabError: settings at which diffusers fails, a bug that is not known.
        """
        check_bugs(bug)
        settings = self.pipe.resolve(settings)
        reference = self.reference(settings, watch)
        on = self.candidate(settings, watch=watch)
        off = self._trace(
            ("off", bug, settings),
            lambda: capture(self.pipe.with_bugs(bug), None, settings, replay=reference, preprocess=True),
            watch,
        )
        yield Case(settings, bug, compare(reference, on), compare(reference, off))
        truth = self.truth(settings, watch)
        yield Case(settings, bug, compare(reference, on, truth), compare(reference, off, truth))

    def comparison(self, settings: GenerationSettings) -> Comparison:
        """svdlab against diffusers, measured by the float64 run."""
        return compare(self.reference(settings), self.candidate(settings), self.truth(settings))

    def reference(self, settings: GenerationSettings, watch: Watch | None = None) -> Trace:
        """diffusers' trace in the working dtype."""
        from svdlab.parity.reference import capture_diffusers

        settings = _as_diffusers_knows(self.pipe.resolve(settings))
        key = ("reference", settings)
        return self._trace(key, lambda: capture_diffusers(self._pipe_in(self.dtype), self.image, settings), watch)

    def truth(self, settings: GenerationSettings, watch: Watch | None = None) -> Trace:
        """diffusers' trace in float64, from the reference's inputs."""
        from svdlab.parity.reference import capture_diffusers

        settings = _as_diffusers_knows(self.pipe.resolve(settings))
        reference = self.reference(settings, watch)
        key = ("truth", settings)
        return self._trace(key, lambda: capture_diffusers(self._pipe_in(torch.float64), replay=reference), watch)

    def candidate(self, settings: GenerationSettings, watch: Watch | None = None) -> Trace:
        """svdlab's trace, from the image and the seed."""
        settings = self.pipe.resolve(settings)
        return self._trace(("on", settings), lambda: capture(self.pipe, self.image, settings), watch)

    def grid(
        self, settings: GenerationSettings, bugs: Sequence[str], changes: Sequence[Mapping[str, Any]]
    ) -> list[list[Case]]:
        """A row of cases, one a bug, for each change of the settings."""
        return [[self.case(settings.replace(**change), bug) for bug in bugs] for change in changes]

    def step_cost(self, settings: GenerationSettings, rounds: int = 5) -> tuple[float, float]:
        """What the UNet costs in one guided step, in the way that ``settings.cfg`` names.

        Args:
            settings: the clip's size and ``cfg``.
            rounds: how many calls are timed, after one that is not.

        Returns:
            The median of seconds, and the largest sum of activations in MiB.
        """
        settings, unet = self.pipe.resolve(settings), self.pipe.unet
        frames, factor = settings.num_frames or 1, self.pipe.vae.config.scale_factor
        size = (settings.height or 0) // factor, (settings.width or 0) // factor
        to: dict[str, Any] = {"device": self._device, "dtype": self.dtype}
        sample = torch.randn(2, frames, unet.config.in_channels, *size, **to)
        with torch.no_grad(), self._lock:
            token = torch.randn(2, 1, self.pipe.image_encoder.config.projection_dim, **to)
            conditioning = unet.condition(token, torch.ones(2, 3, **to), frames)

            def step() -> None:
                predict_noise(unet, sample, torch.ones((), **to), conditioning, cfg=settings.cfg)
                if self._device.startswith("cuda"):
                    torch.cuda.synchronize(self._device)

            step()  # what a first pass prepares is no activation
            peak, seconds = measured_peak(step, self._device), []
            for _ in range(rounds):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), peak / 2**20

    def _pipe_in(self, dtype: torch.dtype) -> Any:
        """diffusers' pipeline in a dtype: one copy, cast when needed. To float64 and back loses nothing."""
        from svdlab.parity.reference import cast_diffusers, load_diffusers

        if self._diffusers is None:
            self._diffusers = load_diffusers(self._folder, self.dtype, self._device)
        return cast_diffusers(self._diffusers, dtype)

    def _trace(self, key: Any, make: Callable[[], Trace], watch: Watch | None) -> Trace:
        with self._lock:
            if key not in self._traces:
                with _watched(*_PARTS[key[0]], key[-1].num_steps, watch):
                    self._traces[key] = make()
            self._traces.move_to_end(key)
            while len(self._traces) > _CASE_TRACES and sum(map(_bytes, self._traces.values())) > _CACHE_BYTES:
                self._traces.popitem(last=False)
            return self._traces[key]


def _bytes(trace: Trace) -> int:
    return sum(tensor.nbytes for tensor in trace.values())


def _as_diffusers_knows(settings: GenerationSettings) -> GenerationSettings:
    """Without what changes svdlab's memory and not its result, so that one reference serves all of it."""
    return settings.replace(cfg="batched", decode="parity", decode_chunk_size=settings.effective_decode_chunk)


@contextmanager
def _watched(start: float, end: float, text: str, steps: int, watch: Watch | None) -> Iterator[None]:
    """Tell ``watch`` of every layer that this thread runs, in either implementation; what it raises ends the run."""
    if watch is None:
        yield
        return
    me, done = threading.get_ident(), 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal done
        if threading.get_ident() != me:
            return
        done = min(steps, done + type(module).__name__.startswith("UNet"))
        watch(start + (end - start) * done / (steps + 1), f"{text}, step {done} of {steps}")

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def motion_per_frame(frames: Tensor) -> list[float]:
    """The mean absolute change from each frame to the next, (F, 3, H, W) to F - 1 numbers, in grey levels of 255."""
    levels = (frames.double() / 2 + 0.5).clamp(0, 1) * 255
    return (levels[1:] - levels[:-1]).abs().mean(dim=(1, 2, 3)).tolist()


def motion(frames: Tensor) -> float:
    """How much a clip moves: the mean of ``motion_per_frame``; 0 for a single frame."""
    changes = motion_per_frame(frames)
    return sum(changes) / len(changes) if changes else 0.0


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table for a notebook to show; numbers in it are what the caller made of them."""
    from IPython.display import HTML

    head, *body = (
        f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in row)}</tr>"
        for tag, row in (("th", heads), *(("td", row) for row in rows))
    )
    return HTML(f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>")


def catalogue_table(rows: Sequence[CatalogueRow]) -> Any:
    """Which of two bars catches which bug, for a notebook to show; what a bar lets through is marked.

    Args:
        rows: of ``parity.diagnose.catalogue``.
    """
    from IPython.display import HTML

    def bar(caught: bool) -> str:
        return "<td>catches it</td>" if caught else "<td style='background:#fbe3d6'><b>lets it through</b></td>"

    heads = ("bug", "first tensor above 4", "noise ratio", "frames MSE", "MSE &lt; 1e-3", "noise ratio &lt;= 4")
    body = "".join(
        f"<tr><td>{escape(row.bug)}</td><td>{escape(row.first_divergence or 'none')}</td><td>{row.ratio:.3g}</td>"
        f"<td>{row.frames_mse:.1e}</td>{bar(not row.passes_mse_bar)}{bar(row.ratio > THRESHOLD)}</tr>"
        for row in rows
    )
    return HTML(f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{body}</table>")


def stage_table(comparison: Comparison) -> Any:
    """The stages that a port is usually judged by: the worst probe of each, for a notebook to show."""
    rows = []
    for stage, prefix in (
        ("image embedding", "image_embeddings"),
        ("image latents", "image_latents"),
        ("noise prediction, every step", "noise_pred."),
        ("frames", "frames"),
    ):
        probes = [p for p in comparison.probes if p.name.startswith(prefix)]
        worst = max(probes, key=lambda p: p.ratio)
        mse, largest = max(p.mse for p in probes), max(p.max_abs for p in probes)
        rows.append((stage, len(probes), f"{worst.ratio:.2f}", f"{worst.floor:.1e}", f"{largest:.1e}", f"{mse:.1e}"))
    return table(
        ("stage", "tensors", "worst noise ratio", "its noise floor", "largest difference", "mean squared error"), rows
    )


def picture(alt: str, *images: Tensor) -> Any:
    """Images (1, 3, H, W) in about [-1, 1] next to each other, enlarged pixel for pixel, for a notebook to show.

    Args:
        alt: what they show, for those who cannot see it.
        images: of one size.
    """
    from IPython.display import HTML
    from PIL import Image as pil

    strip = side_by_side([Clip.from_tensor(image, 1) for image in images]).to_pil()[0]
    scale = max(1, _PICTURE_HEIGHT // strip.height)
    buffer = io.BytesIO()
    strip.resize((strip.width * scale, strip.height * scale), pil.Resampling.NEAREST).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return HTML(f'<img style="max-width:100%" alt="{escape(alt)}" src="data:image/png;base64,{data}">')


@dataclass(frozen=True)
class Chunk:
    """What a decode in chunks does.

    Attributes:
        size: frames a chunk.
        cuts: how far diffusers' frames are from those it decodes at once, relative.
        parity: svdlab with this chunk size against diffusers with the same.
        exact: svdlab's exact decode in chunks of this size against diffusers at once.
        distance: of the frames from diffusers float64 at once: "diffusers", "parity", "exact" and "floor".
    """

    size: int
    cuts: float
    parity: Comparison
    exact: Comparison
    distance: dict[str, float]


def every_chunk(lab: Lab, settings: GenerationSettings) -> list[Chunk]:
    """Decode a clip in chunks of every size from 1 to all frames, in diffusers and in svdlab in both ways."""
    settings = lab.pipe.resolve(settings.replace(decode="parity", decode_chunk_size=None))
    reference, truth = lab.reference(settings), lab.truth(settings)
    whole = truth["frames"].double()
    found = []
    for size in range(1, (settings.num_frames or 1) + 1):
        cut, exact = (settings.replace(decode=how, decode_chunk_size=size) for how in ("parity", "exact"))
        same = compare(lab.reference(cut), lab.candidate(cut), lab.truth(cut))
        kept = compare(reference, lab.candidate(exact), truth)
        frames = {
            "diffusers": same.traces["reference"]["frames"],
            "parity": same.traces["candidate"]["frames"],
            "exact": kept.traces["candidate"]["frames"],
            "floor": reference["frames"],
        }
        distance = {name: float((f.double() - whole).norm() / whole.norm()) for name, f in frames.items()}
        cuts = float((frames["diffusers"] - frames["floor"]).norm() / frames["floor"].norm())
        found.append(Chunk(size, cuts, same, kept, distance))
    return found
