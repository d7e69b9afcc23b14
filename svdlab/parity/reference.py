"""diffusers' own pipeline as the reference: loaded from the same folder, observed, replayed, never changed.

This is the only room that imports diffusers. What is observed goes through forward hooks, the step callback
and wrappers on the pipeline object; all of it is gone when a capture ends, however it ends.

What stays float32 in a float64 run of diffusers 0.42: the sinusoids
(``embeddings.py:get_timestep_embedding``), sigmas and timesteps and the Euler step's sample
(``scheduling_euler_discrete.py:set_timesteps, step``), and the decoded frames
(``pipeline_stable_video_diffusion.py:decode_latents``). Each is one rounding at 6e-8 relative, below what the
networks themselves lose in float32, but it bounds what "float64" can tell apart: see ``compare.resolution``.
The preprocessing is float32, too (``image_processor.py:pil_to_numpy``); a float64 run that replays another
trace records it in float64, from a float64 image, and gives its networks the replayed pixels.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError, requires
from svdlab.parity import taps as tapping
from svdlab.parity.trace import (
    Stop,
    Trace,
    TraceWriter,
    check_until,
    dtype_name,
    replay_images,
    replayed,
    source_images,
    version_of,
)
from svdlab.svd.settings import GenerationSettings


def load_diffusers(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    weights_dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> Any:
    """Load ``StableVideoDiffusionPipeline`` from a checkpoint folder in diffusers' layout (or a hub name).

    Args:
        folder: the folder.
        dtype: what the networks run in.
        device: where.
        weights_dtype: round the weights to this first. The truth for a float16 run is float64 arithmetic on
            the float16 weights: rounding the weights is part of the checkpoint, not of the arithmetic.
        variant: file name variant ("fp16").

    Raises:
        SvdlabError: diffusers is not installed, or it cannot read the folder.
    """
    requires("diffusers", "transformers")
    try:
        with _quiet():
            from diffusers import StableVideoDiffusionPipeline

            pipe = StableVideoDiffusionPipeline.from_pretrained(
                os.fspath(folder), torch_dtype=weights_dtype or dtype, variant=variant, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise SvdlabError(
            f"{folder}: diffusers cannot load it ({reason[0] if reason else type(error).__name__})"
        ) from None
    for model in (pipe.unet, pipe.vae, pipe.image_encoder):
        model.eval().requires_grad_(False)
    return cast_diffusers(pipe, dtype, device)


def diffusers_network(name: str, network: nn.Module) -> Any:
    """diffusers' (for the image encoder transformers') twin of one of svdlab's networks, on the same weight tensors.

    Args:
        name: "unet", "vae" or "image_encoder".
        network: svdlab's; its weights are shared, not copied.
    """
    with _quiet():
        from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        options = asdict(network.config)  # type: ignore[call-overload]
        with torch.device("meta"):
            if name == "unet":
                twin: Any = UNetSpatioTemporalConditionModel(**options)
            elif name == "vae":
                twin = AutoencoderKLTemporalDecoder(**options)
            else:
                twin = CLIPVisionModelWithProjection(CLIPVisionConfig(**options))
        state = network.state_dict()
        twin.load_state_dict(state, strict=True, assign=True)
        for module in twin.modules():
            if "position_ids" in module._buffers:  # no part of a checkpoint: made again
                positions = torch.arange(module._buffers["position_ids"].shape[-1])[None]
                module._buffers["position_ids"] = positions.to(next(iter(state.values())).device)
    return twin.eval().requires_grad_(False)


def diffusers_pipeline(unet: nn.Module, vae: nn.Module, image_encoder: nn.Module, scheduler: Any) -> Any:
    """diffusers' pipeline around its networks and svdlab's scheduler settings (``EulerScheduler``)."""
    with _quiet():
        from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
        from transformers import CLIPImageProcessor

        pipe = StableVideoDiffusionPipeline(
            vae, image_encoder, unet, EulerDiscreteScheduler.from_config(asdict(scheduler)), CLIPImageProcessor()
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cast_diffusers(pipe: Any, dtype: torch.dtype, device: str | torch.device | None = None) -> Any:
    """Move a diffusers pipeline's networks to another dtype (and device) in place, without its warnings."""
    with _quiet():
        for model in (pipe.unet, pipe.vae, pipe.image_encoder):
            model.to(device=device or model.device, dtype=dtype)
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no progress bars of other libraries; only what is ours is on the terminal."""
    # transformers sets its level when it is first imported, and then warns that torchvision is not there.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    levels = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name, level in levels.items():
            logging.getLogger(name).setLevel(logging.ERROR)
            stack.callback(logging.getLogger(name).setLevel, level)
        try:
            import diffusers.utils.logging as diffusers_logging
            import transformers.utils.logging as transformers_logging
        except ImportError:
            yield
            return
        for module in (diffusers_logging, transformers_logging):
            if module.is_progress_bar_enabled():
                module.disable_progress_bar()
                stack.callback(module.enable_progress_bar)
        yield


def resolve(pipe: Any, settings: GenerationSettings) -> GenerationSettings:
    """Fill height, width and number of frames from a diffusers pipeline's configuration, and its dtype."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) or size is None else size
    if size == 96:  # as svdlab: the published configs say 96, the models were trained at 576x1024
        height, width = 576 // pipe.vae_scale_factor, 1024 // pipe.vae_scale_factor
    filled: dict[str, Any] = {"dtype": dtype_name(pipe.unet.dtype)}
    for field, own, factor in (
        ("height", height, pipe.vae_scale_factor),
        ("width", width, pipe.vae_scale_factor),
        ("num_frames", pipe.unet.config.num_frames, 1),
    ):
        if getattr(settings, field) is None:
            if own is None:
                raise SvdlabError(f"{field}: got none and the checkpoint's config has none, allowed: a number")
            filled[field] = int(own) * factor
    return settings.replace(**filled)


