"""Euler sampling over the EDM sigmas with v-prediction and continuous timesteps.

Source: Karras et al. 2022 (arXiv 2206.00364), equation 5 and algorithm 1; diffusers
``schedulers/scheduling_euler_discrete.py:EulerDiscreteScheduler``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from svdlab.errors import SvdlabError, short
from svdlab.svd.config import Config, Options, read_config
from svdlab.svd.settings import MAX_SIGMA, MIN_SIGMA, GenerationSettings

# Align Your Steps' noise levels for SVD: Sabour et al. 2024 (arXiv 2404.14507), appendix B.
ALIGN_YOUR_STEPS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)

# Options of diffusers' older schedulers that no schedule reads.
_INERT = ("clip_sample", "set_alpha_to_one", "skip_prk_steps")
# What each remaining option must be; anything else is another sampler.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("v_prediction",),
    "timestep_type": ("continuous",),
    "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "final_sigmas_type": ("zero",),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}


class EulerScheduler(Config):
    """What ``scheduler_config.json`` decides; the steps themselves are the functions below.

    Field names, and the values that stand when a file omits them, are diffusers'. SVD's published file sets
    ``sigma_min=0.002, sigma_max=700, timestep_spacing="leading"``.
    """

    sigma_min: float = 0.0
    sigma_max: float = 0.0
    prediction_type: str = "epsilon"
    timestep_type: str = "discrete"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    final_sigmas_type: str = "zero"
    timestep_spacing: str = "linspace"
    # For schedules made from betas: they change nothing here, and are kept for who makes another sampler of ``config``.
    beta_start: Any = 0.0001
    beta_end: Any = 0.02
    beta_schedule: Any = "linear"
    trained_betas: Any = None
    num_train_timesteps: Any = 1000
    interpolation_type: Any = "linear"
    steps_offset: Any = 0
    rescale_betas_zero_snr: Any = False

    @model_validator(mode="after")
    def _check(self) -> EulerScheduler:
        for name, allowed in _REQUIRED.items():
            if (value := getattr(self, name)) not in allowed:
                shown = ", ".join(repr(a) for a in allowed)
                raise SvdlabError(f"{name}: {short(value)} is not implemented; allowed: {shown}")
        low, high = self.sigma_min, self.sigma_max
        if not (low and high and MIN_SIGMA <= low < high <= MAX_SIGMA):
            raise SvdlabError(
                f"sigma_min, sigma_max: got {low}, {high}, allowed: 0 < sigma_min < sigma_max, "
                f"from {MIN_SIGMA} to {MAX_SIGMA}"
            )
        return self

    @classmethod
    def from_config(cls, options: Mapping[str, Any], where: str = "scheduler_config.json") -> EulerScheduler:
        """Read the parsed JSON.

        Raises:
            SvdlabError: a sampler or an option that is not implemented, by name.
        """
        name = options.get("_class_name", "EulerDiscreteScheduler")
        if name != "EulerDiscreteScheduler":
            raise SvdlabError(f"{where}: scheduler {name!r} is not implemented; allowed: EulerDiscreteScheduler")
        return read_config(cls, options, where, inert=_INERT)

    @property
    def config(self) -> Options:
        """The options as diffusers' scheduler has them: another one is made of them by its ``from_config``."""
        return Options(_class_name="EulerDiscreteScheduler", **self.model_dump())

    def init_noise_sigma(self, sigmas: Tensor) -> Tensor:
        """The first latents' standard deviation: sqrt(sigma_max^2 + 1), or sigma_max unless the spacing is leading."""
        return (sigmas.max() ** 2 + 1) ** 0.5 if self.timestep_spacing == "leading" else sigmas.max()


def karras_sigmas(num_inference_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Sigmas (steps + 1,) in float32, from ``sigma_max`` to ``sigma_min`` evenly in sigma^(1/rho), then 0.

    Source: Karras et al. 2022, equation 5; diffusers ``scheduling_euler_discrete.py:_convert_to_karras``.
    """
    ramp = np.linspace(0, 1, num_inference_steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return custom_sigmas([*(high + ramp * (low - high)) ** rho, 0.0])


def custom_sigmas(sigmas: Sequence[float]) -> Tensor:
    """Given sigmas (steps + 1,) in float32; the last one is where sampling ends."""
    return torch.from_numpy(np.array(sigmas, dtype=np.float32))


def align_your_steps(num_inference_steps: int) -> list[float]:
    """Align Your Steps' sigmas (steps + 1) for SVD: the ten published steps, or between them linearly in ln(sigma).

    The last one is 0, as everywhere here. Source: Sabour et al. 2024, appendix B; for ten steps diffusers
    ``scheduling_utils.py:AysSchedules["StableDiffusionVideoSigmas"]``.
    """
    published = np.linspace(0, 1, len(ALIGN_YOUR_STEPS))
    wanted = np.linspace(0, 1, num_inference_steps + 1)[:-1]
    return [*np.exp(np.interp(wanted, published, np.log(ALIGN_YOUR_STEPS))).tolist(), 0.0]


def named_sigmas(settings: GenerationSettings) -> list[float] | None:
    """The sigmas (steps + 1) that settings give or name; None for those of the scheduler, Karras's."""
    if settings.sigmas is not None:
        return list(settings.sigmas)
    return align_your_steps(settings.num_inference_steps) if settings.schedule == "ays" else None


@dataclass(frozen=True)
class Scalings:
    """EDM's preconditioning at some noise levels: D(x) = c_skip x + c_out F(c_in x; c_noise).

    Attributes:
        c_skip, c_out, c_in, c_noise: of the sigmas' shape.
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def scalings(sigma: Tensor) -> Scalings:
    """SVD's scalings, those of v-prediction with sigma_data 1: the one place where they stand.

    c_skip = 1 / (sigma^2 + 1), c_out = -sigma / sqrt(sigma^2 + 1), c_in = 1 / sqrt(sigma^2 + 1),
    c_noise = 0.25 ln(sigma), the timestep.

    Source: Karras et al. 2022, table 1; Salimans and Ho 2022 (arXiv 2202.00512), v-prediction; diffusers
    ``scheduling_euler_discrete.py:step, scale_model_input, set_timesteps``.

    Args:
        sigma: positive, any shape.
    """
    variance = sigma**2 + 1
    return Scalings(1 / variance, -sigma / variance**0.5, 1 / variance**0.5, 0.25 * sigma.log())


def euler_step(denoised: Tensor, latents: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One step of the probability-flow ODE from ``sigma`` to ``next_sigma``.

    Source: Karras et al. 2022, algorithm 1, lines 4 and 5 (first order only).
    """
    return latents + (latents - denoised) / sigma * (next_sigma - sigma)
