"""Which known bug explains a candidate's trace: svdlab replays the inputs with bugs put in.

A set of bugs is an explanation only if its replay matches the candidate within the noise floor at every probe that
the candidate has. The search is greedy: one bug for the first divergence, then, where a later divergence is left,
another for that one; where no single bug explains a divergence, pairs of the bugs that show there. A replay stops at
the first probe that it gets wrong, so bugs of the conditioning cost no UNet pass. What nothing explains is unknown.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svdlab.parity.bugs import BUGS, sample_posterior
from svdlab.parity.candidate import capture
from svdlab.parity.compare import THRESHOLD, Comparison, compare
from svdlab.parity.probes import execution_key
from svdlab.parity.replay import replay_inputs
from svdlab.parity.trace import Trace
from svdlab.parity.writer import CaptureComplete
from svdlab.svd.pipeline import Inputs, SVDPipeline
from svdlab.svd.stages import Change

if TYPE_CHECKING:
    pass

# Between THRESHOLD and this ratio a mismatch may still be rounding that the bug itself amplifies, and a float64 replay
# decides; unless the tensors differ by this share of their norm, which no rounding explains.
_DOUBTFUL, _ANOTHER = 1000.0, 0.2
# Bounds of the tests for a unit Gaussian, in standard errors of the mean and of the variance, and for one value.
_SIGMAS, _LARGEST = 5.0, 6.0


@dataclass(frozen=True)
class Explanation:
    """Bugs that together give what the candidate has.

    Attributes:
        bugs: names in the catalogue.
        ratio: the largest distance left between their replay and the candidate, over the noise floor (at most 4).
        probe: where that is.
    """

    bugs: tuple[str, ...]
    ratio: float
    probe: str

    @property
    def causes(self) -> str:
        """What the port did, in words."""
        return "; ".join(BUGS[bug].cause for bug in self.bugs)


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        verdict: "parity" (nothing to explain), "explained" or "unknown".
        comparison: of reference and candidate.
        explanations: best first. More than one: no probe of this candidate tells them apart at its dtype and settings.
        closest: for "unknown", the bugs that explain the first divergences, and the probe that they leave unexplained.
        tried: the sets of bugs that were replayed.
    """

    verdict: Literal["parity", "explained", "unknown"]
    comparison: Comparison
    explanations: list[Explanation] = field(default_factory=list)
    closest: tuple[tuple[str, ...], str] | None = None
    tried: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def first_divergence(self) -> str | None:
        """The first probe at which the candidate leaves the reference."""
        return self.comparison.first_divergence

    @property
    def first_module(self) -> str | None:
        """The first inner module that does, where both traces have taps."""
        return self.comparison.first_module

    def summary(self) -> str:
        """One or a few lines for people."""
        if self.verdict == "parity":
            return f"parity: nothing to explain (worst ratio {self.comparison.worst.ratio:.3g})"
        where = f"first divergence {self.first_divergence}" + (f", in {self.first_module}" if self.first_module else "")
        if self.verdict == "explained":
            lines = [f"{' + '.join(e.bugs)}: {e.causes} (what is left: ratio {e.ratio:.2f})" for e in self.explanations]
            same = ["these give the same tensors at this dtype and these settings"] if len(lines) > 1 else []
            return "\n".join([f"explained; {where}", *lines, *same])
        left = f"; {' + '.join(self.closest[0])} leaves {self.closest[1]} unexplained" if self.closest else ""
        return f"unknown: no bug of the catalogue, and no pair, explains it ({len(self.tried)} tried); {where}{left}"

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "verdict": self.verdict,
            "first_divergence": self.first_divergence,
            "first_module": self.first_module,
            "explanations": [{"bugs": list(e.bugs), "ratio": e.ratio, "probe": e.probe} for e in self.explanations],
            "closest": self.closest and {"bugs": list(self.closest[0]), "unexplained": self.closest[1]},
            "tried": [list(names) for names in self.tried],
            "floor": self.comparison.floor_from,
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2)

    def _repr_html_(self) -> str:
        return "".join(f"<p>{escape(line)}</p>" for line in self.summary().splitlines())


def diagnose(
    reference: Trace,
    candidate: Trace,
    truth: Trace | None = None,
    *,
    pipe: SVDPipeline,
    max_bugs: int = 2,
    progress: bool = False,
) -> Diagnosis:
    """Name the bug, or the pair of bugs, behind a candidate's trace.

    Args:
        reference: diffusers' trace with all ``input.*`` probes.
        candidate: the port's trace of the same generation; any of the probes.
        truth: the reference in float64; without it the floors are the bounds of ``compare``.
        pipe: svdlab with the same weights, in the reference's dtype.
        max_bugs: the largest set that is tried.
        progress: show a bar over replays.

    Raises:
        SvdlabError: traces that cannot be compared, a reference without inputs to replay, another dtype.
    """
    comparison = compare(reference, candidate, truth)
    if comparison.verdict == "parity":
        return Diagnosis("parity", comparison)
    with tqdm(desc="replays", unit="replay", disable=not progress) as bar:
        return _Search(reference, candidate, comparison, pipe, bar.update).run(max_bugs)


