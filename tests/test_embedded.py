"""The checkpoint inside the package: one for both pipelines, small, documented, and it does what its card says.

The card's own figures come from ``svdlab evaluate``, on 32 first frames in minutes; here a few clips must tell the
same story, so that a damaged or exchanged checkpoint does not pass.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from svdlab.parity.reference import load_diffusers
from svdlab.svd.checkpoint import EMBEDDED, checkpoint_path
from svdlab.svd.pipeline import SVDPipeline
from svdlab.training.data import DIRECTIONS, SIZE, displacement, sample_scene
from svdlab.training.recipe import IMAGE_ENCODER, UNET, VAE, Recipe

SCENES = [sample_scene(i) for i in range(6)]
AHEAD = np.array([DIRECTIONS[scene.direction] for scene in SCENES])
SIZES = dict(height=SIZE, width=SIZE, num_frames=8, num_inference_steps=12)


def clips(pipe: SVDPipeline, **options: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    images = [scene.image() for scene in SCENES]
    return pipe(images, output_type="np", progress=False, generator=generator, **{**SIZES, **options}).frames  # type: ignore[arg-type]


def forward(frames: np.ndarray) -> np.ndarray:
    """Pixels per frame where the nose points, (N,)."""
    slopes = [np.polyfit(range(8), scene.track(clip), 1)[0] for scene, clip in zip(SCENES, frames, strict=True)]
    return (np.array(slopes) * AHEAD).sum(1)


@pytest.fixture(scope="module")
def pipe() -> SVDPipeline:
    return SVDPipeline.from_pretrained()


@pytest.fixture(scope="module")
def usual(pipe: SVDPipeline) -> np.ndarray:
    return clips(pipe)


def test_it_is_in_the_package_and_small() -> None:
    folder = checkpoint_path(EMBEDDED)
    assert folder.parent.name == "svdlab"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 20e6


def test_its_card_has_the_recipe_of_this_version(pipe: SVDPipeline) -> None:
    card = (checkpoint_path(EMBEDDED) / "README.md").read_text()
    recipe = re.search(r"```json\n(.*?)```", card, re.S)
    assert recipe and json.loads(recipe[1]) == json.loads(json.dumps(Recipe().to_dict()))
    assert (pipe.unet.config, pipe.image_encoder.config) == (UNET, IMAGE_ENCODER)
    assert pipe.vae.config.block_out_channels == VAE.block_out_channels


def test_diffusers_makes_the_same_clip_of_it(pipe: SVDPipeline) -> None:
    theirs = load_diffusers(checkpoint_path(EMBEDDED))
    theirs.set_progress_bar_config(disable=True)
    options = dict(**SIZES, output_type="np")
    mine, other = (
        p(SCENES[0].image(), generator=torch.Generator().manual_seed(1), **options, **quiet).frames  # type: ignore[operator]
        for p, quiet in ((pipe, {"progress": False}), (theirs, {}))
    )
    np.testing.assert_allclose(mine, other, atol=2e-3)
    assert np.abs(np.diff(mine, axis=1)).mean() > 1e-3, "something moves"


def test_the_shape_moves_where_its_nose_points_as_fast_as_it_should(usual: np.ndarray) -> None:
    assert (forward(usual) > 0.5 * displacement(7, 127)).all()
    assert forward(usual).mean() == pytest.approx(displacement(7, 127), rel=0.2)


def test_the_first_frame_is_the_image(usual: np.ndarray) -> None:
    truth = np.stack([np.array(scene.image()) / 255 for scene in SCENES])
    psnr = -10 * np.log10(((usual[:, 0] - truth) ** 2).mean((1, 2, 3)))
    assert np.median(psnr) > 23


@pytest.mark.slow
def test_motion_follows_the_conditions(pipe: SVDPipeline, usual: np.ndarray) -> None:
    at_7 = forward(usual)
    assert (forward(clips(pipe, fps=28)) < 0.5 * at_7).all()
    assert (forward(clips(pipe, motion_bucket_id=20)) < 0.75 * at_7).all()


def test_a_port_that_feeds_fps_is_slower(pipe: SVDPipeline, usual: np.ndarray) -> None:
    port = pipe.with_bugs("fps_not_decremented")
    assert (forward(clips(port)) < forward(usual)).mean() > 0.8
