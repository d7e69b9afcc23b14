"""Bugs planted in diffusers itself: candidates that owe nothing to svdlab's own rules.

``planted(pipe, "fps_not_decremented", ...)`` patches a loaded ``StableVideoDiffusionPipeline``, its scheduler and its
networks, and puts everything back. ``PLANTS`` holds the catalogue ("name" or "name:variant"), ``UNKNOWN`` bugs outside
of it, ``RELATED`` what can be described and not named. Each entry says which stage is wrong, and where it shows first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.models import embeddings
from diffusers.models.activations import GEGLU
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import AlphaBlender, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

Plant = Callable[[Any, ExitStack], None]


# The first recorded tensor that a stage writes, or that is made of what it writes.
SHOWS = {
    "resize_image": "input.image",
    "clip_pixels": "input.clip_pixels",
    "image_embedding": "image_embeddings",
    "image_latents": "image_latents",
    "time_ids": "added_time_ids",
    "sigmas": "sigmas",
    "timesteps": "timesteps",
    "guidance_ramp": "guidance_scale",
    "condition": "noise_pred_uncond.000",
    "initial_latents": "model_input.000",
    "model_input": "model_input.000",
    "predict_noise": "noise_pred_uncond.000",
    "guide": "noise_pred.000",
    "euler_step": "latents.000",
    "decode": "frames",
    "to_8bit": "frames_8bit",
}


@dataclass(frozen=True)
class Planted:
    """One planted bug.

    Attributes:
        plant: puts it into a pipeline until a stack closes.
        stage: the first stage that it makes wrong, a name of ``svdlab.svd.stages.STAGES``.
        place: what it changes, so that two in one place are not combined.
        first_module: the first tap that it makes wrong, where it lies inside a network.
        first_probe: the first tensor of a trace that differs; of the stage where it is not given.
        settings, unet: generation settings and options of the random checkpoint without which it does nothing.
        optional: whether a trace shows it only in a probe that has to be asked for.
    """

    plant: Plant
    stage: str
    place: str
    first_module: str | None = None
    first_probe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    unet: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_probe", self.first_probe or SHOWS[self.stage])


def patch(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object or a class until the stack closes."""
    held = vars(owner).get(name, stack)
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        object.__setattr__(owner, name, value)
    # A module's own would take the name out of its submodules.
    delete, put = (delattr, setattr) if isinstance(owner, type) else (object.__delattr__, object.__setattr__)
    restore = (lambda: delete(owner, name)) if held is stack else (lambda: put(owner, name, held))
    stack.callback(restore)


