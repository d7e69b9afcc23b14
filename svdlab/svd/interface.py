"""What code that was written for diffusers' ``StableVideoDiffusionPipeline`` finds under its names, beside the call.

Every name is that of diffusers' pipeline, ``pipeline_stable_video_diffusion.py:StableVideoDiffusionPipeline`` or
``pipeline_utils.py:DiffusionPipeline``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError, short
from svdlab.svd import images
from svdlab.svd.checkpoint import MODEL_INDEX, write_checkpoint
from svdlab.svd.components import COMPONENTS, adopt
from svdlab.svd.modules import no_effect
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.schedulers import label, prepared
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import Stages

if TYPE_CHECKING:
    from svdlab.svd.pipeline import Callback, Generators, Probe

Frames = TypeVar("Frames")


@dataclass
class SVDOutput(Generic[Frames]):
    """What a call returns: also ``output[0]`` and ``output["frames"]``.

    Attributes:
        frames: PIL lists, numpy (B, F, H, W, 3), tensor (B, F, 3, H, W), or latents (B, F, 4, h, w).
    """

    frames: Frames

    def to_tuple(self) -> tuple[Frames]:
        """The frames alone."""
        return (self.frames,)

    def keys(self) -> list[str]:
        """For ``dict(output)``."""
        return ["frames"]

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if key in self.keys() else self.to_tuple()[key]  # type: ignore[index]


class VideoProcessor:
    """diffusers' ``video_processor.py:VideoProcessor``, as far as a pipeline's user calls it."""

    def preprocess(self, image: Any, height: int, width: int) -> Tensor:
        """Images of every kind that a pipeline takes to (B, 3, height, width) in [-1, 1]."""
        return torch.cat([images.resize(one, height, width) for one in images.as_list(image)])

    def postprocess_video(self, video: Tensor, output_type: str = "np") -> Any:
        """Frames (B, 3, F, H, W) in about [-1, 1] to the kind of ``output_type``."""
        images.check_output_type(output_type)
        return images.postprocess(video.transpose(1, 2), output_type)


def plain_numbers(**values: Any) -> dict[str, Any]:
    """Settings whose numbers are numpy's or torch's, as Python's; where integers are allowed, 127.0 is 127."""
    for name, value in values.items():
        if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
            values[name] = value = value.item()
        whole = isinstance(value, float) and value.is_integer()
        if whole and GenerationSettings.model_fields[name].annotation is not float:
            values[name] = int(value)
    return values


def halves(values: Tensor, guided: bool) -> Tensor:
    """With zeros for the unconditional half, where there is one."""
    return torch.cat([torch.zeros_like(values), values]) if guided else values


# diffusers' names of what a step's callback may ask for, made of a trace's tensors and the settings.
CALLBACK_TENSORS: Mapping[str, Callable[[Mapping[str, Tensor], GenerationSettings], Tensor]] = {
    "latents": lambda seen, _: seen["latents"],
    "noise_pred": lambda seen, _: seen["noise_pred"],
    "noise_pred_uncond": lambda seen, _: seen["noise_pred_uncond"],
    "noise_pred_cond": lambda seen, _: seen["noise_pred_cond"],
    "latent_model_input": lambda seen, _: seen["model_input"],
    "timesteps": lambda seen, _: seen["timesteps"],
    "guidance_scale": lambda seen, _: seen["guidance_scale"][..., None, None, None],
    "image_embeddings": lambda seen, _: halves(seen["image_embeddings"], "noise_pred_uncond" in seen),
    "image_latents": lambda seen, _: seen["model_input"].chunk(2, dim=2)[1],
    "added_time_ids": lambda seen, _: seen["added_time_ids"].repeat(1 + ("noise_pred_uncond" in seen), 1),
    "image": lambda seen, settings: seen["input.image"] + settings.noise_aug_strength * seen["input.noise"],
    "noise": lambda seen, _: seen["input.noise"],
}