@dataclass(frozen=True)
class _State:
    """A set of bugs whose replay matches the candidate before ``wrong``; None: everywhere."""

    bugs: tuple[str, ...]
    changes: tuple[Change, ...]
    wrong: str | None
    ratio: float = 0.0
    worst: str = ""

    def gets_past(self, probe: str) -> bool:
        """Whether the replay is right at ``probe`` and before it."""
        return self.wrong is None or execution_key(self.wrong) > execution_key(probe)


class _Search:
    def __init__(
        self,
        reference: Trace,
        candidate: Trace,
        comparison: Comparison,
        pipe: SVDPipeline,
        tick: Callable[[], object],
    ):
        self.reference, self.candidate, self.comparison, self.tick = reference, candidate, comparison, tick
        self.pipes = {pipe.dtype: pipe}
        self.pipe = pipe
        # Without the source image the CLIP input can only be replayed, and its bugs cannot be told.
        self.preprocess = "input.source" in reference
        self.floors = {p.name: p.floor for p in comparison.probes}
        self.inputs: dict[Any, Inputs] = {}
        self.tried: list[tuple[str, ...]] = []
        self.settings = pipe.resolve(reference.settings.replace(dtype=reference.dtype))

    def run(self, max_bugs: int) -> Diagnosis:
        wrong = self.comparison.first_divergence
        assert wrong is not None
        frontier = [_State((), (), wrong)]
        closest = None
        for _ in range(max_bugs):
            reached = [state for start in frontier for state in self.extend(start, max_bugs)]
            if solved := [state for state in reached if state.wrong is None]:
                return Diagnosis("explained", self.comparison, self.ranked(solved), tried=self.tried)
            if not reached:
                break
            # The further a set reaches, the more it explains.
            reached.sort(key=lambda s: execution_key(s.wrong or ""), reverse=True)
            closest = reached[0]
            frontier = reached
        left = (closest.bugs, closest.wrong) if closest and closest.wrong else None
        return Diagnosis("unknown", self.comparison, closest=left, tried=self.tried)

    def ranked(self, solved: Sequence[_State]) -> list[Explanation]:
        """Smallest sets first, then by what is left; one entry for each set of names."""
        # A tensor that is met digit for digit is no random draw that happens to look like it.
        solved = [s for s in solved if not _DRAWS.keys() & set(s.bugs)] or solved
        best: dict[tuple[str, ...], _State] = {}
        for state in sorted(solved, key=lambda s: (len(s.bugs), s.ratio)):
            best.setdefault(tuple(sorted(state.bugs)), state)
        fewest = min(len(state.bugs) for state in best.values())
        return [Explanation(s.bugs, s.ratio, s.worst) for s in best.values() if len(s.bugs) == fewest]

    def extend(self, start: _State, max_bugs: int) -> list[_State]:
        """One more bug, or two that show at the same probe, so that the replay gets past ``start.wrong``."""
        assert start.wrong is not None
        beyond: list[_State] = []
        # By where a bug's replay goes wrong: at the divergence itself, or before it, where another may undo it.
        stuck: dict[str, list[tuple[str, Change]]] = {}
        for name, change in self.candidates(start):
            concrete = self.concrete(name, change, start)
            state = None if concrete is None else self.walk(start, (name,), (concrete,))
            if state and state.gets_past(start.wrong):
                beyond.append(state)
            else:
                wrong = start.wrong if state is None or state.wrong is None else state.wrong
                stuck.setdefault(wrong, []).append((name, change))
        if beyond or len(start.bugs) + 2 > max_bugs:
            return beyond
        for (a, one), (b, other) in _pairs(start.wrong, stuck):
            if not _compatible(*start.bugs, a, b):
                continue
            concrete = self.concrete(b, other, replace(start, changes=(*start.changes, one)))
            if concrete is None:
                continue
            if (both := self.walk(start, (a, b), (one, concrete))).gets_past(start.wrong):
                beyond.append(both)
        return beyond

    def candidates(self, start: _State) -> Iterator[tuple[str, Change]]:
        """The catalogue's bugs that can show at or before the first wrong probe, the likeliest first."""
        assert start.wrong is not None
        at = execution_key(start.wrong)
        # A bug can be too small to see where it first acts and show later: earlier ones stay in, but come last.
        bugs = [b for b in BUGS.values() if execution_key(b.first_probe) <= at and _compatible(*start.bugs, b.name)]
        for bug in sorted(bugs, key=lambda b: execution_key(b.first_probe), reverse=True):
            for variant in bug.variants:
                yield bug.name, variant

    def concrete(self, name: str, change: Change, start: _State) -> Change | None:
        """What to replay; for a bug with a random draw of its own, the candidate's latents if they pass as one.

        The draw is unknown, its law is not: (candidate - centre) / spread must look like a unit Gaussian.
        """
        if name not in _DRAWS:
            return change
        if "image_latents" not in self.candidate:
            return None
        centre, edge = (self.image_latents((*start.changes, *changes)) for changes in _DRAWS[name])
        found = self.candidate["image_latents"].double()
        spread = edge - centre
        rounding = self.floors["image_latents"] * float(centre.norm() / math.sqrt(centre.numel()))
        if not float(spread.abs().min()) > 8 * rounding or not _is_unit_gaussian((found - centre) / spread, centre):
            return None
        return Change(wrap={"image_latents": lambda pipe, stage, *inputs: found.to(stage(*inputs))})

    def image_latents(self, changes: Sequence[Change]) -> Tensor:
        """What the replay encodes with these changes, in float64."""
        recorded: dict[str, Tensor] = {}

        def probe(name: str, tensor: Tensor) -> None:
            if name == "image_latents":
                recorded[name] = tensor.double().cpu()
                raise CaptureComplete

        self.replay(changes, probe, self.pipe)
        return recorded["image_latents"]

    def replay(self, changes: Sequence[Change], probe: Callable[[str, Tensor], None], pipe: SVDPipeline) -> None:
        """Run the reference's inputs through the pipeline with changes, until ``probe`` stops it."""
        broken = pipe.with_changes(*_ordered(changes))
        settings = self.settings.replace(dtype=str(pipe.dtype).removeprefix("torch."))
        # The preprocessing is done once for all replays that do not change it.
        key = (pipe.dtype, *(w for c in changes for stage, w in c.wrap.items() if stage in _PREPROCESSING))
        if key not in self.inputs:
            self.inputs[key] = replay_inputs(broken, settings, self.reference, self.preprocess)
        with suppress(CaptureComplete):
            broken.run(self.inputs[key], settings, probe=probe)

    def walk(self, start: _State, names: tuple[str, ...], changes: tuple[Change, ...]) -> _State:
        """Replay with more bugs until the replay leaves the candidate."""
        self.tick()
        bugs, changes = (*start.bugs, *names), (*start.changes, *changes)
        self.tried.append(bugs)
        ratios: dict[str, float] = {}
        doubtful: dict[str, Tensor] = {}

        def probe(name: str, tensor: Tensor) -> None:
            if name not in self.floors:
                return
            distance = _distance(self.candidate[name], tensor)
            ratios[name] = distance / self.floors[name]
            if not ratios[name] <= THRESHOLD:
                if not (ratios[name] <= _DOUBTFUL and distance <= _ANOTHER):
                    raise CaptureComplete
                doubtful[name] = tensor.double().cpu()

        self.replay(changes, probe, self.pipe)
        if doubtful:
            self.judge(changes, ratios, doubtful)
        wrong = next((name for name, ratio in ratios.items() if not ratio <= THRESHOLD), None)
        right = {n: r for n, r in ratios.items() if r <= THRESHOLD} or {"": 0.0}
        worst = max(right, key=lambda n: right[n])
        return _State(bugs, changes, wrong, right[worst], worst)

    def judge(self, changes: Sequence[Change], ratios: dict[str, float], doubtful: Mapping[str, Tensor]) -> None:
        """Widen the floors of doubtful probes to what rounding does in this very replay, measured in float64."""
        if torch.float64 not in self.pipes:
            self.pipes[torch.float64] = SVDPipeline(copy.deepcopy(self.pipe.components)).to(torch.float64)
        last = list(doubtful)[-1]

        def probe(name: str, tensor: Tensor) -> None:
            if name in doubtful:
                own = _distance(doubtful[name], tensor)
                ratios[name] = _distance(self.candidate[name], tensor) / max(own, self.floors[name])
            if name == last or not ratios.get(name, 0.0) <= THRESHOLD:
                raise CaptureComplete

        self.replay(changes, probe, self.pipes[torch.float64])


