"""SVD's three networks as plain modules whose names are the official checkpoint's keys."""

from svdlab.svd.image_encoder import CLIPVision, CLIPVisionConfig
from svdlab.svd.unet import Conditioning, UNet, UNetConfig
from svdlab.svd.vae import VAE, VAEConfig

__all__ = ["CLIPVision", "CLIPVisionConfig", "Conditioning", "UNet", "UNetConfig", "VAE", "VAEConfig"]
