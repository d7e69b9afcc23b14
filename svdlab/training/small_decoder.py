"""A small decoder of the VAE's latents, and an encoder as small: an ``AutoencoderTiny`` of diffusers' (TAESD)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svdlab.files import atomic_path
from svdlab.parity.reference import tiny_autoencoder
from svdlab.svd import VAE
from svdlab.training.autoencoder import draw
from svdlab.training.data import SIZE
from svdlab.training.fit import products_in_bfloat16
from svdlab.training.recipe import TINY_AUTOENCODER, Recipe


class SmallAutoencoder(nn.Module):
    """Images (B, 3, H, W) and their latents (B, 4, h, w) to rebuilt images and rebuilt latents."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = tiny_autoencoder(**TINY_AUTOENCODER)

    def forward(self, images: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        with products_in_bfloat16(images.device):
            rebuilt, encoded = self.tiny.decoder(latents), self.tiny.encoder(images)
        return rebuilt.float(), encoded.float()

    def write(self, folder: Path) -> None:
        """As diffusers loads it, in float16."""
        self.tiny.save_config(folder)
        state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in self.tiny.state_dict().items()}
        with atomic_path(folder / "diffusion_pytorch_model.safetensors") as temporary:
            save_file(state, temporary, metadata={"format": "pt"})


def loss(recipe: Recipe, vae: VAE) -> Callable[[Callable[..., Any], torch.Generator], Tensor]:
    """Mean absolute and squared error of images, the shape's pixels weighted, and squared error of latents.

    Args:
        recipe: weights and ranges.
        vae: whose latents, times its scaling factor, are to be decoded.
    """

    def of(call: Callable[..., Any], generator: torch.Generator) -> Tensor:
        drawn = [draw(generator, recipe, 1, SIZE) for _ in range(recipe.small_decoder.batch)]
        images, weight = map(torch.cat, zip(*drawn, strict=True))
        with torch.no_grad(), products_in_bfloat16(vae.device):
            latents = vae.encode(images.to(vae.device)).latent_dist.mean.float() * vae.config.scaling_factor
        rebuilt, encoded = call(images, latents)
        error = (rebuilt - images.to(rebuilt.device)).abs()
        weighted = ((error + 4 * error.square()) * weight.to(error.device)).mean()
        return weighted + (encoded - latents).square().mean()

    return of
