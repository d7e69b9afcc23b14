"""The published architecture, without weights: SVD and SVD-XT differ in the number of frames alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svdlab.svd.config import CLIPVisionConfig, Configs, UNetConfig, VAEConfig

SVD_VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    layers_per_block=2,
    sample_size=768,
)
# OpenCLIP's ViT-H/14.
SVD_CLIP = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
)
ARCHITECTURES: Mapping[str, Configs] = {
    "svd": Configs(UNetConfig(sample_size=96, num_frames=14), SVD_VAE, SVD_CLIP),
    "svd-xt": Configs(UNetConfig(sample_size=96, num_frames=25), SVD_VAE, SVD_CLIP),
}

# What ``scheduler_config.json`` says for both.
SVD_SCHEDULER: Mapping[str, Any] = dict(
    beta_end=0.012,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    interpolation_type="linear",
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    sigma_max=700.0,
    sigma_min=0.002,
    steps_offset=1,
    timestep_spacing="leading",
    timestep_type="continuous",
    use_karras_sigmas=True,
)
