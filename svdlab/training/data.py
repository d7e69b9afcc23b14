"""Procedural clips of one moving shape: what the embedded checkpoint is trained on, and its sample first frames.

A scene is a disc, square or triangle with a white nose on a quiet background. It moves where its nose points, at a
speed that the motion bucket sets in pixels per second; the displacement between two frames is that speed over the frame
rate.
Nothing is stored: a scene is a function of its seed.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image

from svdlab.errors import SvdlabError

SIZE = 64
SHAPES = ("disc", "square", "triangle")
# Unit vectors (x, y) with y downwards.
DIRECTIONS = {"right": (1.0, 0.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "up": (0.0, -1.0)}
# Scenes that training never draws: their seeds lie above this.
HELD_OUT = 2**32
_NOSE = np.array((1.0, 1.0, 1.0))
# At motion bucket 127 and 7 frames per second a shape moves 2.8 pixels per frame.
_REFERENCE_SPEED, _REFERENCE_BUCKET = 19.6, 127


def speed(motion_bucket_id: float) -> float:
    """Pixels per second for a motion bucket: it rises with the bucket's square root, 19.6 at 127."""
    return _REFERENCE_SPEED * (motion_bucket_id / _REFERENCE_BUCKET) ** 0.5


def displacement(fps: float, motion_bucket_id: float) -> float:
    """Pixels per frame."""
    return speed(motion_bucket_id) / fps


@dataclass(frozen=True)
class Scene:
    """One shape, its start and its background.

    Attributes:
        shape: one of ``SHAPES``.
        direction: one of ``DIRECTIONS``.
        colour: of the shape, RGB in [0, 1].
        background: two RGB colours, equal for a flat background.
        angle: of the background's gradient, radians.
        radius: of the shape, pixels.
        start: centre (x, y) in the first frame, pixels.
    """

    shape: str
    direction: str
    colour: tuple[float, float, float]
    background: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float
    radius: float
    start: tuple[float, float]

    @classmethod
    def from_seed(cls, seed: int) -> Scene:
        """The scene of a seed; seeds from ``HELD_OUT`` on are never trained on.

        The start lies in the rear part of the picture, so that the shape stays inside it for eight frames at the
        reference speed, 2.8 pixels per frame, and its centre at half as much again.
        """
        rng = np.random.default_rng(seed)
        background = _muted(rng), _muted(rng)
        if rng.random() < 0.4:
            background = background[0], background[0]
        colour = _vivid(rng)
        while min(np.linalg.norm(np.subtract(colour, b)) for b in background) < 0.45:
            colour = _vivid(rng)
        radius = rng.uniform(6.5, 9.0)
        direction = str(rng.choice(list(DIRECTIONS)))
        ahead = np.array(DIRECTIONS[direction])
        along = rng.uniform(radius + 2, SIZE / 2 - 7)
        across = rng.uniform(radius + 2, SIZE - radius - 2)
        # From the edge behind the shape, whichever that is.
        start = np.where(ahead > 0, along, np.where(ahead < 0, SIZE - along, across))
        shape, angle = str(rng.choice(SHAPES)), rng.uniform(0, 2 * np.pi)
        return cls(shape, direction, colour, background, angle, radius, (float(start[0]), float(start[1])))

    def backdrop(self, scale: int = 1) -> np.ndarray:
        """The background alone, float64 (S, S, 3) in [0, 1] with S = scale * SIZE."""
        y, x = np.mgrid[: SIZE * scale, : SIZE * scale] / (SIZE * scale - 1) - 0.5
        ramp = 0.5 + (x * np.cos(self.angle) + y * np.sin(self.angle)) / np.sqrt(2)
        first, second = (np.array(c) for c in self.background)
        return first + ramp[..., None] * (second - first)

    def coverage(self, centres: np.ndarray, scale: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """How much of each pixel the shape and its nose cover, (F, S, S) each in [0, 1], centres (F, 2)."""
        y, x = (np.mgrid[: SIZE * scale, : SIZE * scale] + 0.5) / scale
        dx, dy = x - centres[:, 0, None, None], y - centres[:, 1, None, None]
        ahead_x, ahead_y = DIRECTIONS[self.direction]
        ahead, aside = dx * ahead_x + dy * ahead_y, np.abs(dy * ahead_x - dx * ahead_y)
        r = self.radius
        if self.shape == "disc":
            distance = np.hypot(dx, dy) - r
        elif self.shape == "square":
            distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * r
        else:  # the tip 1.3 r ahead, the base 0.8 r behind and 2.2 r wide
            slope = np.hypot(1.1, 2.1)
            distance = np.maximum(-ahead - 0.8 * r, (1.1 * (ahead - 1.3 * r) + 2.1 * aside) / slope)
        nose = np.hypot(ahead - 0.45 * r, aside) - 0.32 * r
        return np.clip(0.5 - distance * scale, 0, 1), np.clip(0.5 - nose * scale, 0, 1)

    def render(self, centres: np.ndarray, scale: int = 1) -> np.ndarray:
        """Frames float64 (F, S, S, 3) in [0, 1] with the shape at the given centres (F, 2), in units of SIZE."""
        body, nose = (c[..., None] for c in self.coverage(centres, scale))
        frames = self.backdrop(scale) * (1 - body) + np.array(self.colour) * body
        return frames * (1 - nose) + _NOSE * nose

    def path(self, num_frames: int, fps: float, motion_bucket_id: float) -> np.ndarray:
        """Centres (F, 2) in pixels."""
        steps = np.arange(num_frames)[:, None] * displacement(fps, motion_bucket_id)
        return np.array(self.start) + steps * np.array(DIRECTIONS[self.direction])

    def clip(self, num_frames: int, fps: float, motion_bucket_id: float) -> np.ndarray:
        """The true clip: float64 (F, SIZE, SIZE, 3) in [0, 1]."""
        return self.render(self.path(num_frames, fps, motion_bucket_id))

    def image(self, scale: int = 1) -> Image.Image:
        """The first frame, scale * SIZE pixels square."""
        return Image.fromarray((self.render(np.array([self.start]), scale)[0] * 255).round().astype(np.uint8))

    def track(self, frames: np.ndarray) -> np.ndarray:
        """Where the shape is in frames (F, SIZE, SIZE, 3) in [0, 1]: centroids (F, 2) of what is not background.

        Raises:
            SvdlabError: frames of another size.
        """
        if frames.shape[1:] != (SIZE, SIZE, 3):
            raise SvdlabError(f"frames: got {frames.shape}, allowed: (frames, {SIZE}, {SIZE}, 3)")
        difference = np.linalg.norm(frames - self.backdrop(), axis=-1)
        # A soft threshold well above what an autoencoder does to a quiet background.
        weight = np.clip(difference - 0.2, 0, None)
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        total = weight.sum((1, 2)) + 1e-9
        return np.stack([(weight * x).sum((1, 2)) / total, (weight * y).sum((1, 2)) / total], axis=-1)


def _vivid(rng: np.random.Generator) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.75, 1), rng.uniform(0.7, 1))


def _muted(rng: np.random.Generator) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.15, 0.6))


def sample_scene(index: int = 0) -> Scene:
    """A held-out scene by number."""
    return Scene.from_seed(HELD_OUT + index)


def sample_image(index: int = 0) -> Image.Image:
    """A held-out first frame by number, 512 by 512: larger than the clip and what CLIP sees, as photographs are."""
    return sample_scene(index).image(scale=8)
