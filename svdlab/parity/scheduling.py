"""Schedulers in captures: what a trace says of them, and draws in their steps that are the same in every capture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.svd.components import adopt
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.schedulers import label, prepared
from svdlab.svd.settings import GenerationSettings


def traced_label(scheduler: Any, settings: GenerationSettings) -> str:
    """A trace's word for a pipeline's scheduler, svdlab's or diffusers'; SVD's Euler has the same in both.

    Raises:
        SvdlabError: one that runs the model more than once a step, or see ``schedulers.prepared``.
    """
    scheduler = adopt("scheduler", scheduler)
    if not isinstance(scheduler, EulerScheduler):
        runs = len(prepared(scheduler, settings, "cpu").timesteps)
        if runs != settings.num_steps:
            raise SvdlabError(
                f"scheduler: {type(scheduler).__name__} runs the UNet {runs} times in {settings.num_steps} steps, "
                "allowed in a trace: once a step"
            )
    return label(scheduler)


@contextmanager
def repeated_draws(scheduler: Any, seed: int) -> Iterator[None]:
    """Let a scheduler's steps draw from the seed, in float32 whatever the networks run in, so that a truth can follow.

    Raises:
        SvdlabError: they draw by other means than diffusers' ``randn_tensor``, which no other run could repeat.
    """
    if isinstance(adopt("scheduler", scheduler), EulerScheduler):  # SVD's, which draws nothing
        yield
        return
    space, generator = inspect.unwrap(type(scheduler).step).__globals__, torch.Generator().manual_seed(seed)
    original, before = space.get("randn_tensor"), torch.get_rng_state()

    def randn_tensor(shape: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        drawn = torch.randn(tuple(shape), generator=generator)
        return drawn.to(device=kwargs.get("device"), dtype=dtype)

    if original is not None:
        space["randn_tensor"] = randn_tensor
    try:
        yield
    finally:
        if original is not None:
            space["randn_tensor"] = original
    if not torch.equal(before, torch.get_rng_state()):
        raise SvdlabError(
            f"scheduler: {type(scheduler).__name__} draws random numbers that a trace cannot repeat, allowed: none, or "
            "diffusers' randn_tensor"
        )
