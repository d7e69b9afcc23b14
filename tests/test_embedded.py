"""The checkpoint inside the package: one for both pipelines, small, documented, and it does what its card says.

The card's own figures come from ``svdlab evaluate``, on 32 first frames in minutes; here a few clips must tell the
same story, so that a damaged or exchanged checkpoint does not pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from svdlab.parity.reference import load_diffusers
from svdlab.svd.checkpoint import EMBEDDED, checkpoint_path
from svdlab.svd.kernels import plain
from svdlab.svd.modules import cast_copy
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


# What no weight there can change: the softmax over a single key is 1, whatever asks for it; and over several keys it
# does not see what all of them have in common.
WITHOUT_INFLUENCE = re.compile(
    r"transformer_blocks\.\d+\.(attn2\.to_[qk]|norm2)\.|(mid_block\.attentions\.\d+\.to_k|self_attn\.k_proj)\.bias"
)
RUNS: dict[str, tuple[str, Callable[..., Tensor], tuple[int, ...]]] = {
    "unet": (
        "",
        lambda unet, x: unet(x, 0.3, x[:, :1, 0, 0, :1].expand(1, 1, 32), torch.tensor([[6, 127, 0.02]]).to(x)).sample,
        (1, 2, 8, 8, 8),
    ),
    "decoder": ("decoder", lambda vae, z: vae.decode(z, num_frames=2).sample, (2, 4, 2, 2)),
    "encoder": ("(encoder|quant_conv)", lambda vae, x: torch.cat(vae.encode(x).latent_dist), (1, 3, 32, 32)),
    "image_encoder": ("", lambda tower, x: tower(x).image_embeds, (1, 3, 224, 224)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_weight_has_an_influence(pipe: SVDPipeline, name: str) -> None:
    """Each tensor changed by a tenth, one at a time, in float64: no part of the checkpoint is dead."""
    prefix, run, shape = RUNS[name]
    network = cast_copy(plain(getattr(pipe, name, pipe.vae)), torch.float64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, dead = run(network, x), set()
    tensors = {n: p for n, p in network.named_parameters() if re.match(prefix, n)}
    for key, tensor in tensors.items():
        kept = tensor.clone()
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        tensor.add_(0.1 * (kept.square().mean().sqrt() + 0.01) * noise)
        if float((run(network, x) - before).norm() / before.norm()) < 1e-9:
            dead.add(key)
        tensor.copy_(kept)
    assert dead == set(filter(WITHOUT_INFLUENCE.search, tensors))


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
