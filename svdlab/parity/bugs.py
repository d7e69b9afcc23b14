"""The parity fixes: one small named function each, with the pre-fix twins that ports are found with.

``Rules()`` is what diffusers does. ``Rules.with_bugs("timestep_negated")`` puts a twin in a fix's place; the pipeline
calls whatever stands there and has no branch on any fix. ``BUGS`` is the catalogue that ``svdlab diagnose`` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.svd.images import normalize_for_clip, resize_with_antialiasing
from svdlab.svd.layers import GEGLU, AlphaBlender, TimestepEmbedding
from svdlab.svd.sampler import (
    EulerScheduler,
    custom_sigmas,
    karras_sigmas,
    scalings,
)
from svdlab.svd.stages import decode_latents
from svdlab.svd.unet import UNet
from svdlab.svd.vae import VAE


def continuous_timesteps(sigmas: Tensor) -> Tensor:
    """0.25 * ln(sigma) for every sigma but the last."""
    return scalings(sigmas[:-1]).c_noise


def scale_model_input(latents: Tensor, sigma: Tensor) -> Tensor:
    """c_in * latents."""
    return latents * scalings(sigma).c_in


def denoised_from_v(v: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """c_skip * latents + c_out * v."""
    s = scalings(sigma)
    return s.c_skip * latents + s.c_out * v


# --- 1. fps conditioning ---


def fps_minus_one(fps: int) -> int:
    """SVD was trained on fps - 1. Source: diffusers ``pipeline_stable_video_diffusion.py:__call__``."""
    return fps - 1


def fps_as_given(fps: int) -> int:
    """Twin: the model is told one frame per second too many."""
    return fps


def time_ids_in_order(fps: float, motion_bucket_id: float, noise_aug_strength: float) -> list[float]:
    """fps, motion bucket, noise augmentation. Source: ``pipeline_stable_video_diffusion.py:_get_add_time_ids``."""
    return [fps, motion_bucket_id, noise_aug_strength]


def time_ids_motion_first(fps: float, motion_bucket_id: float, noise_aug_strength: float) -> list[float]:
    """Twin: the motion bucket stands where the fps belongs."""
    return [motion_bucket_id, fps, noise_aug_strength]


# --- 2. sigmas and timesteps ---


def karras_schedule(scheduler: EulerScheduler, num_inference_steps: int) -> Tensor:
    """Karras sigmas (steps + 1,). Source: ``scheduling_euler_discrete.py:_convert_to_karras``."""
    return karras_sigmas(num_inference_steps, scheduler.sigma_min, scheduler.sigma_max)


def linear_schedule(scheduler: EulerScheduler, num_inference_steps: int) -> Tensor:
    """Twin: linear in sigma."""
    return custom_sigmas([*np.linspace(scheduler.sigma_max, scheduler.sigma_min, num_inference_steps), 0.0])


def timesteps_without_quarter(sigmas: Tensor) -> Tensor:
    """Twin of ``continuous_timesteps``: ln(sigma)."""
    return sigmas[:-1].log()


def timesteps_negated(sigmas: Tensor) -> Tensor:
    """Twin of ``continuous_timesteps``: -ln(sigma)."""
    return -sigmas[:-1].log()


def initial_sigma(scheduler: EulerScheduler, sigmas: Tensor) -> Tensor:
    """sqrt(sigma_max^2 + 1). Source: ``scheduling_euler_discrete.py:init_noise_sigma``."""
    return scheduler.init_noise_sigma(sigmas)


def initial_sigma_max(scheduler: EulerScheduler, sigmas: Tensor) -> Tensor:
    """Twin: sigma_max."""
    return sigmas.max()


def initial_sigma_one(scheduler: EulerScheduler, sigmas: Tensor) -> Tensor:
    """Twin: the unit noise as drawn."""
    return torch.ones_like(sigmas[0])


def model_input_as_is(latents: Tensor, sigma: Tensor) -> Tensor:
    """Twin of ``scale_model_input``: no 1 / sqrt(sigma^2 + 1)."""
    return latents


def denoised_from_epsilon(epsilon: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """Twin of ``denoised_from_v``: the output read as the noise."""
    return latents - sigma * epsilon


# --- 3. the conditioning image ---


def augment_pixels(pixels: Tensor, noise: Tensor, strength: float) -> Tensor:
    """Noise augmentation before the encode, (B, 3, H, W). Source: ``pipeline_stable_video_diffusion.py:__call__``."""
    return pixels + strength * noise


def pixels_as_given(pixels: Tensor, noise: Tensor, strength: float) -> Tensor:
    """Twin: the pixels are not augmented."""
    return pixels


def latents_as_encoded(latents: Tensor, strength: float) -> Tensor:
    """The encoded latents (B, 4, h, w) are not touched after the encode."""
    return latents


def augment_latents(latents: Tensor, strength: float) -> Tensor:
    """Twin: the noise comes after the encode; drawn from a seed of its own, since no pixel noise fits the shape."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    return latents + strength * noise.to(latents)


