"""What speed costs: seconds of a clip against its distance from the exact one, for every approximation there is.

A speed-up is published with a picture beside it that looks alike. Here it stands beside its noise ratio, and beside the
distance from the converged solution of the ODE, in which the exact 25 steps have an error of their own.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import benchmark
from tqdm import tqdm

from svdlab.bench.timing import Calls, in_turns, machine
from svdlab.errors import SvdlabError, short
from svdlab.parity.compare import THRESHOLD
from svdlab.parity.reference import (
    SMALL_DECODER,
    capture_diffusers,
    cast_diffusers,
    dpm_solver,
    load_diffusers,
    small_decoder,
)
from svdlab.svd.approximations import approximated
from svdlab.svd.checkpoint import checkpoint_path, load_configs
from svdlab.svd.images import to_unit
from svdlab.svd.pipeline import Inputs, SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.tables import Column, Table
from svdlab.training.data import SIZE, sample_image, sample_scene

if TYPE_CHECKING:
    from PIL import Image

Call = Callable[[Inputs], Tensor]
# Steps after which the ODE counts as solved.
CONVERGED_STEPS = 200
# What took this many times as long as the exact clip when it was measured is not run again for its seconds.
_SLOW = 3
# Of the luminance window in Wang et al. 2004: pixels, and its Gaussian's standard deviation.
_WINDOW, _SPREAD = 11, 1.5


@dataclass(frozen=True)
class Variant:
    """One way to make a clip.

    Attributes:
        name: for tables.
        changes: of the settings.
        approximations: keys of ``approximations.APPROXIMATIONS``.
        solver: "euler", or "dpm_solver" for ``reference.dpm_solver``.
        decoder: "vae", or "small" for a ``reference.small_decoder``.

    Raises:
        SvdlabError: a solver or decoder that there is not.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    approximations: tuple[str, ...] = ()
    solver: str = "euler"
    decoder: str = "vae"

    def __post_init__(self) -> None:
        for name, allowed in (("solver", ("euler", "dpm_solver")), ("decoder", ("vae", "small"))):
            if (got := getattr(self, name)) not in allowed:
                raise SvdlabError(f"{name}: got {short(got)}, allowed: {', '.join(allowed)}")


EXACT = Variant("exact")
VARIANTS = (
    EXACT,
    Variant("15 steps", {"num_inference_steps": 15}),
    Variant("10 steps", {"num_inference_steps": 10}),
    Variant("5 steps", {"num_inference_steps": 5}),
    Variant("AYS, 10 steps", {"num_inference_steps": 10, "schedule": "ays"}),
    Variant("DPM++ 2M, 25 steps", solver="dpm_solver"),
    Variant("DPM++ 2M, 10 steps", {"num_inference_steps": 10}, solver="dpm_solver"),
    Variant("guidance interval", approximations=("guidance_interval",)),
    Variant("deep features", approximations=("deep_features",)),
    Variant("both", approximations=("guidance_interval", "deep_features")),
    Variant(
        "both, AYS, 10 steps", {"num_inference_steps": 10, "schedule": "ays"}, ("guidance_interval", "deep_features")
    ),
    Variant("small decoder", decoder="small"),
    Variant("bfloat16", {"dtype": "bfloat16"}),
    Variant("float16", {"dtype": "float16"}),
)


@dataclass(frozen=True)
class Row:
    """What one variant gave, over all images; a median where nothing else is said.

    Attributes:
        name: the variant's.
        seconds: of a clip.
        speedup: how many times as long the exact clip took, by pairs that followed each other, and their range.
        noise_ratio: the frames' distance from diffusers in float64 over diffusers' own in float32; the worst.
        psnr, ssim: of the frames in [0, 1] to the exact ones, dB and at most 1; infinite and 1 for the same frames.
        from_converged: distance of the frames from those of ``CONVERGED_STEPS`` steps, relative.
        motion_error: of the shape's velocity from the exact clip's in pixels per frame, the mean of magnitudes; None
            where the clips are not of the training's size.
    """

    name: str
    seconds: float
    speedup: float
    speedup_range: tuple[float, float]
    noise_ratio: float
    psnr: float
    ssim: float
    from_converged: float
    motion_error: float | None


