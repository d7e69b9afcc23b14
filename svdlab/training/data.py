"""Procedural clips of a moving thing: what the embedded checkpoint is trained on, and its sample first frames.

A scene is a ball, fish, rocket, dart or drop with a white nose, lit from above, over a quiet backdrop on which it casts
a soft shadow; a stone may rest there, behind it. It moves where its nose points, in one of eight directions, at a speed
that the motion bucket sets in pixels per second; the displacement between two frames is that speed over the frame rate.
Every contour is two pixels soft and every backdrop smooth: a latent covers eight by eight pixels, and what is finer
costs the autoencoder more than the eye gains.

What guidance settles is how vivid the end of a clip is. Clips that are learnt without their picture fade: the thing
loses part of its colour to the backdrop, more from frame to frame (``Scene.clip(..., fade=...)``). Guidance leads away
from that, the more the later the frame.

Nothing is stored: a scene is a function of its seed.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from PIL import Image

from svdlab.errors import SvdlabError

SIZE = 64
SHAPES = ("ball", "fish", "rocket", "dart", "drop")
BACKDROPS = ("ramp", "waves", "clouds", "horizon")
_D = 0.5**0.5
# Unit vectors (x, y) with y downwards.
DIRECTIONS = {
    "right": (1.0, 0.0),
    "down right": (_D, _D),
    "down": (0.0, 1.0),
    "down left": (-_D, _D),
    "left": (-1.0, 0.0),
    "up left": (-_D, -_D),
    "up": (0.0, -1.0),
    "up right": (_D, -_D),
}
# Scenes that training never draws: their seeds lie above this, and so do their pairs of shape and backdrop.
HELD_OUT = 2**32
_NOSE = np.array((1.0, 1.0, 1.0))
# At motion bucket 127 and 7 frames per second a shape moves 2.8 pixels per frame.
_REFERENCE_SPEED, _REFERENCE_BUCKET = 19.6, 127
# Pixels that a shape may travel and still be in the picture: 8 frames at the fastest bucket and 7 frames per second.
_ROOM = 28.0
_SOFTNESS = 2.0


def speed(motion_bucket_id: float) -> float:
    """Pixels per second for a motion bucket: it rises with the bucket's square root, 19.6 at 127."""
    return _REFERENCE_SPEED * (motion_bucket_id / _REFERENCE_BUCKET) ** 0.5


def displacement(fps: float, motion_bucket_id: float) -> float:
    """Pixels per frame."""
    return speed(motion_bucket_id) / fps


