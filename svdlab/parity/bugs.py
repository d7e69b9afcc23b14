"""The catalogue of bugs that ports of Stable Video Diffusion are met with, each injectable into svdlab.

A bug is a wrapper around one stage of the pipeline (``svdlab.svd.stages``), or an edit of modules inside one. Each
entry stands beside its cause and the place in diffusers that does it right; the correct code has no hooks for them.

To add one: write the wrapper ``(pipe, stage, *the stage's arguments)`` and call ``_wrapped`` around it, or an edit
``(network)`` (``svdlab.parity.edits``) and ``_edited``. ``svdlab diagnose``, the notebooks' explorer and the sweeps
then know it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.parity.edits import (
    Edit,
    in_dtype,
    of_kind,
    on_input,
    on_output,
    on_plain_decoder,
    replaced_method,
    reweighted,
    set_to,
    setting,
)
from svdlab.parity.probes import SHAPES
from svdlab.svd.config import per_level
from svdlab.svd.image_encoder import ACTIVATIONS, CLIPMLP
from svdlab.svd.images import blur_for, normalize_for_clip, resize_with_antialiasing, to_levels, to_tensor, to_unit
from svdlab.svd.layers import (
    GEGLU,
    AlphaBlender,
    Attention,
    Conv2d,
    Downsample,
    FrameGroupNorm,
    GroupNorm,
    Sinusoids,
    SpatioTemporalTransformer,
    TemporalConv,
    TemporalTransformerBlock,
    TransformerConditioning,
    VideoGroupNorm,
)
from svdlab.svd.sampler import custom_sigmas, euler_step, named_sigmas, scalings
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGE, STAGES, Change, wide


@dataclass(frozen=True)
class Original:
    """That Stability AI's own code, with which the model was trained, does what an entry of the catalogue says.

    Such an entry is no bug but a departure: diffusers departs from the original.

    Attributes:
        does, diffusers: what the original does, and what diffusers does.
        source: where, in https://github.com/Stability-AI/generative-models at 0ad7de9.
        change: the original's behaviour with its defaults.
        argument: whether it is a value that the original's code is given, so that a run of it may agree with diffusers.
    """

    does: str
    diffusers: str
    source: str
    change: Change
    argument: bool


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
        met: where it was met: a port, a public report, the documentation.
        original: where it is no bug but what the original does, and diffusers does not.
    """

    name: str
    cause: str
    diffusers: str
    stage: str
    variants: tuple[Change, ...]
    decides: str = ""
    met: str = ""
    original: Original | None = None

    @property
    def said(self) -> str:
        """The cause; of what the original does, that it is no bug."""
        source = self.original and f" ({self.original.source})"
        return f"no bug, the original's choice: {self.cause}{source}" if source else self.cause

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
    readers = (later.name for later in STAGES if set(at.writes) & set(later.reads))
    return next(map(first_probe, readers), at.writes[0])


_PIPELINE = "pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py"
_SCHEDULER = "schedulers/scheduling_euler_discrete.py"
_BLOCKS = "models/unets/unet_3d_blocks.py"
_bugs: dict[str, Bug] = {}


def _bug(
    name: str, cause: str, diffusers: str, stage: str, *variants: Change, decides: str = "", met: str = ""
) -> None:
    _bugs[name] = Bug(name, cause, diffusers, stage, variants, decides or name, met)


def _wrapped(stage: str, *wrappers: Callable[..., Any]) -> Callable[..., None]:
    """Declare a bug in one stage, a variant per wrapper."""

    def declare(name: str, cause: str, diffusers: str, decides: str = "", met: str = "") -> None:
        _bug(name, cause, diffusers, stage, *(Change(wrap={stage: w}) for w in wrappers), decides=decides, met=met)

    return declare


def _edited(stage: str, network: str, *edits: Edit) -> Callable[..., None]:
    """Declare a bug inside a network that a stage runs, a variant per edit."""

    def declare(name: str, cause: str, diffusers: str, decides: str = "", met: str = "") -> None:
        _bug(name, cause, diffusers, stage, *(Change(edit={network: e}) for e in edits), decides=decides, met=met)

    return declare


_PORT = "the Rust port that svdlab grew out of"


# --- the conditioning image ---


def _frame_resize(of_picture: Image.Resampling, **of_tensor: Any) -> Callable[..., Tensor]:
    """Another filter for PIL images, and for tensors."""

    def wrapper(pipe: Any, stage: Any, source: Any, settings: GenerationSettings) -> Tensor:
        assert settings.height and settings.width
        if isinstance(source, Tensor):
            return F.interpolate(source, size=(settings.height, settings.width), **of_tensor) * 2 - 1
        return to_tensor(source.resize((settings.width, settings.height), of_picture)) * 2 - 1

    return wrapper


def _frame_interpolated(**how: Any) -> Callable[..., Tensor]:
    return lambda pipe, stage, source, settings: (
        F.interpolate(to_tensor(source), size=(settings.height, settings.width), **how) * 2 - 1
    )