def frontier(
    model: str = "embedded",
    *,
    images: int = 4,
    pairs: int = 3,
    settings: Mapping[str, Any] = {},  # noqa: B006 - read only
    variants: Sequence[Variant] = VARIANTS,
    decoder: str | None = None,
    device: str = "cpu",
    progress: bool = True,
    clips: MutableMapping[str, Tensor] | None = None,
) -> list[Row]:
    """Measure every variant on held-out first frames.

    Args:
        model: of ``SVDPipeline.from_pretrained``.
        images: how many first frames, one seed each.
        pairs: timed runs of each variant, in turns with the exact one; of one that takes three times as long as that
            the runs count that measure it.
        settings: that all share; the exact clip's.
        variants: which, ``EXACT`` first.
        decoder: folder or hub name of the small decoder, an AutoencoderTiny; None: the checkpoint's own.
        device: where.
        progress: show a bar.
        clips: gets every variant's frames (V, F, 3, H, W) of the first image, by name.

    Returns:
        One row per variant, in their order; none with a small decoder where there is none.

    Raises:
        SvdlabError: see ``reference.small_decoder``.
    """
    folder = checkpoint_path(model)
    if decoder is None and (folder / SMALL_DECODER).is_dir():
        decoder = str(folder / SMALL_DECODER)
    small = small_decoder(decoder, load_configs(model).vae, device) if decoder else None
    pipe = SVDPipeline.from_pretrained(model, device=device, compat="diffusers")
    diffusers = load_diffusers(folder, torch.float32, device)
    start = pipe.resolve(GenerationSettings(**settings))
    by_dtype, calls = {start.dtype: pipe}, dict[str, Call]()
    for variant in variants:
        if variant.decoder == "small" and small is None:
            continue
        ours = start.replace(**variant.changes)
        if ours.dtype not in by_dtype:
            by_dtype[ours.dtype] = SVDPipeline.from_pretrained(model, dtype=ours.torch_dtype, device=device)
        calls[variant.name] = make_call(by_dtype[ours.dtype], start, variant, small)
    solve = make_call(pipe, start.replace(num_inference_steps=CONVERGED_STEPS), EXACT)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    took: dict[str, list[float]] = {name: [] for name in calls}

    def made(name: str) -> Tensor:
        started = benchmark.timer()
        frames = calls[name](inputs)
        took[name].append(benchmark.timer() - started)
        if clips is not None:
            clips.setdefault(name, frames)
        return frames

    with tqdm(total=images * (len(calls) + 1) + pairs * len(calls), unit="clip", disable=not progress) as bar:
        for index in range(images):
            image, seeded = sample_image(index), start.replace(seed=index)
            inputs = pipe.prepare(image, seeded, torch.Generator().manual_seed(index))
            exact, solved = made(EXACT.name), solve(inputs)
            truth, floor = _judged_by(diffusers, image, seeded, exact)
            bar.update()
            for name in calls:
                frames = exact if name == EXACT.name else made(name)
                found[name].append(
                    {
                        "noise_ratio": _distance(frames, truth) / floor,
                        "from_converged": _distance(frames, solved),
                        "psnr": psnr(frames, exact),
                        "ssim": ssim(frames, exact),
                        **_motion_error(index, frames, exact),
                    }
                )
                bar.update()
        slow = {name for name in calls if name != EXACT.name and min(took[name]) > _SLOW * min(took[EXACT.name])}
        timed: Calls = {name: functools.partial(calls[name], inputs) for name in calls if name not in slow}
        bar.update(pairs * len(slow))
        seconds = in_turns(timed, pairs, bar.update)
    of_exact = seconds[EXACT.name]
    rows = []
    for name in calls:
        own = took[name] if name in slow else seconds[name]
        beside = [statistics.median(of_exact)] * len(own) if name in slow else of_exact
        rows.append(_row(name, found[name], own, beside))
    return rows


def make_call(
    pipe: SVDPipeline, settings: GenerationSettings, variant: Variant, small: Callable[..., Tensor] | None = None
) -> Call:
    """What makes a variant's frames (V, F, 3, H, W) of ``Inputs``, in the pipeline's own dtype.

    Args:
        pipe: with exact stages; it stays as it is.
        settings: the exact clip's.
        variant: whose changes of the settings, approximations, solver and decoder are taken.
        small: the stage ``decode`` of a variant with the small decoder.
    """
    settings = settings.replace(**variant.changes)
    pipe = approximated(pipe, *variant.approximations)
    if variant.solver == "dpm_solver":
        pipe.scheduler = dpm_solver(pipe.scheduler)
    if variant.decoder == "small":
        assert small is not None
        pipe = pipe.with_stage(decode=small)
    return lambda inputs: pipe.run(inputs, settings)