def _check_supported(settings: GenerationSettings) -> None:
    """Refuse what diffusers itself fails at, before it does so with a shape error in the first step."""
    low, high = settings.min_guidance_scale, settings.max_guidance_scale
    ramp = torch.linspace(low, high, settings.num_frames or 1)
    if (high > 1) != bool(ramp.max() > 1):
        raise SvdlabError(
            f"max_guidance_scale: diffusers fails at a ramp from {low:g} to {high:g} over "
            f"{settings.num_frames} frame(s), "
            "allowed in the reference: both ends of the ramp that is used above 1, or both at most 1"
        )


def capture_diffusers(
    pipe: Any,
    image: Any = None,
    settings: GenerationSettings | None = None,
    *,
    replay: Trace | None = None,
    preprocess: bool = False,
    taps: Sequence[str] = (),
    until: str | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    perturb: int | None = None,
    implementation: str = "diffusers",
) -> Trace:
    """Run a diffusers ``StableVideoDiffusionPipeline`` and record every probe of design section 5.

    Args:
        pipe: the pipeline; its dtype is the trace's. The same pipeline can be captured any number of times.
        image: a PIL image or a list of them; not needed with ``replay``.
        settings: None means ``replay``'s.
        replay: a trace whose random draws and image are used instead of the seed and ``image``. The truth is
            a float64 pipeline that replays the working dtype's trace.
        preprocess: redo the preprocessing from the replayed source image instead of replaying its results.
        taps: shell-style patterns of module names (``unet.down_blocks.*``), see ``svdlab.parity.taps``.
        until: stop after this probe.
        path: stream to this file instead of keeping the tensors in memory.
        progress: show a bar over the denoising steps.
        perturb: a seed: move every input and every layer's output by one unit in the last place, up or down
            at random. How far the result moves is what rounding alone can do (``compare``'s floor without a
            truth).
        implementation: what the trace calls it.

    Raises:
        SvdlabError: a setting at which diffusers fails, no image and nothing to replay, a replay that lacks
            an input or has another shape, a pattern that names no module.
    """
    settings = resolve(pipe, settings or (replay.settings if replay is not None else GenerationSettings()))
    _check_supported(settings)
    check_until(until, settings)
    tensors = {} if replay is None else replayed(replay, preprocess)
    if image is None:
        if replay is None:
            raise SvdlabError("image: got none, allowed: a PIL image, or a trace to replay")
        image = replay_images(tensors, settings)
    images = _pil_list(image)
    models = {"image_encoder": pipe.image_encoder, "vae": pipe.vae, "unet": pipe.unet}
    chosen = tapping.select(models, taps)
    writer = TraceWriter(
        settings,
        implementation,
        implementation_version=version_of("diffusers"),
        dtype=settings.dtype,
        path=path,
    )
    with writer, ExitStack() as stack, torch.no_grad():
        bar = stack.enter_context(
            tqdm(total=settings.num_steps, desc=f"{implementation} {settings.dtype}", disable=not progress)
        )
        watch = _Watch(pipe, settings, tensors, writer, until, stack, perturb)
        for name, module in chosen.items():
            watch.tap(name, module)
        if any(name.startswith("vae.decoder") for name in chosen):
            watch.count_decoder_frames()
        stack.enter_context(_quiet())
        with suppress(Stop):
            watch.source(images)
            pipe(
                images,
                height=settings.height,
                width=settings.width,
                num_frames=settings.num_frames,
                num_inference_steps=settings.num_inference_steps if settings.sigmas is None else None,
                sigmas=None if settings.sigmas is None else list(settings.sigmas),
                min_guidance_scale=settings.min_guidance_scale,
                max_guidance_scale=settings.max_guidance_scale,
                fps=settings.fps,
                motion_bucket_id=settings.motion_bucket_id,
                noise_aug_strength=settings.noise_aug_strength,
                decode_chunk_size=_chunk(settings),
                num_videos_per_prompt=settings.num_videos_per_prompt,
                generator=torch.Generator("cpu").manual_seed(settings.seed),
                output_type="pt",
                callback_on_step_end=watch.step_end(bar),
                callback_on_step_end_tensor_inputs=["noise_pred", "latents"],
            )
    return writer.trace


