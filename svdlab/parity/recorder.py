"""Observing a diffusers pipeline while it runs: every probe and tap recorded, draws and pixels replayed.

It holds the hooks, and needs the pipeline object only: diffusers is imported in ``parity.reference``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.parity import taps as tapping
from svdlab.parity.writer import TraceWriter
from svdlab.svd.schedulers import noise_levels
from svdlab.svd.settings import GenerationSettings


class Recorder:
    """The hooks of one capture; ``stack`` takes all of them away again.

    Args:
        pipe: a ``StableVideoDiffusionPipeline``.
        settings: resolved.
        replay: tensors that stand in for draws and pixels, by probe.
        writer: where everything is recorded; it ends the run when it has what was asked for.
        stack: closed when the capture ends.
        perturb: a seed to move every input and every layer's output by one unit in the last place, or None.
        optional: record the optional probes, too.
    """

    def __init__(
        self,
        pipe: Any,
        settings: GenerationSettings,
        replay: Mapping[str, Tensor],
        writer: TraceWriter,
        stack: ExitStack,
        perturb: int | None,
        optional: bool = False,
    ) -> None:
        self.pipe, self.settings, self.replay = pipe, settings, replay
        self.writer, self.stack = writer, stack
        self.step = 0
        self.guided = False
        self.decoder_frames = settings.num_frames or 1
        self.nudge = Nudge(perturb) if perturb is not None else None
        self.optional = optional
        if optional:
            self._wrap(pipe, "prepare_latents", self._prepare_latents)
            self._wrap(pipe.scheduler, "step", self._scheduler_step)

        vae_dtype = pipe.vae.dtype
        stack.callback(lambda: pipe.vae.dtype == vae_dtype or pipe.vae.to(dtype=vae_dtype))
        # Two progress bars would overwrite each other.
        bars = copy.copy(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**{**bars, "disable": True})
        stack.callback(lambda: setattr(pipe, "_progress_bar_config", bars))

        processor = pipe.video_processor
        self._wrap(processor, "preprocess", self._preprocess)
        self._wrap(processor, "postprocess_video", self._postprocess)
        # A truth: the working dtype's trace replayed in float64.
        self.exact = pipe.unet.dtype == torch.float64 and "input.source" in replay
        if self.exact:
            self._wrap(processor, "pil_to_numpy", self._pil_to_float64)
        self._replace_randn()
        self._hook(pipe.image_encoder.register_forward_pre_hook(self._before_clip, with_kwargs=True))
        self._hook(pipe.unet.register_forward_pre_hook(self._before_unet, with_kwargs=True))
        self._hook(pipe.unet.register_forward_hook(self._after_unet))
        self._hook(pipe.vae.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        if self.nudge is not None:
            for model in (pipe.image_encoder, pipe.vae, pipe.unet):
                for module in model.modules():
                    if next(module.children(), None) is None:
                        self._hook(module.register_forward_hook(self._nudge_output))

    def _hook(self, handle: Any) -> None:
        self.stack.callback(handle.remove)

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Shadow a method on the object; what stood on the object before comes back."""
        own = vars(owner).get(name)
        original = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))
        self.stack.callback(lambda: setattr(owner, name, own) if own is not None else delattr(owner, name))

    def _replace_randn(self) -> None:
        """Record and replay the draws: ``randn_tensor`` where the pipeline's code looks it up."""
        spaces: dict[int, dict[str, Any]] = {}
        for method in (type(self.pipe).__call__, type(self.pipe).prepare_latents):
            space = inspect.unwrap(method).__globals__
            if "randn_tensor" in space:
                spaces[id(space)] = space
        if not spaces:
            raise SvdlabError(f"{type(self.pipe).__name__}: its random draws are not made by diffusers' randn_tensor")
        for space in spaces.values():
            original = space["randn_tensor"]
            self.stack.callback(space.__setitem__, "randn_tensor", original)
            space["randn_tensor"] = self._draw(original)

    def _draw(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def randn_tensor(shape: Any, *args: Any, **kwargs: Any) -> Tensor:
            name = "input.latents" if len(shape) == 5 else "input.noise"
            if name not in self.replay:
                drawn = original(shape, *args, **kwargs)
            else:
                drawn = self.replay[name].to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
                if tuple(drawn.shape) != tuple(shape):
                    raise SvdlabError(f"{name}: the replayed shape {tuple(drawn.shape)}, allowed: {tuple(shape)}")
            self.writer.digest_input(name, drawn)
            return self.record(name, self._nudged(drawn))

        return randn_tensor

    def _nudged(self, tensor: Tensor) -> Tensor:
        return tensor if self.nudge is None else self.nudge(tensor)

    def _nudge_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        assert self.nudge is not None
        return self.nudge(output) if isinstance(output, Tensor) and output.is_floating_point() else None

    def record(self, name: str, tensor: Tensor) -> Tensor:
        """Write a probe once, and return it."""
        if name not in self.writer:
            self.writer.put(name, tensor)
        return tensor

    def source(self, images: Sequence[Any]) -> None:
        """Record the image as given."""
        if self.replay and "input.source" not in self.replay:
            return
        levels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
        source = torch.from_numpy(levels / np.float32(255))
        self.writer.digest_input("input.source", source)
        self.record("input.source", source)

    def _pil_to_float64(self, original: Callable[..., Any], images: Any) -> np.ndarray:
        images = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(image) for image in images]).astype(np.float64) / 255

    def _preprocess(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return self._pixels("input.image", original(*args, **kwargs))

    def _before_clip(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pixels = self._pixels("input.clip_pixels", args[0] if args else kwargs["pixel_values"])
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    def _pixels(self, name: str, made: Tensor) -> Tensor:
        """What the networks get: the pixels as made here, or as replayed.

        A float64 run that replays records the preprocessing that it made in float64, the truth of that probe,
        while its networks get the replayed pixels: the probes behind it judge the networks, not the resize.
        """
        given = self.replay.get(name)
        if given is None:
            return self.record(name, self._nudged(made))
        if given.shape != made.shape:
            raise SvdlabError(f"{name}: the replayed shape {tuple(given.shape)}, allowed: {tuple(made.shape)}")
        # No narrower than replayed: a float16 pipeline keeps the image in float32 until the VAE.
        wide = torch.promote_types(given.dtype, made.dtype) if name == "input.image" else made.dtype
        # In the memory layout of what it replaces, by which kernels are chosen.
        given = self._nudged(torch.empty_like(made, dtype=wide).copy_(given))
        self.record(name, made if self.exact else given)
        return given

    def _before_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.guided = bool(self.pipe.do_classifier_free_guidance)
        videos = len(sample) // 2 if self.guided else len(sample)
        if self.step == 0:
            channels = sample.shape[2] // 2
            for name, tensor in (
                ("image_embeddings", kwargs["encoder_hidden_states"][-videos:]),
                ("image_latents", sample[-videos:, 0, channels:]),
                ("added_time_ids", kwargs["added_time_ids"][-videos:]),
                ("sigmas", noise_levels(self.pipe.scheduler)),
                ("timesteps", self.pipe.scheduler.timesteps.float()),
                ("guidance_scale", self.pipe.guidance_scale.reshape(videos, -1)),
            ):
                self.record(name, tensor)
        self.record(f"model_input.{self.step:03d}", sample)

    def _after_unet(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.guided:
            uncond, cond = tapping.first_tensor(output).chunk(2)
            self.record(f"noise_pred_uncond.{self.step:03d}", uncond)
            self.record(f"noise_pred_cond.{self.step:03d}", cond)

    def _before_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """How many frames this call treats as one clip."""
        self.decoder_frames = kwargs["num_frames"]

    def step_end(self, bar: Any) -> Callable[..., dict[str, Tensor]]:
        """diffusers' ``callback_on_step_end``."""

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            self.record(f"noise_pred.{step:03d}", tensors["noise_pred"])
            self.record(f"latents.{step:03d}", tensors["latents"])
            self.step = step + 1
            bar.update()
            return {}

        return callback

    def _prepare_latents(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return self.record("latents.init", original(*args, **kwargs))

    def _scheduler_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if (denoised := getattr(output, "pred_original_sample", None)) is not None:  # not of every scheduler
            self.record(f"denoised.{self.step:03d}", denoised)
        return output

    def _postprocess(self, original: Callable[..., Any], video: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.record("frames", video.permute(0, 2, 1, 3, 4))
        if self.optional:
            levels = [[np.asarray(frame) for frame in frames] for frames in original(video, output_type="pil")]
            self.record("frames_8bit", torch.from_numpy(np.stack(levels)).movedim(-1, -3).float())
        return original(video, *args, **kwargs)

    def tap(self, name: str, module: nn.Module) -> None:
        """Record a module's output in the layout of ``svdlab.parity.taps``."""
        size: dict[str, tuple[int, int]] = {}
        if (block := tapping.attention_block(name)) is not None:
            owner = getattr(self.pipe, name.split(".", 1)[0]).get_submodule(block)

            def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                size["hw"] = (args[0].shape[-2], args[0].shape[-1])

            self._hook(owner.register_forward_pre_hook(before))
        layout = tapping.layout_of(name)
        per_step = tapping.is_per_step(name)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if name.startswith("unet.") and not per_step and self.step:
                return
            full_name = f"{name}.{self.step:03d}" if per_step else name
            clip, video = self._frames_of(name)
            tensor = tapping.from_diffusers(name, tapping.first_tensor(output), clip, size.get("hw"))
            if layout == "activation":
                self.writer.extend(full_name, tensor.flatten(0, 1), frames=video)
            else:
                self.writer.extend(full_name, tensor)

        self._hook(module.register_forward_hook(after))

    def _frames_of(self, name: str) -> tuple[int, int]:
        """Frames that a module treats as one clip, and those of the video that its calls add up to."""
        video = self.settings.num_frames or 1
        if name.startswith("unet."):
            return video, video
        return (self.decoder_frames, video) if name.startswith("vae.decoder") else (1, 1)


class Nudge:
    """Multiply every value by one unit in the last place more or less, by a seeded coin."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        generator = self.generators.get(tensor.device)
        if generator is None:
            generator = self.generators[tensor.device] = torch.Generator(tensor.device).manual_seed(self.seed)
        coins = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device)
        return tensor + tensor * ((2 * coins - 1) * torch.finfo(tensor.dtype).eps).to(tensor.dtype)