def _judged_by(diffusers: Any, image: Image.Image, settings: GenerationSettings, exact: Tensor) -> tuple[Tensor, float]:
    """diffusers' frames in float64, and the distance of its own in float32 from these.

    Raises:
        SvdlabError: the exact clip is not at parity, so that nothing can be measured against it.
    """
    reference = capture_diffusers(cast_diffusers(diffusers, torch.float32), image, settings)
    truth = capture_diffusers(cast_diffusers(diffusers, torch.float64), replay=reference)["frames"]
    floor = max(_distance(reference["frames"], truth), torch.finfo(torch.float32).eps)
    if (ratio := _distance(exact, truth) / floor) > THRESHOLD:
        raise SvdlabError(f"frontier: the exact clip's noise ratio is {ratio:.3g}, allowed: at most {THRESHOLD:g}")
    return truth, floor


def _distance(frames: Tensor, other: Tensor) -> float:
    other = other.double()
    return float((frames.double() - other).norm() / other.norm())


def _motion_error(index: int, frames: Tensor, exact: Tensor) -> dict[str, float]:
    """How far the shape's velocity is from the exact clip's, in pixels per frame; nothing for other clips."""
    if frames.shape[-2:] != (SIZE, SIZE) or frames.shape[1] < 2:
        return {}
    at = np.arange(frames.shape[1])
    tracks = (sample_scene(index).track(to_unit(x[0].double()).permute(0, 2, 3, 1).numpy()) for x in (frames, exact))
    velocity, wanted = (np.polyfit(at, track, 1)[0] for track in tracks)
    return {"motion_error": float(np.linalg.norm(velocity - wanted))}


def psnr(frames: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of frames in about [-1, 1], clamped; infinite for the same."""
    error = float((to_unit(frames.double()) - to_unit(exact.double())).square().mean())
    return -10 * math.log10(error) if error else math.inf


def ssim(frames: Tensor, exact: Tensor) -> float:
    """Structural similarity of frames (..., 3, H, W) in about [-1, 1], clamped, averaged; 1 for the same.

    Source: Wang et al. 2004, Image quality assessment: from error visibility to structural similarity.
    """
    x, y = (to_unit(f.double()).flatten(0, -3)[:, None] for f in (frames, exact))
    at = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    line = (-(at**2) / (2 * _SPREAD**2)).exp()
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    mean_x, mean_y, xx, yy, xy = (F.conv2d(z, window) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    covariance, variances = xy - mean_x * mean_y, xx - mean_x**2 + yy - mean_y**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))).mean())


def _row(name: str, found: Sequence[Mapping[str, float]], seconds: Sequence[float], exact: Sequence[float]) -> Row:
    speedups = [e / s for e, s in zip(exact, seconds, strict=True)]
    motion = [one["motion_error"] for one in found if "motion_error" in one]
    return Row(
        name=name,
        seconds=statistics.median(seconds),
        speedup=statistics.median(speedups),
        speedup_range=(min(speedups), max(speedups)),
        noise_ratio=max(one["noise_ratio"] for one in found),
        **{key: statistics.median(one[key] for one in found) for key in ("psnr", "ssim", "from_converged")},
        motion_error=statistics.mean(motion) if motion else None,
    )


def to_json(rows: Sequence[Row], device: str, images: int) -> dict[str, Any]:
    """The JSON of ``svdlab frontier``; an infinite PSNR is null."""
    plain = [{**asdict(row), "psnr": row.psnr if math.isfinite(row.psnr) else None} for row in rows]
    return {"machine": machine(device), "images": images, "rows": plain}


def frontier_table(rows: Sequence[Row]) -> Table:
    """One row per variant, as they came."""
    names = ("s", "times as fast", "noise ratio", "PSNR dB", "SSIM", "motion off, px/frame", "from converged")
    cells = [
        [
            row.name,
            f"{row.seconds:.3g}",
            f"{row.speedup:.2f} ({row.speedup_range[0]:.2f}-{row.speedup_range[1]:.2f})",
            f"{row.noise_ratio:.3g}",
            f"{row.psnr:.1f}",
            f"{row.ssim:.4f}",
            "" if row.motion_error is None else f"{row.motion_error:.3f}",
            f"{row.from_converged:.2e}",
        ]
        for row in rows
    ]
    return Table(["variant", *(Column(name, "right") for name in names)], cells)