@dataclass(frozen=True)
class Stone:
    """A disc at rest, behind the shape: centre (x, y) and radius in pixels, and an RGB colour in [0, 1]."""

    centre: tuple[float, float]
    radius: float
    colour: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """One shape, its start and what is behind it.

    Attributes:
        shape: one of ``SHAPES``.
        direction: one of ``DIRECTIONS``.
        colour: of the shape, RGB in [0, 1].
        backdrop_kind: one of ``BACKDROPS``.
        background: the backdrop's two RGB colours.
        angle: of the backdrop's ramp or waves, radians.
        places: three points (x, y) in [-0.5, 0.5]: the clouds' centres, the waves' phase, the horizon's height.
        stone: what rests there, if anything.
        radius: of the shape, pixels.
        start: centre (x, y) in the first frame, pixels.
    """

    shape: str
    direction: str
    colour: tuple[float, float, float]
    backdrop_kind: str
    background: tuple[tuple[float, float, float], tuple[float, float, float]]
    angle: float
    places: tuple[tuple[float, float], ...]
    stone: Stone | None
    radius: float
    start: tuple[float, float]

    @classmethod
    def from_seed(cls, seed: int) -> Scene:
        """The scene of a seed; seeds from ``HELD_OUT`` on, and their pairs of shape and backdrop, are never trained on.

        The start lies in the rear part of the picture, so that the whole shape stays inside it for eight frames at 7
        frames per second, whatever the motion bucket.
        """
        rng = np.random.default_rng(seed)
        shape, kind = _pair(rng, held_out=seed >= HELD_OUT)
        background = _backgrounds(rng)
        colour = _vivid(rng)
        while min(np.linalg.norm(np.subtract(colour, b)) for b in background) < 0.5:
            colour = _vivid(rng)
        radius = rng.uniform(7.0, 9.5)
        direction = str(rng.choice(list(DIRECTIONS)))
        margin = 1.25 * radius + 1.5
        start = []
        for ahead in DIRECTIONS[direction]:
            low, high = margin, SIZE - margin
            start.append(float(rng.uniform(low - min(0, ahead) * _ROOM, high - max(0, ahead) * _ROOM)))
        angle = rng.uniform(0, 2 * np.pi)
        places = tuple((float(x), float(y)) for x, y in rng.uniform(-0.4, 0.4, (3, 2)))
        stone = _stone(rng, background, colour) if rng.random() < 0.35 else None
        return cls(shape, direction, colour, kind, background, angle, places, stone, radius, (start[0], start[1]))

    def backdrop(self, scale: int = 1) -> np.ndarray:
        """What is behind the shape, without its shadow, float64 (S, S, 3) in [0, 1] with S = scale * SIZE."""
        x, y = (at / SIZE - 0.5 for at in _pixels(scale))
        along = x * np.cos(self.angle) + y * np.sin(self.angle)
        if self.backdrop_kind == "ramp":
            share = 0.5 + along / np.sqrt(2)
        elif self.backdrop_kind == "waves":  # two or so over the picture
            share = 0.5 + 0.5 * np.sin(2 * np.pi * (2 * along + self.places[0][0]))
        elif self.backdrop_kind == "clouds":
            share = 1 - np.prod([1 - np.exp(-((x - a) ** 2 + (y - b) ** 2) / 0.06) for a, b in self.places], axis=0)
        else:  # a soft edge between sky and ground, about the middle
            share = 1 / (1 + np.exp(-(y - 0.5 * self.places[0][1]) / 0.03))
        first, second = (np.array(c) for c in self.background)
        picture = first + share[..., None] * (second - first)
        if self.stone is not None:
            a, b = self.stone.centre
            cover = _soft(np.hypot((x + 0.5) * SIZE - a, (y + 0.5) * SIZE - b) - self.stone.radius)[..., None]
            picture = picture + cover * (np.array(self.stone.colour) - picture)
        return picture

    def coverage(self, centres: np.ndarray, scale: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """How much of each pixel the shape and its nose cover, (F, S, S) each in [0, 1], centres (F, 2)."""
        ahead, aside = self._local(centres, scale)
        aside, r = np.abs(aside), self.radius
        if self.shape == "ball":
            distance = np.hypot(ahead, aside) - 0.95 * r
        elif self.shape == "fish":  # an ellipse and a tail
            body = (np.hypot((ahead - 0.15 * r) / 1.0, aside / 0.68) - r) * 0.8
            tail = _wedge(ahead + 0.45 * r, aside, -0.7 * r, 0.85)
            distance = np.minimum(body, tail)
        elif self.shape == "rocket":  # a capsule with fins at the rear
            body = np.hypot(ahead - np.clip(ahead, -0.7 * r, 0.6 * r), aside) - 0.55 * r
            fins = _wedge(ahead - 0.1 * r, aside, -1.15 * r, 0.65)
            distance = np.minimum(body, fins)
        elif self.shape == "dart":  # a triangle, the tip ahead
            distance = _wedge(ahead - 1.15 * r, aside, -1.95 * r, 0.5)
        else:  # a disc, and a tip behind
            body = np.hypot(ahead - 0.25 * r, aside) - 0.8 * r
            tail = _wedge(-ahead - 1.1 * r, aside, -1.1 * r, 0.62)
            distance = np.minimum(body, tail)
        nose = np.hypot(ahead - (0.3 if self.shape == "dart" else 0.5) * r, aside) - 0.36 * r
        return _soft(distance), _soft(nose)

    def render(self, centres: np.ndarray, scale: int = 1, visible: np.ndarray | None = None) -> np.ndarray:
        """Frames float64 (F, S, S, 3) in [0, 1] with the shape at the given centres (F, 2), in units of SIZE.

        Args:
            centres: where.
            scale: pixels per unit.
            visible: (F,), the share of the shape and of its shadow that is not lost to the backdrop; all by default.
        """
        body, nose = (c[..., None] for c in self.coverage(centres, scale))
        x, y = _pixels(scale)
        across, below = x - centres[:, 0, None, None], y - centres[:, 1, None, None]
        far = np.hypot(across - 0.25 * self.radius, below - 0.45 * self.radius) / self.radius
        shadow = 0.15 / (1 + np.exp((far - 1) * 6))[..., None]
        # Two tones: the colour above, and darker below.
        shade = 1 - 0.35 / (1 + np.exp(-below / (0.25 * self.radius)))[..., None]
        backdrop = self.backdrop(scale)
        frames = backdrop * (1 - shadow)
        frames = frames * (1 - body) + np.array(self.colour) * shade * body
        frames = frames * (1 - nose) + _NOSE * nose
        return frames if visible is None else backdrop + visible[:, None, None, None] * (frames - backdrop)

    def path(self, num_frames: int, fps: float, motion_bucket_id: float) -> np.ndarray:
        """Centres (F, 2) in pixels."""
        steps = np.arange(num_frames)[:, None] * displacement(fps, motion_bucket_id)
        return np.array(self.start) + steps * np.array(DIRECTIONS[self.direction])

    def clip(self, num_frames: int, fps: float, motion_bucket_id: float, fade: float = 0.0) -> np.ndarray:
        """The true clip: float64 (F, SIZE, SIZE, 3) in [0, 1]; ``fade`` is what the last frame loses of the shape."""
        visible = 1 - fade * np.linspace(0, 1, num_frames)
        return self.render(self.path(num_frames, fps, motion_bucket_id), visible=visible)

    def image(self, scale: int = 1) -> Image.Image:
        """The first frame, scale * SIZE pixels square."""
        return Image.fromarray((self.render(np.array([self.start]), scale)[0] * 255).round().astype(np.uint8))

    def seen(self, frames: np.ndarray) -> np.ndarray:
        """How much of each pixel of frames (F, SIZE, SIZE, 3) in [0, 1] is the shape: (F, SIZE, SIZE) in [0, 1].

        Raises:
            SvdlabError: frames of another size.
        """
        if frames.shape[1:] != (SIZE, SIZE, 3):
            raise SvdlabError(f"frames: got {frames.shape}, allowed: (frames, {SIZE}, {SIZE}, 3)")
        difference = np.linalg.norm(frames - self.backdrop(), axis=-1)
        # Against the frame's own contrast: a shape that is paler or brighter than it should be is no smaller or larger.
        # Where there is no shape, there is no contrast to go by.
        contrast = (difference**3).sum((1, 2), keepdims=True) / ((difference**2).sum((1, 2), keepdims=True) + 1e-9)
        return np.clip(4 * difference / contrast.clip(0.3) - 1, 0, 1)

    def track(self, frames: np.ndarray) -> np.ndarray:
        """Where the shape is in frames (F, SIZE, SIZE, 3) in [0, 1]: centroids (F, 2) of what is not backdrop.

        Raises:
            SvdlabError: frames of another size.
        """
        weight = self.seen(frames)
        x, y = _pixels()
        total = weight.sum((1, 2)) + 1e-9
        return np.stack([(weight * x).sum((1, 2)) / total, (weight * y).sum((1, 2)) / total], axis=-1)

    def _local(self, centres: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray]:
        """Each pixel's place (F, S, S) ahead of the shape's centre and to its side, in pixels."""
        x, y = _pixels(scale)
        dx, dy = x - centres[:, 0, None, None], y - centres[:, 1, None, None]
        ahead_x, ahead_y = DIRECTIONS[self.direction]
        return dx * ahead_x + dy * ahead_y, dy * ahead_x - dx * ahead_y


def _pixels(scale: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """x and y (S, S) of every pixel's centre in units of SIZE, with S = scale * SIZE."""
    y, x = (np.mgrid[: SIZE * scale, : SIZE * scale] + 0.5) / scale
    return x, y


def _soft(distance: np.ndarray) -> np.ndarray:
    """Coverage of a signed distance in pixels: a smooth step, ``_SOFTNESS`` pixels to either side."""
    t = np.clip(0.5 - distance / (2 * _SOFTNESS), 0, 1)
    return t * t * (3 - 2 * t)


def _wedge(ahead: np.ndarray, aside: np.ndarray, base: float, slope: float) -> np.ndarray:
    """Signed distance to a triangle: its tip at the origin, its base at ``base`` behind, ``slope`` wide per length."""
    return np.maximum(base - ahead, (slope * ahead + aside) / np.hypot(slope, 1))


def _pair(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """A shape and a backdrop: one of the pairs that are kept for held-out scenes, or one of the others."""
    shape = int(rng.integers(len(SHAPES)))
    own = shape % len(BACKDROPS)
    kind = own if held_out else (own + int(rng.integers(1, len(BACKDROPS)))) % len(BACKDROPS)
    return SHAPES[shape], BACKDROPS[kind]


def _vivid(rng: np.random.Generator) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.7, 1), rng.uniform(0.75, 1))


def _backgrounds(rng: np.random.Generator) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Two muted colours, near enough for a quiet backdrop and far enough to be seen."""
    while True:
        first, second = (colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.15, 0.6)) for _ in "12")
        if 0.12 <= np.linalg.norm(np.subtract(first, second)) <= 0.4:
            return first, second


def _stone(rng: np.random.Generator, background: tuple[tuple[float, ...], ...], colour: tuple[float, ...]) -> Stone:
    """A muted disc, unlike what is around it and unlike the shape."""
    while True:
        own = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.1, 0.7))
        apart = [np.linalg.norm(np.subtract(own, b)) for b in background]
        if min(apart) >= 0.15 and max(apart) <= 0.5 and np.linalg.norm(np.subtract(own, colour)) >= 0.5:
            break
    radius = rng.uniform(5.0, 9.0)
    x, y = rng.uniform(radius + 2, SIZE - radius - 2, 2)
    return Stone((float(x), float(y)), float(radius), own)


def sample_scene(index: int = 0) -> Scene:
    """A held-out scene by number."""
    return Scene.from_seed(HELD_OUT + index)


def sample_image(index: int = 0) -> Image.Image:
    """A held-out first frame by number, 512 by 512: larger than the clip and what CLIP sees, as photographs are."""
    return sample_scene(index).image(scale=8)