_wrapped(
    "resize_image",
    _frame_resize(Image.Resampling.BILINEAR, mode="bilinear"),
    _frame_interpolated(mode="bilinear"),
    _frame_interpolated(mode="bilinear", align_corners=True),
    _frame_interpolated(mode="bilinear", antialias=True),
)(
    "frame_resize_bilinear",
    "frame resized bilinearly, not by Lanczos",
    "image_processor.py:VaeImageProcessor.resize",
    decides="resize of the frame",
)
_wrapped(
    "resize_image",
    _frame_resize(Image.Resampling.BICUBIC, mode="bicubic"),
    _frame_interpolated(mode="bicubic"),
    _frame_interpolated(mode="bicubic", antialias=True),
)(
    "frame_resize_bicubic",
    "frame resized bicubically, not by Lanczos",
    "image_processor.py:VaeImageProcessor.resize",
    decides="resize of the frame",
)


def _as_given(pipe: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
    return source


def _frame(pipe: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
    """The frame that the VAE gets, (1, 3, H, W) in [0, 1], made of what CLIP should have been given."""
    levels = to_levels(source * 2 - 1)[0]
    is_8bit = torch.allclose(source, torch.from_numpy(levels).permute(2, 0, 1)[None].to(source) / 255, atol=1e-4)
    return (pipe.resize_image(Image.fromarray(levels) if is_8bit else source, settings).to(source) + 1) / 2


def _clip_resize(
    of: Callable[[Any, Tensor, GenerationSettings], Tensor], resize: Callable[[Tensor, int], Tensor]
) -> Callable[..., Tensor]:
    """CLIP's pixels from an image in [0, 1], resized from [-1, 1] to a square."""

    def wrapper(pipe: Any, stage: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
        resized = resize(of(pipe, source, settings) * 2 - 1, pipe.image_encoder.config.image_size)
        return normalize_for_clip((resized + 1) / 2, pipe.feature_extractor.mean, pipe.feature_extractor.std)

    return wrapper


def _interpolated(**how: Any) -> Callable[[Tensor, int], Tensor]:
    return lambda images, size: F.interpolate(images, size=(size, size), **how)


def _clip_statistics(pipe: Any) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (pipe.feature_extractor.mean, pipe.feature_extractor.std))
    return mean, std


def _without_clip_statistics(pipe: Any, stage: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
    mean, std = _clip_statistics(pipe)
    return stage(source, settings) * std + mean


def _clip_statistics_of_another_range(pipe: Any, stage: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
    mean, std = _clip_statistics(pipe)
    return 2 * stage(source, settings) + (mean - 1) / std


def _clip_in_another_range(pipe: Any, stage: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
    mean, std = _clip_statistics(pipe)
    return 2 * (stage(source, settings) * std + mean) - 1


_CLIP_RESIZE = f"{_PIPELINE}:_resize_with_antialiasing"
for _name, _words, _met, _ways in (
    (
        "clip_no_antialias",
        "aligned bicubic without the blur",
        "",
        [dict(mode="bicubic", align_corners=True)],
    ),
    ("clip_resize_nearest", "nearest neighbour", _PORT, [dict(mode="nearest"), dict(mode="nearest-exact")]),
    (
        "clip_resize_bilinear",
        "bilinear",
        _PORT,
        [
            dict(mode="bilinear", align_corners=False),
            dict(mode="bilinear", align_corners=True),
            dict(mode="bilinear", antialias=True),
        ],
    ),
    (
        "clip_resize_bicubic",
        "bicubic about pixel centres",
        "the script that made the reference values of the Rust port that svdlab grew out of",
        [dict(mode="bicubic", align_corners=False), dict(mode="bicubic", antialias=True)],
    ),
):
    _images = (_as_given, _frame) if _name == "clip_no_antialias" else (_frame, _as_given)
    _wrapped("clip_pixels", *(_clip_resize(of, _interpolated(**way)) for of in _images for way in _ways))(
        _name, f"resized for CLIP by {_words}", _CLIP_RESIZE, decides="resize for CLIP", met=_met
    )
_bug_of_the_frame = _clip_resize(_frame, resize_with_antialiasing)
_wrapped("clip_pixels", _bug_of_the_frame)(
    "clip_from_resized_frame",
    "CLIP given the frame resized for the VAE, not the image",
    f"{_PIPELINE}:__call__",
    decides="resize for CLIP",
    met=_PORT,
)


def _cubic(parameter: float) -> Callable[[Tensor, int], Tensor]:
    """The blur, then Keys's cubic with another parameter; torch's has -0.75, Pillow's -0.5."""

    def weights(size: int, into: int) -> Tensor:
        at = torch.linspace(0, size - 1, into, dtype=torch.float64)
        near = at.floor().long()[:, None] + torch.arange(-1, 3)
        x = (at[:, None] - near).abs()
        inner = ((parameter + 2) * x - (parameter + 3)) * x * x + 1
        outer = parameter * (((x - 5) * x + 8) * x - 4)
        taps = torch.where(x <= 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))
        return torch.zeros(into, size, dtype=torch.float64).scatter_add_(1, near.clamp(0, size - 1), taps)

    def resize(images: Tensor, size: int) -> Tensor:
        blurred = blur_for(images, size)
        down, across = (weights(side, size).to(blurred) for side in blurred.shape[-2:])
        return down @ blurred @ across.T

    return resize


def _centre(source: Tensor, size: int) -> Tensor:
    """The shorter side as long as asked for, antialiased, and the middle of the longer one."""
    scale = size / min(source.shape[-2:])
    height, width = (round(scale * side) for side in source.shape[-2:])
    resized = F.interpolate(source, size=(height, width), mode="bicubic", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return resized[..., top : top + size, left : left + size]


def _to_8bit(pixels: Tensor) -> Tensor:
    return (pixels * 255).clamp(0, 255).round() / 255


def _cropped_picture(source: Tensor, size: int) -> Tensor:
    """As Pillow and CLIP's own feature extractor make it, in 8 bits."""
    picture = Image.fromarray(to_levels(source * 2 - 1)[0])
    long = int(size * max(picture.size) / min(picture.size))
    width, height = (size, long) if picture.width <= picture.height else (long, size)
    top, left = (height - size) // 2, (width - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(resized.crop((left, top, left + size, top + size)))


def _clip_crop(crop: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    def wrapper(pipe: Any, stage: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
        pixels = crop(source, pipe.image_encoder.config.image_size)
        return normalize_for_clip(pixels, pipe.feature_extractor.mean, pipe.feature_extractor.std)

    return wrapper


_COMFY = "https://github.com/comfyanonymous/ComfyUI, comfy/clip_vision.py:clip_preprocess"
_wrapped("clip_pixels", _clip_resize(_as_given, _cubic(-0.5)), _clip_resize(_as_given, _cubic(-0.6)))(
    "clip_bicubic_parameter",
    "bicubic for CLIP with another kernel parameter than -0.75",
    _CLIP_RESIZE,
    decides="resize for CLIP",
    met="the difference of Pillow's bicubic (-0.5) and torch's (-0.75), in their documentation",
)
_wrapped(
    "clip_pixels",
    _clip_crop(_centre),
    _clip_crop(_cropped_picture),
    _clip_crop(lambda source, size: _to_8bit(_centre(source, size))),
)(
    "clip_centre_crop",
    "CLIP given the middle of the image, not all of it in a square",
    f"{_PIPELINE}:_encode_image",
    decides="resize for CLIP",
    met=_COMFY,
)


def _rounded_for_clip(pipe: Any, stage: Any, source: Tensor, settings: GenerationSettings) -> Tensor:
    mean, std = _clip_statistics(pipe)
    return (_to_8bit(stage(source, settings) * std + mean) - mean) / std


_wrapped("clip_pixels", _rounded_for_clip)(
    "clip_8bit", "CLIP's pixels rounded to 8 bits after the resize", f"{_PIPELINE}:_encode_image", met=_COMFY
)
_wrapped("clip_pixels", _without_clip_statistics)(
    "clip_unnormalised", "no CLIP mean and std", f"{_PIPELINE}:_encode_image", decides="range of CLIP's pixels"
)
_wrapped("clip_pixels", _clip_statistics_of_another_range, _clip_in_another_range)(
    "clip_fed_minus_one_to_one",
    "pixels in [-1, 1] to CLIP, whose mean and std are for [0, 1]",
    f"{_PIPELINE}:_encode_image",
    decides="range of CLIP's pixels",
    met=_PORT,
)
_edited("image_embedding", "image_encoder", set_to(CLIPMLP, "activation", ACTIVATIONS["quick_gelu"]))(
    "quick_gelu",
    "QuickGELU in CLIP, whose ViT-H has the exact GELU",
    "../transformers/models/clip/modeling_clip.py:CLIPMLP",
    decides="activation of CLIP",
    met=_PORT,
)


_edited("image_embedding", "image_encoder", set_to(CLIPMLP, "activation", partial(F.gelu, approximate="tanh")))(
    "clip_gelu_tanh",
    "tanh approximation of GELU in CLIP",
    "../transformers/models/clip/modeling_clip.py:CLIPMLP",
    decides="activation of CLIP",
)
_edited("image_embedding", "image_encoder", *(set_to(nn.LayerNorm, "eps", eps) for eps in (1e-6, 1e-12)))(
    "clip_layer_norm_eps",
    "layer-norm eps of CLIP 1e-6, not 1e-5",
    "../transformers/models/clip/configuration_clip.py:CLIPVisionConfig",
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


_edited("image_latents", "vae", lambda vae: sample_posterior(vae, own_noise))(
    "image_latents_sampled",
    "sampled the posterior instead of taking its mode",
    f"{_PIPELINE}:_encode_vae_image",
    met=_PORT,
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
    met=_PORT,
)
_wrapped("image_latents", _not_augmented)(
    "noise_aug_missing", "no noise augmentation", f"{_PIPELINE}:__call__", decides="noise augmentation"
)
_wrapped("image_latents", _augmented_latents)(
    "noise_aug_after_encode",
    "noised the latents instead of the pixels",
    f"{_PIPELINE}:__call__",
    decides="noise augmentation",
    met=_PORT,
)

_wrapped("image_latents", lambda pipe, stage, image, noise, settings: stage(image, 2 * noise, settings))(
    "noise_aug_on_unit_pixels",
    "noise added to pixels in [0, 1], twice as strong as to those in [-1, 1]",
    f"{_PIPELINE}:__call__",
    decides="noise augmentation",
)


def _not_upcast(vae: Any) -> None:
    vae.config = vae.config.replace(force_upcast=False)


_edited("image_latents", "vae", _not_upcast)(
    "vae_not_upcast",
    "the VAE encoded in half precision, without force_upcast",
    f"{_PIPELINE}:__call__",
    met="the checkpoint's option force_upcast, which exists for it",
)
_edited(
    "image_latents",
    "vae",
    # As wide as a convolution with padding 1 sees the image.
    replaced_method(
        Downsample,
        "forward",
        lambda original, self, x: self.conv(F.pad(x, (0, 0, 1, 1, 1, 1))) if self.pad_end else original(self, x),
    ),
)(
    "vae_encoder_padding_symmetric",
    "the VAE encoder's downsampling padded on all sides",
    "models/downsampling.py:Downsample2D.forward",
    met=_PORT,
)

# --- fps and motion ---


def _fps_as_given(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    return stage(settings) + torch.tensor([[1, 0, 0]])


def _motion_first(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    return stage(settings)[:, [1, 0, 2]]


_wrapped("time_ids", _fps_as_given)(
    "fps_not_decremented", "fed fps instead of fps - 1", f"{_PIPELINE}:__call__", met=_PORT
)
_wrapped("time_ids", _motion_first)("time_ids_reordered", "motion bucket before fps", f"{_PIPELINE}:_get_add_time_ids")

# --- noise levels ---


def _linear_sigmas(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    if named_sigmas(settings) is not None:
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
    "timestep_negated", "-ln(sigma)", f"{_SCHEDULER}:set_timesteps", decides="timestep of a sigma", met=_PORT
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
    "guidance_per_step",
    "guidance ramp over steps instead of frames",
    f"{_PIPELINE}:__call__",
    decides="guidance ramp",
    met=_PORT,
)
_wrapped("guidance_ramp", _maximum_everywhere)(
    "guidance_constant", "one guidance scale for all frames", f"{_PIPELINE}:__call__", decides="guidance ramp"
)


def _ramp(ends: Callable[[float, float, int], Tensor]) -> Callable[..., Tensor]:
    return lambda pipe, stage, settings: ends(
        settings.min_guidance_scale, settings.max_guidance_scale, settings.num_frames
    )


_wrapped(
    "guidance_ramp",
    _ramp(lambda low, high, frames: torch.linspace(high, low, frames)),
    _ramp(lambda low, high, frames: torch.linspace(low, high, frames + 1)[:-1]),
    _ramp(lambda low, high, frames: torch.linspace(low, high, frames + 1)[1:]),
    _ramp(lambda low, high, frames: torch.linspace(0, high, frames)),
)(
    "guidance_ramp_ends",
    "guidance ramp with other ends: falling, without one end, or from 0",
    f"{_PIPELINE}:__call__",
    decides="guidance ramp",
)
# First and last frame's guidance scale in the published configurations, for 14 frames and for 25.
_SVD, _SVD_XT = (1.0, 2.5), (1.5, 3.0)
_wrapped(
    "guidance_ramp",
    _ramp(lambda low, high, frames: torch.linspace(*_SVD, frames)),
    _ramp(lambda low, high, frames: torch.linspace(*_SVD_XT, frames)),
)(
    "guidance_ramp_of_original",
    "guidance ramp from 1 to 2.5, or from 1.5 to 3, in the place of the one from 1 to 3",
    f"{_PIPELINE}:__call__",
    decides="guidance ramp",
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


def _repeated_condition(
    pipe: Any, stage: Any, embeddings: Tensor, ids: Tensor, settings: GenerationSettings, guided: bool
) -> Any:
    if not guided:
        return stage(embeddings, ids, settings, guided)
    images = embeddings[:: settings.num_videos_per_prompt]
    both = torch.cat([torch.zeros_like(images), images]).repeat(settings.num_videos_per_prompt, 1, 1)
    return pipe.unet.condition(both, ids.repeat(2, 1), settings.num_frames)


def _repeated_latents(
    pipe: Any, stage: Any, latents: Tensor, image_latents: Tensor, sigma: Tensor, guided: bool
) -> Tensor:
    result = stage(latents, image_latents, sigma, guided)
    if guided:
        images = torch.unique_consecutive(image_latents, dim=0)
        both = torch.cat([torch.zeros_like(images), images]).repeat(len(latents) // len(images), 1, 1, 1)
        result[:, :, latents.shape[2] :] = both[:, None]
    return result


def _unscaled_input(
    pipe: Any, stage: Any, latents: Tensor, image_latents: Tensor, sigma: Tensor, guided: bool
) -> Tensor:
    result = stage(latents, image_latents, sigma, guided)
    result[:, :, : latents.shape[2]] = latents.repeat(2 if guided else 1, 1, 1, 1, 1)
    return result


_bug(
    "clips_repeated_after_guidance",
    "several clips of an image: repeated with the zeros for guidance already beside it, so that the halves mix",
    f"{_PIPELINE}:_encode_image",
    "condition",
    Change(wrap={"condition": _repeated_condition}),
    Change(wrap={"condition": _repeated_condition, "model_input": _repeated_latents}),
    Change(wrap={"model_input": _repeated_latents}),
)
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


def _root_in_c_skip(
    pipe: Any, stage: Any, noise_pred: Tensor, latents: Tensor, sigma: Tensor, next_sigma: Tensor
) -> Tensor:
    latents, s = wide(latents), scalings(sigma)
    return euler_step(s.c_skip**0.5 * latents + s.c_out * wide(noise_pred), latents, sigma, next_sigma)


_wrapped("euler_step", _epsilon)(
    "prediction_epsilon", "output read as epsilon instead of v", f"{_SCHEDULER}:step", decides="reading of the output"
)
_wrapped("euler_step", _root_in_c_skip)(
    "c_skip_with_square_root",
    "c_skip is 1 / sqrt(sigma^2 + 1), not 1 / (sigma^2 + 1)",
    f"{_SCHEDULER}:step",
    decides="reading of the output",
    met=_PORT,
)

# --- inside the networks ---


def _no_frame_positions(unet: nn.Module) -> None:
    for name, module in unet.named_modules():
        if name.endswith("time_pos_embed"):
            module.register_forward_hook(lambda m, args, output: torch.zeros_like(output))


_sine_first = on_output(Sinusoids, lambda m, args, output: output.unflatten(-1, (2, -1)).flip(-2).flatten(-2))
# Which sinusoids: the timestep's, those of fps, motion and augmentation, the frames'.
_SINUSOIDS = (".*", "time_proj", "add_time_proj", r".*attentions.*\.time_proj")


def _other_frequencies(frequencies: Callable[[int], Tensor]) -> tuple[Edit, ...]:
    """An edit for each kind of sinusoids; ``frequencies`` gives half of the dimension's."""

    def recomputed(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        angles = args[0][:, None].float() * frequencies(module.dim // 2).to(output.device)
        return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, module.dim % 2))

    return tuple(on_output(Sinusoids, recomputed, where) for where in _SINUSOIDS)


def _exponent(half: int, shift: int = 0) -> Tensor:
    return -math.log(10000) / (half - shift) * torch.arange(half, dtype=torch.float32)


def _heads(of_up_block: Callable[[list[int], int], int]) -> Edit:
    """Another number of heads in the up blocks: of the heads of all levels, and of the block's number."""

    def edit(unet: Any) -> None:
        heads = per_level("num_attention_heads", unet.config.num_attention_heads, len(unet.up_blocks))
        for i, block in enumerate(unet.up_blocks):
            for transformer in block.attentions:
                _set_heads(transformer, of_up_block(list(heads), i))

    return edit


def _set_heads(transformer: nn.Module, heads: int) -> None:
    """A number that the channels cannot be divided by is one that a port could not have run with."""
    for name, module in transformer.named_modules():
        if name.endswith("attn1") and module.to_q.out_features % heads == 0:
            module.heads = heads


def _halves_exchanged(original: Any, self: Any, x: Tensor) -> Tensor:
    gate, value = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate=self.approximate)


def _position_first(original: Any, self: Any, h: Tensor, conditioning: TransformerConditioning) -> Tensor:
    for spatial, temporal, spatial_token, temporal_token in self.layers(conditioning):
        h = h + conditioning.frame_positions
        h = self.time_mixer(spatial(h, spatial_token), temporal(h, temporal_token))
    return h


_per_frame = replaced_method(VideoGroupNorm, "forward", lambda original, self, x: FrameGroupNorm.forward(self, x))


def _interleaved_context(module: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The pixels of a batch get the contexts in turn, as (pixel, batch) laid out like (batch, pixel)."""
    x, token = args
    videos, _, height, width, _ = x.shape
    turn = torch.arange(videos * height * width, device=x.device) % videos
    return x, token.flatten(0, 3)[turn].view(videos, 1, height, width, -1)


def _ff_for_ff_in(unet: nn.Module) -> None:
    for block in of_kind(unet, TemporalTransformerBlock):
        block.ff_in = block.ff


def _heads_everywhere(of_level: Callable[[list[int], list[int], int], int]) -> Edit:
    """Another number of heads: of the heads and the channels of all levels, and of the level."""

    def edit(unet: Any) -> None:
        channels = list(unet.config.block_out_channels)
        heads = list(per_level("num_attention_heads", unet.config.num_attention_heads, len(channels)))
        levels = range(len(channels))
        blocks = [*zip(unet.down_blocks, levels, strict=True), (unet.mid_block, levels[-1])]
        for block, level in [*blocks, *zip(unet.up_blocks, reversed(levels), strict=True)]:
            for transformer in block.attentions:
                _set_heads(transformer, of_level(heads, channels, level))

    return edit


def _last_but_one_as_before(heads: list[int], channels: list[int], level: int) -> int:
    """(5, 10, 20, 20) becomes (5, 10, 10, 20)."""
    return heads[level - 1] if level and level == len(heads) - 2 else heads[level]


def _sinusoids_in(dtype: torch.dtype) -> Edit:
    def recomputed(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        frequencies = _exponent(module.dim // 2).exp().to(output.device, dtype)
        angles = args[0][:, None].to(dtype) * frequencies
        return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1).float(), (0, module.dim % 2))

    return on_output(Sinusoids, recomputed)


def _statistics_in(dtype: torch.dtype) -> Edit:
    """Mean and variance rounded, whatever they were added up in."""
    rounded = in_dtype(dtype)

    def normalize(original: Any, self: Any, rows: Tensor) -> Tensor:
        groups = rows.unflatten(-1, (self.num_groups, -1))
        mean = groups.mean((1, 3), keepdim=True)
        variance = (groups - mean).square().mean((1, 3), keepdim=True)
        normal = (groups - rounded(mean)) * (rounded(variance) + self.eps).rsqrt()
        return normal.flatten(-2) * self.weight + self.bias

    return replaced_method(GroupNorm, "normalize", normalize)


def _query_times(power: float) -> Edit:
    """Attention whose queries are multiplied by a power of the heads' dimension before it."""
    return replaced_method(
        Attention,
        "scaled_dot_product_attention",
        lambda original, self, q, k, v: original(q * q.shape[-1] ** power, k, v),
    )


def _scores_in(dtype: torch.dtype) -> Edit:
    def attention(original: Any, self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = in_dtype(dtype)(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
        return scores.softmax(-1) @ v

    return replaced_method(Attention, "scaled_dot_product_attention", attention)


_HALF = (torch.float16, torch.bfloat16)


def _first_in(dtype: torch.dtype) -> Callable[..., tuple[Tensor, ...]]:
    return lambda module, args: (in_dtype(dtype)(args[0].float()), *args[1:])


def _swap_alpha(where: str = ".*") -> Edit:
    return setting(AlphaBlender, "switch_spatial_to_temporal_mix", lambda switched: not switched, where)


_TRANSFORMER = "models/transformers/transformer_temporal.py:TransformerSpatioTemporalModel.forward"

_edited("predict_noise", "unet", _swap_alpha())(
    "alpha_swapped_unet",
    "temporal blend of the UNet the wrong way round",
    "models/resnet.py:AlphaBlender.forward",
    decides="temporal blend of the UNet",
)
_edited("predict_noise", "unet", _swap_alpha(r".*attentions.*"))(
    "transformer_alpha_swapped",
    "temporal blend of the UNet's transformers the wrong way round, that of its resnets right",
    "models/resnet.py:AlphaBlender.forward",
    decides="temporal blend of the UNet",
    met=_PORT,
)
_edited("decode", "vae", _swap_alpha())(
    "alpha_swapped_vae", "temporal blend of the VAE decoder the wrong way round", f"{_BLOCKS}:UpBlockTemporalDecoder"
)
_edited("predict_noise", "unet", _no_frame_positions)(
    "frame_position_missing", "no frame position embedding", _TRANSFORMER, decides="frame positions"
)
_edited("predict_noise", "unet", replaced_method(SpatioTemporalTransformer, "blocks", _position_first))(
    "frame_position_first_parallel",
    "frame position added first, and both transformer blocks on the same input",
    _TRANSFORMER,
    decides="frame positions",
    met=_PORT,
)
_edited("predict_noise", "unet", _sine_first)(
    "sincos_order", "sinusoidal embeddings sin-then-cos", "models/embeddings.py:get_timestep_embedding"
)
_edited("predict_noise", "unet", *_other_frequencies(_exponent))(
    "sinusoids_without_exp",
    "the frequencies' logarithms used as frequencies",
    "models/embeddings.py:get_timestep_embedding",
    decides="frequencies of the sinusoids",
    met=_PORT,
)
_edited("predict_noise", "unet", *_other_frequencies(lambda half: _exponent(half, 1).exp()))(
    "sinusoids_shift_one",
    "frequencies divided by half - 1: downscale_freq_shift 1 instead of 0",
    "models/embeddings.py:get_timestep_embedding",
    decides="frequencies of the sinusoids",
    met=_PORT,
)
_edited("predict_noise", "unet", set_to(GEGLU, "approximate", "tanh"))(
    "gelu_tanh", "tanh approximation of GELU", "models/activations.py:GEGLU"
)
_edited("predict_noise", "unet", replaced_method(GEGLU, "forward", _halves_exchanged))(
    "geglu_halves_exchanged", "GELU on the wrong half of GEGLU", "models/activations.py:GEGLU.forward", met=_PORT
)
_edited("predict_noise", "unet", _heads(lambda heads, block: heads[block]))(
    "heads_not_reversed",
    "the up blocks' numbers of heads in the order of the down blocks",
    "models/unets/unet_spatio_temporal_condition.py:UNetSpatioTemporalConditionModel.__init__",
    decides="number of heads",
    met=_PORT,
)
_edited("predict_noise", "unet", _per_frame)(
    "temporal_group_norm_per_frame_unet",
    "statistics of each frame in the temporal blocks of the UNet",
    "models/resnet.py:TemporalResnetBlock.forward",
    met=_PORT,
)
_edited("decode", "vae", on_plain_decoder(_per_frame))(
    "temporal_group_norm_per_frame_vae",
    "statistics of each frame in the temporal blocks of the VAE's decoder",
    "models/resnet.py:TemporalResnetBlock.forward",
    met=_PORT,
)


_ATTENTION = "models/attention_processor.py:AttnProcessor2_0"
_edited("predict_noise", "unet", on_input(TemporalTransformerBlock, _interleaved_context))(
    "temporal_context_order",
    "the temporal blocks' context as (pixel, batch), not (batch, pixel): guidance halves mix",
    _TRANSFORMER,
)
_edited("predict_noise", "unet", _ff_for_ff_in)(
    "ff_in_replaced_by_ff",
    "the temporal block's ff used in the place of its ff_in, too",
    "models/attention.py:TemporalBasicTransformerBlock.forward",
)
_edited(
    "predict_noise",
    "unet",
    _heads_everywhere(_last_but_one_as_before),
    _heads_everywhere(lambda heads, channels, level: channels[level] // heads[level]),
    _heads_everywhere(lambda heads, channels, level: heads[0]),
)(
    "head_counts",
    "other numbers of heads: (5, 10, 10, 20), the channels of a head taken for it, or one for all levels",
    "models/unets/unet_spatio_temporal_condition.py:UNetSpatioTemporalConditionModel.__init__",
    decides="number of heads",
    met="https://github.com/huggingface/diffusers/pull/7205",
)
_edited("predict_noise", "unet", *(on_input(Sinusoids, _first_in(dtype), "time_proj") for dtype in _HALF))(
    "timestep_in_half",
    "the timestep rounded to half precision before its sinusoids",
    "models/embeddings.py:get_timestep_embedding",
    met="https://github.com/modelscope/DiffSynth-Studio/pull/1025",
)
_edited("predict_noise", "unet", *(_sinusoids_in(dtype) for dtype in _HALF))(
    "sinusoids_in_half",
    "sinusoids computed in half precision",
    "models/embeddings.py:get_timestep_embedding",
    decides="frequencies of the sinusoids",
    met="https://github.com/apache/tvm/pull/15811",
)
_edited("predict_noise", "unet", *(_statistics_in(dtype) for dtype in _HALF))(
    "norm_statistics_in_half",
    "mean and variance of the UNet's group norms rounded to half precision",
    f"{_BLOCKS}:get_up_block",
    met="https://github.com/huggingface/diffusers/pull/182",
)
_edited("predict_noise", "unet", *(_scores_in(dtype) for dtype in _HALF))(
    "attention_scores_in_half",
    "attention scores rounded to half precision before the softmax",
    _ATTENTION,
    decides="scores of the attention",
)
_edited("predict_noise", "unet", _query_times(0.5))(
    "attention_unscaled", "attention without 1 / sqrt(d)", _ATTENTION, decides="scores of the attention"
)
_edited("predict_noise", "unet", _query_times(-0.5))(
    "attention_scaled_twice", "attention with 1 / d for 1 / sqrt(d)", _ATTENTION, decides="scores of the attention"
)
_edited(
    "predict_noise",
    "unet",
    *(
        reweighted(nn.Module, "bias", torch.zeros_like, where)
        for where in (
            r".*attn[12]\.to_out\.0",
            r".*\.ff(_in)?\.net\.2",
            r".*\.ff(_in)?\.net\.0\.proj",
            r".*attentions\.\d+\.proj_in",
            r".*attentions\.\d+\.proj_out",
            r".*time_emb_proj",
            r".*conv_shortcut",
            r".*(down|up)samplers\.0\.conv",
        )
    ),
)("bias_missing", "a kind of layer of the UNet without its bias", "models/attention.py:FeedForward")
_edited(
    "predict_noise",
    "unet",
    *(
        reweighted(nn.Linear, "weight", lambda w: w.T if w.shape[0] == w.shape[1] else None, where)
        for where in (r".*attn1\.to_[qkv]", r".*attn1\.to_out\.0", r".*attentions\.\d+\.proj_(in|out)", ".*")
    ),
)(
    "linear_weights_transposed",
    "square weights of linear layers (out, in) read as (in, out)",
    "models/attention_processor.py:Attention",
)
_edited(
    "predict_noise",
    "unet",
    reweighted(Conv2d, "weight", lambda w: w.transpose(2, 3) if w.shape[2] > 1 else None),
    reweighted(Conv2d, "weight", lambda w: w.flip((2, 3)) if w.shape[2] > 1 else None),
    reweighted(Conv2d, "weight", lambda w: w.transpose(0, 1) if w.shape[0] == w.shape[1] and w.shape[2] > 1 else None),
    reweighted(TemporalConv, "weight", lambda w: w.flip(2)),
)(
    "conv_weight_axes",
    "convolution kernels with height and width or in and out exchanged, or flipped",
    "models/resnet.py:ResnetBlock2D",
)
_edited("predict_noise", "unet", *(set_to(nn.LayerNorm, "eps", eps) for eps in (1e-6, 1e-12)))(
    "layer_norm_eps",
    "layer-norm eps of the UNet 1e-6, not 1e-5",
    "models/attention.py:BasicTransformerBlock",
    met="https://github.com/huggingface/candle/pull/271, in another model",
)


def _eps(value: float, where: str = ".*") -> Edit:
    return set_to(nn.GroupNorm, "eps", value, where)


_bug(
    "group_norm_eps",
    "other group-norm eps: one everywhere, in one network, or in one kind of layer",
    f"{_BLOCKS}:get_up_block",
    "image_latents",
    *(Change(edit={"unet": _eps(eps), "vae": _eps(eps)}) for eps in (1e-5, 1e-6)),
    *(Change(edit={"unet": _eps(eps)}) for eps in (1e-5, 1e-6)),
    # https://github.com/ml-explore/mlx-examples/issues/1435: the framework's default in the transformers.
    Change(edit={"unet": _eps(1e-5, r".*attentions\.\d+\.norm")}),
    Change(edit={"vae": _eps(1e-6, r".*temporal_res_block.*")}),
    *(Change(edit={"vae": _eps(eps)}) for eps in (1e-5, 1e-6)),
    decides="group-norm eps",
    met=_PORT,
)
_edited("predict_noise", "unet", _eps(1e-5, r".*res_block.*"))(
    "resnet_norm_eps",
    "group-norm eps of all of the UNet's resnets 1e-5, not 1e-6 in the blocks with attention and in all up blocks",
    f"{_BLOCKS}:get_up_block",
    decides="group-norm eps",
)

# --- the decode ---


def _not_divided(pipe: Any, stage: Any, latents: Tensor, settings: GenerationSettings) -> Tensor:
    return stage(latents * pipe.vae.config.scaling_factor, settings)


def _chunks_of(size: int) -> Callable[..., Tensor]:
    return lambda pipe, stage, latents, settings: stage(
        latents, settings.replace(decode="parity", decode_chunk_size=size)
    )


def _in_chunks(default: int) -> Callable[..., Tensor]:
    """In chunks, of another size where the settings have one."""

    def wrapper(pipe: Any, stage: Any, latents: Tensor, settings: GenerationSettings) -> Tensor:
        chunk = settings.decode_chunk_size if isinstance(settings.decode_chunk_size, int) else default
        return stage(latents, settings.replace(decode="parity", decode_chunk_size=chunk))

    return wrapper


_wrapped("decode", _not_divided)(
    "decode_unscaled",
    "latents not divided by the scaling factor before the decode",
    f"{_PIPELINE}:decode_latents",
)
_wrapped("decode", _in_chunks(2), *(_chunks_of(size) for size in (*range(1, 9), 14)))(
    "decode_chunked",
    "decoded in chunks where the reference decoded at once, or in chunks of another size",
    f"{_PIPELINE}:decode_latents",
    met=_PORT,
)

_wrapped(
    "to_8bit",
    lambda pipe, stage, frames: (to_unit(frames) * 255).to(torch.uint8).cpu(),
)(
    "frames_truncated",
    "8-bit frames truncated, not rounded",
    "image_processor.py:VaeImageProcessor.numpy_to_pil",
)

# --- what is no bug: the original's choices ---


def _original_ramp(pipe: Any, stage: Any, settings: GenerationSettings) -> Tensor:
    """The original's default in the place of diffusers' default; what was asked for stays."""
    fields, given = GenerationSettings.model_fields, (settings.min_guidance_scale, settings.max_guidance_scale)
    if given != tuple(fields[name].default for name in ("min_guidance_scale", "max_guidance_scale")):
        return stage(settings)
    return torch.linspace(*(_SVD_XT if pipe.unet.config.num_frames == 25 else _SVD), settings.num_frames)


_SCRIPT = "scripts/sampling/simple_video_sample.py:sample"
for _name, _original in {
    "clip_from_resized_frame": Original(
        "CLIP sees the frame that the VAE encodes",
        "CLIP sees the image as given",
        f"{_SCRIPT}, cond_frames_without_noise",
        _bugs["clip_from_resized_frame"].variants[0],
        argument=True,
    ),
    "fps_not_decremented": Original(
        "fps_id as given, 6 by default",
        "fps - 1, of 7 by default",
        f"{_SCRIPT}, fps_id",
        _bugs["fps_not_decremented"].variants[0],
        argument=True,
    ),
    "guidance_ramp_of_original": Original(
        "guidance from 1 to 2.5 (svd), from 1.5 to 3 (svd_xt) by default",
        "guidance from 1 to 3 by default",
        "scripts/sampling/configs/svd.yaml and svd_xt.yaml, guider_config",
        Change(wrap={"guidance_ramp": _original_ramp}),
        argument=True,
    ),
    "resnet_norm_eps": Original(
        "group-norm eps 1e-5 in every resnet of the UNet",
        "1e-6 in the down blocks with attention and in all up blocks",
        "sgm/modules/diffusionmodules/openaimodel.py:ResBlock",
        _bugs["resnet_norm_eps"].variants[0],
        argument=False,
    ),
    "decode_chunked": Original(
        "14 frames decoded at a time by default, as clips of their own",
        "all frames decoded at once by default",
        f"{_SCRIPT}, decoding_t",
        Change(wrap={"decode": _in_chunks(14)}),
        argument=True,
    ),
    "frames_truncated": Original(
        "8-bit frames truncated",
        "8-bit frames rounded",
        f"{_SCRIPT}, vid",
        _bugs["frames_truncated"].variants[0],
        argument=False,
    ),
}.items():
    _bugs[_name] = replace(_bugs[_name], original=_original)

BUGS: Mapping[str, Bug] = MappingProxyType(_bugs)
# Where diffusers departs from the original: by name, what the original does.
DEPARTURES: Mapping[str, Original] = MappingProxyType({n: b.original for n, b in _bugs.items() if b.original})


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


def departures(*names: str) -> tuple[Change, ...]:
    """What makes svdlab do as the original with its defaults, in the catalogue's order.

    Raises:
        SvdlabError: a name that is not in ``DEPARTURES``.
    """
    for name in names:
        if name not in DEPARTURES:
            raise SvdlabError(f"departures: got {name!r}, allowed: {', '.join(DEPARTURES)}")
    return tuple(original.change for name, original in DEPARTURES.items() if name in names)
