"""The tensors that a trace can hold: their names, their shapes, and the order in which a generation makes them.

``docs/trace-format.md`` describes each one. Probes are the generation's own tensors; taps (``svdlab.parity.taps``) are
outputs of modules inside the networks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from svdlab.errors import SvdlabError, short
from svdlab.parity import taps
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGES

# Probes with their shapes. B images given, V videos (B times the videos per image), F frames, H x W pixels, h x w
# latents of L channels, S steps, D embedding width, P CLIP pixels; G is V, or 2V with guidance (the unconditional half
# first).
INPUTS = {
    "input.source": ("B", 3, "H0", "W0"),
    "input.image": ("B", 3, "H", "W"),
    "input.clip_pixels": ("B", 3, "P", "P"),
    "input.noise": ("B", 3, "H", "W"),
    "input.latents": ("V", "F", "L", "h", "w"),
}
CONDITIONING = {
    "image_embeddings": ("V", 1, "D"),
    "image_latents": ("V", "L", "h", "w"),
    "added_time_ids": ("V", 3),
    "sigmas": ("S+1",),
    "timesteps": ("S",),
    "guidance_scale": ("V", "F"),
}
STEP = {
    "model_input": ("G", "F", "2L", "h", "w"),
    "noise_pred_uncond": ("V", "F", "L", "h", "w"),
    "noise_pred_cond": ("V", "F", "L", "h", "w"),
    "noise_pred": ("V", "F", "L", "h", "w"),
    "latents": ("V", "F", "L", "h", "w"),
}
FRAMES = {"frames": ("V", "F", 3, "H", "W")}
SHAPES: Mapping[str, tuple[int | str, ...]] = {**INPUTS, **CONDITIONING, **STEP, **FRAMES}
# What a capture records only when it is asked to: for ports that have these tensors and not their neighbours.
OPTIONAL_CONDITIONING = {"latents.init": ("V", "F", "L", "h", "w")}
OPTIONAL_STEP = {"denoised": ("V", "F", "L", "h", "w")}
OPTIONAL_FRAMES = {"frames_8bit": ("V", "F", 3, "H", "W")}
OPTIONAL: Mapping[str, tuple[int | str, ...]] = {**OPTIONAL_CONDITIONING, **OPTIONAL_STEP, **OPTIONAL_FRAMES}
EVERY_SHAPE: Mapping[str, tuple[int | str, ...]] = {**SHAPES, **OPTIONAL}
PER_STEP = (*STEP, *OPTIONAL_STEP)


def _order(probes: Mapping[str, object], per_step: bool = False) -> tuple[str, ...]:
    """Probes as the pipeline's stages write them, and before them the taps of the network that the stage runs."""
    names: list[str] = []
    for stage in STAGES:
        # What the UNet computes once for all steps is no probe itself.
        writes = [name for name in stage.writes if name in probes or (name == "conditioning" and "sigmas" in probes)]
        if writes and stage.network:
            names.append(f"taps of {stage.network}{' at a step' * per_step}")
        names += writes
    return tuple(names)


def _with_denoised(names: tuple[str, ...]) -> tuple[str, ...]:
    """The Euler step makes the denoised latents before the next ones."""
    at = names.index("latents")
    return (*names[:at], *OPTIONAL_STEP, *names[at:])


_PHASES = (
    tuple(INPUTS),
    _order({**CONDITIONING, **OPTIONAL_CONDITIONING}),
    _with_denoised(_order(STEP, per_step=True)),
    (*_order(FRAMES), *OPTIONAL_FRAMES),
)
_FREE_PHASES = (0, 1)  # a port may order its inputs, and its conditioning, as it likes
_PLACE = {name: (phase, index) for phase, names in enumerate(_PHASES) for index, name in enumerate(names)}
_STEP_PROBE = re.compile(rf"({'|'.join(PER_STEP)})\.([0-9]{{3}}|[1-9][0-9]{{3,8}})")


def probe_of(name: str) -> tuple[str, int | None] | None:
    """Split a probe's name: ``latents.003`` -> ("latents", 3), ``frames`` -> ("frames", None); or None."""
    if match := _STEP_PROBE.fullmatch(name):
        return match[1], int(match[2])
    return (name, None) if name in EVERY_SHAPE and name not in PER_STEP else None


