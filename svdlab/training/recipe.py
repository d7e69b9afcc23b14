"""What the embedded checkpoint is: architectures, data and optimisation in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from svdlab.svd import CLIPVisionConfig, UNetConfig, VAEConfig

# The published structure, narrow: two layers per block in the VAE, so that the decoder's attention runs, widths that
# are a base times integers, and attention heads as wide as the published ones (64 channels, 80 in the tower), so that a
# single file says it all. Every level has two channels per group-norm group or more: one alone would be an instance
# norm, without flat colour.
VAE = VAEConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    block_out_channels=(64, 64, 64, 64),
    layers_per_block=2,
    sample_size=64,
)
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(64, 64, 128),
    down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
    up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
    layers_per_block=1,
    num_attention_heads=(1, 1, 2),
    cross_attention_dim=32,
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=96,
    num_frames=8,
)
IMAGE_ENCODER = CLIPVisionConfig(
    hidden_size=80,
    intermediate_size=160,
    projection_dim=32,
    num_hidden_layers=4,
    num_attention_heads=1,
    image_size=224,
    patch_size=32,
    hidden_act="gelu",
)

# The small decoder's, and its encoder's: options of diffusers' AutoencoderTiny.
TINY_AUTOENCODER = dict(
    encoder_block_out_channels=(32, 32, 32, 32),
    decoder_block_out_channels=(32, 32, 32, 32),
    num_encoder_blocks=(1, 1, 1, 1),
    num_decoder_blocks=(2, 2, 2, 1),
)


@dataclass(frozen=True)
class Schedule:
    """How one network is optimised: linear warm-up, cosine decay, exponential moving average of the weights."""

    steps: int
    batch: int
    learning_rate: float
    ema_decay: float = 0.999
    warmup: int = 100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, with the seed.

    Attributes:
        image_encoder, vae_crops, vae_images, vae_clips, vae_temporal, small_decoder, unet: the phases; the VAE learns
            from quarters of images first, which are four times cheaper, then from images, then from clips; at last
            its decoder's temporal branches alone.
        clips: how many clips the UNet learns from, encoded once.
        augmentations: noisy first frames per clip.
        noise_aug: mean and standard deviation of ln(noise_aug_strength).
        sigma: mean and standard deviation of ln(sigma), as SVD trains image-to-video (arXiv 2311.15127, appendix D).
        sigma_uniform: share of sigmas drawn log-uniformly over the sampler's whole range instead.
        drop_both, drop_embedding, drop_latents: shares of clips trained without both conditions, or without one.
        fade: what the shape has lost to the backdrop in the last frame of a clip that is learnt without both.
        fps, motion_bucket_id: ranges, both ends included; ``max_displacement`` in pixels per frame bounds their ratio.
        shape_weight: how much more a pixel or latent on the shape counts than one of the background.
        shade_weight: of the autoencoder's error in the mean over each latent's pixels.
        kl_weight: of the VAE's posterior.
        disturbance: of the latents in ``vae_temporal``, in their standard deviation.
        seed: of all draws.
    """

    image_encoder: Schedule = Schedule(steps=600, batch=32, learning_rate=1e-3)
    vae_crops: Schedule = Schedule(steps=3600, batch=12, learning_rate=2.5e-3, ema_decay=0.99)
    vae_images: Schedule = Schedule(steps=900, batch=6, learning_rate=1e-3, ema_decay=0.99, warmup=50)
    vae_clips: Schedule = Schedule(steps=80, batch=1, learning_rate=3e-4, ema_decay=0.98, warmup=20)
    vae_temporal: Schedule = Schedule(steps=500, batch=1, learning_rate=2e-3, ema_decay=0.98, warmup=20)
    small_decoder: Schedule = Schedule(steps=1500, batch=8, learning_rate=2e-3, ema_decay=0.99)
    unet: Schedule = Schedule(steps=5000, batch=16, learning_rate=2.5e-3, warmup=300)
    clips: int = 4000
    augmentations: int = 1
    noise_aug: tuple[float, float] = (-3.0, 1.0)
    sigma: tuple[float, float] = (0.7, 1.6)
    sigma_uniform: float = 0.15
    drop_both: float = 0.3
    drop_embedding: float = 0.05
    drop_latents: float = 0.05
    fade: float = 0.25
    fps: tuple[int, int] = (4, 30)
    motion_bucket_id: tuple[int, int] = (1, 255)
    max_displacement: float = 4.2
    shape_weight: float = 4.0
    shade_weight: float = 4.0
    kl_weight: float = 1e-6
    disturbance: float = 0.15
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the model card and to tell one recipe's files from another's."""
        return asdict(self)

    def smoke(self) -> Recipe:
        """The same phases in half a minute: enough for every loss to fall, not for a model."""
        return replace(
            self,
            image_encoder=replace(self.image_encoder, steps=20, batch=8, warmup=5),
            vae_crops=replace(self.vae_crops, steps=24, batch=4, warmup=3),
            vae_images=replace(self.vae_images, steps=2, batch=2, warmup=1),
            vae_clips=replace(self.vae_clips, steps=2, warmup=1),
            vae_temporal=replace(self.vae_temporal, steps=2, warmup=1),
            small_decoder=replace(self.small_decoder, steps=10, batch=2, warmup=3),
            unet=replace(self.unet, steps=20, batch=2, warmup=3),
            clips=8,
        )
