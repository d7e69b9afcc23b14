"""svdlab as the candidate: one run of it, with every tensor recorded that the trace format names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError
from svdlab.parity import taps as tapping
from svdlab.parity.bugs import departures as original
from svdlab.parity.digests import checkpoint_digest
from svdlab.parity.probes import probe_of
from svdlab.parity.replay import replay_inputs
from svdlab.parity.scheduling import repeated_draws, traced_label
from svdlab.parity.trace import Trace, dtype_name
from svdlab.parity.writer import TraceWriter, version_of, versions_of_run
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import Change

if TYPE_CHECKING:
    from svdlab.svd.pipeline import SVDPipeline


def capture(
    pipe: SVDPipeline,
    image: Any = None,
    settings: GenerationSettings | None = None,
    *,
    replay: Trace | None = None,
    preprocess: bool = False,
    taps: Sequence[str] = (),
    until: str | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    optional: bool = False,
    departures: Sequence[str] = (),
) -> Trace:
    """Run svdlab and record every tensor of ``docs/trace-format.md``.

    Args:
        pipe: the pipeline; its dtype is the trace's.
        image: a PIL image or a list of them; not needed with ``replay``.
        settings: None means ``replay``'s.
        replay: a trace whose random draws and image are used instead of the seed and ``image``.
        preprocess: redo the preprocessing from the replayed source image instead of replaying its results.
        taps: shell-style patterns of module names (``unet.down_blocks.*``), see ``svdlab.parity.taps``.
        until: stop after this probe.
        path: stream to this file instead of keeping the tensors in memory (see :class:`TraceWriter` for the
            bound).
        progress: show a bar over the denoising steps.
        checkpoint: the folder that the pipeline was loaded from: its digest goes into the trace.
        optional: record ``latents.init`` and ``frames_8bit``, too.
        departures: names of ``bugs.DEPARTURES``: do there what the original does; the trace says so.

    Raises:
        SvdlabError: no image and nothing to replay, or a replay that lacks an input, or a pattern that names
            no module, or no departure's name.
    """
    pipe = pipe.with_changes(*original(*departures))
    implementation = f"svdlab ({', '.join(departures)})" if departures else "svdlab"
    settings = settings or (replay.settings if replay is not None else GenerationSettings())
    settings = pipe.resolve(settings.replace(dtype=dtype_name(pipe.dtype)))
    if replay is not None:
        inputs = replay_inputs(pipe, settings, replay, preprocess, image)
    elif image is not None:
        inputs = pipe.prepare(image, settings, torch.Generator().manual_seed(settings.seed))
    else:
        raise SvdlabError("image: got none, allowed: an image, or a trace to replay")
    if optional:
        # Around whatever stands there.
        pipe = pipe.with_changes(Change(wrap={"initial_latents": lambda _, stage, *given: record_init(stage(*given))}))
    if taps:
        # Another thread may be running these networks: the hooks go on modules of this capture's own.
        pipe = pipe.with_own_modules()
    models = {"image_encoder": pipe.image_encoder, "vae": pipe.vae, "unet": pipe.unet}
    chosen = tapping.select(models, taps)
    run_settings = settings
    if any(name.startswith("vae.decoder") for name in chosen) and (
        settings.decode == "exact" or not isinstance(settings.decode_chunk_size, int)
    ):
        # All frames at once gives what the exact decode gives, which does not call the modules whose hooks record.
        run_settings = settings.replace(decode="parity", decode_chunk_size=settings.num_frames)
    writer = TraceWriter(
        settings,
        implementation,
        implementation_version=version_of("svdlab"),
        dtype=settings.dtype,
        digests={} if checkpoint is None else {"checkpoint": checkpoint_digest(checkpoint)},
        versions=versions_of_run(),
        scheduler=traced_label(pipe.scheduler, settings),
        path=path,
        until=until,
    )
    step = 0
    with (
        writer,
        repeated_draws(pipe.scheduler, settings.seed),
        torch.no_grad(),
        tqdm(total=settings.num_steps, desc=f"{implementation} {settings.dtype}", disable=not progress) as bar,
    ):

        def record_tap(name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
            full_name = f"{name}.{step:03d}" if tapping.is_per_step(name) else name
            layout = tapping.layout_of(name)
            if layout == "positions" and full_name in writer:
                return  # computed for each half of the batch, and the same
            tensor = tapping.from_svdlab(name, tapping.first_tensor(output))
            if layout != "activation":
                writer.extend(full_name, tensor)
                return
            frames = settings.num_frames if name.startswith(("unet", "vae.decoder")) else 1
            writer.extend(full_name, tensor.flatten(0, 1), frames=frames)

        def record_probe(name: str, tensor: Tensor) -> None:
            nonlocal step
            base, at = probe_of(name) or (name, None)
            if base == "model_input":
                step = at or 0
            if base == "latents":
                bar.update()
            writer.digest_input(name, tensor)
            writer.put(name, tensor)
            if optional and name == "frames" and tensor.isfinite().all():  # NaN has no level
                writer.put("frames_8bit", pipe.to_8bit(tensor).float())

        def record_init(latents: Tensor) -> Tensor:
            writer.put("latents.init", latents)
            return latents

        for name, module in chosen.items():
            module.register_forward_hook(partial(record_tap, name))
        pipe.run(inputs, run_settings, probe=record_probe)
    return writer.trace
