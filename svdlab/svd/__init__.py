"""SVD's three networks as plain modules whose names are the official checkpoint's keys."""

from typing import TYPE_CHECKING

from svdlab.lazy import lazy_names

if TYPE_CHECKING:
    from svdlab.svd.config import CLIPVisionConfig, UNetConfig, VAEConfig
    from svdlab.svd.image_encoder import CLIPVision
    from svdlab.svd.unet import Conditioning, UNet
    from svdlab.svd.vae import VAE

__all__ = ["CLIPVision", "CLIPVisionConfig", "Conditioning", "UNet", "UNetConfig", "VAE", "VAEConfig"]
# Settings can be had without torch, as for --help.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(["CLIPVisionConfig", "UNetConfig", "VAEConfig"], "svdlab.svd.config"),
        "CLIPVision": "svdlab.svd.image_encoder",
        **dict.fromkeys(["Conditioning", "UNet"], "svdlab.svd.unet"),
        "VAE": "svdlab.svd.vae",
    },
)
