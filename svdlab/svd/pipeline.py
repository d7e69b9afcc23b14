"""Stable Video Diffusion, one image to a clip: the whole story, top to bottom.

``prepare`` turns the user's image and seed into ``Inputs``; ``denoise`` and ``decode`` are deterministic from there.
Each step of them is a stage (``svdlab.svd.stages``). What else diffusers' users call is in ``svdlab.svd.interface``.
Source: diffusers ``pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py``.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from svdlab.errors import SvdlabError, short
from svdlab.svd import images
from svdlab.svd.checkpoint import (
    EMBEDDED,
    channels_last,
    check_together,
    checkpoint_path,
    load_components,
    load_single_file,
    resolve_size,
)
from svdlab.svd.compat import COMPAT, check_compat, check_image
from svdlab.svd.components import COMPONENTS, NETWORKS
from svdlab.svd.config import Configs
from svdlab.svd.interface import DiffusersInterface, SVDOutput, plain_numbers
from svdlab.svd.kernels import unedited_weights
from svdlab.svd.modules import own_modules
from svdlab.svd.overrides import overridden, start
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.schedulers import RULES, rules
from svdlab.svd.settings import CallSettings, GenerationSettings
from svdlab.svd.stages import STAGE, Change

if TYPE_CHECKING:
    from typing_extensions import Self

    from svdlab.svd.video import Clip

Probe = Callable[[str, Tensor], None]
Callback = Callable[["SVDPipeline", int, Tensor, dict[str, Tensor]], "dict[str, Tensor] | None"]
Generators = torch.Generator | Sequence[torch.Generator] | None
# A forked process has none of its parent's OpenMP threads, and its first parallel loop would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


@dataclass(frozen=True)
class Inputs:
    """All that a generation reads beside settings and weights; a port that replays these needs no random generator.

    Attributes:
        source: the images as given, (B, 3, H0, W0) in [0, 1]; None when their sizes differ.
        image: resized for the VAE, (B, 3, H, W) in [-1, 1], before noise augmentation.
        clip_pixels: resized and normalised for CLIP, (B, 3, P, P).
        noise: unit Gaussian for the noise augmentation, (B, 3, H, W).
        latents: unit Gaussian, (B * videos, F, 4, h, w).
    """

    source: Tensor | None
    image: Tensor
    clip_pixels: Tensor
    noise: Tensor
    latents: Tensor


class SVDPipeline(DiffusersInterface):
    """Stable Video Diffusion with the constructor, the call and the names of diffusers' pipeline.

    Examples:
        >>> pipe = SVDPipeline.from_pretrained("embedded")
        >>> frames = pipe(image, height=64, width=64, num_frames=8).frames[0]

    Args:
        vae, image_encoder, unet, scheduler, feature_extractor: svdlab's own, or diffusers' and transformers', whose
            weights are shared; see ``components.adopt``.
        compat: "diffusers" for diffusers' frames also where svdlab mends them: docs/compatibility.md.

    Raises:
        SvdlabError: a component that svdlab does not implement, or networks that do not belong together.
    """

    # Whether what a subclass overrides stands in the stages' places, as in a call.
    overrides_run = False

    def __init__(
        self,
        vae: Any,
        image_encoder: Any,
        unet: Any,
        scheduler: Any,
        feature_extractor: Any,
        *,
        compat: str | None = None,
    ):
        check_compat(compat)
        self.register_modules(
            vae=vae, image_encoder=image_encoder, unet=unet, scheduler=scheduler, feature_extractor=feature_extractor
        )
        check_together("components", self.configs)
        self.compat = compat
        self.replaced: dict[str, Callable[..., Any]] = {}
        self._wrapped: list[tuple[str, Callable[..., Any]]] = list(COMPAT[compat].wrap.items()) if compat else []
        self.put_stages({})

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path = EMBEDDED,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        compat: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        device_map: str | None = None,
        **components: Any,
    ) -> Self:
        """Load a checkpoint in diffusers' format from the hub, a folder, or the package ("embedded").

        A single file that needs no options loads here, too: see ``from_single_file``.

        Args:
            dtype: of the weights, float32 by default; or one for each network by its name, "default" for the others.
                ``torch_dtype`` is diffusers' older name for it.
            device: where the networks go, by default the CPU; ``device_map`` is diffusers' name for it.
            variant: ``"fp16"`` for half-precision files.
            compat: of the constructor.
            cache_dir, token, local_files_only, force_download, revision: of a download from the hub.
            use_safetensors: False is refused: nothing is unpickled.
            low_cpu_mem_usage: diffusers'; a network is never in memory twice, whatever it says.
            components: in the place of the checkpoint's, by name: of the constructor.

        Raises:
            SvdlabError: see ``checkpoint.load_components``; an argument of diffusers that cannot be honoured, by name.
        """
        for name in components:
            if name not in COMPONENTS:
                raise SvdlabError(
                    f"from_pretrained: {short(name)} is not implemented, allowed: {', '.join(COMPONENTS)}"
                )
        if use_safetensors is False:
            raise SvdlabError("use_safetensors: got False, allowed: True; svdlab reads safetensors only")
        if device_map is not None and not isinstance(device_map, (str, torch.device)) or device_map in _MAPS:
            raise SvdlabError(f"device_map: got {short(device_map)}, allowed: one device; enable_model_cpu_offload")
        check_compat(compat)
        dtypes = _dtypes(torch_dtype if dtype is None else dtype)
        path = checkpoint_path(
            repo_or_folder,
            variant,
            revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        # No weight may be rounded to one network's dtype on its way to another's.
        widest = functools.reduce(torch.promote_types, dtypes.values())
        loaded = vars(load_components(path, widest, device_map or device or "cpu", variant))
        for name, of_network in dtypes.items():
            loaded[name].to(of_network)
        return cls._made({**loaded, **components}, compat)

    @classmethod
    def from_single_file(
        cls,
        path_or_repo_file: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        compat: str | None = None,
        unet: Mapping[str, Any] = MappingProxyType({}),
        vae: Mapping[str, Any] = MappingProxyType({}),
        image_encoder: Mapping[str, Any] = MappingProxyType({}),
        scheduler: Mapping[str, Any] = MappingProxyType({}),
        feature_extractor: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Load a checkpoint in one file, in the naming of the code that the model was trained with.

        What its weights do not say is read from the file, where ``svdlab convert`` has written it, or is the published
        models': see ``single_file.UNSAID``.

        Examples:
            >>> pipe = SVDPipeline.from_single_file("svd_xt.safetensors", dtype=torch.float16)

        Args:
            path_or_repo_file: a file, ``owner/name/svd_xt.safetensors`` on the hub, or its address there.
            dtype: of the weights, float32 by default; ``torch_dtype`` is diffusers' older name for it.
            revision: branch, tag or commit on the hub.
            compat: of the constructor.
            unet: options of its ``config.json`` that the weights do not say: num_frames, num_attention_heads,
                sample_size.
            vae: scaling_factor, force_upcast, sample_size.
            image_encoder: num_attention_heads, hidden_act, layer_norm_eps, image_size.
            scheduler: options of ``scheduler_config.json``.
            feature_extractor: image_mean, image_std.

        Raises:
            SvdlabError: a folder, see ``from_pretrained``; else see ``checkpoint.load_single_file``.
        """
        path = checkpoint_path(path_or_repo_file, revision=revision)
        if path.is_dir():
            raise SvdlabError(f"{path}: is a folder, allowed: a single file; from_pretrained loads folders")
        given = {"unet": unet, "vae": vae, "image_encoder": image_encoder}
        given |= {"scheduler": scheduler, "feature_extractor": feature_extractor}
        check_compat(compat)
        return cls._made(vars(load_single_file(path, dtype or torch_dtype or torch.float32, device, given)), compat)

    @classmethod
    def _made(cls, components: Mapping[str, Any], compat: str | None) -> Self:
        """A subclass's constructor need not know ``compat``."""
        return cls(**components, **({"compat": compat} if compat else {}))

    def with_bugs(self, *names: str) -> SVDPipeline:
        """The same weights with bugs of the catalogue injected; this pipeline stays as it is.

        The catalogue (``svdlab.parity.bugs``) is found by its entry point: this module knows nothing of what can be
        wrong with it.

        Raises:
            SvdlabError: a name that is not in the catalogue, or bugs that exclude each other.
        """
        return self.with_changes(*_catalogue()(*names))

    def with_stage(self, **functions: Callable[..., Any]) -> SVDPipeline:
        """The same weights with a function in a stage's place; this pipeline stays as it is.

        The function replaces all that stands there, an injected bug included.

        Examples:
            >>> wrong = pipe.with_stage(time_ids=lambda settings: torch.tensor([[settings.fps, 127, 0.02]]))

        Args:
            functions: by the name of a stage, see ``stages.STAGES``; called with the stage's arguments.

        Raises:
            SvdlabError: a name that is not a stage's.
        """
        for name in functions:
            if name not in STAGE:
                raise SvdlabError(f"stage: got {name!r}, allowed: {', '.join(STAGE)}")
        return self._variant(replaced=functions)

    def with_changes(self, *changes: Change) -> SVDPipeline:
        """The same weights with stages wrapped and modules edited; this pipeline stays as it is.

        Args:
            changes: the first one lies innermost.
        """
        other = self._variant(wrapped=[pair for change in changes for pair in change.wrap.items()])
        for name in {name for change in changes for name in change.edit}:
            network = own_modules(getattr(other, name))
            for change in changes:
                if name in change.edit:
                    change.edit[name](network)
            setattr(other, name, network)
        return other

    def with_own_modules(self) -> SVDPipeline:
        """The same weights in module objects of its own, for hooks that must not reach another user of this one."""
        other = self._variant()
        for name in NETWORKS:
            setattr(other, name, own_modules(getattr(other, name)))
        return other

    def _variant(
        self, replaced: dict[str, Callable[..., Any]] | None = None, wrapped: Sequence[tuple[str, Any]] = ()
    ) -> SVDPipeline:
        """A copy with other stages; a function in a stage's place replaces what is wrapped around that, too."""
        other, replaced = copy.copy(self), replaced or {}
        other._wrapped = [*(pair for pair in self._wrapped if pair[0] not in replaced), *wrapped]
        other.put_stages({**self.replaced, **replaced})
        return other

    def __copy__(self) -> Self:
        """The same networks, and stages that run on those which the copy has, whatever is put in their places."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.put_stages(self.replaced)
        return other

    def put_stages(self, replaced: Mapping[str, Callable[..., Any]]) -> None:
        """Make these functions and what is wrapped around them this object's stages; the wrappers see its networks."""
        self.replaced = dict(replaced)
        for name in STAGE:
            vars(self).pop(name, None)
        vars(self).update(self.replaced)
        for name, wrapper in self._wrapped:
            vars(self)[name] = partial(wrapper, self, getattr(self, name))

    def sampler(self, settings: GenerationSettings) -> SVDPipeline:
        """Whose stages in ``schedulers.RULES`` one generation runs: its own, or another library's scheduler's.

        Raises:
            SvdlabError: see ``schedulers.prepared``; a rule that is changed here, where the scheduler brings its own.
        """
        if isinstance(self.scheduler, EulerScheduler):
            return self
        # What stands before the first step may be wrapped, to be looked at.
        changed = {*self.replaced, *(name for name, _ in self._wrapped)} & {*RULES} - {"initial_latents"}
        if changed:
            kind = type(self.scheduler).__name__
            raise SvdlabError(f"{min(changed)}: changed, allowed with {kind}, which brings its own: unchanged")
        other = copy.copy(self)
        other.put_stages({**rules(self.scheduler, settings, self.device), **self.replaced})
        return other

    def to(
        self,
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        torch_device: torch.device | str | None = None,
        torch_dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move and cast all three networks; returns itself.

        Args:
            args: a device, a dtype, or both in this order.
            device, dtype: the same by name; ``torch_device`` and ``torch_dtype`` are diffusers' older names.
            silence_dtype_warnings: diffusers'; there are none here.
        """
        named = {"device": device or torch_device, "dtype": dtype or torch_dtype}
        for name in NETWORKS:
            getattr(self, name).to(*args, **{key: value for key, value in named.items() if value is not None})
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Keep each network on the device only while it runs, and on the CPU else: for GPUs that cannot hold all.

        Args:
            gpu_id: which of several devices.
            device: of which kind; a name with a number, such as "cuda:1", says both.
        """
        self._offload_device = torch.device(device if gpu_id is None else f"{torch.device(device).type}:{gpu_id}")
        for name in NETWORKS:
            channels_last(getattr(self, name).to("cpu"))

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

    def _runs_own_code(self) -> bool:
        """Whether between two steps nothing runs that a caller wrote, and that could edit a weight."""
        wrappers = (getattr(wrapper, "__module__", "") for _, wrapper in self._wrapped)
        assigned = (vars(self).keys() & {*STAGE}) - {name for name, _ in self._wrapped}
        hooks = (hook for m in self.unet.modules() for hook in (m._forward_hooks, m._forward_pre_hooks))
        others = type(self) is not SVDPipeline or self.replaced or assigned or any(hooks)
        return not others and all(module == "svdlab.svd.approximations" for module in wrappers)

    @contextmanager
    def _room_for_decode(self, settings: GenerationSettings) -> Iterator[None]:
        """Where a decode does not fit beside the other networks, they wait on the CPU until it is done.

        On 8 GB cards that is every clip of the published size. Not for threads that share the weights at that moment.
        """
        from svdlab.svd.memory import decode_fits

        device, others = self.device, (self.unet, self.image_encoder)
        if self._offload_device or device == _HOST or decode_fits(self.configs, settings, device):
            yield
            return
        warnings.warn(f"svdlab: the UNet and the image encoder leave {device} for the decode", stacklevel=4)
        try:
            self._offload_device = device
            for module in others:
                module.to(_HOST)
            yield
        finally:
            for module in others:
                module.to(device)
            self._offload_device = None

    @property
    def configs(self) -> Configs:
        """The architecture of the three networks."""
        return Configs(self.unet.config, self.vae.config, self.image_encoder.config)

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
        fps: float = 7,
        motion_bucket_id: float = 127,
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
        schedule: str = "karras",
        decode: str = "parity",
        cfg: str = "batched",
        progress: bool = True,
        probe: Probe | None = None,
    ) -> Any:
        """Generate clips from images. Arguments up to ``return_dict`` are diffusers', by name and by order.

        Args:
            image: PIL image or list of them; numpy (H, W, 3) or (B, H, W, 3), uint8 or float; tensor (3, H, W) or
                (B, 3, H, W). Any size; floats in [0, 1], or in [-1, 1] where some are negative.
            height, width: of the clip in pixels, multiples of the VAE's scale factor; None for the checkpoint's own.
            num_frames: None for the checkpoint's own.
            sigmas: custom sigmas, falling; the last one is where sampling ends (usually 0).
            min_guidance_scale, max_guidance_scale: at the first and at the last frame; the ramp may fall.
            decode_chunk_size: None decodes as if all at once, in chunks of 2; "auto" gives the same in the largest
                chunks that fit the free memory; n gives diffusers' result for that n (of several clips each by itself,
                unless ``compat`` is "diffusers").
            generator: one, or one per video.
            latents: unit Gaussian (B * videos, F, 4, h, w) in any dtype, on any device.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}); may return new latents.
            callback_on_step_end_tensor_inputs: what it gets, of the names in ``interface.CALLBACK_TENSORS``.
            return_dict: False returns the frames alone, True an ``SVDOutput``.
            schedule: "ays" for Align Your Steps' sigmas, "karras" for the scheduler's own.
            decode: "exact" makes the frames independent of ``decode_chunk_size``.
            cfg: "sequential" runs guidance in two passes for half the activation memory.
            progress: show a bar over steps.
            probe: called with the name and value of every tensor of a trace.

        Numbers may be numpy's or torch's, and whole ones floats, such as ``motion_bucket_id=127.0``.

        Raises:
            SvdlabError: a value that is not allowed, before any work.
        """
        self.check_inputs(image, height, width)
        images.check_output_type(output_type)
        if self.compat == "diffusers":
            height, width = (
                side or (self.unet.config.sample_size or 0) * self.vae_scale_factor for side in (height, width)
            )
        settings: GenerationSettings = CallSettings(
            **plain_numbers(
                height=height,
                width=width,
                num_frames=num_frames,
                num_inference_steps=num_inference_steps,
                min_guidance_scale=min_guidance_scale,
                max_guidance_scale=max_guidance_scale,
                fps=fps,
                motion_bucket_id=motion_bucket_id,
                noise_aug_strength=noise_aug_strength,
                decode_chunk_size=decode_chunk_size,
                num_videos_per_prompt=num_videos_per_prompt or 1,
            ),
            sigmas=None if sigmas is None else tuple(float(s) for s in sigmas),
            schedule=schedule,
            decode=decode,
            cfg=cfg,
            dtype=str(self.dtype).removeprefix("torch."),
        )
        callback, gather = self._callback(callback_on_step_end, callback_on_step_end_tensor_inputs, settings, probe)
        self._settings = settings = self.resolve(settings)
        pipe, inputs = start(self, image, settings, generator, latents)
        self._videos = len(inputs.latents)
        result = pipe.denoise(inputs, settings, probe=gather, callback=callback, progress=progress)
        if output_type != "latent":
            result = images.postprocess(pipe._decode(result, settings, probe), output_type, pipe.to_8bit)
        return SVDOutput(result) if return_dict else result

    def generate(self, image: Any, settings: GenerationSettings, progress: bool = True) -> list[Clip]:
        """Clips from settings, seeded by them: what the command line, notebooks and sweeps call.

        Raises:
            SvdlabError: see ``prepare``; NaN or infinity after a step or in the frames, and which weight holds some.
        """
        from svdlab.svd.video import Clip

        settings = self.resolve(settings)
        generator = torch.Generator().manual_seed(settings.seed)

        def after_step(_: SVDPipeline, step: int, __: Tensor, held: dict[str, Tensor]) -> None:
            self.check_finite(f"latents after step {step}", held["latents"])

        pipe, inputs = start(self, image, settings, generator, None)
        with nullcontext() if isinstance(self.scheduler, EulerScheduler) else _seeded(settings.seed, self.device):
            frames = pipe.run(inputs, settings, callback=after_step, progress=progress)
        self.check_finite("frames", frames)
        levels = self.to_8bit(frames).movedim(-3, -1).numpy()
        return [Clip(video, settings.fps, settings) for video in levels]

    def check_finite(self, name: str, values: Tensor) -> None:
        """Refuse NaN and infinity in what the networks made.

        Args:
            name: of the values, for the error.
            values: of any shape.

        Raises:
            SvdlabError: with how many there are, and which weight holds some.
        """
        images.check_finite(name, values, self._why_not_finite)

    def _why_not_finite(self) -> str:
        """Looked for only where it has happened: a pass over all weights at every load would take seconds."""
        for name in NETWORKS:
            for key, weight in getattr(self, name).state_dict().items():
                if not weight.isfinite().all():
                    return f": the checkpoint's {name} holds NaN or infinity in {key}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f": too large for {dtype}, allowed: a wider dtype, settings nearer to the defaults"

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
            SvdlabError: an image, generator list or latents of the wrong kind, shape or range; a subclass that
                overrides what only a call asks, see ``overrides.OVERRIDABLE``.
        """
        if not self.overrides_run and (names := overridden(self)):
            raise SvdlabError(f"{names[0]}: overridden, allowed: calling the pipeline, or its generate")
        if self.compat == "diffusers":
            check_image(image)
        settings = self.resolve(settings)
        height, width, factor = settings.height, settings.width, self.vae.config.scale_factor
        assert height and width and settings.num_frames
        given = images.as_list(image)
        sources = [images.to_tensor(one) for one in given]
        pixels = torch.cat([self.resize_image(one, settings) for one in given])
        batch = len(sources)
        videos, channels = batch * settings.num_videos_per_prompt, self.unet.config.out_channels
        shape = (videos, settings.num_frames, channels, height // factor, width // factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise SvdlabError(f"latents: got shape {tuple(latents.shape)}, allowed: {shape}")
        if isinstance(generator, Sequence) and len(generator) not in (1, shape[0]):
            raise SvdlabError(f"generator: got a list of {len(generator)}, allowed: one, or one per video ({shape[0]})")
        clip_pixels = torch.cat([self.clip_pixels(s, settings) for s in sources])
        noise = images.randn(pixels.shape, generator, self.device, pixels.dtype)
        if latents is None:
            latents = images.randn(shape, generator, self.device, self.dtype)
        same_size = len({s.shape for s in sources}) == 1
        return Inputs(torch.cat(sources) if same_size else None, pixels, clip_pixels, noise, latents)

    def run(
        self,
        inputs: Inputs,
        settings: GenerationSettings,
        *,
        probe: Probe | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Denoise and decode: frames (V, F, 3, H, W) before clamping, in about [-1, 1]."""
        latents = self.denoise(inputs, settings, probe=probe, callback=callback, progress=progress)
        return self._decode(latents, settings, probe)

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
        """From inputs to clean latents (V, F, 4, h, w): the stages from the embedding of the image to the last step.

        Args:
            inputs: of ``prepare``, or replayed from a trace.
            settings: see ``GenerationSettings``.
            probe: called with the name and value of every tensor of a trace.
            callback: diffusers' ``callback_on_step_end``.
            progress: show a bar over steps.
        """
        settings, record = self.resolve(settings), probe or _ignore
        device, dtype, sampler = self.device, self.dtype, self.sampler(settings)
        for name in ("source", "image", "clip_pixels", "noise", "latents"):
            if (value := getattr(inputs, name)) is not None:
                record(f"input.{name}", value)

        # What the video shows: a CLIP token for the cross-attention, latents that every frame is given.
        with self._on_device(self.image_encoder):
            image_embeddings = self.image_embedding(inputs.clip_pixels.to(device, dtype), settings)
        record("image_embeddings", image_embeddings)
        with self._on_device(self.vae):
            image_latents = self.image_latents(inputs.image.to(device), inputs.noise.to(device), settings)
        record("image_latents", image_latents)
        videos = len(image_latents)

        # How it moves: frames per second, motion bucket, noise augmentation.
        added_time_ids = torch.as_tensor(self.time_ids(settings)).to(device, dtype).expand(videos, -1)
        record("added_time_ids", added_time_ids)

        # The noise levels to visit, and the guidance of every frame.
        sigmas = sampler.sigmas(settings).to(device)
        record("sigmas", sigmas)
        timesteps = sampler.timesteps(sigmas)
        record("timesteps", timesteps)
        guidance_scale = self.guidance_ramp(settings).to(device, dtype).expand(len(timesteps), -1)
        record("guidance_scale", guidance_scale[0].expand(videos, -1))
        guided = bool(guidance_scale.max() > 1)
        if not guided:  # one half, one pass
            settings = settings.replace(cfg="batched")

        alone = probe is None and callback is None and self._runs_own_code()
        with self._on_device(self.unet), unedited_weights() if alone else nullcontext():
            conditioning = self.condition(image_embeddings, added_time_ids, settings, guided)
            latents = sampler.initial_latents(inputs.latents.to(device, dtype), sigmas)
            for i, timestep in enumerate(self.progress_bar(timesteps) if progress else timesteps):
                model_input = sampler.model_input(latents, image_latents, sigmas[i], guided)
                record(f"model_input.{i:03}", model_input)
                noise_pred = self.predict_noise(model_input, timestep, conditioning, settings)
                if guided:
                    noise_pred_uncond, noise_pred_cond = noise_pred.chunk(2)
                    record(f"noise_pred_uncond.{i:03}", noise_pred_uncond)
                    record(f"noise_pred_cond.{i:03}", noise_pred_cond)
                    noise_pred = self.guide(noise_pred_uncond, noise_pred_cond, guidance_scale[i])
                record(f"noise_pred.{i:03}", noise_pred)
                latents = sampler.euler_step(noise_pred, latents, sigmas[i], sigmas[i + 1]).to(dtype)
                if callback is not None:
                    latents = (callback(self, i, timestep, {"latents": latents}) or {}).get("latents", latents)
                record(f"latents.{i:03}", latents)
        return latents

    @torch.no_grad()
    def _decode(self, latents: Tensor, settings: GenerationSettings, probe: Probe | None) -> Tensor:
        settings = self.resolve(settings)
        with self._on_device(self.vae), self._room_for_decode(settings):
            frames = self.decode(latents, settings)
        (probe or _ignore)("frames", frames)
        return frames


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """For schedulers whose steps draw: they do so from torch's own generators, which are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.manual_seed(seed)
        yield


_HOST = torch.device("cpu")
# Of diffusers: how accelerate spreads the networks over several devices.
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def _dtypes(given: torch.dtype | Mapping[str, torch.dtype] | None) -> dict[str, torch.dtype]:
    """A dtype for each network."""
    if not isinstance(given, Mapping):
        given = {"default": given or torch.float32}
    if others := given.keys() - {*NETWORKS, "default"}:
        raise SvdlabError(f"dtype: got {short(sorted(others)[0])}, allowed: {', '.join(NETWORKS)}, default")
    return {name: given.get(name, given.get("default", torch.float32)) for name in NETWORKS}


@cache
def _catalogue() -> Callable[..., Sequence[Change]]:
    found = tuple(entry_points(group="svdlab.bugs"))
    if len(found) != 1:
        names = ", ".join(entry.value for entry in found) or "none"
        raise SvdlabError(f"bugs: catalogues installed: {names}, allowed: one; install svdlab again")
    return found[0].load()


def _ignore(name: str, value: Tensor) -> None:
    pass
