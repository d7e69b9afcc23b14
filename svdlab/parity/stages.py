"""Judging each stage of a generation from the candidate's own tensors.

A stage is run on what the candidate's trace says went in, in the working dtype and in float64:

    distance = |c - exact| / |exact|,  floor = max(|work - exact| / |exact|, |r - exact_r| / |exact_r|, resolution),

with ``exact_r`` the stage's result from the reference's own tensors. ``ratio`` is distance / floor, and what is at most
the parity tolerance is right. Nothing upstream matters, and errors do not add up. Where a tensor between two stages is
not in the trace, both are judged together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.parity.bugs import BUGS
from svdlab.parity.compare import THRESHOLD, resolution
from svdlab.parity.probes import INPUTS, execution_key, probe_of
from svdlab.parity.recorder import Nudge
from svdlab.parity.replay import is_8bit, source_images
from svdlab.parity.trace import DTYPES, Trace
from svdlab.svd.modules import cast_copy
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.sampler import EulerScheduler
from svdlab.svd.schedulers import RULES, label
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGE, STAGES, Change, wide

# A reference this many floors away from what the checkpoint gives is not diffusers' trace of it.
FOREIGN = 64.0
# Read in float32 or wider, whatever the networks run in.
_WIDE = {"input.source", "input.image", "input.clip_pixels", "input.noise", "sigmas", "timesteps", "frames"}
_DRAWS = ("input.noise", "input.latents")
_STAGE_OF = {name: stage.name for stage in STAGES for name in stage.writes}


def _is_judged(name: str) -> bool:
    """Whether a stage, or the preprocessing, writes or reads this very tensor."""
    probe = probe_of(name)
    return probe is not None and (probe[0] in _STAGE_OF or probe[0] in INPUTS)


def stages_changed(*changes: Change) -> frozenset[str]:
    """The stages whose results changes can alter: those that are wrapped, and those that run an edited network."""
    stages = {stage for change in changes for stage in change.wrap}
    networks = {network for change in changes for network in change.edit}
    return frozenset(stages | {stage.name for stage in STAGES if stage.network.split(".")[0] in networks})


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to ``wanted``; absolute, root mean square, where that is zero. NaN stays NaN and matches nothing."""
    if found.shape != wanted.shape:  # a bug can turn guidance off, and with it half of the batch
        return math.inf
    found, wanted = found.cpu(), wanted.cpu()
    # A difference of two close numbers is exact, so that only half precision needs a wider one.
    wide_enough = torch.promote_types(torch.promote_types(found.dtype, wanted.dtype), torch.float32)
    return _norm(found.to(wide_enough) - wanted.to(wide_enough)) / (_norm(wanted) or math.sqrt(wanted.numel()))


