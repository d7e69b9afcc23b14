"""The phases in order, and the checkpoint that they end in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from svdlab.files import atomic_folder, atomic_path, check_new_folder
from svdlab.parity.reference import SMALL_DECODER
from svdlab.svd import VAE, CLIPVision, UNet
from svdlab.svd.checkpoint import open_safetensors, write_checkpoint
from svdlab.training import autoencoder, denoiser, small_decoder, tower
from svdlab.training import recipe as recipes
from svdlab.training.data import SIZE, Scene
from svdlab.training.fit import Phase, fit
from svdlab.training.recipe import Recipe


def train(recipe: Recipe, work: Path, out: Path, device: torch.device) -> dict[str, list[float]]:
    """Train every network from nothing and write a checkpoint in diffusers' format.

    Args:
        recipe: what to train, and for how long.
        work: folder of the phases' files; what an interrupted run is resumed from.
        out: folder of the checkpoint (float16 weights), whole or not at all.
        device: where to train.

    Returns:
        Each phase's losses, of the steps that this call ran.

    Raises:
        SvdlabError: ``out`` is there already, ``work`` holds files of another recipe.
    """
    check_new_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    image_encoder, vae = CLIPVision(recipes.IMAGE_ENCODER), autoencoder.initialise_(VAE(recipes.VAE))
    unet, small = denoiser.initialise_(UNet(recipes.UNET)), small_decoder.SmallAutoencoder()
    losses: dict[str, list[float]] = {}

    def run(name: str, network: torch.nn.Module, loss: object, depends_on: tuple[str, ...]) -> None:
        phase = Phase(name, network, loss, getattr(recipe, name), _fingerprint(recipe, (name, *depends_on)))  # type: ignore[arg-type]
        losses[name] = fit(phase, work, recipe.seed, device)

    size = image_encoder.config.image_size
    run("image_encoder", tower.Described(image_encoder), tower.loss(recipe, size), ())
    tower.normalise_(image_encoder, _first_frames(recipe, 256, size).to(device))
    network = autoencoder.Autoencoder(vae)
    latent = (vae.config.latent_channels, vae.config.scale_factor)
    before: tuple[str, ...] = _VAE_FIELDS
    for name, num_frames, window in (("vae_crops", 1, SIZE // 2), ("vae_images", 1, SIZE), ("vae_clips", 8, SIZE)):
        run(name, network, autoencoder.loss(recipe, getattr(recipe, name).batch, num_frames, window, latent), before)
        before = (*before, name)
    steady = autoencoder.TemporalDecoder(vae, recipe.disturbance)
    disturbed = autoencoder.loss(recipe, recipe.vae_temporal.batch, 8, SIZE, latent)
    run("vae_temporal", steady, disturbed, (*before, "disturbance"))
    pool, scaling_factor = _pool(recipe, vae, image_encoder, work, device)
    vae.config = vae.config.replace(scaling_factor=scaling_factor)
    before = (*_VAE_FIELDS, *_POOL_FIELDS)
    run("small_decoder", small, small_decoder.loss(recipe, vae), before)
    run("unet", denoiser.Denoiser(unet), denoiser.loss(recipe, pool), (*before, *_UNET_FIELDS))

    with atomic_folder(out) as folder:
        write_checkpoint(folder, unet, vae, image_encoder, dtype=torch.float16)
        small.write(folder / SMALL_DECODER)
    return losses


_VAE_FIELDS = ("shape_weight", "shade_weight", "kl_weight", "fps", "motion_bucket_id", "max_displacement")
_POOL_FIELDS = ("image_encoder", "vae_crops", "vae_images", "vae_clips", "clips", "augmentations", "noise_aug", "fade")
_UNET_FIELDS = ("sigma", "sigma_uniform", "drop_both", "drop_embedding", "drop_latents")


def _fingerprint(recipe: Recipe, fields: tuple[str, ...]) -> str:
    chosen = {name: value for name, value in recipe.to_dict().items() if name in (*fields, "seed")}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _first_frames(recipe: Recipe, count: int, size: int) -> torch.Tensor:
    seeds = torch.randint(2**31, (count,), generator=torch.Generator().manual_seed(recipe.seed))
    scenes = [Scene.from_seed(int(seed)) for seed in seeds]
    frames = np.concatenate([scene.render(np.array([scene.start])) for scene in scenes])
    return tower.clip_pixels(autoencoder.to_tensor(frames), size)


def _pool(
    recipe: Recipe, vae: VAE, image_encoder: CLIPVision, work: Path, device: torch.device
) -> tuple[denoiser.Pool, float]:
    """The encoded clips, from the work folder if they are there."""
    path, fingerprint = work / "pool.safetensors", _fingerprint(recipe, (*_VAE_FIELDS, *_POOL_FIELDS))
    if path.exists():
        with open_safetensors(path) as file:
            if (about := file.metadata() or {}).get("fingerprint") == fingerprint:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return denoiser.Pool(**tensors), float(about["scaling_factor"])
    pool, scaling_factor = denoiser.encode_pool(recipe, vae, image_encoder, device)
    with atomic_path(path) as temporary:
        about = {"fingerprint": fingerprint, "scaling_factor": str(scaling_factor)}
        save_file({k: v.contiguous() for k, v in vars(pool).items()}, temporary, metadata=about)
    return pool, scaling_factor
