"""What the embedded checkpoint can do, measured through diffusers' own pipeline on first frames it never saw.

Every clip comes from diffusers, so that a figure speaks of the checkpoint and not of svdlab; only the seconds compare
the two.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from svdlab.parity.reference import load_diffusers, resolve
from svdlab.svd.checkpoint import checkpoint_files, checkpoint_path
from svdlab.svd.images import to_unit
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.training.data import DIRECTIONS, SIZE, displacement, sample_scene, speed
from svdlab.training.recipe import Recipe

_BATCH = 16
_FPS = (7, 14, 28)
_BUCKETS = (20, 60, 127, 190, 255)


@dataclass(frozen=True)
class Figure:
    """One measured property and the bar it is held to.

    Attributes:
        name: what was measured.
        passed: whether the bar is met.
        bar: the bar, in words.
        values: the numbers.
    """

    name: str
    passed: bool
    bar: str
    values: dict[str, float] = field(default_factory=dict)

    def numbers(self) -> str:
        """The values, on one line."""
        return ", ".join(f"{k} {v:.3g}" for k, v in self.values.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Sampler:
    """Clips of the held-out first frames, (N, F, H, W, 3) in [0, 1], by diffusers."""

    def __init__(self, model: str, images: int, steps: int, device: str):
        self.pipe = load_diffusers(checkpoint_path(model), torch.float32, device)
        self.pipe.set_progress_bar_config(disable=True)
        self.scenes = [sample_scene(i) for i in range(images)]
        self.steps, self.num_frames = steps, int(resolve(self.pipe, GenerationSettings()).num_frames or 0)
        self.bar = tqdm(desc="clips through diffusers", unit="clip")

    def __call__(self, *, fps: int = 7, motion_bucket_id: int = 127, seed: int = 0, **options: Any) -> np.ndarray:
        clips = []
        for start in range(0, len(self.scenes), _BATCH):
            scenes = self.scenes[start : start + _BATCH]
            generators = [torch.Generator().manual_seed(seed * 10_000 + start + i) for i in range(len(scenes))]
            frames = self.pipe(
                [scene.image() for scene in scenes],
                height=SIZE,
                width=SIZE,
                num_frames=self.num_frames,
                num_inference_steps=self.steps,
                fps=fps,
                motion_bucket_id=motion_bucket_id,
                generator=generators,
                output_type="np",
                **options,
            ).frames
            clips.append(frames)
            self.bar.update(len(scenes))
        return np.concatenate(clips)

    @contextmanager
    def no_embedding(self) -> Iterator[None]:
        """The conditional half without its image embedding, too."""

        def zero(module: torch.nn.Module, args: Any, output: Any) -> Any:
            output.image_embeds = torch.zeros_like(output.image_embeds)
            return output

        hook = self.pipe.image_encoder.register_forward_hook(zero)
        try:
            yield
        finally:
            hook.remove()

    def motion(self, clips: np.ndarray) -> np.ndarray:
        """Pixels per frame (N, 2) of each clip: the slope of the shape's centroid over the frames."""
        at = np.arange(self.num_frames)
        tracks = [scene.track(clip) for scene, clip in zip(self.scenes, clips, strict=True)]
        return np.array([np.polyfit(at, track, 1)[0] for track in tracks])

    def forward(self, clips: np.ndarray) -> np.ndarray:
        """Pixels per frame (N,) where the nose points."""
        ahead = np.array([DIRECTIONS[scene.direction] for scene in self.scenes])
        return (self.motion(clips) * ahead).sum(1)


def evaluate(model: str = "embedded", images: int = 32, steps: int = 25, device: str = "cpu") -> list[Figure]:
    """Measure a checkpoint of moving shapes.

    Args:
        model: a checkpoint that ``svdlab train-tiny`` wrote, or "embedded".
        images: how many held-out first frames, one seed each.
        steps: denoising steps.
        device: where to run.

    Returns:
        One figure per property, in the order of the model card.

    Raises:
        SvdlabError: no such checkpoint.
    """
    sample = Sampler(model, images, steps, device)
    clips = {fps: sample(fps=fps) for fps in _FPS}
    usual = clips[7]
    forward = {fps: sample.forward(c) for fps, c in clips.items()}
    by_bucket = {b: forward[7] if b == 127 else sample.forward(sample(motion_bucket_id=b)) for b in _BUCKETS}
    other_seed, unguided, overguided = sample(seed=1), sample(max_guidance_scale=1.0), sample(max_guidance_scale=5.0)
    # What a port that is fed fps instead of fps - 1 does at 7 frames per second.
    not_decremented = sample(fps=8)
    with sample.no_embedding():
        no_embedding = sample()
    sample.bar.close()
    return [
        displacement_ratio("displacement at fps 7 over fps 28", forward[7], forward[28], 4),
        displacement_ratio("displacement at fps 14 over fps 28", forward[14], forward[28], 2),
        displacement_error(forward, by_bucket),
        bucket_rank(by_bucket),
        direction(sample, clips.values()),
        first_frame(sample, usual),
        _reconstruction(sample),
        guidance(usual, unguided, other_seed),
        area(sample, overguided),
        _embedding(usual, no_embedding, other_seed),
        fps_not_decremented(forward[7], sample.forward(other_seed), sample.forward(not_decremented)),
        _seconds(model, sample, device),
    ]


