"""SVD's three networks as plain modules whose names are the official checkpoint's keys."""

from svdlab.svd.config import CLIPVisionConfig, UNetConfig, VAEConfig
from svdlab.svd.image_encoder import CLIPVision
from svdlab.svd.unet import Conditioning, UNet
from svdlab.svd.vae import VAE

__all__ = ["CLIPVision", "CLIPVisionConfig", "Conditioning", "UNet", "UNetConfig", "VAE", "VAEConfig"]
