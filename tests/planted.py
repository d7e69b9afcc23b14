"""Bugs planted in diffusers itself: candidates that owe nothing to svdlab's own rules.

``planted(pipe, "fps_not_decremented", ...)`` patches a loaded ``StableVideoDiffusionPipeline``, its scheduler and its
networks, and puts everything back. ``PLANTS`` holds the catalogue, ``UNKNOWN`` bugs outside of it.
Each entry says at which probe it shows first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import AlphaBlender
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module
from torch import Tensor, nn

Plant = Callable[[Any, ExitStack], None]


@dataclass(frozen=True)
class Planted:
    """One planted bug: ``place`` names what it changes, so that two in one place are not combined."""

    plant: Plant
    first_probe: str
    place: str
    first_module: str | None = None


def patch(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object or a class until the stack closes."""
    held = vars(owner).get(name, stack)
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        object.__setattr__(owner, name, value)
    restore = (lambda: delattr(owner, name)) if held is stack else (lambda: setattr(owner, name, held))
    stack.callback(restore)


def wrap(stack: ExitStack, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by ``wrapper(original, *args, **kwargs)``."""
    original = getattr(owner, name)
    patch(stack, owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


def set_all(stack: ExitStack, model: nn.Module, kind: type, name: str, change: Callable[[Any], Any]) -> None:
    """Change an attribute of every module of a kind."""
    for m in model.modules():
        if isinstance(m, kind):
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
            return change(pipe, original(image, device, videos, guided), guided)

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


def clean_pixels(after: Callable[[Tensor, float, bool], Tensor]) -> Plant:
    """Encode the pixels as they were before the noise augmentation, then do something to the latents."""

    def plant(pipe: Any, stack: ExitStack) -> None:
        seen: dict[str, Tensor] = {}

        def preprocess(original: Any, *args: Any, **kwargs: Any) -> Tensor:
            seen["image"] = original(*args, **kwargs)
            return seen["image"]

        def encode(original: Any, image: Tensor, **kwargs: Any) -> Tensor:
            clean = seen["image"].to(image)
            strength = float((image - clean).std())  # the noise has unit variance
            latents = original(clean, **kwargs)
            return after(latents, strength, kwargs["do_classifier_free_guidance"])

        wrap(stack, pipe.video_processor, "preprocess", preprocess)
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


def plain_resize(pipe: Any, stack: ExitStack) -> None:
    def resize(image: Tensor, size: tuple[int, int], *args: Any, **kwargs: Any) -> Tensor:
        return F.interpolate(image, size=size, mode="bicubic", align_corners=True)

    patch(stack, module, "_resize_with_antialiasing", resize)


def unnormalised(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "do_normalize": False})

    wrap(stack, pipe.feature_extractor, "preprocess", wrapper)


def keep_embedding(pipe: Any, stack: ExitStack) -> None:
    def wrapper(original: Any, image: Any, device: Any, videos: int, guided: bool) -> Tensor:
        result = original(image, device, videos, guided)
        return torch.cat([result.chunk(2)[1]] * 2) if guided else result

    wrap(stack, pipe, "_encode_image", wrapper)


def swap_alpha(name: str) -> Plant:
    return lambda pipe, stack: set_all(
        stack, getattr(pipe, name), AlphaBlender, "switch_spatial_to_temporal_mix", lambda switched: not switched
    )


def no_positions(pipe: Any, stack: ExitStack) -> None:
    for name, m in pipe.unet.named_modules():
        if name.endswith("time_pos_embed"):
            stack.callback(m.register_forward_hook(lambda m, args, output: torch.zeros_like(output)).remove)


def sine_first(pipe: Any, stack: ExitStack) -> None:
    set_all(stack, pipe.unet, Timesteps, "flip_sin_to_cos", lambda cosine_first: False)


def tanh_gelu(pipe: Any, stack: ExitStack) -> None:
    patch(stack, GEGLU, "gelu", lambda self, gate: F.gelu(gate, approximate="tanh"))


def one_eps(pipe: Any, stack: ExitStack) -> None:
    for model in (pipe.unet, pipe.vae):
        set_all(stack, model, nn.GroupNorm, "eps", lambda eps: 1e-5)


def decode(change: Callable[[Any, Tensor, int, int], tuple[Tensor, int, int]]) -> Plant:
    def plant(pipe: Any, stack: ExitStack) -> None:
        def wrapper(original: Any, latents: Tensor, frames: int, chunk: int) -> Tensor:
            return original(*change(pipe, latents, frames, chunk))

        wrap(stack, pipe, "decode_latents", wrapper)

    return plant


UNCOND = "noise_pred_uncond.000"
PLANTS: dict[str, Planted] = {
    "fps_not_decremented": Planted(time_ids(lambda f, m, n: (f + 1, m, n)), "added_time_ids", "fps"),
    "timestep_unscaled": Planted(timesteps(4.0), "timesteps", "timesteps"),
    "timestep_negated": Planted(timesteps(-4.0), "timesteps", "timesteps"),
    "noise_aug_after_encode": Planted(clean_pixels(noise_on_latents), "image_latents", "noise_aug"),
    "noise_aug_missing": Planted(clean_pixels(lambda z, strength, guided: z), "image_latents", "noise_aug"),
    "guidance_per_step": Planted(guidance(ramp_over_steps, keep), "guidance_scale", "guidance"),
    "guidance_constant": Planted(
        guidance(lambda ramp, step, steps: torch.full_like(ramp, float(ramp.max())), keep), "guidance_scale", "guidance"
    ),
    # uncond + (1 - s)(cond - uncond) = cond + s (uncond - cond)
    "guidance_swapped": Planted(
        guidance(lambda ramp, step, steps: ramp, lambda scale: 1 - scale), "noise_pred.000", "guidance"
    ),
    "image_latents_scaled": Planted(
        encode_vae_image(lambda pipe, z, guided: z * pipe.vae.config.scaling_factor), "image_latents", "scaled"
    ),
    "image_latents_sampled": Planted(sampled, "image_latents", "posterior"),
    "uncond_latents_kept": Planted(
        encode_vae_image(lambda pipe, z, guided: torch.cat([z.chunk(2)[1]] * 2) if guided else z),
        "model_input.000",
        "uncond_latents",
    ),
    "uncond_embedding_kept": Planted(keep_embedding, UNCOND, "uncond_embedding"),
    "time_ids_reordered": Planted(time_ids(lambda f, m, n: (m, f, n)), "added_time_ids", "order"),
    "init_noise_unscaled": Planted(scheduler_property(lambda self: self.sigmas.max()), "model_input.000", "init"),
    "init_noise_unscaled:unit": Planted(scheduler_property(lambda self: 1.0), "model_input.000", "init"),
    "model_input_unscaled": Planted(unscaled_input, "model_input.000", "model_input"),
    "sigmas_not_karras": Planted(linear_sigmas, "sigmas", "sigmas"),
    "prediction_epsilon": Planted(epsilon, "latents.000", "prediction"),
    "clip_no_antialias": Planted(plain_resize, "input.clip_pixels", "clip_resize"),
    "clip_unnormalised": Planted(unnormalised, "input.clip_pixels", "clip_normalise"),
    "alpha_swapped_unet": Planted(swap_alpha("unet"), UNCOND, "alpha_unet"),
    "alpha_swapped_vae": Planted(swap_alpha("vae"), "frames", "alpha_vae"),
    "frame_position_missing": Planted(no_positions, UNCOND, "positions"),
    "sincos_order": Planted(sine_first, UNCOND, "sincos"),
    "gelu_tanh": Planted(tanh_gelu, UNCOND, "gelu"),
    "group_norm_eps": Planted(one_eps, "image_latents", "eps"),
    "decode_unscaled": Planted(
        decode(lambda pipe, z, frames, chunk: (z * pipe.vae.config.scaling_factor, frames, chunk)), "frames", "unscale"
    ),
    "decode_chunked": Planted(decode(lambda pipe, z, frames, chunk: (z, frames, 2)), "frames", "chunk"),
}


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


_TRANSFORMER = "unet.down_blocks.0.attentions.0"
UNKNOWN: dict[str, Planted] = {
    "heads_reversed": Planted(heads_reversed, UNCOND, "a", f"{_TRANSFORMER}.transformer_blocks.0.attn1.to_out.0.000"),
    "positions_from_one": Planted(positions_from_one, UNCOND, "b", f"{_TRANSFORMER}.time_pos_embed"),
    "reflect_padding": Planted(
        reflect_padding, UNCOND, "c", "unet.down_blocks.0.resnets.0.spatial_res_block.conv1.000"
    ),
    "skips_swapped": Planted(skips_swapped, UNCOND, "d", "unet.up_blocks.1.resnets.0.spatial_res_block.norm1.000"),
    "stale_latents": Planted(stale_latents, "model_input.001", "e"),
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
            (PLANTS | UNKNOWN)[name].plant(pipe, stack)
        yield