def _pairs(
    here: str, stuck: Mapping[str, Sequence[tuple[str, Change]]]
) -> Iterator[tuple[tuple[str, Change], tuple[str, Change]]]:
    """Two that show at the first divergence, or two that may undo each other before it, as two factors can."""
    for wrong, bugs in stuck.items():
        if wrong != here:
            bugs = [(name, change) for name, change in bugs if not change.edit]
        # A draw of the port's own can only be tested with the other bug in place: it comes second.
        for one, other in combinations(sorted(bugs, key=lambda bug: bug[0] in _DRAWS), 2):
            if one[0] != other[0] and one[0] not in _DRAWS:
                yield one, other


def _compatible(*names: str) -> bool:
    """Whether no two of the bugs decide the same."""
    return len({BUGS[name].decides for name in names}) == len(names)


def _ordered(changes: Sequence[Change]) -> list[Change]:
    """In the catalogue's order, in which the wrappers of one stage lie around each other; drawn latents lie outside."""
    order = {id(variant): i for i, bug in enumerate(BUGS.values()) for variant in bug.variants}
    return sorted(changes, key=lambda change: order.get(id(change), len(order)))


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Relative to ``wanted``; absolute, root mean square, where that is zero. NaN stays NaN and matches nothing."""
    if found.shape != wanted.shape:  # a bug can turn guidance off, and with it half of the batch
        return math.inf
    wanted = wanted.double().cpu()
    difference = float((found.double() - wanted).norm())
    return difference / (float(wanted.norm()) or math.sqrt(wanted.numel()))


def _is_unit_gaussian(z: Tensor, centre: Tensor) -> bool:
    """Whether ``z`` (B, 4, h, w) looks like independent draws.

    Mean, variance and largest value; no trace of the picture in it, and none of a value's neighbours.
    """
    n = z.numel()
    mean, variance = float(z.mean()), float(z.var())
    others = [(z, centre), (z[..., 1:], z[..., :-1]), (z[..., 1:, :], z[..., :-1, :])]
    return (
        abs(mean) <= _SIGMAS / math.sqrt(n)
        and abs(variance - 1) <= _SIGMAS * math.sqrt(2 / n)
        and float(z.abs().max()) <= _LARGEST
        and all(abs(_correlation(a, b)) <= _SIGMAS / math.sqrt(a.numel()) for a, b in others if a.numel() > 2)
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def _one_deviation_more(pipe: SVDPipeline, stage: Any, image: Tensor, noise: Tensor, settings: Any) -> Tensor:
    return stage(image, noise, settings) + settings.noise_aug_strength


# Stages that make the inputs of a generation from the source image.
_PREPROCESSING = ("resize_image", "clip_pixels")
_MISSING = BUGS["noise_aug_missing"].variants[0]
# Bugs with a random draw of the port's own: changes that give the draw's centre, and centre + one standard deviation.
_DRAWS: Mapping[str, tuple[tuple[Change, ...], tuple[Change, ...]]] = {
    "image_latents_sampled": ((), (Change(edit={"vae": lambda vae: sample_posterior(vae, torch.ones_like)}),)),
    "noise_aug_after_encode": ((_MISSING,), (_MISSING, Change(wrap={"image_latents": _one_deviation_more}))),
}


@dataclass(frozen=True)
class CatalogueRow:
    """What one bug does, and which test catches it.

    Attributes:
        bug: its name.
        first_divergence: the first probe above the noise ratio, None if no probe is.
        ratio: the largest noise ratio of all probes.
        frames_mse: mean squared error of the final frames, before clamping, in about [-1, 1].
        passes_mse_bar: whether the usual threshold, MSE < 1e-3, misses it.
    """

    bug: str
    first_divergence: str | None
    ratio: float
    frames_mse: float
    passes_mse_bar: bool


def catalogue(reference: Trace, truth: Trace, pipe: SVDPipeline, progress: bool = False) -> list[CatalogueRow]:
    """Every bug of the catalogue, put into svdlab in its first variant, against the reference.

    Args:
        reference: diffusers' trace with its source image.
        truth: the same in float64.
        pipe: svdlab with the same weights.
        progress: show a bar.
    """
    rows = []
    for name in tqdm(BUGS, desc="catalogue", unit="bug", disable=not progress):
        made = compare(reference, capture(pipe.with_bugs(name), replay=reference, preprocess=True), truth)
        rows.append(row_of(name, made))
    return rows


def row_of(bug: str, comparison: Comparison) -> CatalogueRow:
    """A row from the comparison of a candidate that has the bug."""
    mse = comparison.frames_mse
    return CatalogueRow(
        bug,
        comparison.first_divergence,
        comparison.worst.ratio,
        math.nan if mse is None else mse,
        bool(comparison.passes_mse_bar),
    )
