"""What a generation's networks are asked to compute, on tensors of the right shapes: for benchmarks and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from svdlab.svd import VAE, CLIPVision, UNet
from svdlab.svd.config import Configs
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import decode_latents, predict_noise, wide

NETWORKS: dict[str, type[Any]] = {"image_encoder": CLIPVision, "vae": VAE, "unet": UNet}
# Which network runs in which part of a generation, in order of execution; the last two pairs are alternatives.
WORKLOADS = {
    "image_encoder": "image_encoder",
    "vae_encode": "vae",
    "unet_batched": "unet",
    "unet_sequential": "unet",
    "decode_parity": "vae",
    "decode_exact": "vae",
}
# Makes a tensor of a shape: ``torch.empty``, ``torch.randn``, with a dtype and a device.
Maker = Callable[..., Tensor]
# A workload, called with its network, a maker of tensors and a decode chunk.
Call = Callable[[Any, Maker, "int | None"], Any]


class UNetInputs(NamedTuple):
    """The inputs of one denoising step; G videos, twice as many with guidance.

    Attributes:
        sample: (G, F, 8, h, w), noisy latents and image latents concatenated along channels.
        timestep: (1,).
        image_embeddings: (G, 1, D).
        added_time_ids: (G, 3).
    """

    sample: Tensor
    timestep: Tensor
    image_embeddings: Tensor
    added_time_ids: Tensor


def unet_inputs(configs: Configs, settings: GenerationSettings, new: Maker) -> UNetInputs:
    """The UNet's inputs in one step of a generation.

    Args:
        configs: the architecture.
        settings: with height, width and number of frames.
        new: makes every tensor.
    """
    height, width = _latent_size(configs, settings)
    batch = settings.num_videos_per_prompt * (2 if _guided(settings) else 1)
    return UNetInputs(
        new(batch, settings.num_frames, configs.unet.in_channels, height, width),
        new(1),
        new(batch, 1, configs.image_encoder.projection_dim),
        new(batch, 3),
    )


def decoder_input(configs: Configs, settings: GenerationSettings, new: Maker) -> Tensor:
    """The latents that are decoded at the end of a generation, (B, F, 4, h, w); arguments as of ``unet_inputs``."""
    size = _latent_size(configs, settings)
    return new(settings.num_videos_per_prompt, settings.num_frames, configs.vae.latent_channels, *size)


def workload_calls(configs: Configs, settings: GenerationSettings) -> dict[str, Call]:
    """What each workload computes.

    Args:
        configs: the architecture.
        settings: with height, width and number of frames.
    """

    def predict(cfg: str) -> Call:
        def call(unet: UNet, new: Maker, chunk: int | None) -> Tensor:
            sample, timestep, embeddings, ids = unet_inputs(configs, settings, new)
            conditioning = unet.condition(embeddings, ids, sample.shape[1])
            return predict_noise(unet, sample, timestep, conditioning, cfg if _guided(settings) else "batched")

        return call

    def decode(exact: bool) -> Call:
        def call(vae: VAE, new: Maker, chunk: int | None) -> Tensor:
            return wide(decode_latents(vae, decoder_input(configs, settings, new), chunk, exact))

        return call

    return {
        "image_encoder": lambda tower, new, chunk: tower(new(1, 3, *(tower.config.image_size,) * 2)),
        "vae_encode": lambda vae, new, chunk: vae.encode(new(1, 3, settings.height, settings.width)),
        "unet_batched": predict("batched"),
        "unet_sequential": predict("sequential"),
        "decode_parity": decode(exact=False),
        "decode_exact": decode(exact=True),
    }


def _guided(settings: GenerationSettings) -> bool:
    return max(settings.min_guidance_scale, settings.max_guidance_scale) > 1


def _latent_size(configs: Configs, settings: GenerationSettings) -> tuple[int, int]:
    assert settings.num_frames and settings.height and settings.width
    return settings.height // configs.vae.scale_factor, settings.width // configs.vae.scale_factor
