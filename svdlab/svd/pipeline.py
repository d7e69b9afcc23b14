"""Stable Video Diffusion, one image to a clip: the whole story, top to bottom.

``prepare`` turns the user's image and seed into ``Inputs``; ``denoise`` and ``decode`` are deterministic from there.
Source: diffusers ``pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError
from svdlab.parity.bugs import Rules
from svdlab.svd import images
from svdlab.svd import sampler as scheduler
from svdlab.svd.checkpoint import EMBEDDED, Components, Configs, channels_last, load_components, resolve_size
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import predict_noise

if TYPE_CHECKING:
    from svdlab.svd.video import Clip

Probe = Callable[[str, Tensor], None]
Callback = Callable[["SVDPipeline", int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Inputs:
    """All that a generation reads beside settings and weights; a port that replays these needs no random generator.

    Attributes:
        source: the images as given, (B, 3, H0, W0) in [0, 1]; None when their sizes differ.
        image: resized for the VAE, (B, 3, H, W) in [-1, 1], before noise augmentation.
        clip_pixels: resized and normalised for CLIP, (B, 3, S, S).
        noise: unit Gaussian for the noise augmentation, (B, 3, H, W).
        latents: unit Gaussian, (B * videos, F, 4, h, w).
    """

    source: Tensor | None
    image: Tensor
    clip_pixels: Tensor
    noise: Tensor
    latents: Tensor


@dataclass
class SVDOutput:
    """What a call returns: ``frames`` as PIL lists, numpy (B, F, H, W, 3), tensor (B, F, 3, H, W), or latents."""

    frames: Any


class SVDPipeline:
    """Stable Video Diffusion with the call signature of diffusers' ``StableVideoDiffusionPipeline``.

    Example:
        >>> pipe = SVDPipeline.from_pretrained("embedded")
        >>> frames = pipe(image, height=64, width=64, num_frames=8).frames[0]
    """

    def __init__(self, components: Components, rules: Rules | None = None):
        self.components = components
        self.unet, self.vae, self.image_encoder = components.unet, components.vae, components.image_encoder
        self.scheduler, self.feature_extractor = components.scheduler, components.feature_extractor
        self.rules = rules or Rules()
        self._offload_device: torch.device | None = None

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path = EMBEDDED,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        rules: Rules | None = None,
    ) -> SVDPipeline:
        """Load a checkpoint in diffusers' format from the hub, a folder, or the package ("embedded").

        Args:
            dtype: of the weights, float32 by default; ``torch_dtype`` is diffusers' older name for it.
            variant: ``"fp16"`` for half-precision files.
            rules: the parity fixes in force; all of them by default.

        Raises:
            SvdlabError: see ``weights.load_components``.
        """
        dtype = dtype or torch_dtype or torch.float32
        return cls(load_components(repo_or_folder, dtype, device, variant, revision), rules)

    def with_rules(self, rules: Rules) -> SVDPipeline:
        """The same weights under other rules."""
        other = SVDPipeline(self.components, rules)
        other._offload_device = self._offload_device
        return other

    def with_bugs(self, *names: str) -> SVDPipeline:
        """The same weights with bugs of the catalogue injected."""
        return self.with_rules(Rules.with_bugs(*names))

    def to(self, *args: Any, **kwargs: Any) -> SVDPipeline:
        """Move and cast all three networks as ``nn.Module.to`` does; returns itself."""
        for module in (self.unet, self.vae, self.image_encoder):
            module.to(*args, **kwargs)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Keep each network on the device only while it runs, and on the CPU else: for GPUs that cannot hold all.

        Args:
            gpu_id: which of several devices.
            device: of which kind; a name with a number, such as "cuda:1", says both.
        """
        self._offload_device = torch.device(device if gpu_id is None else f"{torch.device(device).type}:{gpu_id}")
        for module in (self.unet, self.vae, self.image_encoder):
            channels_last(module.to("cpu"))

    @contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[None]:
        """Where the networks are offloaded: bring one in, and take it back afterwards."""
        if self._offload_device is None:
            yield
            return
        try:
            module.to(self._offload_device)
            yield
        finally:
            module.to("cpu")

    @property
    def configs(self) -> Configs:
        """The architecture of the three networks."""
        return Configs(self.unet.config, self.vae.config, self.image_encoder.config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet's weights."""
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self._offload_device or self.unet.conv_in.weight.device

    def __call__(
        self,
        image: Any,
        height: int | None = 576,
        width: int | None = 1024,
        num_frames: int | None = None,
        num_inference_steps: int = 25,
        sigmas: Sequence[float] | None = None,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 3.0,
        fps: int = 7,
        motion_bucket_id: int = 127,
        noise_aug_strength: float = 0.02,
        decode_chunk_size: int | Literal["auto"] | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        *,
        decode: str = "parity",
        cfg: str = "batched",
        progress: bool = True,
        probe: Probe | None = None,
    ) -> SVDOutput | tuple[Any]:
        """Generate clips from images. Arguments up to ``return_dict`` are diffusers', by name and by order.

        Args:
            image: PIL image or list of them; numpy (H, W, 3) or (B, H, W, 3), uint8 or float in [0, 1]; tensor
                (3, H, W) or (B, 3, H, W) in [0, 1]. Any size.
            height, width: of the clip in pixels, multiples of the VAE's scale factor; None for the checkpoint's own.
            num_frames: None for the checkpoint's own.
            sigmas: custom sigmas, falling; the last one is where sampling ends (usually 0).
            min_guidance_scale, max_guidance_scale: at the first and at the last frame; the ramp may fall.
            decode_chunk_size: None decodes as if all at once, in chunks of 2; "auto" gives the same in the largest
                chunks that fit the free memory; n gives diffusers' result for that n.
            generator: one, or one a video.
            latents: unit Gaussian (B * videos, F, 4, h, w) in any dtype, on any device.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}); may return new latents.
            return_dict: False returns a one-tuple.
            decode: "exact" makes the frames independent of ``decode_chunk_size``.
            cfg: "sequential" runs guidance in two passes for half the activation memory.
            progress: show a bar over steps.
            probe: called with the name and value of every tensor of a trace.

        Raises:
            SvdlabError: a value that is not allowed, before any work.
        """
        images.check_output_type(output_type)
        if tuple(callback_on_step_end_tensor_inputs) != ("latents",):
            given = list(callback_on_step_end_tensor_inputs)
            raise SvdlabError(f"callback_on_step_end_tensor_inputs: got {given}, allowed: ['latents']")
        settings = GenerationSettings(
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            sigmas=None if sigmas is None else tuple(float(s) for s in sigmas),
            min_guidance_scale=min_guidance_scale,
            max_guidance_scale=max_guidance_scale,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
            noise_aug_strength=noise_aug_strength,
            decode_chunk_size=decode_chunk_size,
            decode=decode,
            cfg=cfg,
            num_videos_per_prompt=num_videos_per_prompt or 1,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        inputs = self.prepare(image, settings, generator, latents)
        result = self.denoise(inputs, settings, probe=probe, callback=callback_on_step_end, progress=progress)
        if output_type != "latent":
            result = images.postprocess(self.decode(result, settings, probe=probe), output_type)
        return SVDOutput(result) if return_dict else (result,)

    def generate(self, image: Any, settings: GenerationSettings, progress: bool = True) -> list[Clip]:
        """Clips from settings, seeded by them: what the command line, notebooks and sweeps call."""
        from svdlab.svd.video import Clip

        settings = self.resolve(settings)
        generator = torch.Generator().manual_seed(settings.seed)
        frames = self.run(self.prepare(image, settings, generator), settings, progress=progress)
        return [Clip.from_tensor(f, settings.fps, settings) for f in frames]

    def resolve(self, settings: GenerationSettings) -> GenerationSettings:
        """Fill in what the settings leave to the checkpoint: height, width, number of frames.

        Raises:
            SvdlabError: a size that the VAE cannot make, or settings of another dtype than the weights.
        """
        resolved = resolve_size(settings, self.unet.config, self.vae.config)
        if settings.torch_dtype != self.dtype:
            raise SvdlabError(f"dtype: got {settings.dtype}, allowed: {self.dtype}, in which the weights were loaded")
        return resolved

    @torch.no_grad()
    def prepare(
        self,
        image: Any,
        settings: GenerationSettings,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> Inputs:
        """Read and resize the images, then draw: noise augmentation first, initial latents second.

        Raises:
            SvdlabError: an image, generator list or latents of the wrong kind, shape or range.
        """
        settings = self.resolve(settings)
        height, width, factor = settings.height, settings.width, self.vae.config.scale_factor
        assert height and width and settings.num_frames
        sources, pixels = images.read_images(image, height, width)
        batch = len(sources)
        videos, channels = batch * settings.num_videos_per_prompt, self.unet.config.out_channels
        shape = (videos, settings.num_frames, channels, height // factor, width // factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise SvdlabError(f"latents: got shape {tuple(latents.shape)}, allowed: {shape}")
        if isinstance(generator, Sequence) and len(generator) not in (1, shape[0]):
            raise SvdlabError(f"generator: got a list of {len(generator)}, allowed: one, or one a video ({shape[0]})")
        clip_pixels = torch.cat([self.clip_pixels(s) for s in sources])
        noise = images.randn(pixels.shape, generator, self.device, pixels.dtype)
        if latents is None:
            latents = images.randn(shape, generator, self.device, self.dtype)
        same_size = len({s.shape for s in sources}) == 1
        return Inputs(torch.cat(sources) if same_size else None, pixels, clip_pixels, noise, latents)

    def clip_pixels(self, source: Tensor) -> Tensor:
        """What the CLIP tower sees of images as given: (B, 3, H0, W0) in [0, 1] -> (B, 3, S, S), normalised."""
        resized = self.rules.clip_resize(source * 2 - 1, self.image_encoder.config.image_size)
        return self.rules.clip_normalise((resized + 1) / 2, self.feature_extractor.mean, self.feature_extractor.std)

    def run(
        self,
        inputs: Inputs,
        settings: GenerationSettings,
        *,
        probe: Probe | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Denoise and decode: frames (B, F, 3, H, W) before clamping, in about [-1, 1]."""
        latents = self.denoise(inputs, settings, probe=probe, callback=callback, progress=progress)
        return self.decode(latents, settings, probe=probe)

    @torch.no_grad()
    def denoise(
        self,
        inputs: Inputs,
        settings: GenerationSettings,
        *,
        probe: Probe | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """From inputs to clean latents (B, F, 4, h, w)."""
        settings, rules, see = self.resolve(settings), self.rules, probe or _ignore
        to: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        for name in ("source", "image", "clip_pixels", "noise", "latents"):
            if (value := getattr(inputs, name)) is not None:
                see(f"input.{name}", value)
        videos, num_frames = settings.num_videos_per_prompt, settings.num_frames
        assert num_frames
        with rules.in_force(self.unet, self.vae):
            # What the clip is of: a CLIP token for the cross-attention, latents beside every frame's noise.
            with self._on_device(self.image_encoder):
                image_embeddings = self.image_encoder(inputs.clip_pixels.to(**to)).repeat_interleave(videos, 0)
            see("image_embeddings", image_embeddings)
            with self._on_device(self.vae):
                image_latents = self._encode(inputs, settings).to(**to).repeat_interleave(videos, 0)
            see("image_latents", image_latents)

            # How it moves: frames per second, motion bucket, noise augmentation.
            ids = rules.time_ids(rules.fps_id(settings.fps), settings.motion_bucket_id, settings.noise_aug_strength)
            added_time_ids = torch.tensor([ids], **to).repeat(len(image_latents), 1)
            see("added_time_ids", added_time_ids)

            # The noise levels to visit, and the guidance at every step and frame.
            if settings.sigmas is None:
                sigmas = rules.sigmas(self.scheduler, settings.num_inference_steps)
            else:
                sigmas = scheduler.custom_sigmas(settings.sigmas)
            sigmas = sigmas.to(self.device)
            timesteps = rules.timesteps(sigmas)
            see("sigmas", sigmas)
            see("timesteps", timesteps)
            low, high = settings.min_guidance_scale, settings.max_guidance_scale
            guidance = rules.guidance_scale(low, high, num_frames, len(timesteps)).to(**to)
            see("guidance_scale", guidance[0].expand(len(image_latents), -1))
            guided = bool(guidance.max() > 1)

            # Conditional and, with guidance, unconditional half: everything no step changes, computed once.
            image_latents = image_latents[:, None].repeat(1, num_frames, 1, 1, 1)
            if guided:
                image_latents = torch.cat([rules.uncond_latents(image_latents), image_latents])
                image_embeddings = torch.cat([rules.uncond_embeddings(image_embeddings), image_embeddings])
                added_time_ids = added_time_ids.repeat(2, 1)
        with rules.in_force(self.unet, self.vae), self._on_device(self.unet):
            conditioning = self.unet.condition(image_embeddings, added_time_ids, num_frames)

            latents = inputs.latents.to(**to) * rules.init_noise_sigma(self.scheduler, sigmas)
            for i, timestep in enumerate(tqdm(timesteps, disable=not progress, desc="denoise", unit="step")):
                scaled = rules.model_input(latents, sigmas[i])
                model_input = torch.cat([scaled.repeat(2 if guided else 1, 1, 1, 1, 1), image_latents], dim=2)
                see(f"model_input.{i:03}", model_input)
                prediction = predict_noise(
                    self.unet, model_input, timestep, conditioning, settings.cfg if guided else "batched"
                )
                if guided:
                    uncond, cond = prediction.chunk(2)
                    see(f"noise_pred_uncond.{i:03}", uncond)
                    see(f"noise_pred_cond.{i:03}", cond)
                    prediction = rules.guide(uncond, cond, guidance[i].view(1, -1, 1, 1, 1))
                see(f"noise_pred.{i:03}", prediction)
                # The Euler step runs in float32 whatever the dtype, as in diffusers.
                wide = latents.to(torch.float32)
                prediction = prediction.to(torch.promote_types(self.dtype, torch.float32))
                denoised = rules.denoised(prediction, wide, sigmas[i])
                latents = scheduler.euler_step(denoised, wide, sigmas[i], sigmas[i + 1]).to(self.dtype)
                if callback is not None:
                    latents = (callback(self, i, timestep, {"latents": latents}) or {}).get("latents", latents)
                see(f"latents.{i:03}", latents)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor, settings: GenerationSettings, *, probe: Probe | None = None) -> Tensor:
        """From clean latents (B, F, 4, h, w) to frames (B, F, 3, H, W) before clamping, in float32 or wider."""
        latents = self.rules.to_decode(latents, self.vae.config.scaling_factor)
        chunk, exact = settings.decode_chunk_size, settings.decode == "exact"
        with self.rules.in_force(self.unet, self.vae), self._on_device(self.vae):
            if chunk == "auto":
                from svdlab.svd.memory import largest_chunk

                chunk, exact = largest_chunk(self.configs, self.resolve(settings), self.device), True
            frames = self.rules.decode(self.vae, latents, chunk, exact)
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        (probe or _ignore)("frames", frames)
        return frames

    def _encode(self, inputs: Inputs, settings: GenerationSettings) -> Tensor:
        """The conditioning image's latents (B, 4, h, w): augmented in pixel space, then encoded, then left alone."""
        rules, vae = self.rules, self.vae
        pixels = inputs.image.to(self.device)
        pixels = rules.augment_pixels(pixels, inputs.noise.to(pixels), settings.noise_aug_strength)
        dtype = vae.config.encoder_dtype(self.dtype)
        try:
            if dtype != self.dtype:
                vae.to(dtype)
            latents = rules.posterior(*vae.encode(pixels.to(dtype)))
        finally:
            if dtype != self.dtype:
                vae.to(self.dtype)
        latents = rules.image_latents(latents, vae.config.scaling_factor)
        return rules.augment_latents(latents, settings.noise_aug_strength)


def _ignore(name: str, value: Tensor) -> None:
    pass
