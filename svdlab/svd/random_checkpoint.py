"""A small checkpoint with random weights, for tests and benchmarks: in it every weight matters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdlab.svd.checkpoint import write_checkpoint
from svdlab.svd.config import CLIPVisionConfig, UNetConfig, VAEConfig
from svdlab.svd.image_encoder import CLIPVision
from svdlab.svd.unet import UNet
from svdlab.svd.vae import VAE

TINY_UNET: Mapping[str, Any] = dict(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    layers_per_block=1,
    num_attention_heads=(2, 4),
    cross_attention_dim=32,
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=96,
    num_frames=8,
)
TINY_VAE: Mapping[str, Any] = dict(
    block_out_channels=(32, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=64,
)
TINY_CLIP: Mapping[str, Any] = dict(
    hidden_size=64,
    intermediate_size=128,
    projection_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=224,
    patch_size=32,
    hidden_act="gelu",
)


def randomize_(module: nn.Module, seed: int) -> nn.Module:
    """Draw weights such that every parameter matters: biases, norm scales and blend factors away from neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and "embedding.weight" not in name:
            noise *= parameter[0].numel() ** -0.5
        elif name.endswith("mix_factor"):
            noise *= 0.7
        elif name.endswith("weight") and parameter.ndim == 1:
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.2
        parameter.data = noise
    return module


def write_random_checkpoint(
    folder: str | Path,
    seed: int = 0,
    unet: Mapping[str, Any] = {},  # noqa: B006 - read only
    vae: Mapping[str, Any] = {},  # noqa: B006
    image_encoder: Mapping[str, Any] = {},  # noqa: B006
    scheduler: Mapping[str, Any] = {},  # noqa: B006
) -> Path:
    """Write a small checkpoint with random weights in diffusers' folder format.

    Args:
        folder: made if needed.
        seed: of the weights.
        unet: options over ``TINY_UNET``; likewise the other components.
    """
    models = (
        UNet(UNetConfig(**{**TINY_UNET, **unet})),
        VAE(VAEConfig(**{**TINY_VAE, **vae})),
        CLIPVision(CLIPVisionConfig(**{**TINY_CLIP, **image_encoder})),
    )
    for i, model in enumerate(models):
        randomize_(model, seed + i)
    return write_checkpoint(folder, *models, scheduler=scheduler)
