"""Approximations: ways to a clip that take less work and give another clip, each by its name, off unless asked for.

Each is a change of stages (``svdlab.svd.stages``), so that the pipeline knows nothing of them, and ``svdlab frontier``
measures what each costs. Fewer steps, another schedule and narrower dtypes are settings.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlab.errors import SvdlabError, short
from svdlab.svd import layout
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import Change
from svdlab.svd.unet import Conditioning, UNet

if TYPE_CHECKING:
    from svdlab.svd.pipeline import SVDPipeline

# Sigmas between which there is guidance. The paper's best interval differs from model to model; this one is a choice.
GUIDED = 0.25, 20.0
# A full pass of the UNet, then one of its outermost level alone, in turns.
_FULL_EVERY = 2

Stage = Callable[..., Tensor]
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Approximation:
    """One of them.

    Attributes:
        said: what it leaves out, one line.
        source: the paper.
        change: of the pipeline.
    """

    said: str
    source: str
    change: Change


class _PerGeneration(Generic[Kept]):
    """What belongs to one generation, known by its conditioning, and ends with it."""

    def __init__(self, make: Callable[[Conditioning], Kept]):
        self._make, self._kept = make, dict[int, Kept]()

    def of(self, conditioning: Conditioning) -> Kept:
        key = id(conditioning)
        if key not in self._kept:
            self._kept[key] = self._make(conditioning)
            weakref.finalize(conditioning, self._kept.pop, key)
        return self._kept[key]


@dataclass
class _Deep:
    """Of one generation: passes so far, and what entered the UNet's outermost upward block in the last full one."""

    passes: int = 0
    features: list[Tensor] = field(default_factory=list)


_halves = _PerGeneration(Conditioning.halves)
_deep = _PerGeneration(lambda conditioning: _Deep())


def _guide_inside(
    pipe: SVDPipeline,
    stage: Stage,
    model_input: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    settings: GenerationSettings,
) -> Tensor:
    """Outside of ``GUIDED`` the conditional half stands for both, which is a guidance scale of 1."""
    if not isinstance(pipe.scheduler, EulerScheduler):
        name = type(pipe.scheduler).__name__
        raise SvdlabError(f"guidance_interval: got {name}, allowed: SVD's Euler, whose timesteps are 0.25 ln(sigma)")
    low, high = GUIDED
    if not pipe.is_guided(settings) or low < math.exp(4 * float(timestep)) <= high:
        return stage(model_input, timestep, conditioning, settings)
    _, conditional = _halves.of(conditioning)
    predicted = stage(model_input.chunk(2)[1], timestep, conditional, settings.replace(cfg="batched"))
    return torch.cat([predicted, predicted])


def _reuse_deep(
    pipe: SVDPipeline,
    stage: Stage,
    model_input: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    settings: GenerationSettings,
) -> Tensor:
    """Every second pass runs the outermost level alone, on what the pass before it had found below."""
    if len(pipe.unet.up_blocks) < 2:
        raise SvdlabError("deep_features: the UNet has one level, allowed: two or more")
    state = _deep.of(conditioning)
    state.passes += 1
    if state.passes % _FULL_EVERY != 1:
        return outermost_level(pipe.unet, model_input, timestep, conditioning, torch.cat(state.features))
    state.features, me = [], threading.get_ident()

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == me:  # another one may run the same networks
            state.features.append(output)

    handle = pipe.unet.up_blocks[-2].register_forward_hook(keep)
    try:
        return stage(model_input, timestep, conditioning, settings)
    finally:
        handle.remove()


def outermost_level(
    unet: UNet, sample: Tensor, timestep: Tensor, conditioning: Conditioning, features: Tensor
) -> Tensor:
    """The UNet's prediction where everything below its outermost level is taken as given.

    Args:
        unet: of two levels or more.
        sample, timestep, conditioning: of ``UNet.forward``.
        features: (B, F, h, w, C), what enters the last upward block.
    """
    down: Any = unet.down_blocks[0]
    up: Any = unet.up_blocks[-1]
    x = layout.from_channels_first(sample)
    emb = unet.embedding(timestep, conditioning, x)
    x = unet.conv_in(x)
    skips = [x, *down(x, emb, iter(conditioning.transformers))[1][: len(down.resnets)]]
    transformers = conditioning.transformers[len(conditioning.transformers) - len(up.attentions) :]
    x = up(features, skips, emb, iter(transformers))
    x = unet.conv_out(F.silu(unet.conv_norm_out(x)))
    return layout.to_channels_first(x)


# Innermost first.
APPROXIMATIONS: Mapping[str, Approximation] = MappingProxyType(
    {
        "deep_features": Approximation(
            "every second step runs the UNet's outermost level alone",
            "Ma et al. 2023, DeepCache, arXiv 2312.00858",
            Change(wrap={"predict_noise": _reuse_deep}),
        ),
        "guidance_interval": Approximation(
            f"classifier-free guidance for sigmas from {GUIDED[0]:g} to {GUIDED[1]:g} alone",
            "Kynkäänniemi et al. 2024, arXiv 2404.07724",
            Change(wrap={"predict_noise": _guide_inside}),
        ),
    }
)


def approximated(pipe: SVDPipeline, *names: str) -> SVDPipeline:
    """The same weights with approximations in place; the pipeline given stays as it is.

    Example:
        >>> fast = approximated(pipe, "deep_features", "guidance_interval")

    Args:
        pipe: which.
        names: keys of ``APPROXIMATIONS``, in any order.

    Raises:
        SvdlabError: a name that is none of them.
    """
    for name in names:
        if name not in APPROXIMATIONS:
            raise SvdlabError(f"approximation: got {short(name)}, allowed: {', '.join(APPROXIMATIONS)}")
    return pipe.with_changes(*(each.change for name, each in APPROXIMATIONS.items() if name in names))