def posterior_mode(mean: Tensor, std: Tensor) -> Tensor:
    """The distribution's mode. Source: ``pipeline_stable_video_diffusion.py:_encode_vae_image``."""
    return mean


def posterior_sample(mean: Tensor, std: Tensor) -> Tensor:
    """Twin: a sample, drawn from a seed of its own."""
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return mean + std * noise.to(mean)


def image_latents_unscaled(latents: Tensor, scaling_factor: float) -> Tensor:
    """Conditioning latents are NOT multiplied by the scaling factor. Source: ``_encode_vae_image``."""
    return latents


def image_latents_scaled(latents: Tensor, scaling_factor: float) -> Tensor:
    """Twin: multiplied, as text-to-image pipelines do."""
    return latents * scaling_factor


def zeros(condition: Tensor) -> Tensor:
    """The unconditional half is zeros. Source: ``_encode_image`` and ``_encode_vae_image``."""
    return torch.zeros_like(condition)


def kept(condition: Tensor) -> Tensor:
    """Twin: the unconditional half sees the condition."""
    return condition


def resize_plain(images: Tensor, size: int) -> Tensor:
    """Twin: bicubic without the blur."""
    return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True)


def clip_pixels_as_they_are(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Twin: no mean and std."""
    return pixels


# --- 4. guidance ---


def guidance_per_frame(low: float, high: float, num_frames: int, num_steps: int) -> Tensor:
    """Scales (steps, F): ``low`` at the first frame to ``high`` at the last, the same in every step.

    Source: ``pipeline_stable_video_diffusion.py:__call__``, 8.
    """
    return torch.linspace(low, high, num_frames).expand(num_steps, -1)


def guidance_per_step(low: float, high: float, num_frames: int, num_steps: int) -> Tensor:
    """Twin: the ramp runs over steps, the same at every frame."""
    return torch.linspace(low, high, num_steps)[:, None].expand(-1, num_frames)


def guidance_constant(low: float, high: float, num_frames: int, num_steps: int) -> Tensor:
    """Twin: the maximum everywhere."""
    return torch.full((num_steps, num_frames), float(high))


def guide(uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance, (B, F, 4, h, w). Source: Ho and Salimans 2022, arXiv 2207.12598."""
    return uncond + scale * (cond - uncond)


def guide_swapped(uncond: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
    """Twin: the halves exchanged."""
    return guide(cond, uncond, scale)


# --- 5. decoding ---


def decode_always_chunked(vae: VAE, latents: Tensor, chunk: int | None, exact: bool) -> Tensor:
    """Twin: chunks of 2, each a clip of its own, where the reference decodes at once."""
    return decode_latents(vae, latents, chunk or 2, exact=False)


def unscale_latents(latents: Tensor, scaling_factor: float) -> Tensor:
    """The latents to decode ARE divided by the scaling factor. Source: ``decode_latents``."""
    return 1 / scaling_factor * latents


def latents_as_sampled(latents: Tensor, scaling_factor: float) -> Tensor:
    """Twin: decoded as they are."""
    return latents


# --- bugs inside the networks: edits of a module's attributes, or hooks, undone on exit ---

Edit = Callable[[nn.Module], AbstractContextManager[None]]


@contextmanager
def _attribute(
    model: nn.Module, kind: type | tuple[type, ...], name: str, value: Callable[[Any], Any]
) -> Iterator[None]:
    modules = [m for m in model.modules() if isinstance(m, kind)]
    before = [getattr(m, name) for m in modules]
    try:
        for m, old in zip(modules, before, strict=True):
            setattr(m, name, value(old))
        yield
    finally:
        for m, old in zip(modules, before, strict=True):
            setattr(m, name, old)


def swap_alpha(model: nn.Module) -> AbstractContextManager[None]:
    """Twin of the temporal blend: the paths change places."""
    return _attribute(model, AlphaBlender, "switch_spatial_to_temporal_mix", lambda switched: not switched)


def tanh_gelu(model: nn.Module) -> AbstractContextManager[None]:
    """Twin of GEGLU's exact GELU: the tanh approximation."""
    return _attribute(model, GEGLU, "approximate", lambda _: "tanh")


def group_norm_eps_5(model: nn.Module) -> AbstractContextManager[None]:
    """Twin of the various group-norm eps: 1e-5 everywhere."""
    return _attribute(model, nn.GroupNorm, "eps", lambda _: 1e-5)


def group_norm_eps_6(model: nn.Module) -> AbstractContextManager[None]:
    """Twin of the various group-norm eps: 1e-6 everywhere."""
    return _attribute(model, nn.GroupNorm, "eps", lambda _: 1e-6)


@contextmanager
def no_frame_positions(model: nn.Module) -> Iterator[None]:
    """Twin: the frame position embedding is left out."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith("time_pos_embed"):
                handle = module.register_forward_hook(lambda m, args, output: torch.zeros_like(output))
                hooks.callback(handle.remove)
        yield


@contextmanager
def sine_first(model: nn.Module) -> Iterator[None]:
    """Twin: every sinusoidal embedding is sin-then-cos."""

    def swap_halves(parts: int) -> Callable:
        return lambda m, args: (args[0].unflatten(-1, (parts, 2, -1)).flip(-2).flatten(-3),)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, TimestepEmbedding):
                handle = module.register_forward_pre_hook(swap_halves(3 if name == "add_embedding" else 1))
                hooks.callback(handle.remove)
        yield


# --- the rules and the catalogue ---


@dataclass(frozen=True)
class Rules:
    """Every decision that ports get wrong, as the function that takes it. The defaults are what diffusers does."""

    fps_id: Callable[[int], int] = fps_minus_one
    time_ids: Callable[[float, float, float], list[float]] = time_ids_in_order
    sigmas: Callable[[EulerScheduler, int], Tensor] = karras_schedule
    timesteps: Callable[[Tensor], Tensor] = continuous_timesteps
    init_noise_sigma: Callable[[EulerScheduler, Tensor], Tensor] = initial_sigma
    model_input: Callable[[Tensor, Tensor], Tensor] = scale_model_input
    denoised: Callable[[Tensor, Tensor, Tensor], Tensor] = denoised_from_v
    augment_pixels: Callable[[Tensor, Tensor, float], Tensor] = augment_pixels
    augment_latents: Callable[[Tensor, float], Tensor] = latents_as_encoded
    posterior: Callable[[Tensor, Tensor], Tensor] = posterior_mode
    image_latents: Callable[[Tensor, float], Tensor] = image_latents_unscaled
    uncond_embeddings: Callable[[Tensor], Tensor] = zeros
    uncond_latents: Callable[[Tensor], Tensor] = zeros
    clip_resize: Callable[[Tensor, int], Tensor] = resize_with_antialiasing
    clip_normalise: Callable[[Tensor, Tensor, Tensor], Tensor] = normalize_for_clip
    guidance_scale: Callable[[float, float, int, int], Tensor] = guidance_per_frame
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] = guide
    to_decode: Callable[[Tensor, float], Tensor] = unscale_latents
    decode: Callable[[VAE, Tensor, int | None, bool], Tensor] = decode_latents
    unet_edits: tuple[Edit, ...] = ()
    vae_edits: tuple[Edit, ...] = ()

    @contextmanager
    def in_force(self, unet: UNet, vae: VAE) -> Iterator[None]:
        """Within this context the networks carry the rules' edits; the weights are shared and stay as they are."""
        with ExitStack() as stack:
            for model, edits in ((unet, self.unet_edits), (vae, self.vae_edits)):
                for edit in edits:
                    stack.enter_context(edit(model))
            yield

    @classmethod
    def with_bugs(cls, *names: str) -> Rules:
        """diffusers' rules with the named bugs of the catalogue put in, each in its first variant.

        Raises:
            SvdlabError: an unknown name, or two bugs in the same place.
        """
        for name in names:
            if name not in BUGS:
                raise SvdlabError(f"rules: unknown bug {name!r}, allowed: {', '.join(BUGS)}")
        return cls().changed(*(BUGS[name].variants[0] for name in names))

    def changed(self, *variants: Mapping[str, Any]) -> Rules:
        """These rules with twins in place of fixes; edits are added to the edits that are there.

        Raises:
            SvdlabError: a fix that is already replaced.
        """
        default = {f.name: f.default for f in fields(self)}
        rules = self
        for variant in variants:
            for field, twin in variant.items():
                current = getattr(rules, field)
                if isinstance(current, tuple):
                    twin = current + twin
                elif current is not default[field]:
                    raise SvdlabError(f"rules: {field} is already {current.__name__}; two bugs in one place")
                rules = replace(rules, **{field: twin})
        return rules


@dataclass(frozen=True)
class Bug:
    """One row of the catalogue.

    Attributes:
        name: what ``diagnose`` reports.
        cause: one line, what the port did.
        diffusers: the location that does it right.
        first_probe: the first probe of a trace at which it can show, for step 0.
        variants: the forms in which it is met, each a mapping from a field of ``Rules`` to the twin.
    """

    name: str
    cause: str
    diffusers: str
    first_probe: str
    variants: tuple[Mapping[str, Any], ...]


_PIPELINE = "pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py"
_SCHEDULER = "schedulers/scheduling_euler_discrete.py"
_BLOCKS = "models/unets/unet_3d_blocks.py"
_FIRST_PREDICTION = "noise_pred_uncond.000"


def _bug(name: str, cause: str, diffusers: str, first_probe: str, *variants: Mapping[str, Any]) -> tuple[str, Bug]:
    return name, Bug(name, cause, diffusers, first_probe, variants)


BUGS: Mapping[str, Bug] = MappingProxyType(
    dict(
        [
            _bug(
                "fps_not_decremented",
                "fed fps instead of fps - 1",
                f"{_PIPELINE}:__call__",
                "added_time_ids",
                {"fps_id": fps_as_given},
            ),
            _bug(
                "timestep_unscaled",
                "ln(sigma) without the 0.25",
                f"{_SCHEDULER}:set_timesteps",
                "timesteps",
                {"timesteps": timesteps_without_quarter},
            ),
            _bug(
                "timestep_negated",
                "-ln(sigma)",
                f"{_SCHEDULER}:set_timesteps",
                "timesteps",
                {"timesteps": timesteps_negated},
            ),
            _bug(
                "noise_aug_after_encode",
                "noised the latents instead of the pixels",
                f"{_PIPELINE}:__call__",
                "image_latents",
                {"augment_pixels": pixels_as_given, "augment_latents": augment_latents},
            ),
            _bug(
                "noise_aug_missing",
                "no noise augmentation",
                f"{_PIPELINE}:__call__",
                "image_latents",
                {"augment_pixels": pixels_as_given},
            ),
            _bug(
                "guidance_per_step",
                "guidance ramp over steps instead of frames",
                f"{_PIPELINE}:__call__",
                "guidance_scale",
                {"guidance_scale": guidance_per_step},
            ),
            _bug(
                "guidance_constant",
                "one guidance scale for all frames",
                f"{_PIPELINE}:__call__",
                "guidance_scale",
                {"guidance_scale": guidance_constant},
            ),
            _bug(
                "guidance_swapped",
                "conditional and unconditional half exchanged",
                f"{_PIPELINE}:__call__",
                "noise_pred.000",
                {"guide": guide_swapped},
            ),
            _bug(
                "image_latents_scaled",
                "image latents multiplied by the VAE's scaling factor",
                f"{_PIPELINE}:_encode_vae_image",
                "image_latents",
                {"image_latents": image_latents_scaled},
            ),
            _bug(
                "image_latents_sampled",
                "sampled the posterior instead of taking its mode",
                f"{_PIPELINE}:_encode_vae_image",
                "image_latents",
                {"posterior": posterior_sample},
            ),
            _bug(
                "uncond_latents_kept",
                "image latents not zeroed in the unconditional half",
                f"{_PIPELINE}:_encode_vae_image",
                "model_input.000",
                {"uncond_latents": kept},
            ),
            _bug(
                "uncond_embedding_kept",
                "image embedding not zeroed in the unconditional half",
                f"{_PIPELINE}:_encode_image",
                _FIRST_PREDICTION,
                {"uncond_embeddings": kept},
            ),
            _bug(
                "time_ids_reordered",
                "motion bucket before fps",
                f"{_PIPELINE}:_get_add_time_ids",
                "added_time_ids",
                {"time_ids": time_ids_motion_first},
            ),
            _bug(
                "init_noise_unscaled",
                "first latents times sigma_max, not sqrt(sigma_max^2 + 1), or unit noise",
                f"{_SCHEDULER}:init_noise_sigma",
                "model_input.000",
                {"init_noise_sigma": initial_sigma_max},
                {"init_noise_sigma": initial_sigma_one},
            ),
            _bug(
                "model_input_unscaled",
                "no 1 / sqrt(sigma^2 + 1) on the model's input",
                f"{_SCHEDULER}:scale_model_input",
                "model_input.000",
                {"model_input": model_input_as_is},
            ),
            _bug(
                "sigmas_not_karras",
                "sigmas linear instead of rho 7",
                f"{_SCHEDULER}:_convert_to_karras",
                "sigmas",
                {"sigmas": linear_schedule},
            ),
            _bug(
                "prediction_epsilon",
                "output read as epsilon instead of v",
                f"{_SCHEDULER}:step",
                "latents.000",
                {"denoised": denoised_from_epsilon},
            ),
            _bug(
                "clip_no_antialias",
                "plain resize before CLIP",
                f"{_PIPELINE}:_resize_with_antialiasing",
                "input.clip_pixels",
                {"clip_resize": resize_plain},
            ),
            _bug(
                "clip_unnormalised",
                "no CLIP mean and std",
                f"{_PIPELINE}:_encode_image",
                "input.clip_pixels",
                {"clip_normalise": clip_pixels_as_they_are},
            ),
            _bug(
                "alpha_swapped_unet",
                "temporal blend of the UNet the wrong way round",
                "models/resnet.py:AlphaBlender.forward",
                _FIRST_PREDICTION,
                {"unet_edits": (swap_alpha,)},
            ),
            _bug(
                "alpha_swapped_vae",
                "temporal blend of the VAE decoder the wrong way round",
                f"{_BLOCKS}:UpBlockTemporalDecoder",
                "frames",
                {"vae_edits": (swap_alpha,)},
            ),
            _bug(
                "frame_position_missing",
                "no frame position embedding",
                "models/transformers/transformer_temporal.py:TransformerSpatioTemporalModel.forward",
                _FIRST_PREDICTION,
                {"unet_edits": (no_frame_positions,)},
            ),
            _bug(
                "sincos_order",
                "sinusoidal embeddings sin-then-cos",
                "models/embeddings.py:get_timestep_embedding",
                _FIRST_PREDICTION,
                {"unet_edits": (sine_first,)},
            ),
            _bug(
                "gelu_tanh",
                "tanh approximation of GELU",
                "models/activations.py:GEGLU",
                _FIRST_PREDICTION,
                {"unet_edits": (tanh_gelu,)},
            ),
            _bug(
                "group_norm_eps",
                "one group-norm eps everywhere",
                f"{_BLOCKS}:get_up_block",
                "image_latents",
                {"unet_edits": (group_norm_eps_5,), "vae_edits": (group_norm_eps_5,)},
                {"unet_edits": (group_norm_eps_6,), "vae_edits": (group_norm_eps_6,)},
                {"unet_edits": (group_norm_eps_5,)},
                {"unet_edits": (group_norm_eps_6,)},
            ),
            _bug(
                "decode_unscaled",
                "latents not divided by the scaling factor before the decode",
                f"{_PIPELINE}:decode_latents",
                "frames",
                {"to_decode": latents_as_sampled},
            ),
            _bug(
                "decode_chunked",
                "decoded in chunks where the reference decoded at once",
                f"{_PIPELINE}:decode_latents",
                "frames",
                {"decode": decode_always_chunked},
            ),
        ]
    )
)


def check_bugs(*names: str) -> None:
    """Raises: SvdlabError for a name that is not in the catalogue, or for two bugs that exclude each other."""
    Rules.with_bugs(*names)
