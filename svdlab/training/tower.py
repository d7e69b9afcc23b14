"""The CLIP tower, taught to say what the first frame shows: shape, backdrop, direction, colours, place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.svd import CLIPVision
from svdlab.svd.checkpoint import ImageNormalization
from svdlab.svd.images import normalize_for_clip, resize_with_antialiasing
from svdlab.training.autoencoder import to_tensor
from svdlab.training.data import BACKDROPS, DIRECTIONS, SHAPES, SIZE, Scene
from svdlab.training.recipe import Recipe

_NUMBERS = 3 + 6 + 2 + 1  # colour, two background colours, start, radius
_ANSWERS = [len(SHAPES), len(BACKDROPS), len(DIRECTIONS), _NUMBERS]


class Described(nn.Module):
    """Pixels (B, 3, S, S) to logits of shape, backdrop and direction, and the numbers that describe the scene."""

    def __init__(self, image_encoder: CLIPVision):
        super().__init__()
        self.image_encoder = image_encoder
        self.head = nn.Linear(image_encoder.config.projection_dim, sum(_ANSWERS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.image_encoder(pixels).image_embeds).split(_ANSWERS, dim=-1)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] as the tower takes them, by the pipeline's own functions."""
    statistics = ImageNormalization()
    return normalize_for_clip((resize_with_antialiasing(images, size) + 1) / 2, statistics.mean, statistics.std)


def loss(recipe: Recipe, size: int) -> Callable[[Callable[..., Any], torch.Generator], Tensor]:
    """Cross-entropy of shape, backdrop and direction, and the squared error of the numbers."""

    def of(call: Callable[..., Any], generator: torch.Generator) -> Tensor:
        seeds = torch.randint(2**31, (recipe.image_encoder.batch,), generator=generator)
        scenes = [Scene.from_seed(int(seed)) for seed in seeds]
        frames = np.concatenate([scene.render(np.array([scene.start])) for scene in scenes])
        *logits, numbers = call(clip_pixels(to_tensor(frames), size))
        truth = torch.tensor([_numbers(s) for s in scenes], device=numbers.device)
        loss = 4 * F.mse_loss(numbers, truth)
        for predicted, answers in zip(logits, zip(*map(_classes, scenes), strict=True), strict=True):
            loss = loss + F.cross_entropy(predicted, torch.tensor(answers, device=predicted.device))
        return loss

    return of


def _classes(scene: Scene) -> tuple[int, int, int]:
    directions = list(DIRECTIONS)
    return SHAPES.index(scene.shape), BACKDROPS.index(scene.backdrop_kind), directions.index(scene.direction)


def _numbers(scene: Scene) -> list[float]:
    place = [2 * c / SIZE - 1 for c in scene.start]
    return [*scene.colour, *scene.background[0], *scene.background[1], *place, scene.radius / 8 - 1]


@torch.no_grad()
def normalise_(image_encoder: CLIPVision, pixels: Tensor) -> None:
    """Scale the projection so that embeddings have unit standard deviation: the UNet should hear them."""
    image_encoder.visual_projection.weight.div_(image_encoder(pixels).image_embeds.std())
