"""The stages of a generation: one small method each, in the order in which they run.

``STAGES`` lists them with what they read and write, in the names of a trace (``docs/trace-format.md``). The methods'
arguments and results carry the same names. ``SVDPipeline.with_stage`` puts another function in a stage's place, and
``SVDPipeline.with_changes`` wraps one or edits the modules of a network.

V videos, F frames, S steps; G is V, or 2V with classifier-free guidance (the unconditional half first); h, w latents.
Sources are functions of diffusers' ``pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py`` where no
other file is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from svdlab.svd import images
from svdlab.svd.config import Configs
from svdlab.svd.image_encoder import CLIPVision
from svdlab.svd.modules import cast_copy, own_modules
from svdlab.svd.sampler import EulerScheduler, custom_sigmas, euler_step, karras_sigmas, named_sigmas, scalings
from svdlab.svd.schedulers import with_image
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.unet import Conditioning, UNet
from svdlab.svd.vae import VAE

if TYPE_CHECKING:
    from PIL import Image

    from svdlab.svd.checkpoint import ImageNormalization


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: the pipeline's method.
        reads, writes: tensors, by their names in a trace; those without a step's number are written once. Every stage
            reads the settings. ``latents.init`` and ``frames_8bit`` are recorded where asked for, ``conditioning`` is
            not.
        network: which network, or which half of the VAE, it runs, if any.
        per_step: runs in every denoising step.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    network: Literal["", "image_encoder", "vae.encoder", "vae.decoder", "unet"] = ""
    per_step: bool = False


STAGES = (
    Stage("resize_image", ("input.source",), ("input.image",)),
    Stage("clip_pixels", ("input.source",), ("input.clip_pixels",)),
    Stage("image_embedding", ("input.clip_pixels",), ("image_embeddings",), "image_encoder"),
    Stage("image_latents", ("input.image", "input.noise"), ("image_latents",), "vae.encoder"),
    Stage("time_ids", (), ("added_time_ids",)),
    Stage("sigmas", (), ("sigmas",)),
    Stage("timesteps", ("sigmas",), ("timesteps",)),
    Stage("guidance_ramp", (), ("guidance_scale",)),
    Stage("condition", ("image_embeddings", "added_time_ids"), ("conditioning",), "unet"),
    Stage("initial_latents", ("input.latents", "sigmas"), ("latents.init",)),
    Stage("model_input", ("latents.init", "latents", "sigmas", "image_latents"), ("model_input",), per_step=True),
    Stage(
        "predict_noise",
        ("model_input", "timesteps", "conditioning"),
        ("noise_pred_uncond", "noise_pred_cond"),
        "unet",
        per_step=True,
    ),
    Stage("guide", ("noise_pred_uncond", "noise_pred_cond", "guidance_scale"), ("noise_pred",), per_step=True),
    Stage("euler_step", ("noise_pred", "latents.init", "latents", "sigmas"), ("latents",), per_step=True),
    Stage("decode", ("latents",), ("frames",), "vae.decoder"),
    Stage("to_8bit", ("frames",), ("frames_8bit",)),
)
STAGE: Mapping[str, Stage] = {stage.name: stage for stage in STAGES}


@dataclass(frozen=True)
class Change:
    """A departure from the correct pipeline.

    Attributes:
        wrap: by stage, a function ``(pipe, stage, *arguments)`` that runs in its place; ``stage`` is what it wraps.
        edit: by network ("unet", "vae" or "image_encoder"), a function that edits its modules. It is given modules of
            its own, whose weights are shared.
    """

    wrap: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    edit: Mapping[str, Callable[[nn.Module], None]] = field(default_factory=dict)


class Stages:
    """The stages of ``SVDPipeline``."""

    unet: UNet
    vae: VAE
    image_encoder: CLIPVision
    # Or another library's: ``svdlab.svd.schedulers``. The stages here are those of svdlab's own.
    scheduler: EulerScheduler
    feature_extractor: ImageNormalization
    _offload_device: torch.device | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self._offload_device or self.unet.conv_in.weight.device

    def resize_image(self, source: Image.Image | Tensor, settings: GenerationSettings) -> Tensor:
        """Resize one image for the VAE: ``input.image`` (1, 3, H, W) in [-1, 1].

        Source: ``image_processor.py:VaeImageProcessor.preprocess``.
        """
        assert settings.height and settings.width
        return images.resize(source, settings.height, settings.width)

    def clip_pixels(self, source: Tensor, settings: GenerationSettings) -> Tensor:
        """What CLIP sees of one image as given: (1, 3, H0, W0) in [0, 1] -> ``input.clip_pixels`` (1, 3, P, P).

        Source: ``_encode_image``.
        """
        resized = images.resize_with_antialiasing(source * 2 - 1, self.image_encoder.config.image_size)
        mean, std = self.feature_extractor.mean, self.feature_extractor.std
        return images.normalize_for_clip((resized + 1) / 2, mean, std)

    @torch.no_grad()
    def image_embedding(self, clip_pixels: Tensor, settings: GenerationSettings) -> Tensor:
        """``image_embeddings`` (V, 1, D), one token per video. Source: ``_encode_image``."""
        made = self.image_encoder(clip_pixels.to(self.image_encoder.dtype)).image_embeds[:, None]
        return made.to(self.dtype).repeat_interleave(settings.num_videos_per_prompt, 0)

    @torch.no_grad()
    def image_latents(self, image: Tensor, noise: Tensor, settings: GenerationSettings) -> Tensor:
        """``image_latents`` (V, 4, h, w): noise augmentation on the PIXELS, then the posterior's mode.

        Not multiplied by the scaling factor, and not touched after the encode. Source: ``__call__``, 4, and
        ``_encode_vae_image``.
        """
        pixels = image + settings.noise_aug_strength * noise
        vae, dtype = self.vae, self.vae.config.encoder_dtype(self.vae.dtype)
        if dtype != self.vae.dtype:
            vae = own_modules(vae)
            vae.encoder, vae.quant_conv = cast_copy(vae.encoder, dtype), cast_copy(vae.quant_conv, dtype)
        mode = vae.encode(pixels.to(dtype)).latent_dist.mode()
        return mode.to(self.dtype).repeat_interleave(settings.num_videos_per_prompt, 0)

    def time_ids(self, settings: GenerationSettings) -> Tensor:
        """``added_time_ids`` (1, 3): SVD was trained on fps - 1. Source: ``__call__``, 2, ``_get_add_time_ids``."""
        return torch.tensor([[settings.fps - 1, settings.motion_bucket_id, settings.noise_aug_strength]])

    def sigmas(self, settings: GenerationSettings) -> Tensor:
        """``sigmas`` (S + 1,) in float32: given, named, or Karras's (rho 7), then 0. Source: ``_convert_to_karras``."""
        if (sigmas := named_sigmas(settings)) is not None:
            return custom_sigmas(sigmas)
        return karras_sigmas(settings.num_steps, self.scheduler.sigma_min, self.scheduler.sigma_max)

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """``timesteps`` (S,): 0.25 ln(sigma). Source: ``scheduling_euler_discrete.py:set_timesteps``."""
        return scalings(sigmas[:-1]).c_noise

    def guidance_ramp(self, settings: GenerationSettings) -> Tensor:
        """``guidance_scale`` (F,): a ramp over frames, the same in every step. Source: ``__call__``, 8."""
        assert settings.num_frames
        return torch.linspace(settings.min_guidance_scale, settings.max_guidance_scale, settings.num_frames)

    def is_guided(self, settings: GenerationSettings) -> bool:
        """Whether there is a frame with guidance above 1."""
        return bool(self.guidance_ramp(settings).to(self.dtype).max() > 1)

    @torch.no_grad()
    def condition(
        self, image_embeddings: Tensor, added_time_ids: Tensor, settings: GenerationSettings, guided: bool
    ) -> Conditioning:
        """What the UNet needs of the conditioning, once per generation; zeros for the unconditional half's embedding.

        Source: ``_encode_image``.
        """
        assert settings.num_frames
        if guided:
            image_embeddings = torch.cat([torch.zeros_like(image_embeddings), image_embeddings])
            added_time_ids = added_time_ids.repeat(2, 1)
        return self.unet.condition(image_embeddings, added_time_ids, settings.num_frames)

    def initial_latents(self, latents: Tensor, sigmas: Tensor) -> Tensor:
        """Unit noise (V, F, 4, h, w) times sqrt(sigma_max^2 + 1).

        Source: ``prepare_latents``, ``scheduling_euler_discrete.py:init_noise_sigma``.
        """
        return latents * self.scheduler.init_noise_sigma(sigmas)

    def model_input(self, latents: Tensor, image_latents: Tensor, sigma: Tensor, guided: bool) -> Tensor:
        """``model_input`` (G, F, 8, h, w): c_in * latents and the image latents, concatenated along channels.

        The unconditional half has zeros for the image latents. Source: ``__call__``, 9, ``_encode_vae_image``.
        """
        return with_image(scalings(sigma).c_in * latents, image_latents, guided)

    @torch.no_grad()
    def predict_noise(
        self, model_input: Tensor, timestep: Tensor, conditioning: Conditioning, settings: GenerationSettings
    ) -> Tensor:
        """``noise_pred_uncond`` and ``noise_pred_cond`` as one tensor (G, F, 4, h, w); without guidance ``noise_pred``.

        Source: ``__call__``, 9.
        """
        return predict_noise(self.unet, model_input, timestep, conditioning, settings.cfg)

    def guide(self, noise_pred_uncond: Tensor, noise_pred_cond: Tensor, guidance_scale: Tensor) -> Tensor:
        """``noise_pred`` (V, F, 4, h, w) by classifier-free guidance with a scale (F,) for every frame.

        Source: Ho and Salimans 2022, arXiv 2207.12598; ``__call__``, 9.
        """
        return noise_pred_uncond + guidance_scale.view(-1, 1, 1, 1) * (noise_pred_cond - noise_pred_uncond)

    def euler_step(self, noise_pred: Tensor, latents: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        """``latents`` (V, F, 4, h, w) at the next noise level, in float32 or wider whatever the networks run in.

        Source: ``scheduling_euler_discrete.py:step``.
        """
        prediction, latents = wide(noise_pred), wide(latents)
        s = scalings(sigma)
        denoised = s.c_skip * latents + s.c_out * prediction
        return euler_step(denoised, latents, sigma, next_sigma)

    @torch.no_grad()
    def decode(self, latents: Tensor, settings: GenerationSettings) -> Tensor:
        """``frames`` (V, F, 3, H, W) before clamping, in about [-1, 1], in float32 or wider.

        The latents ARE divided by the scaling factor. Source: ``decode_latents``.
        """
        chunk, exact = settings.decode_chunk_size, settings.decode == "exact"
        if chunk == "auto":
            from svdlab.svd.memory import largest_chunk

            configs = Configs(self.unet.config, self.vae.config, self.image_encoder.config)
            chunk, exact = largest_chunk(configs, settings, self.device), True
        latents = (1 / self.vae.config.scaling_factor * latents).to(self.vae.dtype)
        return wide(decode_latents(self.vae, latents, chunk, exact))

    def to_8bit(self, frames: Tensor) -> Tensor:
        """``frames_8bit`` (V, F, 3, H, W) as uint8: clamped, and rounded to whole levels.

        Source: ``image_processor.py:VaeImageProcessor.numpy_to_pil``.
        """
        return images.to_8bit(frames)


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def predict_noise(
    unet: UNet, model_input: Tensor, timestep: Tensor, conditioning: Conditioning, cfg: str = "batched"
) -> Tensor:
    """The v-prediction (G, F, 4, h, w) of both guidance halves, in one forward pass or, for less memory, in two.

    Args:
        unet: the network.
        model_input: (G, F, 8, h, w).
        timestep: 0.25 * ln(sigma).
        conditioning: of ``unet.condition``, with the same batch.
        cfg: "batched", or "sequential": one pass per half, the same result for half the activation memory.
    """
    if cfg == "batched":
        return unet(model_input, timestep, conditioning)
    halves = zip(model_input.chunk(2), conditioning.halves(), strict=True)
    return torch.cat([unet(x, timestep, c) for x, c in halves])


def decode_latents(vae: VAE, latents: Tensor, chunk: int | None, exact: bool) -> Tensor:
    """Frames (V, F, 3, H, W) of latents (V, F, 4, h, w), one video after the other: no two are ever blended.

    Args:
        vae: the network.
        latents: divided by the scaling factor.
        chunk: frames at a time.
        exact: what decoding all frames at once gives, with ``chunk`` frames in memory (default 2). Otherwise what
            diffusers gives for that chunk size (``decode_latents``): each chunk is decoded as a video of its own. No
            chunk size means all at once in both, and is computed exactly.
    """
    videos = [v[None] for v in latents]
    if exact or chunk is None:
        return torch.cat([vae.decode_videos(v, chunk or 2) for v in videos])
    return torch.cat([torch.cat([vae.decode_videos(c) for c in v.split(chunk, dim=1)], dim=1) for v in videos])