def is_optional(name: str) -> bool:
    """Whether ``name`` is a probe that a capture records only when it is asked to."""
    probe = probe_of(name)
    return probe is not None and probe[0] in OPTIONAL


def is_tap(name: str) -> bool:
    """Whether ``name`` is an inner tap rather than a probe."""
    return probe_of(name) is None


def execution_key(name: str) -> tuple[int, int, int]:
    """Sort key of execution order: (phase, step, place); a tap comes before the first probe that it can change.

    Raises:
        SvdlabError: neither a probe nor a tap.
    """
    if (split := probe_of(name)) is not None:
        place, step = split
    elif (split := taps.split(name)) is not None:
        place, step = f"taps of {_network(split[0])}", split[1]
        if step is not None:
            place += " at a step"
    else:
        raise SvdlabError(f"{short(name)}: neither a probe nor a tap of docs/trace-format.md")
    phase, index = _PLACE[place]
    return phase, step or 0, index


def _network(tap: str) -> str:
    """Which network a tap is of; the two halves of the VAE run at different times."""
    network = tap.split(".", 1)[0]
    if network != "vae":
        return network
    return "vae.decoder" if tap.startswith("vae.decoder") else "vae.encoder"


def check_order(names: Sequence[str]) -> None:
    """Refuse names that are not in execution order.

    Inputs are in any order among themselves, and so is the conditioning; taps are anywhere.

    Raises:
        SvdlabError: naming the two probes, or a name that is neither a probe nor a tap.
    """
    before: tuple[tuple[int, int, int], str] = (0, 0, 0), ""
    for name in names:
        key = execution_key(name)
        if is_tap(name):
            continue
        if key[0] in _FREE_PHASES:
            key = key[0], 0, 0
        if key < before[0]:
            raise SvdlabError(f"order: {name} after {before[1]}, allowed: execution order")
        before = key, name


def check_until(until: str | None, settings: GenerationSettings) -> None:
    """Refuse to stop after a probe that this generation does not have.

    Raises:
        SvdlabError: not a probe's name, or a step that is not run.
    """
    if until is None:
        return
    probe = probe_of(until)
    if probe is None or (probe[1] or 0) >= settings.num_steps:
        raise SvdlabError(f"until: got {until!r}, allowed: a probe such as 'image_latents' or 'noise_pred.000'")


def check_shapes(shapes: Mapping[str, tuple[int, ...]], settings: GenerationSettings) -> None:
    """Every probe's and tap's shape against resolved settings, and against each other.

    Raises:
        SvdlabError: naming the first tensor of another shape, or of a step that is not run.
    """
    steps, videos = settings.num_steps, settings.num_videos_per_prompt
    known: dict[str, int] = {
        "F": settings.num_frames or 0,
        "H": settings.height or 0,
        "W": settings.width or 0,
        "S": steps,
        "S+1": steps + 1,
    }
    for name in sorted(shapes, key=execution_key):
        shape = shapes[name]
        if (probe := probe_of(name)) is not None:
            (_, step), spec = probe, EVERY_SHAPE[probe[0]]
        else:
            tap, step = taps.split(name) or ("", None)
            spec = taps.shape_of(tap) or ("*",) * len(shape)
        if step is not None and step >= steps:
            raise SvdlabError(f"{name}: step {step}, allowed: 0 to {steps - 1}, as the settings have it")
        good = len(shape) == len(spec) and 0 not in shape
        for size, dim in zip(shape, spec, strict=False):
            if isinstance(dim, int):
                good = good and size == dim
            elif dim != "*":
                if "B" in known:
                    known.setdefault("V", known["B"] * videos)
                if "L" in known:
                    known.setdefault("2L", 2 * known["L"])
                good = good and known.setdefault(dim, size) == size
        if good and "G" in known and "V" in known:
            good = known["G"] in (known["V"], 2 * known["V"])
        if not good:
            sizes = ", ".join(str(known.get(str(dim), dim)) for dim in spec) + "," * (len(spec) == 1)
            raise SvdlabError(f"{name}: shape {shape}, allowed: ({sizes})")