class DiffusersInterface(Stages):
    """The names of diffusers' pipeline, beside the constructor and the call."""

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = []
    _exclude_from_cpu_offload: ClassVar[list[str]] = []
    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)
    _progress_bar_config: Mapping[str, Any] = {}
    # Of the last call.
    _settings: GenerationSettings | None = None
    _videos = 1

    # --- components ---

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, adopt(name, value) if name in COMPONENTS else value)

    def register_modules(self, **components: Any) -> None:
        """Set components by name; diffusers' own become svdlab's, see ``components.adopt``."""
        for name, component in components.items():
            setattr(self, name, component)

    @property
    def components(self) -> dict[str, Any]:
        """What the constructor takes: ``SVDPipeline(**pipe.components)`` shares this one's weights."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def config(self) -> dict[str, Any]:
        """What ``model_index.json`` holds: each component's library and class in diffusers."""
        return dict(MODEL_INDEX)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of the frames for one of the latents, along a side."""
        return self.vae.config.scale_factor

    @property
    def video_processor(self) -> VideoProcessor:
        """What images and frames are read and written by; it has no options, and cannot be replaced."""
        return VideoProcessor()

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Write a checkpoint that diffusers and svdlab load, in each network's own dtype.

        Args:
            save_directory: made if needed.
            safe_serialization: False is for pickles, which svdlab does not write; the files are safetensors.
            variant: such as "fp16", in the names of the files with weights.

        Raises:
            SvdlabError: the scheduler is another library's, which svdlab could not load again.
        """
        if not isinstance(self.scheduler, EulerScheduler):
            raise SvdlabError(
                f"scheduler: got {label(self.scheduler)}, allowed in a checkpoint: EulerDiscreteScheduler"
            )
        if not safe_serialization:
            no_effect("safe_serialization=False", "svdlab writes safetensors only, which everything loads")
        write_checkpoint(
            save_directory,
            self.unet,
            self.vae,
            self.image_encoder,
            scheduler=self.scheduler.config,
            feature_extractor=self.feature_extractor,
            dtype=None,
            variant=variant,
        )

    # --- switches ---

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A bar over denoising steps, with the options of ``set_progress_bar_config``."""
        options = {"desc": "denoise", "unit": "step", **self._progress_bar_config}
        return tqdm(iterable, total=total, **options)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of ``tqdm``, such as ``disable=True``."""
        self._progress_bar_config = options

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """diffusers', which here has no effect."""
        no_effect("enable_attention_slicing", "attention never holds the whole matrix of weights")

    def disable_attention_slicing(self) -> None:
        """The inverse of ``enable_attention_slicing``, without an effect."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """diffusers', which here has no effect."""
        no_effect("enable_xformers_memory_efficient_attention", "torch's fused attention runs wherever it can")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """The inverse of ``enable_xformers_memory_efficient_attention``, without an effect."""

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Refused: what holds a whole network at a time is no stand-in where people ask for less than that.

        Raises:
            SvdlabError: always, with what saves memory here.
        """
        raise SvdlabError(
            "enable_sequential_cpu_offload: not implemented, allowed: enable_model_cpu_offload, which has one network "
            'at a time; cfg="sequential" in the call halves the activations; svdlab memory says what fits'
        )

    # --- of a call ---

    @property
    def num_timesteps(self) -> int:
        """Runs of the UNet in the last call: one for each step, with some other schedulers two."""
        settings = self._last_call()
        own = isinstance(self.scheduler, EulerScheduler)
        return settings.num_steps if own else len(prepared(self.scheduler, settings, "cpu").timesteps)

    @property
    def guidance_scale(self) -> Tensor:
        """The guidance of every frame in the last call, (V, F, 1, 1, 1)."""
        ramp = self.guidance_ramp(self._last_call()).to(self.device, self.dtype)
        return ramp.expand(self._videos, -1)[..., None, None, None]

    @property
    def _guidance_scale(self) -> Tensor:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: Any) -> None:
        raise SvdlabError(
            "_guidance_scale: cannot be set, allowed: min_guidance_scale and max_guidance_scale of a call"
        )

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether there was guidance in the last call."""
        return self.is_guided(self._last_call())

    def _last_call(self) -> GenerationSettings:
        if self._settings is None:
            raise AttributeError("the pipeline has not been called yet")
        return self._settings

    def _callback(
        self,
        callback: Callable[..., Any] | None,
        names: Sequence[str],
        settings: GenerationSettings,
        probe: Probe | None,
    ) -> tuple[Callback | None, Probe | None]:
        """A step's callback that gets what it asks for, and the probe that gathers it.

        Raises:
            SvdlabError: a name that is not offered, or that there is only with guidance.
        """
        for name in names:
            if name not in CALLBACK_TENSORS:
                allowed = ", ".join(CALLBACK_TENSORS)
                raise SvdlabError(f"callback_on_step_end_tensor_inputs: got {short(name)}, allowed: {allowed}")
            if name in ("noise_pred_uncond", "noise_pred_cond") and not self.is_guided(settings):
                raise SvdlabError(f"callback_on_step_end_tensor_inputs: {name} is there with guidance above 1 only")
        if callback is None:
            return None, probe
        seen: dict[str, Tensor] = {}

        def gather(name: str, value: Tensor) -> None:
            seen[re.sub(r"\.\d+$", "", name)] = value
            if probe is not None:
                probe(name, value)

        def after_step(_: Any, step: int, timestep: Tensor, held: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.update(held)
            made = callback(self, step, timestep, {name: CALLBACK_TENSORS[name](seen, settings) for name in names})
            if made is not None and not isinstance(made, Mapping):
                raise SvdlabError(f"callback_on_step_end: returned {type(made).__name__}, allowed: a dict, or None")
            return dict(made or {})

        return after_step, gather

    # --- what subclasses override: see ``svdlab.svd.overrides`` ---

    def check_inputs(self, image: Any, height: int | None, width: int | None) -> None:
        """Called first, with what the call was given; what svdlab itself refuses it refuses later."""

    def _encode_image(
        self, image: Any, device: torch.device | str, num_videos_per_prompt: int, do_classifier_free_guidance: bool
    ) -> Tensor:
        """Embeddings (G, 1, D) of the images as given, zeros for the unconditional half."""
        settings = GenerationSettings(num_videos_per_prompt=num_videos_per_prompt)
        sources = [images.to_tensor(one) for one in images.as_list(image)]
        pixels = torch.cat([self.clip_pixels(source, settings) for source in sources])
        return halves(Stages.image_embedding(self, pixels.to(device), settings), do_classifier_free_guidance)

    def _encode_vae_image(
        self, image: Tensor, device: torch.device | str, num_videos_per_prompt: int, do_classifier_free_guidance: bool
    ) -> Tensor:
        """Latents (G, 4, h, w) of pixels with their noise (B, 3, H, W), zeros for the unconditional half."""
        settings = GenerationSettings(num_videos_per_prompt=num_videos_per_prompt, noise_aug_strength=0.0)
        image = image.to(device)
        made = Stages.image_latents(self, image, torch.zeros_like(image), settings)
        return halves(made, do_classifier_free_guidance)

    def _get_add_time_ids(
        self,
        fps: float,
        motion_bucket_id: float,
        noise_aug_strength: float,
        dtype: torch.dtype,
        batch_size: int,
        num_videos_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> Tensor:
        """``added_time_ids`` (G, 3); ``fps`` is already one less than the call's."""
        rows = batch_size * num_videos_per_prompt * (1 + do_classifier_free_guidance)
        return torch.tensor([[fps, motion_bucket_id, noise_aug_strength]], dtype=dtype).repeat(rows, 1)

    def prepare_latents(
        self,
        batch_size: int,
        num_frames: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The first latents (V, F, 4, h, w), drawn or given, times the first noise level's standard deviation."""
        factor = self.vae_scale_factor
        shape = (batch_size, num_frames, num_channels_latents // 2, height // factor, width // factor)
        if latents is None:
            latents = images.randn(shape, generator, torch.device(device), dtype)
        settings, latents = self._settings or GenerationSettings(), latents.to(device, dtype)
        if isinstance(self.scheduler, EulerScheduler):
            return Stages.initial_latents(self, latents, self.sigmas(settings).to(device))
        return latents * prepared(self.scheduler, settings, device).init_noise_sigma

    def decode_latents(self, latents: Tensor, num_frames: int, decode_chunk_size: int = 14) -> Tensor:
        """Frames (V, 3, F, H, W) in about [-1, 1] of latents (V, F, 4, h, w)."""
        # All frames of a video at once are decoded in less memory, to the same frames.
        chunk = None if decode_chunk_size == num_frames else decode_chunk_size
        settings = GenerationSettings(num_frames=num_frames, decode_chunk_size=chunk)
        return Stages.decode(self, latents, settings).transpose(1, 2)
