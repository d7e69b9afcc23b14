"""The schedule and the step against diffusers' EulerDiscreteScheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from svdlab.errors import SvdlabError
from svdlab.svd import sampler as own
from svdlab.svd.architectures import SVD_SCHEDULER
from svdlab.svd.sampler import EulerScheduler

# The file that Stability published, with the options other samplers left in it.
PUBLISHED = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    **SVD_SCHEDULER,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
}


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_sigmas_and_timesteps(steps: int) -> None:
    reference = EulerDiscreteScheduler(**SVD_SCHEDULER)
    reference.set_timesteps(steps)
    sigmas = own.karras_sigmas(steps, 0.002, 700.0)
    assert torch.equal(sigmas, reference.sigmas)
    torch.testing.assert_close(own.scalings(sigmas[:-1]).c_noise, reference.timesteps, rtol=2e-7, atol=0)
    config = EulerScheduler.from_config(PUBLISHED)
    assert torch.equal(config.init_noise_sigma(sigmas), reference.init_noise_sigma)
    assert sigmas.dtype == torch.float32


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_custom_sigmas_and_spacings(spacing: str) -> None:
    reference = EulerDiscreteScheduler(**{**SVD_SCHEDULER, "timestep_spacing": spacing})
    reference.set_timesteps(sigmas=[100.0, 3.0, 0.5, 0.0])
    sigmas = own.custom_sigmas([100.0, 3.0, 0.5, 0.0])
    assert torch.equal(sigmas, reference.sigmas)
    torch.testing.assert_close(own.scalings(sigmas[:-1]).c_noise, reference.timesteps, rtol=2e-7, atol=0)
    config = EulerScheduler.from_config({**PUBLISHED, "timestep_spacing": spacing})
    assert torch.equal(config.init_noise_sigma(sigmas), reference.init_noise_sigma)


def test_steps() -> None:
    reference = EulerDiscreteScheduler(**SVD_SCHEDULER)
    reference.set_timesteps(6)
    sigmas = own.karras_sigmas(6, 0.002, 700.0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 3, 4, 2, 2, generator=generator) * 700
    for i, timestep in enumerate(reference.timesteps):
        v = torch.randn(latents.shape, generator=generator)
        scaled = reference.scale_model_input(latents, timestep)
        torch.testing.assert_close(own.scalings(sigmas[i]).c_in * latents, scaled)
        expected = reference.step(v, timestep, latents)
        scalings = own.scalings(sigmas[i])
        denoised = scalings.c_skip * latents + scalings.c_out * v
        torch.testing.assert_close(denoised, expected.pred_original_sample)
        latents = own.euler_step(denoised, latents, sigmas[i], sigmas[i + 1])
        torch.testing.assert_close(latents, expected.prev_sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prediction_type": "epsilon"},
            "prediction_type: 'epsilon' is not implemented; allowed: 'v_prediction'",
        ),
        ({"use_karras_sigmas": False}, "use_karras_sigmas: False is not implemented"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type: 'sigma_min' is not implemented"),
        ({"timestep_type": "discrete"}, "timestep_type: 'discrete' is not implemented"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas: True is not implemented"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas: True is not implemented"),
        ({"shift": 3.0}, "scheduler_config.json: option 'shift' is not implemented"),
        ({"_class_name": "DDIMScheduler"}, "scheduler 'DDIMScheduler' is not implemented"),
        ({"sigma_max": None}, "scheduler_config.json: sigma_max: got None, allowed: a valid number"),
        ({"sigma_min": 800.0}, "sigma_min, sigma_max: got 800.0, 700.0"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdlabError, match=message) as error:
        EulerScheduler.from_config({**PUBLISHED, **change})
    assert "\n" not in str(error.value)