def _chunk(settings: GenerationSettings) -> int | None:
    chunk = settings.decode_chunk_size
    return chunk if settings.decode == "parity" and isinstance(chunk, int) else None


def _pil_list(image: Any) -> list[Any]:
    from PIL import Image as pil

    if isinstance(image, Tensor):
        return list(source_images(image if image.ndim == 4 else image[None]))
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images or not all(isinstance(i, pil.Image) for i in images):
        raise SvdlabError(f"image: got {type(image).__name__}, allowed: a PIL image or a list of them")
    if len({i.size for i in images}) > 1:
        raise SvdlabError(
            f"image: sizes {sorted({i.size for i in images})}, allowed in diffusers: one size for all images"
        )
    return [i.convert("RGB") for i in images]


class _Watch:
    """The hooks of one capture. Everything is undone by ``stack``."""

    def __init__(
        self,
        pipe: Any,
        settings: GenerationSettings,
        replay: Mapping[str, Tensor],
        writer: TraceWriter,
        until: str | None,
        stack: ExitStack,
        perturb: int | None,
    ) -> None:
        self.pipe, self.settings, self.replay = pipe, settings, replay
        self.writer, self.until, self.stack = writer, until, stack
        self.step = 0
        self.guided = False
        self.decoder_frames = settings.num_frames or 1
        self.nudge = _Nudge(perturb) if perturb is not None else None

        vae_dtype = pipe.vae.dtype
        stack.callback(lambda: pipe.vae.dtype == vae_dtype or pipe.vae.to(dtype=vae_dtype))
        # The bar of diffusers would stand beside ours.
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
        import inspect

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
            return self.record(name, self._nudged(drawn))

        return randn_tensor

    def _nudged(self, tensor: Tensor) -> Tensor:
        return tensor if self.nudge is None else self.nudge(tensor)

    def _nudge_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        assert self.nudge is not None
        return self.nudge(output) if isinstance(output, Tensor) and output.is_floating_point() else None

    def record(self, name: str, tensor: Tensor) -> Tensor:
        """Write a probe; leave the pipeline when it was the last one that was asked for."""
        if name not in self.writer:
            self.writer.put(name, tensor)
        if name == self.until:
            raise Stop
        return tensor

    def source(self, images: Sequence[Any]) -> None:
        """Record the image as given."""
        if self.replay and "input.source" not in self.replay:
            return
        levels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
        self.record("input.source", torch.from_numpy(levels / np.float32(255)))

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
        while its networks get the replayed pixels: what is judged there is the networks, not the resize.
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
                ("sigmas", self.pipe.scheduler.sigmas),
                ("timesteps", self.pipe.scheduler.timesteps),
                ("guidance_scale", self.pipe.guidance_scale.reshape(videos, -1)),
            ):
                self.record(name, tensor)
        self.record(f"model_input.{self.step:03d}", sample)

    def _after_unet(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.guided:
            uncond, cond = tapping.first_tensor(output).chunk(2)
            self.record(f"noise_pred_uncond.{self.step:03d}", uncond)
            self.record(f"noise_pred_cond.{self.step:03d}", cond)

    def step_end(self, bar: Any) -> Callable[..., dict[str, Tensor]]:
        """diffusers' ``callback_on_step_end``."""

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            self.record(f"noise_pred.{step:03d}", tensors["noise_pred"])
            self.record(f"latents.{step:03d}", tensors["latents"])
            self.step = step + 1
            bar.update()
            return {}

        return callback

    def _postprocess(self, original: Callable[..., Any], video: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.record("frames", video.permute(0, 2, 1, 3, 4))
        return original(video, *args, **kwargs)

    def count_decoder_frames(self) -> None:
        """Know how many frames each call of the decoder treats as one clip."""

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.decoder_frames = kwargs["num_frames"]

        self._hook(self.pipe.vae.decoder.register_forward_pre_hook(before, with_kwargs=True))

    def tap(self, name: str, module: nn.Module) -> None:
        """Record a module's output in the layout of ``svdlab.parity.taps``."""
        size: dict[str, tuple[int, int]] = {}
        if (parent := _attention_of(name)) is not None:
            owner = getattr(self.pipe, name.split(".", 1)[0]).get_submodule(parent)

            def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                size["hw"] = (args[0].shape[-2], args[0].shape[-1])

            self._hook(owner.register_forward_pre_hook(before))
        layout = tapping.layout_of(name)
        per_step = tapping.is_per_step(name)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if name.startswith("unet.") and not per_step and self.step:
                return
            full_name = f"{name}.{self.step:03d}" if per_step else name
            tensor = tapping.first_tensor(output)
            frames = self._frames_of(name)
            if layout == "vector":
                self.writer.extend(full_name, _vector(name, tensor, frames))
            elif layout == "positions":
                self.writer.put(full_name, tensor[:frames])
            elif layout == "tokens":
                self.writer.extend(full_name, tensor)
            else:
                tensor = _activation(name, tensor, frames, size.get("hw"))
                if name.startswith("vae.decoder"):
                    self.writer.extend(full_name, tensor.flatten(0, 1), frames=self.settings.num_frames)
                else:
                    self.writer.extend(full_name, tensor)

        self._hook(module.register_forward_hook(after))

    def _frames_of(self, name: str) -> int:
        if name.startswith("unet."):
            return self.settings.num_frames or 1
        return self.decoder_frames if name.startswith("vae.decoder") else 1


def _attention_of(name: str) -> str | None:
    """The path of the transformer or attention block that a module lies in, which knows height and width."""
    parts = name.split(".")
    if "attentions" not in parts:
        return None
    return ".".join(parts[1 : parts.index("attentions") + 2])


def _vector(name: str, tensor: Tensor, frames: int) -> Tensor:
    """(B, C) of (B, C), of (B, F, C), or of (B*F, C) where diffusers repeats it over the frames."""
    if tensor.ndim == 3:
        return tensor[:, 0]
    return tensor[::frames] if name.endswith("time_emb_proj") else tensor


def _activation(name: str, tensor: Tensor, frames: int, size: tuple[int, int] | None) -> Tensor:
    """(B, F, C, H, W) of diffusers' four layouts."""
    if tensor.ndim == 5:
        return tensor.permute(0, 2, 1, 3, 4)
    if tensor.ndim == 4:
        return tensor.unflatten(0, (-1, frames))
    assert size is not None
    inside_temporal = "temporal_transformer_blocks" in name and not name.split(".")[-2] == "temporal_transformer_blocks"
    if inside_temporal:  # (B*H*W, F, C)
        return tensor.unflatten(0, (-1, *size)).permute(0, 3, 4, 1, 2)
    return tensor.unflatten(1, size).unflatten(0, (-1, frames)).permute(0, 1, 4, 2, 3)


class _Nudge:
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
