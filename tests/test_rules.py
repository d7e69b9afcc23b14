"""Every fix has a pre-fix twin that changes the output, and the twins leave no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from svdlab.errors import SvdlabError
from svdlab.parity import bugs as rules
from svdlab.parity.bugs import BUGS, Rules
from svdlab.svd import images
from svdlab.svd.pipeline import Inputs, SVDPipeline
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=32, width=32, num_frames=3, num_inference_steps=3)


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def clean(pipe: SVDPipeline, photo: Image.Image) -> dict[str, torch.Tensor]:
    return _run(pipe, photo)


def _run(pipe: SVDPipeline, photo: Image.Image) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    inputs = pipe.prepare(photo, SETTINGS, torch.Generator().manual_seed(0))
    pipe.run(inputs, SETTINGS, probe=lambda name, value: seen.setdefault(name, value.clone()))
    return seen


VARIANTS = [(name, i) for name, bug in BUGS.items() for i in range(len(bug.variants))]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_twin_shows_from_its_first_probe_to_the_frames(
    pipe: SVDPipeline, photo: Image.Image, clean: dict[str, torch.Tensor], name: str, variant: int
) -> None:
    bug = BUGS[name]
    seen = _run(pipe.with_rules(Rules().changed(bug.variants[variant])), photo)
    different = [probe for probe in clean if not torch.equal(seen[probe], clean[probe])]
    assert different and different[-1] == "frames"
    if variant == 0:
        assert different[0] == bug.first_probe
    again = _run(pipe, photo)
    assert all(torch.equal(again[probe], clean[probe]) for probe in clean), "the twin left something behind"


def test_the_catalogue_is_the_design_s() -> None:
    assert len(BUGS) == 27
    assert all(bug.name == name and bug.cause and ":" in bug.diffusers for name, bug in BUGS.items())


def test_edits_are_undone_when_a_run_fails(
    pipe: SVDPipeline, clean: dict[str, torch.Tensor], photo: Image.Image
) -> None:
    buggy = pipe.with_rules(Rules.with_bugs("alpha_swapped_unet", "sincos_order", "gelu_tanh", "alpha_swapped_vae"))
    inputs = buggy.prepare(photo, SETTINGS, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        buggy.run(Inputs(None, inputs.image, inputs.clip_pixels, inputs.noise, inputs.latents[..., :2]), SETTINGS)
    again = _run(pipe, photo)
    assert all(torch.equal(again[probe], clean[probe]) for probe in clean)


def test_bugs_in_one_place_exclude_each_other() -> None:
    with pytest.raises(SvdlabError, match="rules: timesteps is already timesteps_without_quarter"):
        Rules.with_bugs("timestep_unscaled", "timestep_negated")
    with pytest.raises(SvdlabError, match="rules: unknown bug 'nothing'"):
        Rules.with_bugs("nothing")
    both = Rules.with_bugs("alpha_swapped_unet", "gelu_tanh")
    assert both.unet_edits == (rules.swap_alpha, rules.tanh_gelu)


def test_the_antialiasing_resize_equals_diffusers() -> None:
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    for size in ((512, 600), (224, 224), (100, 300), (225, 1001)):
        image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        torch.testing.assert_close(
            images.resize_with_antialiasing(image, 224), _resize_with_antialiasing(image, (224, 224))
        )


def test_what_the_model_is_told() -> None:
    """The facts in numbers: fps - 1 first, a quarter of ln(sigma), the ramp along frames."""
    default = Rules()
    assert default.time_ids(default.fps_id(7), 127, 0.02) == [6, 127, 0.02]
    sigmas = torch.tensor([700.0, 1.0, 0.0])
    torch.testing.assert_close(default.timesteps(sigmas), torch.tensor([1.637770, 0.0]))
    assert default.guidance_scale(1.0, 3.0, 3, 2).tolist() == [[1.0, 2.0, 3.0]] * 2