def model_card(model: str, figures: list[Figure], images: int, steps: int) -> str:
    """The checkpoint's README, in Markdown: data, recipe, the figures that ``evaluate`` measured, limits."""
    from jinja2 import Environment, PackageLoader

    pipe, files = SVDPipeline.from_pretrained(model), checkpoint_files(checkpoint_path(model))
    networks = {"UNet": pipe.unet, "VAE": pipe.vae, "image encoder": pipe.image_encoder}
    loader = Environment(loader=PackageLoader("svdlab.training"), keep_trailing_newline=True)
    return loader.get_template("model_card.md").render(
        megabytes=round(sum(f.stat().st_size for f in files if f.suffix == ".safetensors") / 1e6, 1),
        num_frames=pipe.unet.config.num_frames,
        speed=speed(127),
        parameters={name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()},
        recipe=json.dumps(Recipe().to_dict(), indent=2),
        figures=figures,
        images=images,
        steps=steps,
    )


def displacement_ratio(name: str, fast: np.ndarray, slow: np.ndarray, truth: float) -> Figure:
    """Mean displacement (N,) at one frame rate over that at another, against the ratio that is true."""
    ratio = float(fast.mean() / slow.mean())
    return Figure(name, abs(ratio / truth - 1) <= 0.03, f"{truth:g} within 3 %", {"ratio": ratio})


def displacement_error(forward: dict[int, np.ndarray], by_bucket: dict[int, np.ndarray]) -> Figure:
    """Displacements (N,) by frame rate and by motion bucket against the true ones."""
    measured = {f"fps {fps}": (d, displacement(fps, 127)) for fps, d in forward.items()}
    measured |= {f"bucket {b}": (d, displacement(7, b)) for b, d in by_bucket.items() if b != 127}
    errors = {name: float(d.mean() / truth - 1) for name, (d, truth) in measured.items() if truth > 1}
    fastest = f"bucket {max(by_bucket)}"
    return Figure(
        "displacement over the truth, less 1",
        all(abs(error) <= (0.06 if name == fastest else 0.03) for name, error in errors.items()),
        "within 3 % where a shape moves more than a pixel per frame, 6 % at the fastest bucket",
        errors,
    )


def bucket_rank(by_bucket: dict[int, np.ndarray]) -> Figure:
    """Spearman's correlation of each clip's displacement with the motion bucket, averaged over the clips."""
    ranks = np.stack(list(by_bucket.values()), axis=1).argsort(1).argsort(1)
    correlation = float(np.mean([np.corrcoef(rank, np.arange(len(by_bucket)))[0, 1] for rank in ranks]))
    means = {f"px/frame at {bucket}": float(d.mean()) for bucket, d in by_bucket.items()}
    name = "rank correlation with motion bucket"
    return Figure(name, correlation >= 0.9995, "1.0", {"correlation": correlation, **means})


def direction(sample: Sampler, clips: Iterable[np.ndarray]) -> Figure:
    """How often the motion is nearest to the one of the eight directions that the nose points to."""
    unit = np.array(list(DIRECTIONS.values()))
    truth = np.array([list(DIRECTIONS).index(scene.direction) for scene in sample.scenes])
    right = float(np.mean([(sample.motion(c) @ unit.T).argmax(1) == truth for c in clips]))
    return Figure("direction right", right >= 0.99, "at least 0.99 of clips", {"share": right})


