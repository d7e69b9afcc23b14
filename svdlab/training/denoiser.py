"""The UNet: EDM's preconditioning and loss over encoded clips.

Source: Karras et al. 2022 (arXiv 2206.00364), section 5 and table 1; SVD paper (arXiv 2311.15127), appendix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from svdlab.svd import VAE, CLIPVision, UNet
from svdlab.svd.layers import ResnetBlock, SpatioTemporalTransformer, TemporalResnetBlock
from svdlab.svd.sampler import scalings
from svdlab.training.autoencoder import draw_motion, to_tensor
from svdlab.training.data import Scene, displacement
from svdlab.training.fit import products_in_bfloat16
from svdlab.training.recipe import Recipe
from svdlab.training.tower import clip_pixels

# One clip in so many is encoded as it fades, too.
_FADED = 3


class Denoiser(nn.Module):
    """A training batch through the UNet: noisy latents and image latents concatenated along channels, and conditioning.

    Products run in bfloat16 where that is faster; the loss of the first steps is the same to four digits.
    """

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timesteps: Tensor, image_embeddings: Tensor, added_time_ids: Tensor) -> Tensor:
        with products_in_bfloat16(sample.device):
            conditioning = self.unet.condition(image_embeddings, added_time_ids, sample.shape[1])
            v = self.unet(sample, timesteps, conditioning)
        return v.float()


def initialise_(unet: UNet) -> UNet:
    """Every residual branch starts at zero, and so does the prediction."""
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, TemporalResnetBlock)):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, SpatioTemporalTransformer):
            nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


@dataclass(frozen=True)
class Pool:
    """Encoded clips.

    Attributes:
        latents: (N, F, 4, h, w), times the VAE's scaling factor.
        image_latents: (N, K, 4, h, w), K noise-augmented first frames, unscaled.
        strengths: (N, K), their noise_aug_strength.
        image_embeddings: (N, 1, D).
        motion: (N, 2), fps - 1 and the motion bucket.
        weight: (N, F, 1, h, w), of each latent in the loss.
        faded: (M, F, 4, h, w), what of the first M clips is learnt without their picture.
    """

    latents: Tensor
    image_latents: Tensor
    strengths: Tensor
    image_embeddings: Tensor
    motion: Tensor
    weight: Tensor
    faded: Tensor


@torch.no_grad()
def encode_pool(recipe: Recipe, vae: VAE, image_encoder: CLIPVision, device: torch.device) -> tuple[Pool, float]:
    """Draw and encode the clips; the pool and the VAE's scaling factor, 1 / standard deviation of its latents.

    One clip in ``_FADED`` is encoded once more as it fades.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    rows: list[tuple[Tensor, ...]] = []
    faded: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        with products_in_bfloat16(device):
            return vae.encode(images.to(device)).latent_dist.mean.float().cpu()

    for _ in tqdm(range(recipe.clips), desc="encode clips", unit="clip", mininterval=2):
        scene = Scene.from_seed(int(torch.randint(2**31, (1,), generator=generator)))
        fps, bucket = draw_motion(generator, recipe)
        path = scene.path(8, fps, bucket)
        frames = to_tensor(scene.render(path))
        mean, spread = recipe.noise_aug
        strengths = torch.randn(recipe.augmentations, generator=generator).mul(spread).add(mean).exp().clamp(max=1.0)
        noisy = [frames[:1] + float(s) * torch.randn(frames[:1].shape, generator=generator) for s in strengths]
        latents = encode(torch.cat([frames, *noisy]))
        if len(faded) * _FADED < recipe.clips:
            faded.append(encode(to_tensor(scene.clip(8, fps, bucket, recipe.fade))))
        pixels = clip_pixels(frames[:1], image_encoder.config.image_size)
        embedding = image_encoder(pixels.to(device)).image_embeds.cpu()
        body = torch.from_numpy(scene.coverage(path)[0]).float()[:, None]
        near = F.max_pool2d(body, kernel_size=8)
        motion = torch.tensor([float(fps - 1), float(bucket)])
        rows.append((latents[:8], latents[8:], strengths, embedding, motion, 1 + recipe.shape_weight * near))
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    pool = Pool(*columns + [torch.stack(faded)])
    scaling_factor = round(1 / float(pool.latents.std()), 5)
    scaled = {name: getattr(pool, name) * scaling_factor for name in ("latents", "faded")}
    return replace(pool, **scaled), scaling_factor


def loss(recipe: Recipe, pool: Pool) -> Callable[[Callable[..., Any], torch.Generator], Tensor]:
    """EDM's loss in v: with SVD's preconditioning the weight lambda(sigma) * c_out^2 is 1 at every sigma.

    Fast clips are rare in the pool, and drawn more often. A clip without both conditions is one that fades: see
    ``training.data``.
    """
    weight = pool.weight / pool.weight.mean()
    even = _even_in_displacement(pool.motion)

    def of(call: Callable[..., Any], generator: torch.Generator) -> Tensor:
        rows = torch.multinomial(even, recipe.unet.batch, replacement=True, generator=generator)
        column = torch.randint(pool.strengths.shape[1], rows.shape, generator=generator)
        both, embedding, latents = np.cumsum([recipe.drop_both, recipe.drop_embedding, recipe.drop_latents])
        chance = torch.rand(rows.shape, generator=generator)
        alone = chance < both
        rows = torch.where(alone, rows % len(pool.faded), rows)
        clean, num_frames = pool.latents[rows], pool.latents.shape[1]
        clean[alone] = pool.faded[rows[alone]]
        sigmas = draw_sigmas(recipe, generator)
        sigma = sigmas.view(-1, 1, 1, 1, 1)
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)

        keep_embedding = (chance >= embedding).float().view(-1, 1, 1)
        keep_latents = ((chance >= latents) | ((chance >= both) & (chance < embedding))).float().view(-1, 1, 1, 1)
        image_latents = (pool.image_latents[rows, column] * keep_latents)[:, None].repeat(1, num_frames, 1, 1, 1)
        ids = torch.cat([pool.motion[rows], pool.strengths[rows, column, None]], dim=1)

        s = scalings(sigma)
        sample = torch.cat([s.c_in * noisy, image_latents], dim=2)
        v = call(sample, scalings(sigmas).c_noise, pool.image_embeddings[rows] * keep_embedding, ids)
        target = (clean - s.c_skip * noisy) / s.c_out
        return ((v - target.to(v.device)).square() * weight[rows].to(v.device)).mean()

    return of


def _even_in_displacement(motion: Tensor) -> Tensor:
    """Weights (N,) of clips, fps - 1 and motion bucket (N, 2): every displacement is drawn about as often."""
    per_frame = torch.tensor([displacement(fps + 1, bucket) for fps, bucket in motion.tolist()])
    edges = torch.linspace(float(per_frame.min()), float(per_frame.max()), 17)
    place = torch.bucketize(per_frame, edges[1:-1])
    return 1 / place.bincount()[place]


def draw_sigmas(recipe: Recipe, generator: torch.Generator) -> Tensor:
    """One sigma per clip (B,): log-normal, some log-uniform; stratified over the batch, for a steadier loss."""
    batch = recipe.unet.batch
    level = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    mean, spread = recipe.sigma
    normal = mean + spread * torch.special.ndtri(level.clamp(1e-4, 1 - 1e-4))
    low, high = math.log(0.002), math.log(700.0)
    uniform = low + (high - low) * torch.rand(batch, generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < recipe.sigma_uniform, uniform, normal).exp()
