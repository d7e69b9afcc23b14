"""SVD's three networks as plain modules whose names are the official checkpoint's keys."""

from typing import TYPE_CHECKING

from svdlab.lazy import lazy_names

if TYPE_CHECKING:
    from svdlab.svd.image_encoder import CLIPVision, CLIPVisionConfig
    from svdlab.svd.unet import Conditioning, UNet, UNetConfig
    from svdlab.svd.vae import VAE, VAEConfig

__all__ = ["CLIPVision", "CLIPVisionConfig", "Conditioning", "UNet", "UNetConfig", "VAE", "VAEConfig"]
# Settings can be had without torch, as for --help.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(["CLIPVision", "CLIPVisionConfig"], "svdlab.svd.image_encoder"),
        **dict.fromkeys(["Conditioning", "UNet", "UNetConfig"], "svdlab.svd.unet"),
        **dict.fromkeys(["VAE", "VAEConfig"], "svdlab.svd.vae"),
    },
)
