"""The catalogue of bugs that ports of Stable Video Diffusion are met with, each injectable into svdlab.

A bug is a wrapper around one stage of the pipeline (``svdlab.svd.stages``), or an edit of modules inside one. Each
entry stands beside its cause and the place in diffusers that does it right; the correct code has no hooks for them.

To add one: write the wrapper ``(pipe, stage, *the stage's arguments)`` and call ``_wrapped`` around it, or an edit
``(network)`` and ``_edited``. ``svdlab diagnose``, the notebooks' explorer and the sweeps then know it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.parity.probes import SHAPES
from svdlab.svd.images import normalize_for_clip
from svdlab.svd.layers import GEGLU, AlphaBlender, TimestepEmbedding
from svdlab.svd.sampler import custom_sigmas, euler_step
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGE, STAGES, Change, wide


@dataclass(frozen=True)
class Bug:
    """One entry of the catalogue.

    Attributes:
        name: what ``diagnose`` reports.
        cause: one line, what the port did.
        diffusers: the location that does it right, below ``src/diffusers``.
        stage: the first stage that it changes.
        variants: the forms in which it is met; the first one is what ``with_bugs`` injects.
        decides: what it decides wrongly, where two bugs that decide the same exclude each other.
    """

    name: str
    cause: str
    diffusers: str
    stage: str
    variants: tuple[Change, ...]
    decides: str = ""

    @property
    def first_probe(self) -> str:
        """The first tensor of a trace at which it can show, for step 0."""
        return first_probe(self.stage)


def first_probe(stage: str) -> str:
    """The first recorded tensor that a stage can change, for step 0."""
    at = STAGE[stage]
    for name in at.writes:
        if name in SHAPES:
            return f"{name}.000" if at.per_step else name
    return next(first_probe(later.name) for later in STAGES if set(at.writes) & set(later.reads))


_PIPELINE = "pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py"
_SCHEDULER = "schedulers/scheduling_euler_discrete.py"
_BLOCKS = "models/unets/unet_3d_blocks.py"
_bugs: dict[str, Bug] = {}


def _bug(name: str, cause: str, diffusers: str, stage: str, *variants: Change, decides: str = "") -> None:
    _bugs[name] = Bug(name, cause, diffusers, stage, variants, decides or name)


def _wrapped(stage: str, *wrappers: Callable[..., Any]) -> Callable[..., None]:
    """Declare a bug in one stage, a variant per wrapper."""

    def declare(name: str, cause: str, diffusers: str, decides: str = "") -> None:
        _bug(name, cause, diffusers, stage, *(Change(wrap={stage: w}) for w in wrappers), decides=decides)

    return declare


def _edited(stage: str, **edits: Callable[[nn.Module], None]) -> Callable[..., None]:
    """Declare a bug inside a network that a stage runs."""

    def declare(name: str, cause: str, diffusers: str) -> None:
        _bug(name, cause, diffusers, stage, Change(edit=edits))

    return declare


# --- the conditioning image ---


def _resize_without_blur(pipe: Any, stage: Any, source: Tensor) -> Tensor:
    size = pipe.image_encoder.config.image_size
    resized = F.interpolate(source * 2 - 1, size=(size, size), mode="bicubic", align_corners=True)
    return normalize_for_clip((resized + 1) / 2, pipe.feature_extractor.mean, pipe.feature_extractor.std)


def _without_clip_statistics(pipe: Any, stage: Any, source: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pipe.feature_extractor.mean, pipe.feature_extractor.std))
    return stage(source) * std + mean


_wrapped("clip_pixels", _resize_without_blur)(
    "clip_no_antialias", "plain resize before CLIP", f"{_PIPELINE}:_resize_with_antialiasing"
)
_wrapped("clip_pixels", _without_clip_statistics)(
    "clip_unnormalised", "no CLIP mean and std", f"{_PIPELINE}:_encode_image"
)


def sample_posterior(vae: nn.Module, noise: Callable[[Tensor], Tensor]) -> None:
    """Edit a VAE so that it encodes to mean + std * noise; ``noise`` makes (B, F, h, w, 4) like what it is given."""

    def moments(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        mean, log_variance = output.chunk(2, dim=-1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return torch.cat([mean + std * noise(mean), log_variance], dim=-1)

    vae.get_submodule("quant_conv").register_forward_hook(moments)


def own_noise(like: Tensor) -> Tensor:
    """Unit Gaussian from a seed of its own, as a port that draws beside the reference has it."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


_edited("image_latents", vae=lambda vae: sample_posterior(vae, own_noise))(
    "image_latents_sampled", "sampled the posterior instead of taking its mode", f"{_PIPELINE}:_encode_vae_image"
)


def _scaled(pipe: Any, stage: Any, image: Tensor, noise: Tensor, settings: GenerationSettings) -> Tensor:
    return stage(image, noise, settings) * pipe.vae.config.scaling_factor


def _not_augmented(pipe: Any, stage: Any, image: Tensor, noise: Tensor, settings: GenerationSettings) -> Tensor:
    return stage(image, torch.zeros_like(noise), settings)


