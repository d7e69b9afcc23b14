"""diffusers and svdlab with the same weights on one image: every trace made once, compared with and without a bug.

``Lab`` computes, once for each setting; ``Case`` is what it finds at one setting with one bug injected.
"""

from __future__ import annotations

import copy
import functools
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from svdlab.parity.bugs import check_bugs
from svdlab.parity.candidate import capture
from svdlab.parity.compare import Comparison, compare
from svdlab.parity.trace import Trace
from svdlab.samples import sample_picture
from svdlab.svd.checkpoint import EMBEDDED, checkpoint_path
from svdlab.svd.images import to_unit
from svdlab.svd.memory import measured_peak
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import predict_noise
from svdlab.svd.workloads import unet_inputs

if TYPE_CHECKING:
    from PIL import Image

OnProgress = Callable[[float, str], None]
# svdlab with the fix, with its bug injected, or with a reader's own functions in the stages' places.
Choice = Literal["off", "on", "own"]
Stages = Mapping[str, Callable[..., Any]]
# Traces are kept while they fit; beyond that the oldest go. A case needs four.
_CACHE_BYTES, _CASE_TRACES = 2**30, 4
# Where a case's parts begin and end on its progress bar: float64 costs as much as the rest.
_PARTS = {
    "reference": (0.0, 0.14, "diffusers"),
    "on": (0.14, 0.26, "svdlab, fix on"),
    "off": (0.26, 0.38, "svdlab, fix off"),
    "own": (0.38, 0.5, "svdlab, your code"),
    "truth": (0.5, 1.0, "diffusers in float64"),
}


class Cancelled(Exception):  # noqa: N818 - it is no error
    """Leaves a computation that a newer one, or the stop button, has made superfluous."""