def wrap(stack: ExitStack, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by ``wrapper(original, *args, **kwargs)``."""
    original = getattr(owner, name)
    patch(stack, owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


def set_all(
    stack: ExitStack, model: nn.Module, kind: type, name: str, change: Callable[[Any], Any], inside: str = ""
) -> None:
    """Change an attribute of every module of a kind, or of those whose name contains ``inside``."""
    for path, m in model.named_modules():
        if isinstance(m, kind) and inside in f".{path}":
            patch(stack, m, name, change(getattr(m, name)))


def halves(result: Tensor, guided: bool, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a change to the conditional half of what ``_encode_*`` returns."""
    if not guided:
        return change(result)
    zeros, kept = result.chunk(2)
    return torch.cat([zeros, change(kept)])


def encode_vae_image(change: Callable[[Any, Tensor, bool], Tensor]) -> Plant:
    """A bug in the latents of the conditioning image."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        def wrapper(original: Any, image: Any, device: Any, videos: int, guided: bool) -> Tensor:
            made = original(image, device=device, num_videos_per_prompt=videos, do_classifier_free_guidance=guided)
            return change(pipe, made, guided)

        # The pipeline calls it with keywords.
        wrap(
            stack,
            pipe,
            "_encode_vae_image",
            lambda original, image, device, num_videos_per_prompt, do_classifier_free_guidance: wrapper(
                original, image, device, num_videos_per_prompt, do_classifier_free_guidance
            ),
        )

    return plant


def seen_pixels(pipe: Any, stack: ExitStack) -> dict[str, Tensor]:
    """Holds under "image" what the preprocessing made last: the pixels before the noise augmentation."""
    seen: dict[str, Tensor] = {}

    def preprocess(original: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen["image"] = original(*args, **kwargs)
        return seen["image"]

    wrap(stack, pipe.video_processor, "preprocess", preprocess)
    return seen


def clean_pixels(after: Callable[[Tensor, float, bool], Tensor]) -> Plant:
    """Encode the pixels as they were before the noise augmentation, then do something to the latents."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        seen = seen_pixels(pipe, stack)

        def encode(original: Any, image: Tensor, **kwargs: Any) -> Tensor:
            clean = seen["image"].to(image)
            strength = float((image - clean).std())  # the noise has unit variance
            latents = original(clean, **kwargs)
            return after(latents, strength, kwargs["do_classifier_free_guidance"])

        wrap(stack, pipe, "_encode_vae_image", encode)

    return plant


def noise_on_latents(latents: Tensor, strength: float, guided: bool) -> Tensor:
    generator = torch.Generator().manual_seed(77)
    return halves(latents, guided, lambda z: z + strength * torch.randn(z.shape, generator=generator).to(z))


def sampled(pipe: Any, stack: ExitStack) -> None:
    generator = torch.Generator().manual_seed(78)
    patch(stack, DiagonalGaussianDistribution, "mode", lambda self: self.sample(generator=generator))


def time_ids(change: Callable[[int, int, float], tuple[float, float, float]]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        def wrapper(original: Any, fps: int, motion: int, noise: float, *rest: Any) -> Tensor:
            return original(*change(fps, motion, noise), *rest)

        wrap(stack, pipe, "_get_add_time_ids", wrapper)

    return plant


def timesteps(factor: float) -> Plant:
    """diffusers' timesteps are 0.25 ln(sigma)."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        def wrapper(original: Any, *args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            pipe.scheduler.timesteps = pipe.scheduler.timesteps * factor

        wrap(stack, pipe.scheduler, "set_timesteps", wrapper)

    return plant


def guidance(before_unet: Callable[[Tensor, int, int], Tensor], after_unet: Callable[[Tensor], Tensor]) -> Plant:
    """The scale that the UNet's caller sees before the pass (which is recorded), and the one used after it."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        state: dict[str, Any] = {}

        def before(m: nn.Module, args: Any, kwargs: Any) -> None:
            if pipe.unet_step == 0:
                state["ramp"] = pipe._guidance_scale
            pipe._guidance_scale = before_unet(state["ramp"], pipe.unet_step, pipe.num_timesteps)

        def after(m: nn.Module, args: Any, output: Any) -> None:
            pipe._guidance_scale = after_unet(pipe._guidance_scale)
            pipe.unet_step += 1

        def reset(original: Any, *args: Any, **kwargs: Any) -> Any:
            object.__setattr__(pipe, "unet_step", 0)
            return original(*args, **kwargs)

        # Whether there is guidance at all is asked in every step, of a scale that may now be at most 1.
        patch(stack, type(pipe), "do_classifier_free_guidance", property(lambda self: True))
        patch(stack, pipe, "unet_step", 0)
        wrap(stack, pipe, "prepare_latents", reset)
        stack.callback(pipe.unet.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(pipe.unet.register_forward_hook(after).remove)

    return plant


def ramp_over_steps(ramp: Tensor, step: int, steps: int) -> Tensor:
    low, high = float(ramp[0, 0]), float(ramp[0, -1])
    return torch.full_like(ramp, float(torch.linspace(low, high, steps)[step]))


def keep(scale: Tensor) -> Tensor:
    return scale


def scheduler_property(value: Callable[[Any], Any]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        patch(stack, type(pipe.scheduler), "init_noise_sigma", property(value))

    return plant


def unscaled_input(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        original(sample, timestep)  # it also keeps the step's index
        return sample

    wrap(stack, pipe.scheduler, "scale_model_input", wrapper)


def linear_sigmas(pipe: Any, stack: ExitStack) -> None:
    config = pipe.scheduler.config

    def convert(in_sigmas: Any, num_inference_steps: int) -> np.ndarray:
        return np.linspace(config.sigma_max, config.sigma_min, num_inference_steps)

    patch(stack, pipe.scheduler, "_convert_to_karras", convert)


def epsilon(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
        pipe.scheduler.register_to_config(prediction_type="epsilon")
        try:
            return original(*args, **kwargs)
        finally:
            pipe.scheduler.register_to_config(prediction_type="v_prediction")

    wrap(stack, pipe.scheduler, "step", wrapper)


# --- the resize for CLIP, and what CLIP is given ---


def resized_for_clip(**how: Any) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        def resize(image: Tensor, size: tuple[int, int], *args: Any, **kwargs: Any) -> Tensor:
            return F.interpolate(image, size=size, **how)

        patch(stack, module, "_resize_with_antialiasing", resize)

    return plant


def frame_for_clip(**how: Any) -> Plant:
    """The frame of the VAE instead of the image as given, in diffusers' own resize if ``how`` names no other."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        size: dict[str, int] = {}

        def check(original: Any, image: Any, height: int, width: int) -> None:
            size.update(height=height, width=width)
            original(image, height, width)

        def encode(original: Any, images: Any, *args: Any, **kwargs: Any) -> Tensor:
            resample = PIL.Image.Resampling[pipe.video_processor.config.resample.upper()]  # the port's own
            frames = [image.resize((size["width"], size["height"]), resample) for image in images]
            return original(frames, *args, **kwargs)

        wrap(stack, pipe, "check_inputs", check)
        wrap(stack, pipe, "_encode_image", encode)
        if how:
            resized_for_clip(**how)(pipe, stack)

    return plant


def unnormalised(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "do_normalize": False})

    wrap(stack, pipe.feature_extractor, "preprocess", wrapper)


def statistics_of_minus_one_to_one(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, images: Any, **kwargs: Any) -> Any:
        return original(images * 2 - 1, **kwargs)

    wrap(stack, pipe.feature_extractor, "preprocess", wrapper)


def minus_one_to_one(pipe: Any, stack: ExitStack) -> None:
    unnormalised(pipe, stack)
    statistics_of_minus_one_to_one(pipe, stack)


def padded_on_all_sides(pipe: Any, stack: ExitStack) -> None:
    for block in pipe.vae.encoder.down_blocks:
        for sampler in block.downsamplers or ():
            patch(stack, sampler, "padding", 1)  # no padding of its own
            patch(stack, sampler.conv, "padding", (1, 1))


def keep_embedding(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, image: Any, device: Any, videos: int, guided: bool) -> Tensor:
        result = original(image, device, videos, guided)
        return torch.cat([result.chunk(2)[1]] * 2) if guided else result

    wrap(stack, pipe, "_encode_image", wrapper)


def swap_alpha(name: str, inside: str = "") -> Plant:
    return lambda pipe, stack: set_all(
        stack,
        getattr(pipe, name),
        AlphaBlender,
        "switch_spatial_to_temporal_mix",
        lambda switched: not switched,
        inside,
    )


def no_positions(pipe: Any, stack: ExitStack) -> None:
    for name, m in pipe.unet.named_modules():
        if name.endswith("time_pos_embed"):
            stack.callback(m.register_forward_hook(lambda m, args, output: torch.zeros_like(output)).remove)


def sine_first(pipe: Any, stack: ExitStack) -> None:
    set_all(stack, pipe.unet, Timesteps, "flip_sin_to_cos", lambda cosine_first: False)


def tanh_gelu(pipe: Any, stack: ExitStack) -> None:
    patch(stack, GEGLU, "gelu", lambda self, gate: F.gelu(gate, approximate="tanh"))


def exchanged_halves(pipe: Any, stack: ExitStack) -> None:
    """The projection's rows in the other order: GELU of the first half."""

    def after(m: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.roll(output, output.shape[-1] // 2, -1)

    for m in pipe.unet.modules():
        if isinstance(m, GEGLU):
            stack.callback(m.proj.register_forward_hook(after).remove)


def position_first(pipe: Any, stack: ExitStack) -> None:
    """The spatial block's input has the frame positions added, and the temporal block gets the same."""
    for m in pipe.unet.modules():
        if isinstance(m, TransformerSpatioTemporalModel):
            held: dict[str, Tensor] = {}

            def embedded(module: nn.Module, args: Any, output: Tensor, held: dict[str, Tensor] = held) -> None:
                held["positions"] = output[:, None, :]

            def spatial(module: nn.Module, args: Any, held: dict[str, Tensor] = held) -> Any:
                held["input"] = args[0] + held["positions"]
                return (held["input"], *args[1:])

            def temporal(module: nn.Module, args: Any, held: dict[str, Tensor] = held) -> Any:
                return (held["input"], *args[1:])

            stack.callback(m.time_pos_embed.register_forward_hook(embedded).remove)
            for block in m.transformer_blocks:
                stack.callback(block.register_forward_pre_hook(spatial).remove)
            for block in m.temporal_transformer_blocks:
                stack.callback(block.register_forward_pre_hook(temporal).remove)


def no_exponential(pipe: Any, stack: ExitStack) -> None:
    """``torch.exp`` is what the embedding calls; there it does nothing."""

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return (lambda x: x) if name == "exp" else getattr(torch, name)

    patch(stack, embeddings, "torch", Torch())


def shift_one(inside: str = "") -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        for name, m in pipe.unet.named_modules():
            if isinstance(m, Timesteps) and (name == inside or not inside or ("." in inside and inside in name)):
                patch(stack, m, "downscale_freq_shift", 1)

    return plant


def up_heads_as_down(pipe: Any, stack: ExitStack) -> None:
    heads = pipe.unet.config.num_attention_heads
    for i, block in enumerate(pipe.unet.up_blocks):
        for m in block.modules():
            if isinstance(m, Attention):
                patch(stack, m, "heads", heads[i])


def norm_per_frame(name: str) -> Plant:
    def norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
        frames = [F.group_norm(one, self.num_groups, self.weight, self.bias, self.eps) for one in x.unbind(2)]
        return torch.stack(frames, dim=2)

    def plant(pipe: Any, stack: ExitStack) -> None:
        for m in getattr(pipe, name).modules():
            if isinstance(m, TemporalResnetBlock):
                for one in (m.norm1, m.norm2):
                    patch(stack, one, "forward", functools.partial(norm, one))

    return plant


def c_skip_root(pipe: Any, stack: ExitStack) -> None:
    """prev = sample + (sample - x0) / sigma * (next - sigma): an error in x0 is added times 1 - next / sigma."""

    def wrapper(original: Any, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        if pipe.scheduler.step_index is None:
            pipe.scheduler._init_step_index(timestep)
        index = pipe.scheduler.step_index
        sigma, following = (float(s) for s in pipe.scheduler.sigmas[index : index + 2])
        result = original(model_output, timestep, sample, **kwargs)
        error = (1 / math.sqrt(sigma**2 + 1) - 1 / (sigma**2 + 1)) * (1 - following / sigma)
        result.prev_sample = (result.prev_sample.double() + error * sample.double()).to(model_output.dtype)
        return result

    wrap(stack, pipe.scheduler, "step", wrapper)


def eps(names: tuple[str, ...], value: float, inside: str = "") -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        for name in names:
            set_all(stack, getattr(pipe, name), nn.GroupNorm, "eps", lambda _: value, inside)

    return plant


def decode(change: Callable[[Any, Tensor, int, int], tuple[Tensor, int, int]]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        def wrapper(original: Any, latents: Tensor, frames: int, chunk: int) -> Tensor:
            return original(*change(pipe, latents, frames, chunk))

        wrap(stack, pipe, "decode_latents", wrapper)

    return plant


# --- met in public ---


def frame_resize(resample: str) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        held = pipe.video_processor.config.resample
        pipe.video_processor.register_to_config(resample=resample)
        stack.callback(pipe.video_processor.register_to_config, resample=held)

    return plant


def keys_cubic(parameter: float) -> Plant:
    """diffusers' blur, and Keys's cubic convolution written out."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return (parameter + 2) * x**3 - (parameter + 3) * x**2 + 1
        return parameter * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    def matrix(size: int, into: int) -> np.ndarray:
        made = np.zeros((into, size))
        for row in range(into):
            at = row * (size - 1) / (into - 1)
            for tap in range(int(at) - 1, int(at) + 3):
                made[row, min(max(tap, 0), size - 1)] += kernel(at - tap)
        return made

    def plant(pipe: Any, stack: ExitStack) -> None:
        def interpolate(image: Tensor, size: tuple[int, int], **how: Any) -> Tensor:
            down, across = (matrix(side, to) for side, to in zip(image.shape[-2:], size, strict=True))
            made = np.einsum("yh,xw,bchw->bcyx", down, across, image.double().numpy(), optimize=True)
            return torch.from_numpy(made).to(image)

        class Functional:
            def __getattr__(self, name: str) -> Any:
                return interpolate if name == "interpolate" else getattr(torch.nn.functional, name)

        class Module:
            functional = Functional()

        class Torch:
            nn = Module()

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

        # Only while the image is resized for CLIP.
        original = module._resize_with_antialiasing

        def resize(*args: Any, **kwargs: Any) -> Tensor:
            with ExitStack() as inner:
                patch_global(inner, module, "torch", Torch())
                return original(*args, **kwargs)

        patch(stack, module, "_resize_with_antialiasing", resize)

    return plant


def patch_global(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def clip_processor(pipe: Any, stack: ExitStack) -> None:
    """CLIP's own preprocessing of the image as given: shorter side to 224, centre crop, 8 bits."""

    def encode(original: Any, images: Any, *args: Any, **kwargs: Any) -> Tensor:
        size = pipe.image_encoder.config.image_size
        cropped = []
        for image in images:
            scale = size / min(image.size)
            resized = image.resize([int(scale * side) for side in image.size], PIL.Image.Resampling.BICUBIC)
            left, top = ((side - size) // 2 for side in resized.size)
            cropped.append(resized.crop((left, top, left + size, top + size)))
        return original(cropped, *args, **kwargs)

    wrap(stack, pipe, "_encode_image", encode)
    # The image has its size already: without the blur of a resize that does nothing.
    patch(stack, module, "_resize_with_antialiasing", lambda image, size: image)


def comfy_crop(pipe: Any, stack: ExitStack) -> None:
    """The middle of the image, resized in torch with its antialiasing, without 8 bits."""

    def resize(image: Tensor, size: tuple[int, int], *args: Any, **kwargs: Any) -> Tensor:
        scale = size[0] / min(image.shape[-2:])
        sides = [round(side * scale) for side in image.shape[-2:]]
        made = F.interpolate((image + 1) / 2, size=sides, mode="bicubic", antialias=True) * 2 - 1
        top, left = ((side - size[0]) // 2 for side in sides)
        return made[:, :, top : top + size[0], left : left + size[0]]

    patch(stack, module, "_resize_with_antialiasing", resize)


def eight_bits_for_clip(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, images: Tensor, **kwargs: Any) -> Any:
        return original(torch.round(images.clip(0, 1) * 255) / 255, **kwargs)

    wrap(stack, pipe.feature_extractor, "preprocess", wrapper)


def clip_activation(function: Callable[[Tensor], Tensor]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        for layer in pipe.image_encoder.vision_model.encoder.layers:
            patch(stack, layer.mlp, "activation_fn", function)

    return plant


def layer_norm_eps(name: str, value: float) -> Plant:
    return lambda pipe, stack: set_all(stack, getattr(pipe, name), nn.LayerNorm, "eps", lambda _: value)


def noise_on_unit_pixels(pipe: Any, stack: ExitStack) -> None:
    """The sum is taken in [0, 1], and brought to [-1, 1] behind it: what was added then counts twice."""
    seen = seen_pixels(pipe, stack)

    def encode(original: Any, image: Tensor, **kwargs: Any) -> Tensor:
        clean = seen["image"].to(image)
        return original(((clean + 1) / 2 + (image - clean)) * 2 - 1, **kwargs)

    wrap(stack, pipe, "_encode_vae_image", encode)


def not_upcast(pipe: Any, stack: ExitStack) -> None:
    held = pipe.vae.config.force_upcast
    pipe.vae.register_to_config(force_upcast=False)
    stack.callback(pipe.vae.register_to_config, force_upcast=held)


def repeated_embeddings(pipe: Any, stack: ExitStack) -> None:
    """[0, e, 0, e] for the UNet, whose halves are [0, 0] and [e, e]."""

    def forward(original: Any, sample: Tensor, t: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        zeros, kept = encoder_hidden_states.chunk(2)
        mixed = torch.stack([zeros, kept], dim=1).flatten(0, 1)
        return original(sample, t, encoder_hidden_states=mixed, **kwargs)

    wrap(stack, pipe.unet, "forward", forward)


def context_order(pipe: Any, stack: ExitStack) -> None:
    def before(m: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        context, pixels = kwargs["encoder_hidden_states"], args[0].shape[1]
        videos = context.reshape(-1, pixels, *context.shape[1:])
        return args, {**kwargs, "encoder_hidden_states": videos.transpose(0, 1).reshape(context.shape)}

    for m in pipe.unet.modules():
        if isinstance(m, TemporalBasicTransformerBlock):
            stack.callback(m.register_forward_pre_hook(before, with_kwargs=True).remove)


def set_weight(stack: ExitStack, owner: nn.Module, name: str, value: Tensor) -> None:
    """Another parameter until the stack closes."""
    held = owner._parameters[name]
    owner._parameters[name] = nn.Parameter(value.detach().clone().contiguous(), requires_grad=False)
    stack.callback(owner._parameters.__setitem__, name, held)


def ff_for_ff_in(pipe: Any, stack: ExitStack) -> None:
    for m in pipe.unet.modules():
        if isinstance(m, TemporalBasicTransformerBlock):
            for one, other in zip(m.ff_in.modules(), m.ff.modules(), strict=True):
                for name, value in other._parameters.items():
                    set_weight(stack, one, name, value)


def reweighted(change: Callable[[str, nn.Module], tuple[str, Tensor] | None]) -> Plant:
    """Another weight or bias where ``change`` gives one."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        for name, m in pipe.unet.named_modules():
            if (changed := change(name, m)) is not None:
                set_weight(stack, m, *changed)

    return plant


def without_bias(ending: str) -> Plant:
    return reweighted(lambda name, m: ("bias", torch.zeros_like(m.bias)) if name.endswith(ending) else None)


def transposed(name: str, m: nn.Module) -> tuple[str, Tensor] | None:
    if name.endswith((".attn1.to_q", ".attn1.to_k", ".attn1.to_v")):
        return "weight", m.weight.t()
    return None


def height_and_width_exchanged(name: str, m: nn.Module) -> tuple[str, Tensor] | None:
    return ("weight", m.weight.permute(0, 1, 3, 2)) if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) else None


def backwards_in_time(name: str, m: nn.Module) -> tuple[str, Tensor] | None:
    return ("weight", m.weight[:, :, [2, 1, 0]]) if isinstance(m, nn.Conv3d) else None


def heads_of_level(heads: Callable[[list[int], list[int]], list[int]]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        config = pipe.unet.config
        wrong = heads(list(config.num_attention_heads), list(config.block_out_channels))
        for blocks, of in ((pipe.unet.down_blocks, wrong), (pipe.unet.up_blocks, wrong[::-1])):
            for block, number in zip(blocks, of, strict=True):
                set_all(stack, block, Attention, "heads", lambda _, number=number: number)
        set_all(stack, pipe.unet.mid_block, Attention, "heads", lambda _: wrong[-1])

    return plant


def timestep_rounded(dtype: torch.dtype) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        def before(m: nn.Module, args: Any) -> Any:
            return (args[0].to(dtype),)

        stack.callback(pipe.unet.time_proj.register_forward_pre_hook(before).remove)

    return plant


def sinusoids_in_float16(pipe: Any, stack: ExitStack) -> None:
    def embedding(timesteps: Tensor, dim: int, **how: Any) -> Tensor:
        half = dim // 2
        frequencies = np.exp(-np.log(np.float32(10000)) / half * np.arange(half, dtype=np.float32)).astype(np.float16)
        angles = timesteps.float().numpy().astype(np.float16)[:, None] * frequencies
        both = np.concatenate([np.cos(angles.astype(np.float32)), np.sin(angles.astype(np.float32))], axis=1)
        return torch.from_numpy(both.astype(np.float16).astype(np.float32))

    patch(stack, embeddings, "get_timestep_embedding", embedding)


def statistics_in_float16(pipe: Any, stack: ExitStack) -> None:
    def norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
        groups = x.reshape(x.shape[0], self.num_groups, -1)
        variance, mean = torch.var_mean(groups, dim=2, keepdim=True, correction=0)
        normal = (groups - mean.half().to(x.dtype)) / torch.sqrt(variance.half().to(x.dtype) + self.eps)
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        return normal.reshape(x.shape) * self.weight.reshape(shape) + self.bias.reshape(shape)

    for m in pipe.unet.modules():
        if isinstance(m, nn.GroupNorm):
            patch(stack, m, "forward", functools.partial(norm, m))


def self_attention(change: Callable[[Tensor], Tensor]) -> Plant:
    """The scores q k / sqrt(d) changed, in the UNet's self-attention."""

    class Processor:
        def __call__(
            self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
        ) -> Tensor:
            q, k, v = (
                attn.head_to_batch_dim(to(hidden_states)) for to in (attn.to_q, attn.to_k, attn.to_v)
            )  # (batch * heads, length, d)
            scores = change(torch.einsum("nqd,nkd->nqk", q, k) / math.sqrt(q.shape[-1]))
            mixed = attn.batch_to_head_dim(torch.softmax(scores, dim=-1) @ v)
            return attn.to_out[0](mixed)

    def plant(pipe: Any, stack: ExitStack) -> None:
        for name, m in pipe.unet.named_modules():
            if name.endswith("attn1"):
                patch(stack, m, "processor", Processor())

    return plant


def scores_times(power: float) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        for name, m in pipe.unet.named_modules():
            if name.endswith("attn1"):
                factor = (m.to_q.out_features // m.heads) ** power
                set_weight(stack, m.to_q, "weight", m.to_q.weight * factor)

    return plant


def falling_ramp(ramp: Tensor, step: int, steps: int) -> Tensor:
    return ramp.flip(1)


def ramp_without_end(ramp: Tensor, step: int, steps: int) -> Tensor:
    low, high, frames = float(ramp[0, 0]), float(ramp[0, -1]), ramp.shape[1]
    at = torch.arange(frames, dtype=ramp.dtype) / frames
    return (low + (high - low) * at).reshape(1, -1, *(1 for _ in ramp.shape[2:])).expand_as(ramp).contiguous()


def other_ramp(low: float, high: float) -> Callable[[Tensor, int, int], Tensor]:
    """The same in every step, whatever was asked for."""

    def ramp(given: Tensor, step: int, steps: int) -> Tensor:
        scale = low + (high - low) * torch.arange(given.shape[1], dtype=given.dtype) / max(given.shape[1] - 1, 1)
        return scale.view(1, -1, *(1 for _ in given.shape[2:])).expand_as(given).contiguous()

    return ramp


def truncated(pipe: Any, stack: ExitStack) -> None:
    """8-bit pictures of the integer part of the levels."""

    def pictures(images: np.ndarray) -> list[PIL.Image.Image]:
        return [PIL.Image.fromarray((255 * image).astype(np.uint8)) for image in images]

    patch(stack, pipe.video_processor, "numpy_to_pil", pictures)


def told_one_frame(pipe: Any, stack: ExitStack) -> None:
    """Each chunk is decoded as so many clips of one frame."""

    def wrapper(original: Any, z: Tensor, num_frames: int, **kwargs: Any) -> Any:
        return original(z, num_frames=1, **kwargs)

    wrap(stack, pipe.vae, "decode", wrapper)


HALF = {"dtype": "float16"}
# As deep as it takes for a level to have another one before and behind it.
THREE_LEVELS: dict[str, Any] = dict(
    block_out_channels=(32, 64, 64),
    down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
    up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
    num_attention_heads=(2, 4, 8),
)
# Where sigma_max and sqrt(sigma_max^2 + 1) differ by more than rounding.
LOW_SIGMAS = {"sigmas": (6.0, 2.0, 0.4, 0.0)}
PLANTS: dict[str, Planted] = {
    "fps_not_decremented": Planted(time_ids(lambda f, m, n: (f + 1, m, n)), "time_ids", "fps"),
    "timestep_unscaled": Planted(timesteps(4.0), "timesteps", "timesteps"),
    "timestep_negated": Planted(timesteps(-4.0), "timesteps", "timesteps"),
    "noise_aug_after_encode": Planted(clean_pixels(noise_on_latents), "image_latents", "noise_aug"),
    "noise_aug_missing": Planted(clean_pixels(lambda z, strength, guided: z), "image_latents", "noise_aug"),
    "guidance_per_step": Planted(
        guidance(ramp_over_steps, keep), "guidance_ramp", "guidance", settings={"num_inference_steps": 2}
    ),
    "guidance_constant": Planted(
        guidance(lambda ramp, step, steps: torch.full_like(ramp, float(ramp.max())), keep), "guidance_ramp", "guidance"
    ),
    # uncond + (1 - s)(cond - uncond) = cond + s (uncond - cond)
    "guidance_swapped": Planted(guidance(lambda ramp, step, steps: ramp, lambda scale: 1 - scale), "guide", "guidance"),
    "image_latents_scaled": Planted(
        encode_vae_image(lambda pipe, z, guided: z * pipe.vae.config.scaling_factor), "image_latents", "scaled"
    ),
    "image_latents_sampled": Planted(sampled, "image_latents", "posterior"),
    "uncond_latents_kept": Planted(
        encode_vae_image(lambda pipe, z, guided: torch.cat([z.chunk(2)[1]] * 2) if guided else z),
        "model_input",
        "uncond_latents",
    ),
    "uncond_embedding_kept": Planted(keep_embedding, "condition", "uncond_embedding"),
    "time_ids_reordered": Planted(time_ids(lambda f, m, n: (m, f, n)), "time_ids", "order"),
    "init_noise_unscaled": Planted(
        scheduler_property(lambda self: self.sigmas.max()), "initial_latents", "init", settings=LOW_SIGMAS
    ),
    "init_noise_unscaled:unit": Planted(scheduler_property(lambda self: 1.0), "initial_latents", "init"),
    "model_input_unscaled": Planted(unscaled_input, "model_input", "model_input"),
    "sigmas_not_karras": Planted(
        linear_sigmas,
        "sigmas",
        "sigmas",
        settings={"num_inference_steps": 3},  # two steps have no sigma between the ends
    ),
    "prediction_epsilon": Planted(epsilon, "euler_step", "prediction"),
    "clip_no_antialias": Planted(resized_for_clip(mode="bicubic", align_corners=True), "clip_pixels", "clip_resize"),
    "clip_resize_nearest": Planted(frame_for_clip(mode="nearest"), "clip_pixels", "clip_resize"),
    "clip_resize_bilinear": Planted(frame_for_clip(mode="bilinear"), "clip_pixels", "clip_resize"),
    "clip_resize_bicubic": Planted(resized_for_clip(mode="bicubic"), "clip_pixels", "clip_resize"),
    "clip_from_resized_frame": Planted(frame_for_clip(), "clip_pixels", "clip_resize"),
    "clip_unnormalised": Planted(unnormalised, "clip_pixels", "clip_normalise"),
    "clip_fed_minus_one_to_one": Planted(statistics_of_minus_one_to_one, "clip_pixels", "clip_normalise"),
    "clip_fed_minus_one_to_one:raw": Planted(minus_one_to_one, "clip_pixels", "clip_normalise"),
    "quick_gelu": Planted(clip_activation(QuickGELUActivation()), "image_embedding", "clip_gelu"),
    "vae_encoder_padding_symmetric": Planted(padded_on_all_sides, "image_latents", "encoder_padding"),
    "c_skip_with_square_root": Planted(c_skip_root, "euler_step", "prediction"),
    "alpha_swapped_unet": Planted(swap_alpha("unet"), "predict_noise", "alpha_unet"),
    "transformer_alpha_swapped": Planted(swap_alpha("unet", ".attentions."), "predict_noise", "alpha_unet"),
    "alpha_swapped_vae": Planted(swap_alpha("vae"), "decode", "alpha_vae"),
    "frame_position_missing": Planted(no_positions, "predict_noise", "positions"),
    "frame_position_first_parallel": Planted(position_first, "predict_noise", "positions"),
    "sincos_order": Planted(sine_first, "predict_noise", "sincos"),
    "sinusoids_without_exp": Planted(no_exponential, "predict_noise", "frequencies"),
    "sinusoids_shift_one": Planted(shift_one(), "predict_noise", "frequencies"),
    "sinusoids_shift_one:time": Planted(shift_one("time_proj"), "predict_noise", "frequencies"),
    "sinusoids_shift_one:added": Planted(shift_one("add_time_proj"), "predict_noise", "frequencies"),
    "sinusoids_shift_one:frames": Planted(shift_one(".attentions."), "predict_noise", "frequencies"),
    "gelu_tanh": Planted(tanh_gelu, "predict_noise", "gelu"),
    "geglu_halves_exchanged": Planted(exchanged_halves, "predict_noise", "geglu"),
    "heads_not_reversed": Planted(up_heads_as_down, "predict_noise", "heads"),
    "temporal_group_norm_per_frame_unet": Planted(norm_per_frame("unet"), "predict_noise", "temporal_norm_unet"),
    "temporal_group_norm_per_frame_vae": Planted(norm_per_frame("vae"), "decode", "temporal_norm_vae"),
    "group_norm_eps": Planted(eps(("unet", "vae"), 1e-5), "image_latents", "eps"),
    "group_norm_eps:unet": Planted(eps(("unet",), 1e-6), "predict_noise", "eps"),
    "resnet_norm_eps": Planted(eps(("unet",), 1e-5, "res_block"), "predict_noise", "eps"),
    "group_norm_eps:vae_temporal": Planted(eps(("vae",), 1e-6, "temporal_res_block"), "decode", "eps"),
    "decode_unscaled": Planted(
        decode(lambda pipe, z, frames, chunk: (z * pipe.vae.config.scaling_factor, frames, chunk)), "decode", "unscale"
    ),
    "decode_chunked": Planted(decode(lambda pipe, z, frames, chunk: (z, frames, 2)), "decode", "chunk"),
    "decode_chunked:1": Planted(decode(lambda pipe, z, frames, chunk: (z, frames, 1)), "decode", "chunk"),
    "decode_chunked:3": Planted(decode(lambda pipe, z, frames, chunk: (z, frames, 3)), "decode", "chunk"),
    "frame_resize_bilinear": Planted(frame_resize("bilinear"), "resize_image", "frame_resize"),
    "frame_resize_bicubic": Planted(frame_resize("bicubic"), "resize_image", "frame_resize"),
    "clip_bicubic_parameter": Planted(keys_cubic(-0.5), "clip_pixels", "clip_resize"),
    "clip_centre_crop": Planted(comfy_crop, "clip_pixels", "clip_resize"),
    "clip_centre_crop:8bit": Planted(clip_processor, "clip_pixels", "clip_resize"),
    "clip_8bit": Planted(eight_bits_for_clip, "clip_pixels", "clip_rounding"),
    "clip_gelu_tanh": Planted(
        clip_activation(functools.partial(F.gelu, approximate="tanh")), "image_embedding", "clip_gelu"
    ),
    "clip_layer_norm_eps": Planted(layer_norm_eps("image_encoder", 1e-6), "image_embedding", "clip_eps"),
    "noise_aug_on_unit_pixels": Planted(noise_on_unit_pixels, "image_latents", "noise_aug"),
    "vae_not_upcast": Planted(not_upcast, "image_latents", "upcast", settings=HALF),
    "guidance_ramp_ends": Planted(guidance(falling_ramp, keep), "guidance_ramp", "guidance"),
    # Of four frames it is the original's ramp, to 2.5.
    "guidance_ramp_ends:open": Planted(
        guidance(ramp_without_end, keep), "guidance_ramp", "guidance", settings={"num_frames": 3}
    ),
    "clips_repeated_after_guidance": Planted(
        repeated_embeddings, "condition", "repeat", settings={"num_videos_per_prompt": 2}
    ),
    "temporal_context_order": Planted(context_order, "predict_noise", "context"),
    "ff_in_replaced_by_ff": Planted(ff_for_ff_in, "predict_noise", "ff_in"),
    "head_counts": Planted(
        heads_of_level(lambda heads, channels: [*heads[:-2], heads[-3], heads[-1]]),
        "predict_noise",
        "heads",
        unet=THREE_LEVELS,
    ),
    "head_counts:of_channels": Planted(
        heads_of_level(lambda heads, channels: [c // h for h, c in zip(heads, channels, strict=True)]),
        "predict_noise",
        "heads",
    ),
    "timestep_in_half": Planted(
        timestep_rounded(torch.float16),
        "predict_noise",
        "timestep_dtype",
        settings={"num_inference_steps": 3},  # the first step's is hardly rounded
    ),
    "timestep_in_half:bfloat16": Planted(timestep_rounded(torch.bfloat16), "predict_noise", "timestep_dtype"),
    "sinusoids_in_half": Planted(sinusoids_in_float16, "predict_noise", "frequencies"),
    "norm_statistics_in_half": Planted(statistics_in_float16, "predict_noise", "statistics"),
    "attention_scores_in_half": Planted(
        self_attention(lambda scores: scores.half().to(scores.dtype)),
        "predict_noise",
        "scores",
        settings={"num_inference_steps": 3},  # where a rounding falls depends on the processor
    ),
    "attention_unscaled": Planted(scores_times(0.5), "predict_noise", "scores"),
    "attention_scaled_twice": Planted(scores_times(-0.5), "predict_noise", "scores"),
    "bias_missing": Planted(without_bias(".to_out.0"), "predict_noise", "bias"),
    "bias_missing:proj_in": Planted(without_bias(".proj_in"), "predict_noise", "bias"),
    "linear_weights_transposed": Planted(reweighted(transposed), "predict_noise", "transposed"),
    "conv_weight_axes": Planted(reweighted(height_and_width_exchanged), "predict_noise", "conv_axes"),
    "conv_weight_axes:time": Planted(reweighted(backwards_in_time), "predict_noise", "conv_axes"),
    "layer_norm_eps": Planted(layer_norm_eps("unet", 1e-6), "predict_noise", "layer_norm_eps"),
    "decode_chunked:num_frames": Planted(told_one_frame, "decode", "chunk"),
    "guidance_ramp_of_original": Planted(guidance(other_ramp(1.0, 2.5), keep), "guidance_ramp", "guidance"),
    "guidance_ramp_of_original:svd_xt": Planted(guidance(other_ramp(1.5, 3.0), keep), "guidance_ramp", "guidance"),
    "frames_truncated": Planted(truncated, "to_8bit", "levels", optional=True),
}
# What Stability's own code does; each in its first form.
DEPARTURES = (
    *("clip_from_resized_frame", "fps_not_decremented", "guidance_ramp_of_original", "resnet_norm_eps"),
    *("decode_chunked", "frames_truncated"),
)


# --- outside the catalogue ---


def heads_reversed(pipe: Any, stack: ExitStack) -> None:
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1

    def before(m: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].unflatten(-1, (attention.heads, -1)).flip(-2).flatten(-2),)

    stack.callback(attention.to_out[0].register_forward_pre_hook(before).remove)


def positions_from_one(pipe: Any, stack: ExitStack) -> None:
    for name, m in pipe.unet.named_modules():
        if name.endswith("time_proj") and "attentions" in name:
            stack.callback(m.register_forward_pre_hook(lambda m, args: (args[0] + 1,)).remove)


def reflect_padding(pipe: Any, stack: ExitStack) -> None:
    patch(stack, pipe.unet.down_blocks[0].resnets[0].spatial_res_block.conv1, "padding_mode", "reflect")


def skips_swapped(pipe: Any, stack: ExitStack) -> None:
    def before(m: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        skips = kwargs["res_hidden_states_tuple"]
        assert skips[-1].shape == skips[-2].shape
        return args, {**kwargs, "res_hidden_states_tuple": (*skips[:-2], skips[-1], skips[-2])}

    stack.callback(pipe.unet.up_blocks[-1].register_forward_pre_hook(before, with_kwargs=True).remove)


def stale_latents(pipe: Any, stack: ExitStack) -> None:
    held: dict[str, Tensor] = {}

    def wrapper(original: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        stale = held.get("sample", sample) if pipe.scheduler.step_index else sample
        held["sample"] = sample
        return original(stale, timestep)

    wrap(stack, pipe.scheduler, "scale_model_input", wrapper)


def output_of(path: str, change: Callable[[Tensor], Tensor]) -> Plant:
    """Another output of one module, named as its tap is."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        network, _, inside = path.partition(".")
        m = getattr(pipe, network).get_submodule(inside)
        stack.callback(m.register_forward_hook(lambda m, args, output: change(output)).remove)

    return plant


def preprocessed(change: Callable[[Tensor], Tensor]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        wrap(stack, pipe.video_processor, "preprocess", lambda original, *a, **k: change(original(*a, **k)))

    return plant


def given_to_clip(change: Callable[[Tensor], Tensor]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        wrap(stack, pipe.feature_extractor, "preprocess", lambda original, x, **k: original(change(x), **k))

    return plant


def schedule(change: Callable[[Tensor], Tensor]) -> Plant:
    """Other sigmas; the timesteps are made of diffusers' own."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        def wrapper(original: Any, *args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            pipe.scheduler.sigmas = change(pipe.scheduler.sigmas)

        wrap(stack, pipe.scheduler, "set_timesteps", wrapper)

    return plant


def step_result(change: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    """Another result of the Euler step, of itself and of the sample before it."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        def wrapper(original: Any, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            result = original(model_output, timestep, sample, **kwargs)
            result.prev_sample = change(result.prev_sample, sample)
            return result

        wrap(stack, pipe.scheduler, "step", wrapper)

    return plant


def embedding_scaled(pipe: Any, stack: ExitStack) -> None:
    """To unit length, as CLIP's similarities have it."""

    def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        result.image_embeds = F.normalize(result.image_embeds, dim=-1)
        return result

    wrap(stack, pipe.image_encoder, "forward", wrapper)


def first_frame_alone(pipe: Any, stack: ExitStack) -> None:
    """The image's latents beside the first frame's only, as in other image-to-video models."""

    def before(m: nn.Module, args: Any, kwargs: Any) -> Any:
        sample = args[0].clone()
        sample[:, 1:, sample.shape[2] // 2 :] = 0
        return (sample, *args[1:]), kwargs

    # A recorder takes the image's latents from the first frame, where they are right.
    stack.callback(pipe.unet.register_forward_pre_hook(before, with_kwargs=True).remove)


def initial_noise(change: Callable[[Tensor], Tensor]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        wrap(stack, pipe, "prepare_latents", lambda original, *a, **k: change(original(*a, **k)))

    return plant


def guided_in_frames_order(pipe: Any, stack: ExitStack) -> None:
    """The recorded ramp is right, and used from the last frame to the first one."""
    guidance(lambda ramp, step, steps: ramp, lambda scale: scale.flip(1))(pipe, stack)


def decoded(change: Callable[[Tensor], Tensor]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        wrap(stack, pipe, "decode_latents", lambda original, *a, **k: change(original(*a, **k)))

    return plant


_TRANSFORMER = "unet.down_blocks.0.attentions.0"
UNKNOWN: dict[str, Planted] = {
    "heads_reversed": Planted(
        heads_reversed, "predict_noise", "a", f"{_TRANSFORMER}.transformer_blocks.0.attn1.to_out.0.000"
    ),
    "positions_from_one": Planted(positions_from_one, "predict_noise", "b", f"{_TRANSFORMER}.time_proj"),
    "reflect_padding": Planted(
        reflect_padding, "predict_noise", "c", "unet.down_blocks.0.resnets.0.spatial_res_block.conv1.000"
    ),
    "skips_swapped": Planted(
        skips_swapped, "predict_noise", "d", "unet.up_blocks.1.resnets.0.spatial_res_block.norm1.000"
    ),
    "stale_latents": Planted(
        stale_latents, "model_input", "e", first_probe="model_input.001", settings={"num_inference_steps": 2}
    ),
    "image_mirrored": Planted(preprocessed(lambda x: x.flip(-1)), "resize_image", "f"),
    "image_bgr": Planted(preprocessed(lambda x: x.flip(1)), "resize_image", "g"),
    "clip_bgr": Planted(given_to_clip(lambda x: x.flip(1)), "clip_pixels", "h"),
    "clip_gamma": Planted(given_to_clip(lambda x: x.clip(0, 1) ** 2.2), "clip_pixels", "i"),
    "embedding_normalised": Planted(embedding_scaled, "image_embedding", "j"),
    "clip_class_token_halved": Planted(
        output_of("image_encoder.vision_model.pre_layrnorm", lambda x: x - x[:, :1] * 0.5),
        "image_embedding",
        "k",
        "image_encoder.vision_model.pre_layrnorm",
    ),
    "encoder_output_scaled": Planted(
        output_of("vae.encoder.conv_norm_out", lambda x: x * 0.9), "image_latents", "l", "vae.encoder.conv_norm_out"
    ),
    "encoder_mid_attention_skipped": Planted(
        output_of("vae.encoder.mid_block.attentions.0.to_out.0", lambda x: x * 0),
        "image_latents",
        "m",
        "vae.encoder.mid_block.attentions.0.to_out.0",
    ),
    "motion_bucket_scaled": Planted(time_ids(lambda f, m, n: (f, m / 255, n)), "time_ids", "n"),
    "sigmas_end_at_minimum": Planted(schedule(lambda s: torch.cat([s[:-1], s[-2:-1] / 2])), "sigmas", "o"),
    "timesteps_base_two": Planted(timesteps(1 / math.log(2)), "timesteps", "p"),
    "guidance_ramp_squared": Planted(guidance(lambda ramp, step, steps: ramp**2, keep), "guidance_ramp", "q"),
    "noise_of_one_frame": Planted(initial_noise(lambda z: z[:, :1].expand_as(z).clone()), "initial_latents", "r"),
    "image_on_first_frame": Planted(first_frame_alone, "model_input", "s"),
    "guidance_ramp_reversed": Planted(guided_in_frames_order, "guide", "t"),
    "step_half_way": Planted(step_result(lambda after, before: (after + before) / 2), "euler_step", "u"),
    "frames_clamped": Planted(decoded(lambda x: x.clamp(-0.5, 0.5)), "decode", "v"),
    "decoder_last_frame_repeated": Planted(
        decoded(lambda x: torch.cat([x[:, :, :-1], x[:, :, -2:-1]], dim=2)), "decode", "w"
    ),
    "decoder_conv_in_scaled": Planted(
        output_of("vae.decoder.conv_in", lambda x: x * 1.05), "decode", "x", "vae.decoder.conv_in"
    ),
    "temporal_conv_causal": Planted(
        output_of(
            "unet.mid_block.resnets.0.temporal_res_block.conv1",
            lambda x: torch.cat([x[:, :, :1], x[:, :, :-1]], dim=2),
        ),
        "predict_noise",
        "y",
        "unet.mid_block.resnets.0.temporal_res_block.conv1.000",
    ),
    "add_embedding_dropped": Planted(
        output_of("unet.add_embedding", torch.zeros_like), "predict_noise", "z", "unet.add_embedding"
    ),
}


def other_lanczos(pipe: Any, stack: ExitStack) -> None:
    """Lanczos of another library: each pass in float, rounded to 8 bits at the end, where Pillow rounds each pass."""

    def weights(size: int, into: int) -> np.ndarray:
        scale = max(size / into, 1.0)
        centres = (np.arange(into)[:, None] + 0.5) * size / into - 0.5
        x = (np.arange(size)[None] - centres) / scale
        kernel = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
        return kernel / kernel.sum(1, keepdims=True)

    def resize(original: Any, image: Any, height: int, width: int, **kwargs: Any) -> Any:
        if not isinstance(image, PIL.Image.Image):
            return original(image, height, width, **kwargs)
        pixels = np.asarray(image).astype(np.float64)
        down, across = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
        made = np.einsum("yh,xw,hwc->yxc", down, across, pixels, optimize=True)
        return PIL.Image.fromarray(made.clip(0, 255).round().astype(np.uint8))

    wrap(stack, pipe.video_processor, "resize", resize)


# No bug of the catalogue is this very one; its relation to the right tensor can be told.
RELATED: dict[str, Planted] = {
    "frame_resize_other_lanczos": Planted(other_lanczos, "resize_image", "frame_resize"),
}


def compatible(a: str, b: str) -> bool:
    """Whether two bugs of the catalogue can stand in one port, each with its effect."""
    one, other = PLANTS[a], PLANTS[b]
    # A sampled posterior or noise on the latents hides whether the pixels were augmented, and the other way round.
    drawn = {one.place, other.place} == {"noise_aug", "posterior"}
    # Without the scaling, the factor that the first latents were scaled by is most of what the model sees.
    return one.place != other.place and not drawn


@contextmanager
def planted(pipe: Any, *names: str) -> Iterator[None]:
    """The pipeline with bugs, until the context ends, however it ends."""
    with ExitStack() as stack:
        for name in names:
            (PLANTS | UNKNOWN | RELATED)[name].plant(pipe, stack)
        yield