def _augmented_latents(pipe: Any, stage: Any, image: Tensor, noise: Tensor, settings: GenerationSettings) -> Tensor:
    latents = _not_augmented(pipe, stage, image, noise, settings)
    videos = settings.num_videos_per_prompt
    return latents + settings.noise_aug_strength * own_noise(latents[::videos]).repeat_interleave(videos, 0)


_wrapped("image_latents", _scaled)(
    "image_latents_scaled",
    "image latents multiplied by the VAE's scaling factor",
    f"{_PIPELINE}:_encode_vae_image",
)
_wrapped("image_latents", _not_augmented)(
    "noise_aug_missing", "no noise augmentation", f"{_PIPELINE}:__call__", decides="noise augmentation"
)
_wrapped("image_latents", _augmented_latents)(
    "noise_aug_after_encode",
    "noised the latents instead of the pixels",
    f"{_PIPELINE}:__call__",
    decides="noise augmentation",
)

# --- fps and motion ---


def _fps_as_given(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    return stage(settings) + torch.tensor([[1, 0, 0]])


def _motion_first(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    return stage(settings)[:, [1, 0, 2]]


_wrapped("time_ids", _fps_as_given)("fps_not_decremented", "fed fps instead of fps - 1", f"{_PIPELINE}:__call__")
_wrapped("time_ids", _motion_first)("time_ids_reordered", "motion bucket before fps", f"{_PIPELINE}:_get_add_time_ids")

# --- noise levels ---


def _linear_sigmas(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    if settings.sigmas is not None:
        return stage(settings)
    low, high = pipe.scheduler.sigma_min, pipe.scheduler.sigma_max
    return custom_sigmas([*np.linspace(high, low, settings.num_steps), 0.0])


_wrapped("sigmas", _linear_sigmas)(
    "sigmas_not_karras", "sigmas linear instead of rho 7", f"{_SCHEDULER}:_convert_to_karras"
)
_wrapped("timesteps", lambda pipe, stage, sigmas: sigmas[:-1].log())(
    "timestep_unscaled", "ln(sigma) without the 0.25", f"{_SCHEDULER}:set_timesteps", decides="timestep of a sigma"
)
_wrapped("timesteps", lambda pipe, stage, sigmas: -sigmas[:-1].log())(
    "timestep_negated", "-ln(sigma)", f"{_SCHEDULER}:set_timesteps", decides="timestep of a sigma"
)
_wrapped(
    "initial_latents",
    lambda pipe, stage, latents, sigmas: latents * sigmas.max(),
    lambda pipe, stage, latents, sigmas: latents,
)(
    "init_noise_unscaled",
    "first latents times sigma_max, not sqrt(sigma_max^2 + 1), or unit noise",
    f"{_SCHEDULER}:init_noise_sigma",
)

# --- classifier-free guidance ---


def _ramp_over_steps(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    ramp = torch.linspace(settings.min_guidance_scale, settings.max_guidance_scale, settings.num_steps)
    return ramp[:, None].expand(-1, settings.num_frames or 1)


def _maximum_everywhere(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    return torch.full_like(stage(settings), settings.max_guidance_scale)


_wrapped("guidance_ramp", _ramp_over_steps)(
    "guidance_per_step", "guidance ramp over steps instead of frames", f"{_PIPELINE}:__call__", decides="guidance ramp"
)
_wrapped("guidance_ramp", _maximum_everywhere)(
    "guidance_constant", "one guidance scale for all frames", f"{_PIPELINE}:__call__", decides="guidance ramp"
)
_wrapped("guide", lambda pipe, stage, uncond, cond, scale: stage(cond, uncond, scale))(
    "guidance_swapped", "conditional and unconditional half exchanged", f"{_PIPELINE}:__call__"
)


def _embedding_in_both_halves(
    pipe: Any, stage: Any, embeddings: Tensor, ids: Tensor, settings: GenerationSettings, guided: bool
) -> Any:
    copies = 2 if guided else 1
    return pipe.unet.condition(embeddings.repeat(copies, 1, 1), ids.repeat(copies, 1), settings.num_frames)


_wrapped("condition", _embedding_in_both_halves)(
    "uncond_embedding_kept",
    "image embedding not zeroed in the unconditional half",
    f"{_PIPELINE}:_encode_image",
)


def _latents_in_both_halves(
    pipe: Any, stage: Any, latents: Tensor, image_latents: Tensor, sigma: Tensor, guided: bool
) -> Tensor:
    result = stage(latents, image_latents, sigma, guided)
    if guided:
        channels, videos = latents.shape[2], len(latents)
        result[:videos, :, channels:] = result[videos:, :, channels:]
    return result


def _unscaled_input(
    pipe: Any, stage: Any, latents: Tensor, image_latents: Tensor, sigma: Tensor, guided: bool
) -> Tensor:
    result = stage(latents, image_latents, sigma, guided)
    result[:, :, : latents.shape[2]] = latents.repeat(2 if guided else 1, 1, 1, 1, 1)
    return result


_wrapped("model_input", _latents_in_both_halves)(
    "uncond_latents_kept",
    "image latents not zeroed in the unconditional half",
    f"{_PIPELINE}:_encode_vae_image",
)
_wrapped("model_input", _unscaled_input)(
    "model_input_unscaled", "no 1 / sqrt(sigma^2 + 1) on the model's input", f"{_SCHEDULER}:scale_model_input"
)


def _epsilon(pipe: Any, stage: Any, noise_pred: Tensor, latents: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    latents = wide(latents)
    return euler_step(latents - sigma * wide(noise_pred), latents, sigma, next_sigma)


_wrapped("euler_step", _epsilon)("prediction_epsilon", "output read as epsilon instead of v", f"{_SCHEDULER}:step")

# --- inside the networks ---


def _set(kind: type[nn.Module], name: str, value: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    """An edit of one attribute of every module of a kind."""

    def edit(network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, kind):
                setattr(module, name, value(getattr(module, name)))

    return edit


def _no_frame_positions(unet: nn.Module) -> None:
    for name, module in unet.named_modules():
        if name.endswith("time_pos_embed"):
            module.register_forward_hook(lambda m, args, output: torch.zeros_like(output))


def _sine_first(unet: nn.Module) -> None:
    def swap_halves(parts: int) -> Callable[..., tuple[Tensor]]:
        return lambda m, args: (args[0].unflatten(-1, (parts, 2, -1)).flip(-2).flatten(-3),)

    for name, module in unet.named_modules():
        if isinstance(module, TimestepEmbedding):
            module.register_forward_pre_hook(swap_halves(3 if name == "add_embedding" else 1))


_swap_alpha = _set(AlphaBlender, "switch_spatial_to_temporal_mix", lambda switched: not switched)

_edited("predict_noise", unet=_swap_alpha)(
    "alpha_swapped_unet", "temporal blend of the UNet the wrong way round", "models/resnet.py:AlphaBlender.forward"
)
_edited("decode", vae=_swap_alpha)(
    "alpha_swapped_vae", "temporal blend of the VAE decoder the wrong way round", f"{_BLOCKS}:UpBlockTemporalDecoder"
)
_edited("predict_noise", unet=_no_frame_positions)(
    "frame_position_missing",
    "no frame position embedding",
    "models/transformers/transformer_temporal.py:TransformerSpatioTemporalModel.forward",
)
_edited("predict_noise", unet=_sine_first)(
    "sincos_order", "sinusoidal embeddings sin-then-cos", "models/embeddings.py:get_timestep_embedding"
)
_edited("predict_noise", unet=_set(GEGLU, "approximate", lambda _: "tanh"))(
    "gelu_tanh", "tanh approximation of GELU", "models/activations.py:GEGLU"
)

_eps = {eps: _set(nn.GroupNorm, "eps", lambda _, eps=eps: eps) for eps in (1e-5, 1e-6)}  # type: ignore[misc]
_bug(
    "group_norm_eps",
    "one group-norm eps everywhere",
    f"{_BLOCKS}:get_up_block",
    "image_latents",
    *(Change(edit={"unet": edit, "vae": edit}) for edit in _eps.values()),
    *(Change(edit={"unet": edit}) for edit in _eps.values()),
)

# --- the decode ---


def _not_divided(pipe: Any, stage: Any, latents: Tensor, settings: GenerationSettings) -> Tensor:
    return stage(latents * pipe.vae.config.scaling_factor, settings)


def _always_in_chunks(pipe: Any, stage: Any, latents: Tensor, settings: GenerationSettings) -> Tensor:
    chunk = settings.decode_chunk_size if isinstance(settings.decode_chunk_size, int) else 2
    return stage(latents, settings.replace(decode="parity", decode_chunk_size=chunk))


_wrapped("decode", _not_divided)(
    "decode_unscaled",
    "latents not divided by the scaling factor before the decode",
    f"{_PIPELINE}:decode_latents",
)
_wrapped("decode", _always_in_chunks)(
    "decode_chunked",
    "decoded in chunks where the reference decoded at once",
    f"{_PIPELINE}:decode_latents",
)

BUGS: Mapping[str, Bug] = MappingProxyType(_bugs)


def check_bugs(*names: str) -> None:
    """Whether bugs can be injected together.

    Raises:
        SvdlabError: a name that is not in the catalogue, or two that exclude each other.
    """
    deciding: dict[str, str] = {}
    for name in names:
        if name not in BUGS:
            raise SvdlabError(f"bugs: got {name!r}, allowed: {', '.join(BUGS)}")
        if other := deciding.get(BUGS[name].decides):
            raise SvdlabError(f"bugs: {other} and {name} exclude each other: both decide the {BUGS[name].decides}")
        deciding[BUGS[name].decides] = name


def changes(*names: str) -> tuple[Change, ...]:
    """What injects bugs, each in its first variant, in the catalogue's order: ``SVDPipeline.with_bugs`` asks here.

    Raises:
        SvdlabError: see ``check_bugs``.
    """
    check_bugs(*names)
    return tuple(bug.variants[0] for name, bug in BUGS.items() if name in names)