@dataclass(frozen=True)
class Case:
    """svdlab with the fix and with its bug injected, against the same reference.

    Attributes:
        settings: resolved.
        bug: the injected bug, a name of ``bugs.BUGS``.
        on: svdlab as it is; ``off`` with the bug, ``own`` with a reader's functions, if any were given. Their noise
            floors are measured once there is a truth.
    """

    settings: GenerationSettings
    bug: str
    on: Comparison
    off: Comparison
    own: Comparison | None = None

    @property
    def measured(self) -> bool:
        """Whether the noise floor is known: the float64 run is done."""
        return self.on.floor_from == "truth"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What there is a comparison of."""
        return ("off", "on") if self.own is None else ("off", "on", "own")

    def comparison(self, which: Choice) -> Comparison:
        """That of a choice which is there."""
        found = {"off": self.off, "on": self.on, "own": self.own}[which]
        assert found is not None
        return found


class Lab:
    """One checkpoint in diffusers and in svdlab, and every trace that was made of it.

    One computation at a time: a second thread waits, and finds what the first one made.

    Args:
        model: "embedded", a checkpoint's folder or single file, or a name on the hub.
        device: where both run.
        dtype: the working dtype; the truth is float64.
        image: what the clips start from; default: ``samples.sample_picture``.

    Raises:
        SvdlabError: a checkpoint that does not load, a dtype that is not known.
    """

    def __init__(
        self, model: str = EMBEDDED, device: str = "cpu", dtype: str = "float32", image: Image.Image | None = None
    ):
        self.model, self.device = model, device
        self.own_image = image is not None
        self.image = image or sample_picture(model)
        self._checkpoint = checkpoint_path(model)
        self.dtype = GenerationSettings(dtype=dtype).torch_dtype
        self.pipe = SVDPipeline.from_pretrained(self._checkpoint, dtype=self.dtype, device=device, compat="diffusers")
        self._diffusers: list[Any] = []  # the pipeline once it is loaded; ``with_image``'s labs share it
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

    def with_image(self, image: Image.Image) -> Lab:
        """The same checkpoint on another image, with no trace yet; both take turns with the networks."""
        other = copy.copy(self)
        other.image, other._traces = image, OrderedDict()
        return other

    def case(self, settings: GenerationSettings, bug: str, stages: Stages | None = None) -> Case:
        """Everything about one position of the sliders; arguments and errors as of ``cases``."""
        *_, case = self.cases(settings, bug, stages)
        return case

    def cases(
        self,
        settings: GenerationSettings,
        bug: str,
        stages: Stages | None = None,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Case]:
        """The case as soon as there are clips, and again once the float64 run has measured the noise floor.

        Args:
            settings: which generation.
            bug: a name of ``bugs.BUGS``.
            stages: functions for the stages' places (``SVDPipeline.with_stage``), run whenever they are given: what
                they do may have changed.
            on_progress: called with the progress in [0, 1] and a text at every layer; may raise ``Cancelled``.

        Raises:
            SvdlabError: settings at which diffusers fails, a bug or a stage that is not known.
        """
        check_bugs(bug)
        with_own = self.pipe.with_stage(**stages or {})
        settings = self.pipe.resolve(settings)
        reference = self.reference(settings, on_progress)
        on = self.candidate(settings, on_progress=on_progress)
        off = self._trace(
            ("off", bug, settings),
            lambda: capture(self.pipe.with_bugs(bug), None, settings, replay=reference, preprocess=True),
            on_progress,
        )
        candidates = [on, off]
        if stages:
            with self._lock, _reporting(*_PARTS["own"], settings.num_steps, on_progress):
                candidates.append(capture(with_own, None, settings, replay=reference, preprocess=True))
        yield Case(settings, bug, *(compare(reference, candidate) for candidate in candidates))
        truth = self.truth(settings, on_progress)
        yield Case(settings, bug, *(compare(reference, candidate, truth) for candidate in candidates))

    def comparison(self, settings: GenerationSettings) -> Comparison:
        """svdlab against diffusers, measured by the float64 run."""
        return compare(self.reference(settings), self.candidate(settings), self.truth(settings))

    def reference(self, settings: GenerationSettings, on_progress: OnProgress | None = None) -> Trace:
        """diffusers' trace in the working dtype."""
        from svdlab.parity.reference import capture_diffusers

        settings = _as_diffusers_knows(self.pipe.resolve(settings))
        key = ("reference", settings)
        return self._trace(key, lambda: capture_diffusers(self._pipe_in(self.dtype), self.image, settings), on_progress)

    def truth(self, settings: GenerationSettings, on_progress: OnProgress | None = None) -> Trace:
        """diffusers' trace in float64, from the reference's inputs."""
        from svdlab.parity.reference import capture_diffusers

        settings = _as_diffusers_knows(self.pipe.resolve(settings))
        reference = self.reference(settings, on_progress)
        key = ("truth", settings)
        return self._trace(key, lambda: capture_diffusers(self._pipe_in(torch.float64), replay=reference), on_progress)

    def candidate(self, settings: GenerationSettings, on_progress: OnProgress | None = None) -> Trace:
        """svdlab's trace, from the image and the seed."""
        settings = self.pipe.resolve(settings)
        return self._trace(("on", settings), lambda: capture(self.pipe, self.image, settings), on_progress)

    def step_cost(self, settings: GenerationSettings, rounds: int = 5) -> tuple[float, float]:
        """What the UNet costs in one guided step, in the way that ``settings.cfg`` names.

        Args:
            settings: the clip's size and ``cfg``.
            rounds: how many calls are timed, after one that is not.

        Returns:
            The median of seconds, and the largest sum of activations in MiB.
        """
        # The scale costs nothing, so long as there is guidance.
        settings = self.pipe.resolve(settings.replace(min_guidance_scale=1.0, max_guidance_scale=3.0))
        unet = self.pipe.unet
        new = functools.partial(torch.randn, device=self.device, dtype=self.dtype)
        with torch.no_grad(), self._lock:
            sample, timestep, embeddings, ids = unet_inputs(self.pipe.configs, settings, new)
            conditioning = unet.condition(embeddings, ids, sample.shape[1])

            def step() -> None:
                predict_noise(unet, sample, timestep, conditioning, cfg=settings.cfg)
                if self.device.startswith("cuda"):
                    torch.cuda.synchronize(self.device)

            step()  # what a first pass prepares is no activation
            peak, seconds = measured_peak(step, self.device), []
            for _ in range(rounds):
                started = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), peak / 2**20

    def _pipe_in(self, dtype: torch.dtype) -> Any:
        """diffusers' pipeline in a dtype: one copy, cast when needed. To float64 and back loses nothing."""
        from svdlab.parity.reference import cast_diffusers, load_diffusers

        if not self._diffusers:
            self._diffusers.append(load_diffusers(self._checkpoint, self.dtype, self.device))
        return cast_diffusers(self._diffusers[0], dtype)

    def _trace(self, key: Any, make: Callable[[], Trace], on_progress: OnProgress | None) -> Trace:
        with self._lock:
            if key not in self._traces:
                with _reporting(*_PARTS[key[0]], key[-1].num_steps, on_progress):
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
def _reporting(start: float, end: float, text: str, steps: int, on_progress: OnProgress | None) -> Iterator[None]:
    """Call ``on_progress`` at every layer of this thread, in either implementation; what it raises ends the run."""
    if on_progress is None:
        yield
        return
    me, done = threading.get_ident(), 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal done
        if threading.get_ident() != me:
            return
        done = min(steps, done + type(module).__name__.startswith("UNet"))
        on_progress(start + (end - start) * done / (steps + 1), f"{text}, step {done} of {steps}")

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def motion_per_frame(frames: Tensor) -> list[float]:
    """The mean absolute change from each frame to the next, (F, 3, H, W) to F - 1 numbers, in grey levels of 255."""
    levels = to_unit(frames.double()) * 255
    return (levels[1:] - levels[:-1]).abs().mean(dim=(1, 2, 3)).tolist()


def motion(frames: Tensor) -> float:
    """How much a clip moves: the mean of ``motion_per_frame``; 0 for a single frame."""
    changes = motion_per_frame(frames)
    return sum(changes) / len(changes) if changes else 0.0


@dataclass(frozen=True)
class Chunk:
    """What a decode in chunks does.

    Attributes:
        size: frames per chunk.
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
