"""A scheduler object of another library in the place of svdlab's sampler, called as diffusers' pipeline calls it.

It is known by what it has: ``set_timesteps``, ``timesteps``, ``init_noise_sigma``, ``scale_model_input`` and ``step``.
Its rules take the places of the stages in ``RULES``; svdlab's own are the functions of ``svdlab.svd.sampler``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svdlab.errors import SvdlabError, short
from svdlab.svd.sampler import EulerScheduler, named_sigmas
from svdlab.svd.settings import GenerationSettings

# The stages that are a sampler's rules.
RULES = ("sigmas", "timesteps", "initial_latents", "model_input", "euler_step")
_METHODS = ("set_timesteps", "scale_model_input", "step")


def is_scheduler(component: Any) -> bool:
    """Whether an object has the methods of a scheduler."""
    methods = all(callable(getattr(component, name, None)) for name in _METHODS)
    return methods and hasattr(component, "config") and not isinstance(component, type)


def label(scheduler: Any) -> str:
    """A scheduler's class and the options that are not its class's defaults, as one writes it in Python."""
    kind = type(scheduler)
    if isinstance(scheduler, EulerScheduler):
        low, high, spacing = scheduler.sigma_min, scheduler.sigma_max, scheduler.timestep_spacing
        options: dict[str, Any] = {"sigma_min": low, "sigma_max": high, "timestep_spacing": spacing}
        return f"EulerDiscreteScheduler({', '.join(f'{name}={value!r}' for name, value in options.items())})"
    defaults = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    held = {name: value for name, value in dict(scheduler.config).items() if name in defaults}
    options = {name: value for name, value in held.items() if value != defaults[name]}
    return f"{kind.__name__}({', '.join(f'{name}={short(value)}' for name, value in options.items())})"


def prepared(scheduler: Any, settings: GenerationSettings, device: torch.device | str) -> Any:
    """A copy of a scheduler, with the noise levels of one generation; the one given stays as it is.

    Args:
        scheduler: another library's.
        settings: their explicit or named sigmas, if any; else the scheduler has its own for ``num_inference_steps``.
        device: for its timesteps.

    Raises:
        SvdlabError: it takes no sigmas and the settings have some, it refuses them, or it has too few itself.
    """
    name = type(scheduler).__name__
    sigmas, own = named_sigmas(settings), copy.deepcopy(scheduler)
    if sigmas is not None and "sigmas" not in inspect.signature(own.set_timesteps).parameters:
        field = "sigmas" if settings.sigmas is not None else "schedule"
        raise SvdlabError(f"{field}: {name} has noise levels of its own only, allowed: none given, schedule karras")
    try:
        if sigmas is not None:
            own.set_timesteps(sigmas=sigmas, device=device)
        else:
            own.set_timesteps(settings.num_inference_steps, device=device)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise SvdlabError(f"scheduler: {name}: {error}") from None
    levels, steps = noise_levels(own), len(own.timesteps)
    if len(levels) <= steps:
        raise SvdlabError(f"scheduler: {name} has {len(levels)} sigmas for {steps} timesteps, allowed: one more")
    return own


def noise_levels(scheduler: Any) -> Tensor:
    """The sigmas (S + 1,) of a scheduler's timesteps in float32, and where it ends.

    Schedulers without ``sigmas`` have the variance that is left of the data, a: sqrt((1 - a) / a), and end at 0.

    Raises:
        SvdlabError: it has neither.
    """
    if isinstance(sigmas := getattr(scheduler, "sigmas", None), Tensor):
        return sigmas.float()
    if not hasattr(scheduler, "alphas_cumprod"):
        raise SvdlabError(f"scheduler: {type(scheduler).__name__} has no noise levels, allowed: sigmas, alphas_cumprod")
    left = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()]
    return torch.cat([((1 - left) / left) ** 0.5, torch.zeros(1)]).float()


def rules(scheduler: Any, settings: GenerationSettings, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The stages in ``RULES`` by another library's scheduler, for one generation: it counts its own steps.

    Raises:
        SvdlabError: see ``prepared``.
    """
    own = prepared(scheduler, settings, device)
    timesteps = own.timesteps
    scaled_at, stepped_at = iter(timesteps), iter(timesteps)

    def model_input(latents: Tensor, image_latents: Tensor, sigma: Tensor, guided: bool) -> Tensor:
        return with_image(own.scale_model_input(latents, next(scaled_at)), image_latents, guided)

    def step(noise_pred: Tensor, latents: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        return own.step(noise_pred, next(stepped_at), latents).prev_sample

    return {
        "sigmas": lambda settings: noise_levels(own),
        "timesteps": lambda sigmas: timesteps.float(),
        "initial_latents": lambda latents, sigmas: latents * own.init_noise_sigma,
        "model_input": model_input,
        "euler_step": step,
    }


def with_image(scaled: Tensor, image_latents: Tensor, guided: bool) -> Tensor:
    """Scaled latents (V, F, 4, h, w) and the image's (V, 4, h, w) along channels, zeros for the unconditional half."""
    conditional = image_latents[:, None].expand_as(scaled)
    if not guided:
        return torch.cat([scaled, conditional], dim=2)
    halves = torch.zeros_like(conditional), conditional
    return torch.cat([torch.cat([scaled, half], dim=2) for half in halves])
