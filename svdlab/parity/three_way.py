"""``svdlab parity``: diffusers in the working dtype, diffusers in float64 and svdlab, on one image."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from svdlab.parity.candidate import capture
from svdlab.parity.compare import Comparison, compare
from svdlab.svd.settings import GenerationSettings


def three_way(
    model: str | os.PathLike[str],
    image: Any,
    settings: GenerationSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    taps: Sequence[str] = (),
    until: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
    departures: Sequence[str] = (),
    scheduler: Any = None,
) -> Comparison:
    """diffusers in the working dtype, diffusers in float64, and svdlab, on one image: ``svdlab parity``.

    svdlab works from the image and the seed alone: its preprocessing and its random draws are judged too. The
    truth has the weights of the working dtype (rounded to it, then widened) and the draws of the reference.
    One pipeline is in memory at a time.

    Args:
        model: checkpoint folder in diffusers' layout, single file, hub name, or "embedded".
        image: a PIL image or a list of them.
        settings: which generation; its dtype is the working dtype.
        device: where all three run.
        taps: inner modules to record in all three.
        until: stop after this probe.
        folder: stream the traces to ``reference``, ``truth`` and ``svdlab.safetensors`` in this folder (else
            in memory).
        progress: show bars.
        departures: names of ``bugs.DEPARTURES``: svdlab does there what the original, Stability's code, does.
        scheduler: diffusers' or another library's, which all three use in the place of the checkpoint's.

    Raises:
        SvdlabError: bad settings, an image that cannot be read, a checkpoint that does not load.
    """
    from svdlab.parity.reference import capture_diffusers, cast_diffusers, load_diffusers
    from svdlab.svd.checkpoint import checkpoint_path
    from svdlab.svd.pipeline import SVDPipeline

    settings = settings or GenerationSettings()
    checkpoint = checkpoint_path(os.fspath(model))
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)

    def path(name: str) -> Path | None:
        return None if folder is None else Path(folder) / f"{name}.safetensors"

    shared: dict[str, Any] = {"taps": taps, "until": until, "progress": progress, "checkpoint": checkpoint}
    pipe = SVDPipeline.from_pretrained(checkpoint, dtype=settings.torch_dtype, device=device, compat="diffusers")
    if scheduler is not None:
        pipe.scheduler = scheduler
    settings = pipe.resolve(settings)
    candidate = capture(pipe, image, settings, path=path("svdlab"), departures=departures, **shared)
    del pipe
    diffusers = load_diffusers(checkpoint, settings.torch_dtype, device)
    if scheduler is not None:
        diffusers.scheduler = copy.deepcopy(scheduler)
    reference = capture_diffusers(diffusers, image, settings, path=path("reference"), **shared)
    diffusers = cast_diffusers(diffusers, torch.float64)
    truth = capture_diffusers(diffusers, None, settings, replay=reference, path=path("truth"), **shared)
    return compare(reference, candidate, truth, progress=progress)