def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every value moved by a unit in the last place, up or down."""
    nudge = Nudge(0)
    return {name: nudge(tensor) for name, tensor in tensors.items()}


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


class Chain:
    """The stages of one generation, each run on known tensors where there are, else on what the stage before made.

    Args:
        pipe: whose stages run.
        settings: resolved.
        known: tensors by their names in a trace.
        guided: whether classifier-free guidance runs.
        changes: put into the pipeline, in the catalogue's order.
        scale_of_first_step: whether a known guidance scale, which a trace holds for step 0 alone, holds for that step
            only.
        made: results of stages that no change alters.
    """

    def __init__(
        self,
        pipe: SVDPipeline,
        settings: GenerationSettings,
        known: Mapping[str, Tensor],
        guided: bool,
        changes: Sequence[Change] = (),
        scale_of_first_step: bool = False,
        made: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.original, self.changes = pipe, tuple(changes)
        self.pipe = pipe.with_changes(*in_catalogue_order(changes)) if changes else pipe
        self.settings = settings.replace(dtype=str(pipe.dtype).removeprefix("torch."), cfg="batched")
        self.known, self.guided = known, guided
        self.scale_of_first_step = scale_of_first_step
        self.made: dict[str, Tensor] = dict(made or {})
        self._made_once: dict[str, object] = {}

    def changed(self, changes: Sequence[Change]) -> Chain:
        """The same tensors with more changes; what they do not alter is not computed again."""
        altered = stages_changed(*changes)
        kept = {name: t for name, t in self.made.items() if not self.stages(name) & altered}
        every = (*self.changes, *changes)
        return Chain(self.original, self.settings, self.known, self.guided, every, self.scale_of_first_step, kept)

    # --- which stage makes what of what ---

    def origin(self, name: str) -> tuple[str, int]:
        """The stage that writes a tensor, and the step."""
        base, step = probe_of(name) or (name, None)
        if base == "noise_pred" and not self.guided:
            base = "noise_pred_cond"
        return _STAGE_OF[base], step or 0

    def reads(self, name: str) -> Iterator[str]:
        """The tensors that go into ``name``, by their names in a trace."""
        stage, step = self.origin(name)
        for read in STAGE[stage].reads:
            if read == "latents.init":
                if step == 0:
                    yield read
            elif read == "latents":
                last = self.settings.num_steps if stage == "decode" else step
                if last:
                    yield f"latents.{last - 1:03}"
            elif read in ("model_input", "noise_pred_uncond", "noise_pred_cond", "noise_pred"):
                yield f"{read}.{step:03}"
            else:
                yield read

    def is_known(self, name: str, reader: str = "") -> bool:
        """Whether ``reader`` is given the known tensor."""
        if name == "guidance_scale" and self.scale_of_first_step and probe_of(reader) not in (None, ("noise_pred", 0)):
            return False
        return name in self.known

    def stages(self, name: str) -> frozenset[str]:
        """The stages that ``expected(name)`` runs."""
        stages = {self.origin(name)[0]}
        for read in self.reads(name):
            if not self.is_known(read, name) and read not in INPUTS:
                stages |= self.stages(read)
        return frozenset(stages)

    def computable(self, name: str) -> bool:
        """Whether everything that goes in is known or can be made."""
        if name in INPUTS and _STAGE_OF.get(name) is None:
            return False
        return all(self.is_known(read, name) or self.computable(read) for read in self.reads(name))

    # --- running ---

    def value(self, name: str, reader: str = "") -> Tensor:
        """What a stage is given: the known tensor, or the result of the stage that makes it."""
        if not self.is_known(name, reader):
            return self.expected(name)
        known = self.known[name].to(self.pipe.device)
        if name not in _WIDE:
            return known.to(self.pipe.dtype)
        if name == "input.source" and self.pipe.dtype == torch.float64 and is_8bit(known):
            return (known.double() * 255).round() / 255
        return wide(known.to(torch.float64) if self.pipe.dtype == torch.float64 else known)

    @torch.no_grad()
    def expected(self, name: str) -> Tensor:
        """What the stage that writes ``name`` makes of what goes in."""
        if name not in self.made:
            stage, step = self.origin(name)
            self.made.update(_RUN[stage](self, name, step))
        return self.made[name]

    def once(self, name: str, make: Callable[[], object]) -> object:
        """A result that is no tensor of a trace, made once."""
        if name not in self._made_once:
            self._made_once[name] = make()
        return self._made_once[name]

    def ramp(self) -> Tensor:
        """The guidance scale (S, F) of every step."""
        scale = self.pipe.guidance_ramp(self.settings).to(self.pipe.device, self.pipe.dtype)
        return scale.expand(self.settings.num_steps, -1)

    def videos(self) -> int:
        """V."""
        return len(self.value("input.latents" if "input.latents" in self.known else "image_latents"))


def _resize_image(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    images = source_images(chain.known["input.source"])
    return {name: torch.cat([chain.pipe.resize_image(image, chain.settings) for image in images])}


def _clip_pixels(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    made = []
    for i, source in enumerate(chain.value("input.source")):
        pipe = chain.pipe
        if "input.image" in chain.known:  # a bug may read the frame: the one that is there
            frame = chain.value("input.image")[i, None]
            pipe = pipe.with_stage(resize_image=lambda source, settings, frame=frame: frame)
        made.append(pipe.clip_pixels(source[None], chain.settings))
    return {name: torch.cat(made)}


def _image_embedding(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    pixels = chain.value("input.clip_pixels").to(chain.pipe.dtype)
    return {name: chain.pipe.image_embedding(pixels, chain.settings)}


def _image_latents(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    return {name: chain.pipe.image_latents(chain.value("input.image"), chain.value("input.noise"), chain.settings)}


def _time_ids(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    ids = torch.as_tensor(chain.pipe.time_ids(chain.settings)).to(chain.pipe.device, chain.pipe.dtype)
    return {name: ids.expand(chain.videos(), -1)}


def _sigmas(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    return {name: chain.pipe.sigmas(chain.settings).to(chain.pipe.device)}


def _timesteps(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    return {name: chain.pipe.timesteps(chain.value("sigmas"))}


def _guidance_ramp(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    return {name: chain.ramp()[0].expand(chain.videos(), -1)}


def _initial_latents(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    return {name: chain.pipe.initial_latents(chain.value("input.latents"), chain.value("sigmas"))}


def _latents_before(chain: Chain, step: int) -> Tensor:
    return chain.value(f"latents.{step - 1:03}" if step else "latents.init")


def _model_input(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    sigma, latents = chain.value("sigmas")[step], _latents_before(chain, step)
    made = chain.pipe.model_input(latents, chain.value("image_latents"), sigma, chain.guided)
    return {name: made.to(chain.pipe.dtype)}


def _predict_noise(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    pipe, settings = chain.pipe, chain.settings
    embeddings, ids = chain.value("image_embeddings"), chain.value("added_time_ids")
    conditioning = chain.once("conditioning", lambda: pipe.condition(embeddings, ids, settings, chain.guided))
    model_input, timestep = chain.value(f"model_input.{step:03}"), chain.value("timesteps")[step]
    made = pipe.predict_noise(model_input, timestep, conditioning, settings)  # type: ignore[arg-type]
    if not chain.guided:
        return {f"noise_pred.{step:03}": made}
    uncond, cond = made.chunk(2)
    return {f"noise_pred_uncond.{step:03}": uncond, f"noise_pred_cond.{step:03}": cond}


def _guide(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    own = not chain.is_known("guidance_scale", name) or "guidance_ramp" in stages_changed(*chain.changes)
    scale = chain.ramp()[step] if own else chain.value("guidance_scale")[0]
    uncond, cond = (chain.value(f"{half}.{step:03}") for half in ("noise_pred_uncond", "noise_pred_cond"))
    return {name: chain.pipe.guide(uncond, cond, scale)}


def _euler_step(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    sigmas, latents = chain.value("sigmas"), _latents_before(chain, step)
    made = chain.pipe.euler_step(chain.value(f"noise_pred.{step:03}"), latents, sigmas[step], sigmas[step + 1])
    return {name: made.to(chain.pipe.dtype)}


def _decode(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    return {name: chain.pipe.decode(chain.value(f"latents.{chain.settings.num_steps - 1:03}"), chain.settings)}


def _to_8bit(chain: Chain, name: str, step: int) -> dict[str, Tensor]:
    frames = chain.value("frames")
    finite = bool(frames.isfinite().all())  # NaN has no level
    return {name: chain.pipe.to_8bit(frames).float() if finite else torch.full_like(frames, math.nan)}


_RUN: Mapping[str, Callable[[Chain, str, int], dict[str, Tensor]]] = {
    "resize_image": _resize_image,
    "clip_pixels": _clip_pixels,
    "image_embedding": _image_embedding,
    "image_latents": _image_latents,
    "time_ids": _time_ids,
    "sigmas": _sigmas,
    "timesteps": _timesteps,
    "guidance_ramp": _guidance_ramp,
    "initial_latents": _initial_latents,
    "model_input": _model_input,
    "predict_noise": _predict_noise,
    "guide": _guide,
    "euler_step": _euler_step,
    "decode": _decode,
    "to_8bit": _to_8bit,
}


def in_catalogue_order(changes: Sequence[Change]) -> list[Change]:
    """The order in which the wrappers of one stage lie around each other; what is not in the catalogue lies outside."""
    order = {id(variant): i for i, bug in enumerate(BUGS.values()) for variant in bug.variants}
    return sorted(changes, key=lambda change: order.get(id(change), len(order)))


@dataclass
class Unit:
    """Stages that are judged together, because no tensor between them is known.

    Attributes:
        stages: their names.
        ratios: by the tensors that they write, in execution order.
        cleared: those of the stages that are right elsewhere.
    """

    stages: frozenset[str]
    ratios: dict[str, float] = field(default_factory=dict)
    cleared: frozenset[str] = frozenset()

    @property
    def ratio(self) -> float:
        """The largest; infinite where a value is not finite."""
        return max(math.inf if math.isnan(r) else r for r in self.ratios.values())

    @property
    def wrong(self) -> list[str]:
        """The tensors that rounding does not explain."""
        return [name for name, ratio in self.ratios.items() if not ratio <= THRESHOLD]

    @property
    def blamed(self) -> frozenset[str]:
        """The stages that may be wrong where one is: those that are not right elsewhere, or all."""
        return self.stages - self.cleared or self.stages


class StageJudge:
    """Runs stages on the candidate's tensors.

    Args:
        reference: diffusers' trace with its inputs.
        candidate: the port's trace of the same generation; any of the probes.
        pipe: svdlab with the same weights, in the reference's dtype.
        candidate_truth: the candidate's code in float64 on the same inputs: how far its own rounding moves it.
        tick: called whenever a stage has been judged.

    Raises:
        SvdlabError: a reference that is not what the checkpoint gives.
    """

    def __init__(
        self,
        reference: Trace,
        candidate: Trace,
        pipe: SVDPipeline,
        candidate_truth: Trace | None = None,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        self.reference, self.candidate, self.pipe, self.tick = reference, candidate, pipe, tick
        self.candidate_truth = candidate_truth
        self.settings = pipe.resolve(reference.settings.replace(dtype=reference.dtype))
        # Weights that are cast are copies; deep copies of the modules would cost more than a stage.
        components = {
            name: cast_copy(component, torch.float64) if isinstance(component, nn.Module) else copy.deepcopy(component)
            for name, component in pipe.components.items()
        }
        self.exact_pipe = SVDPipeline(**components, compat=pipe.compat)
        probes = [name for name in candidate if name in reference and _is_judged(name)]
        draws = [name for name in INPUTS if name in reference and name not in probes]
        if "input.source" in reference and not is_8bit(reference["input.source"]):
            draws, probes = ([n for n in names if n != "input.source"] for names in (draws, probes))
        known = {name: candidate.raw(name) for name in probes}
        own = {name: reference[name] for name in (*probes, *draws)}
        known.update({name: reference[name] for name in draws})
        self.guided = self._is_guided(known)
        self.known = known
        self.work = Chain(pipe, self.settings, known, self.guided)
        self.exact = Chain(self.exact_pipe, self.settings, known, self.guided)
        # The candidate's tensors moved by a unit in the last place: a bug that itself rounds jumps where they are.
        self.moved = Chain(pipe, self.settings, moved(known), self.guided)
        self.own = Chain(self.exact_pipe, self.settings, own, self.guided)
        self.own_work = Chain(pipe, self.settings, own, self.guided)
        # Of another scheduler svdlab has no rule of its own to judge by.
        same = isinstance(pipe.scheduler, EulerScheduler) and reference.scheduler in ("", label(pipe.scheduler))
        self.uncovered = frozenset[str]() if same else frozenset(RULES)
        self.judged = [n for n in sorted(probes, key=execution_key) if self.is_covered(n)]
        self.resolution = resolution(reference.dtype)
        self._own: dict[str, float] = {}

    def _is_guided(self, known: Mapping[str, Tensor]) -> bool:
        for name, tensor in known.items():
            base = (probe_of(name) or ("", None))[0]
            if base == "model_input" and "image_latents" in known:
                return len(tensor) == 2 * len(known["image_latents"])
            if base in ("noise_pred_uncond", "noise_pred_cond"):
                return True
        if "guidance_scale" in known:
            return bool(known["guidance_scale"].max() > 1)
        return bool(self.pipe.guidance_ramp(self.settings).max() > 1)

    def is_covered(self, name: str, chain: Chain | None = None) -> bool:
        """Whether a tensor can be made of what is known, by rules that are svdlab's own."""
        chain = chain or self.work
        return chain.computable(name) and not chain.stages(name) & self.uncovered

    def own_distance(self, name: str) -> float:
        """The reference's distance from what the stage makes of the reference's own tensors, in float64."""
        if name not in self._own:
            self._own[name] = 0.0
            if name in self.reference and self.reference.shape(name) == tuple(self.own.expected(name).shape):
                self._own[name] = distance(self.reference[name], self.own.expected(name))
        return self._own[name]

    def is_foreign(self, name: str) -> bool:
        """Whether the reference is not what the checkpoint gives."""
        limit = self.own_distance(name) / FOREIGN
        rounding = distance(self.work.expected(name), self.exact.expected(name))
        if limit <= max(rounding, self.resolution):
            return False
        # The candidate's tensors may round less than the reference's: one step from sigma 700 to 0 cancels.
        return limit > distance(self.own_work.expected(name), self.own.expected(name))

    def candidate_rounding(self, name: str) -> float:
        """How far the candidate's own rounding moves a tensor, where its float64 trace is given."""
        exact = self.candidate_truth
        return 0.0 if exact is None or name not in exact else distance(self.candidate.raw(name), exact[name])

    def floor(self, name: str, work: Chain | None = None, exact: Chain | None = None) -> float:
        """What rounding explains of one tensor; NaN where the stage's own result is not finite."""
        rounding = distance((work or self.work).expected(name), (exact or self.exact).expected(name))
        floor = max(rounding, self.own_distance(name), self.candidate_rounding(name), self.resolution)
        if name == "frames_8bit":
            # A value between two levels falls to either: at least one value by one level.
            made = self.work.expected(name)
            floor = max(floor, 1 / (_norm(made) or math.inf), distance(self.moved.expected(name), made))
        return floor if math.isfinite(rounding) else math.nan

    def ratio(
        self, name: str, work: Chain | None = None, exact: Chain | None = None, moved: Chain | None = None
    ) -> float:
        """The candidate's distance over the floor, of one tensor.

        Args:
            name: which.
            work, exact: with changes in place.
            moved: likewise, on the candidate's tensors moved by a unit in the last place: where rounding alone does not
                explain the distance, what that does is in the floor, too.
        """
        return self.ratio_to((exact or self.exact).expected(name), name, self.floor(name, work, exact), moved)

    def ratio_to(self, wanted: Tensor, name: str, floor: float, moved: Chain | None) -> float:
        """The candidate's distance from a tensor over a floor, see ``ratio``."""
        left = distance(self.known[name], wanted)
        if moved is not None and not left <= THRESHOLD * floor:
            floor = max(floor, distance(moved.expected(name), wanted))
        return left / floor

    def units(self) -> list[Unit]:
        """Judge every tensor that the candidate holds.

        Raises:
            SvdlabError: see the class.
        """
        ratios: dict[str, float] = {}
        for name in self.judged:
            if not bool(torch.isfinite(self.exact.expected(name)).all()):
                continue  # what went in is not finite: nothing can be said of the stage
            ratios[name] = self.ratio(name)
            if self.is_foreign(name):
                raise SvdlabError(
                    f"{self.reference.label}: {name} is not what the checkpoint gives ({self.own_distance(name):.2g} "
                    "away), allowed: diffusers' trace of the weights of --model"
                )
            if name == "guidance_scale" and not ratios[name] <= THRESHOLD:
                # It holds for step 0 only: a ramp over steps has other values later.
                for chain in (self.work, self.exact, self.moved, self.own, self.own_work):
                    chain.scale_of_first_step = True
            self.tick()
        units: dict[frozenset[str], Unit] = {}
        for name, ratio in ratios.items():
            stages = self.work.stages(name)
            units.setdefault(stages, Unit(stages)).ratios[name] = ratio
        right = frozenset(stage for unit in units.values() if not unit.wrong for stage in unit.stages)
        for unit in units.values():
            unit.cleared = right & unit.stages
        return list(units.values())

    @property
    def differing_inputs(self) -> list[str]:
        """The random draws, and the image as given, in which the candidate differs from the reference."""
        names = [n for n in ("input.source", *_DRAWS) if n in self.candidate and n in self.reference]
        limit = THRESHOLD * torch.finfo(DTYPES[self.reference.dtype]).eps
        return [n for n in names if not distance(self.candidate.raw(n), self.reference[n]) <= limit]