def first_frame(sample: Sampler, clips: np.ndarray) -> Figure:
    """How close the first frame of clips (N, F, H, W, 3) is to the image that was given."""
    psnr = [_psnr(clip[0], np.array(s.image()) / 255) for s, clip in zip(sample.scenes, clips, strict=True)]
    median = statistics.median(psnr)
    return Figure("first frame, PSNR", median >= 30, "median at least 30 dB", {"median": median, "worst": min(psnr)})


@torch.no_grad()
def _reconstruction(sample: Sampler) -> Figure:
    vae, psnr = sample.pipe.vae, []
    for scene in sample.scenes:
        truth = scene.clip(sample.num_frames, 7, 127)
        frames = torch.from_numpy(truth).permute(0, 3, 1, 2).float().to(vae.device) * 2 - 1
        decoded = vae.decode(vae.encode(frames).latent_dist.mode(), num_frames=len(frames)).sample
        psnr.append(_psnr(to_unit(decoded).permute(0, 2, 3, 1).cpu().numpy(), truth))
    median = statistics.median(psnr)
    values = {"median": median, "worst": min(psnr)}
    return Figure("VAE on true clips, PSNR", median >= 33, "median at least 33 dB", values)


def guidance(usual: np.ndarray, unguided: np.ndarray, other_seed: np.ndarray) -> Figure:
    """How much guidance changes the last frames of clips (N, F, H, W, 3), against what another seed does."""
    by_guidance, by_seed = _change(usual[:, -1], unguided[:, -1]), _change(usual[:, -1], other_seed[:, -1])
    values = {"rms by guidance": by_guidance, "rms by seed": by_seed}
    passed = by_guidance >= 2 * by_seed
    return Figure("last frame, max guidance 1 to 3", passed, "at least twice what another seed does", values)


def area(sample: Sampler, overguided: np.ndarray) -> Figure:
    """How large the shape is in the last frame of clips (N, F, H, W, 3), over how large it should be."""
    errors = []
    for scene, clip in zip(sample.scenes, overguided, strict=True):
        truth = scene.clip(sample.num_frames, 7, 127)
        errors.append(float(scene.seen(clip[-1:]).sum() / scene.seen(truth[-1:]).sum()) - 1)
    median, worst = statistics.median(errors), max(errors, key=abs)
    values = {"median": median, "worst": worst}
    name = "last frame at max guidance 5, area over the truth, less 1"
    return Figure(name, abs(median) <= 0.1, "within 10 %", values)


def _embedding(usual: np.ndarray, without: np.ndarray, other_seed: np.ndarray) -> Figure:
    change = _change(usual, without)
    values = {"rms": change, "rms by seed": _change(usual, other_seed)}
    return Figure("image embedding zeroed", change > 1e-3, "more than rounding, 1e-3 of the range", values)


def fps_not_decremented(usual: np.ndarray, other_seed: np.ndarray, not_decremented: np.ndarray) -> Figure:
    """Whether displacements (N,) show that a port feeds fps instead of fps - 1."""
    shift, spread = float((not_decremented - usual).mean()), float((usual - other_seed).std() / np.sqrt(2))
    return Figure(
        "fps not decremented, at fps 7",
        shift < 0 and -shift > spread,
        "slower, by more than the seed-to-seed spread of a clip",
        {"shift": shift, "expected": displacement(8, 127) - displacement(7, 127), "spread": spread},
    )


def _seconds(model: str, sample: Sampler, device: str) -> Figure:
    """One clip at a time, in turns, after a first one of each."""
    ours, image = SVDPipeline.from_pretrained(model, device=device), sample.scenes[0].image()
    options = dict(height=SIZE, width=SIZE, num_frames=sample.num_frames, num_inference_steps=sample.steps)
    pipes: dict[str, Callable[..., Any]] = {"svdlab": partial(ours, progress=False), "diffusers": sample.pipe}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(4):
        for name, pipe in pipes.items():
            started = time.perf_counter()
            pipe(image, **options)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    # No bar: a busy machine must not fail a checkpoint.
    return Figure(f"seconds per clip of {sample.steps} steps", True, "no bar; medians of 3, in turns", medians)


def _psnr(image: np.ndarray, truth: np.ndarray) -> float:
    """Of values in [0, 1], dB."""
    return float(-10 * np.log10(np.mean((image - truth) ** 2) + 1e-12))


def _change(a: np.ndarray, b: np.ndarray) -> float:
    """Median over clips of the root mean squared difference, in [0, 1]."""
    return float(np.median(np.sqrt(((a - b) ** 2).reshape(len(a), -1).mean(1))))
