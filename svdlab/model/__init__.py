"""SVD's three networks as plain modules whose names are the official checkpoint's keys."""

from svdlab.model.clip import CLIPVision, CLIPVisionConfig
from svdlab.model.unet import Conditioning, UNet, UNetConfig
from svdlab.model.vae import VAE, VAEConfig

__all__ = ["CLIPVision", "CLIPVisionConfig", "Conditioning", "UNet", "UNetConfig", "VAE", "VAEConfig"]
