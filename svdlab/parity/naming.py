"""Which bugs of the catalogue make a wrong stage right: replays of that stage alone, from the candidate's own tensors.

A set of bugs is accepted where every tensor of the stages is then within the parity tolerance, where that is at least
twice as close as without the bugs, and where nothing that was right becomes wrong. The smallest sets count; when
several meet the tensors, all are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from svdlab.parity.bugs import BUGS, DEPARTURES, sample_posterior
from svdlab.parity.compare import THRESHOLD
from svdlab.parity.modules import ModuleJudge
from svdlab.parity.stages import Chain, StageJudge, Unit, distance, stages_changed
from svdlab.svd.modules import own_modules, state_of
from svdlab.svd.stages import Change
from svdlab.svd.vae import VAE

# A set that leaves less than this many floors, and a distance below this share, may be right with the rounding that the
# bugs themselves amplify: a float64 replay decides.
_DOUBTFUL, _ANOTHER = 1000.0, 0.2
# Of a single module, whose rounding few bugs amplify.
_DOUBTFUL_MODULE = 12.0
# A set of bugs must leave at most this share of the ratio without them.
_MATERIAL = 0.5
# How many sets are carried on to larger ones, and how many predicted ones are replayed.
_BEAM, _PREDICTED = 4, 24
# A random draw: bounds in standard errors, the largest value, and how many values tell its spread.
_SIGMAS, _LARGEST, _ENOUGH = 3.0, 6.0, 200
# Noise that the port did not replay: how often its spread is measured, and how many deviations from it tell.
_ENCODES, _FAR = 16, 4.0
_SAMPLE = 2**16

Item = TypeVar("Item")
Named = tuple[str, Change]
Bugs = tuple[Named, ...]


@dataclass(frozen=True)
class Found:
    """A set of bugs that makes stages right.

    Attributes:
        bugs: (name in the catalogue, the variant that fits).
        ratio: the largest that is left, at most the parity tolerance.
        probe: where.
    """

    bugs: Bugs
    ratio: float
    probe: str

    @property
    def names(self) -> tuple[str, ...]:
        """In the catalogue's order."""
        order = list(BUGS)
        return tuple(sorted({name for name, _ in self.bugs}, key=order.index))


@dataclass(frozen=True)
class _Tried:
    """A set that was replayed at the unit's first wrong tensor: the distance left, and a sample of what is left."""

    bugs: Bugs
    distance: float
    left: Tensor


class Namer:
    """Searches the catalogue.

    Args:
        judge: of the stages.
        units: what it found.
        largest: the largest set that is tried in one unit.
        tick: called at every replay.
        is_late: asked before sets of several bugs are tried; single bugs always are.

    Attributes:
        tried: the sets that were replayed.
        stopped: whether sets were left out for lack of time.
    """

    def __init__(
        self,
        judge: StageJudge,
        units: Sequence[Unit],
        largest: int = 3,
        tick: Callable[[], object] = lambda: None,
        is_late: Callable[[], bool] = lambda: False,
    ) -> None:
        self.judge, self.units, self.largest, self.tick, self.is_late = judge, units, largest, tick, is_late
        self.tried: list[tuple[str, ...]] = []
        self.stopped = False
        # Bugs with a random draw of the port's own that the values neither contradict nor prove.
        self.untold: set[str] = set()
        self._concrete: dict[frozenset[int], list[Change] | None] = {}
        self._changed = _all_stages_changed(judge.pipe.vae)

    def name(self, unit: Unit, base: Bugs = (), needed: Bugs = ()) -> list[Found]:
        """The smallest sets of bugs that make a unit right.

        Args:
            unit: a wrong one.
            base: bugs that are named already, tried first and extended where they do not do.
            needed: those of them that modules have shown to be there, though the unit may be right without.

        Returns:
            Equal sets, best first; empty where nothing in the catalogue explains the unit.
        """
        base = tuple(b for b in base if self.changes_of(b) & unit.stages)
        if base and (found := self.accept(base, unit, proven=bool(needed))):
            return [self.pruned(found, unit, needed)]
        for start in self.in_time(dict.fromkeys((len(base), 0))):
            if sets := self.search(base[:start], unit, needed):
                return sets
        return []

    def in_time(self, items: Iterable[Item]) -> Iterator[Item]:
        """The first item, and those that follow as long as it is not late."""
        for i, item in enumerate(items):
            if i and self.is_late():
                self.stopped = True
                return
            yield item

    def search(self, start: Bugs, unit: Unit, needed: Bugs) -> list[Found]:
        """The smallest extensions of a set that make a unit right."""
        singles = self.expand(start, unit)
        if sets := self.settled(self.accepted(singles, unit), unit, needed):
            return sets
        # Effects of small bugs add up: what singles leave predicts what pairs and triples leave.
        for size in range(2, self.largest + 1):
            more = (*self.with_draw(start, size, unit), *self.predicted(singles, start, size, unit))
            predicted = [self.attempt((*start, *bugs), unit) for bugs in self.in_time(more)]
            if sets := self.settled(self.accepted(predicted, unit), unit, needed):
                return self.with_equals(sets, unit, needed)
        beam = self.beam(singles)
        for _ in range(2, self.largest + 1):
            longer = ((*one.bugs, option) for one in beam for option in self.options(one.bugs, unit))
            wider = [self.attempt(bugs, unit) for bugs in self.in_time(longer)]
            if sets := self.settled(self.accepted(wider, unit), unit, needed):
                return self.with_equals(sets, unit, needed)
            beam = self.beam(wider)
        return []

    # --- what a set of bugs changes ---

    def changes_of(self, bug: Named) -> frozenset[str]:
        """The stages whose results a bug can change."""
        return self._changed.get(id(bug[1])) or stages_changed(bug[1])

    def options(self, start: Bugs, unit: Unit) -> list[Named]:
        """The catalogue's variants that can change a unit and stand beside the bugs that are there."""
        decided = {BUGS[name].decides for name, _ in start}
        return [
            (bug.name, variant)
            for bug in BUGS.values()
            if bug.decides not in decided
            for variant in bug.variants
            if self._changed[id(variant)] & unit.stages
        ]

    def concrete(self, bugs: Bugs) -> list[Change] | None:
        """What to replay; None where a bug's own random draw does not look like one.

        The draw is unknown, its law is not: (candidate - centre) / spread must look like a unit Gaussian.
        """
        key = frozenset(id(change) for _, change in bugs)
        if key not in self._concrete:
            self._concrete[key] = self._made_concrete(bugs)
        return self._concrete[key]

    def _made_concrete(self, bugs: Bugs) -> list[Change] | None:
        changes = [change for name, change in bugs if name not in DRAWS]
        for name, _ in bugs:
            if name in DRAWS:
                if "image_latents" not in self.judge.known:
                    return None
                drawn = self.drawn(name, changes)
                if drawn is None:
                    return None
                changes = [*changes, drawn]
        return changes

    def drawn(self, name: str, changes: Sequence[Change]) -> Change | None:
        """A change that gives the candidate's image latents, if they pass for that bug's draw."""
        centre, edge = (
            self.judge.exact.changed([*changes, *more]).expected("image_latents").double().cpu() for more in DRAWS[name]
        )
        found = self.judge.known["image_latents"].double().cpu()
        spread = edge - centre
        rounding = 8 * max(self.judge.own_distance("image_latents"), self.judge.resolution)
        if not float(spread.abs().min()) > rounding * float(centre.norm() / math.sqrt(centre.numel())):
            return None
        if not is_unit_gaussian((found - centre) / spread, centre):
            return None
        if found.numel() < _ENOUGH or self.may_be_other_noise((found - centre) / spread, centre, spread, changes):
            self.untold.add(name)
            return None
        return Change(wrap={"image_latents": lambda pipe, stage, *inputs: found.to(stage(*inputs))})

    def may_be_other_noise(self, z: Tensor, centre: Tensor, spread: Tensor, changes: Sequence[Change]) -> bool:
        """Whether noise of the port's own, added to the pixels where it belongs, spreads the latents as much.

        That is a port which did not replay ``input.noise``, and no bug. Its spread is measured by encoding other noise.
        """
        generator, noise = torch.Generator().manual_seed(0), self.judge.work.value("input.noise")
        spreads = []
        for _ in range(_ENCODES):
            drawn = torch.randn(noise.shape, generator=generator).to(noise)
            known = {**self.judge.known, "input.noise": drawn}
            chain = Chain(self.judge.pipe, self.judge.settings, known, self.judge.guided, changes)
            made = chain.expected("image_latents").double().cpu()
            spreads.append(_log_variances((made - centre) / spread))
        mean, deviation = torch.stack(spreads).mean(0), torch.stack(spreads).std(0)
        return bool(((_log_variances(z) - mean).abs() <= _FAR * deviation).all())

    # --- replaying ---

    def attempt(self, bugs: Bugs, unit: Unit) -> _Tried:
        """Replay a set at the unit's first wrong tensor, in the working dtype."""
        self.tick()
        self.tried.append(tuple(name for name, _ in bugs))
        probe, nothing = unit.wrong[0], torch.zeros(0)
        changes = self.concrete(bugs)
        if changes is None:
            return _Tried(bugs, math.inf, nothing)
        made = self.judge.work.changed(changes).expected(probe)
        found = self.judge.known[probe]
        left = distance(found, made)
        if not math.isfinite(left):
            return _Tried(bugs, math.inf, nothing)
        flat = found.double().cpu().flatten() - made.double().cpu().flatten()
        return _Tried(bugs, left, flat[:: -(-flat.numel() // _SAMPLE)])

    def expand(self, start: Bugs, unit: Unit) -> list[_Tried]:
        """The set with one more bug, each that can change the unit."""
        return [self.attempt((*start, option), unit) for option in self.options(start, unit)]

    def beam(self, tried: Iterable[_Tried]) -> list[_Tried]:
        """The closest few, of different names."""
        best: dict[frozenset[str], _Tried] = {}
        for one in sorted(tried, key=lambda t: t.distance):
            best.setdefault(frozenset(name for name, _ in one.bugs), one)
        return list(islice(best.values(), _BEAM))

    def predicted(self, singles: Sequence[_Tried], start: Bugs, size: int, unit: Unit) -> list[Bugs]:
        """Further bugs in the order of what they would leave if the effects of all added up."""
        left = self.attempt(start, unit).left
        usable = [one for one in singles if one.left.shape == left.shape and float((left - one.left).norm()) > 0]
        if len(usable) < size:
            return []
        effects = torch.stack([left - one.left for one in usable])
        gram, along = effects @ effects.T, effects @ left
        sets = torch.combinations(torch.arange(len(usable)), size)
        squares = -2 * along[sets].sum(1)
        squares += sum(gram[sets[:, i], sets[:, j]] for i in range(size) for j in range(size))
        chosen: list[Bugs] = []
        for row in sets[squares.argsort()].tolist():
            bugs = tuple(usable[i].bugs[-1] for i in row)
            if len({BUGS[name].decides for name, _ in bugs}) == size:
                chosen.append(bugs)
            if len(chosen) == _PREDICTED:
                break
        return chosen

    def with_draw(self, start: Bugs, size: int, unit: Unit) -> Iterator[Bugs]:
        """Further bugs, one of them with a random draw of the port's own, of which nothing can be predicted."""
        options = [option for option in self.options(start, unit) if "image_latents" in self.changes_of(option)]
        others = [option for option in options if option[0] not in DRAWS]
        for draw in (option for option in options if option[0] in DRAWS):
            for rest in combinations(others, size - 1):
                if len({BUGS[name].decides for name, _ in (draw, *rest)}) == size:
                    yield draw, *rest

    # --- accepting ---

    def accepted(self, tried: Iterable[_Tried], unit: Unit) -> list[Found]:
        """The sets that make the unit right, best first, one for each set of names."""
        floor = self.judge.floor(unit.wrong[0])
        sets = []
        for one in tried:
            if one.distance <= THRESHOLD * floor or (one.distance <= _DOUBTFUL * floor and one.distance <= _ANOTHER):
                found = self.accept(one.bugs, unit)
                if found:
                    sets.append(found)
        # A tensor that is met digit for digit is no random draw that happens to look like it.
        sets = [f for f in sets if not DRAWS.keys() & set(f.names)] or sets
        return self.distinct(sets)

    def distinct(self, sets: Iterable[Found]) -> list[Found]:
        """Best first, one for each set of names, of the smallest size.

        Who does what the original does is not accused of a bug that gives the same.
        """
        best: dict[tuple[str, ...], Found] = {}
        # Of a bug's variants that fit the one that changes the least is what can be said.
        for found in sorted(sets, key=lambda f: (sum(len(self.changes_of(bug)) for bug in f.bugs), f.ratio)):
            best.setdefault(found.names, found)
        rank = {names: (len(names), -len(DEPARTURES.keys() & set(names))) for names in best}
        first = min(rank.values(), default=None)
        return sorted((f for names, f in best.items() if rank[names] == first), key=lambda f: f.ratio)

    def accept(self, bugs: Bugs, unit: Unit, proven: bool = False) -> Found | None:
        """The set as an explanation of a unit, or None where it is none; ``proven``: modules have shown it."""
        changes = self.concrete(bugs)
        if changes is None:
            return None
        work, exact, moved = (c.changed(changes) for c in (self.judge.work, self.judge.exact, self.judge.moved))
        ratios: dict[str, float] = {}
        for name in sorted(unit.ratios, key=lambda n: n != unit.wrong[0] if unit.wrong else False):
            ratios[name] = self.judge.ratio(name, work, exact, moved)
            if not ratios[name] <= THRESHOLD:
                return None
        worst = max(ratios, key=lambda n: ratios[n])
        if not ratios[worst] <= _MATERIAL * unit.ratio:
            return None
        for name in () if proven else unit.wrong:
            # A bug that itself rounds has a floor that covers any small error: the distance has to fall, too.
            found = self.judge.known[name]
            left = min(distance(found, chain.expected(name)) for chain in (work, exact))
            if not left <= _MATERIAL * distance(found, self.judge.exact.expected(name)):
                return None
        changed = frozenset[str]().union(*(self.changes_of(bug) for bug in bugs))
        for other in self.units:
            if other is unit or other.wrong or not other.stages & changed:
                continue
            if any(not self.judge.ratio(name, work, exact) <= THRESHOLD for name in other.ratios):
                return None
        return Found(bugs, ratios[worst], worst)

    def pruned(self, found: Found, unit: Unit, needed: Bugs = ()) -> Found:
        """Without the bugs that make no difference."""
        for bug in found.bugs:
            if bug in needed:
                continue
            fewer = tuple(b for b in found.bugs if b is not bug)
            if fewer and (smaller := self.accept(fewer, unit)):
                return self.pruned(smaller, unit, needed)
        return found

    def settled(self, sets: Sequence[Found], unit: Unit, needed: Bugs) -> list[Found]:
        """Without the bugs that make no difference, and without the sets in which one only widens the floor."""
        pruned = self.distinct([self.pruned(found, unit, needed) for found in sets])
        return [found for found in pruned if self.each_matters(found, unit, needed)]

    def each_matters(self, found: Found, unit: Unit, needed: Bugs) -> bool:
        """Whether every bug of a set brings some tensor nearer; one that itself rounds can make a set fit without."""

        def left(bugs: Bugs) -> dict[str, float]:
            changes = self.concrete(bugs)
            if changes is None:
                return dict.fromkeys(unit.wrong, math.inf)
            made = self.judge.work.changed(changes)
            return {name: distance(self.judge.known[name], made.expected(name)) for name in unit.wrong}

        together = left(found.bugs)
        others = [tuple(b for b in found.bugs if b is not bug) for bug in found.bugs if bug not in needed]
        return len(found.bugs) == 1 or all(
            any(together[name] <= _MATERIAL * without for name, without in left(rest).items()) for rest in others
        )

    def with_equals(self, sets: Sequence[Found], unit: Unit, needed: Bugs) -> list[Found]:
        """With the sets that differ from an accepted one in one bug and meet the tensors as well."""
        more = list(sets)
        for found in sets[:2]:
            for kept in combinations(found.bugs, len(found.bugs) - 1):
                if set(map(id, needed)) <= set(map(id, kept)):
                    more += self.settled(self.accepted(self.expand(kept, unit), unit), unit, needed)
        return self.distinct(more)


# By a VAE's configuration, and of it by the identity of a variant, which is there as long as the process.
_changed_in: dict[str, dict[int, frozenset[str]]] = {}


def _all_stages_changed(vae: VAE) -> dict[int, frozenset[str]]:
    """``_stages_changed`` of every variant of the catalogue, by its identity; looked at once for an architecture."""
    key = vae.config.model_dump_json()
    if key not in _changed_in:
        before = {name: state_of(module) for name, module in vae.named_modules()}
        variants = [variant for bug in BUGS.values() for variant in bug.variants]
        _changed_in[key] = {id(variant): _stages_changed(variant, vae, before) for variant in variants}
    return _changed_in[key]


def _stages_changed(change: Change, vae: VAE, before: Mapping[str, object]) -> frozenset[str]:
    """``stages_changed``, with the halves of the VAE told apart by looking at what an edit does to them."""
    stages = stages_changed(change)
    if "vae" not in change.edit:
        return stages
    edited = own_modules(vae)
    change.edit["vae"](edited)
    changed = {name for name, module in edited.named_modules() if state_of(module) != before[name]}
    wrapped = frozenset(change.wrap)
    halves = {"decode" if name.startswith("decoder") else "image_latents" for name in changed if name}
    return stages - ({"decode", "image_latents"} - halves - wrapped) if halves else stages


@dataclass(frozen=True)
class NamedModules:
    """What bugs explain of a network's wrong modules.

    Attributes:
        picks: bugs that are each needed; of each the alternatives that mend the same modules.
        left: the wrong modules that none mends.
    """

    picks: list[list[Named]]
    left: list[str]


def name_modules(
    judge: ModuleJudge, options: Sequence[Named], tick: Callable[[], object] = lambda: None
) -> NamedModules:
    """The fewest bugs that make a network's wrong modules right and leave the right ones right.

    Args:
        judge: which has judged.
        options: bugs that can change the network.
        tick: called at every pass.
    """
    wrong = set(judge.wrong)
    clean = judge.ratios_with(()) if wrong else {}
    touched: dict[int, set[str]] = {}

    def still_wrong(bugs: Sequence[Named], exact: bool = False) -> set[str]:
        """The modules that bugs leave wrong; all where they break one that was right."""
        tick()
        ratios = judge.ratios_with([change for _, change in bugs], exact)
        if len(bugs) == 1:
            touched[id(bugs[0][1])] = {n for n in wrong if ratios[n] != clean[n]}
        limit = THRESHOLD if exact else _DOUBTFUL_MODULE
        if any(n not in wrong and not ratios[n] <= max(limit, 2 * judge.ratios[n]) for n in ratios):
            return wrong
        return {n for n in wrong if not ratios[n] <= min(limit, _MATERIAL * judge.ratios[n])}

    picks: list[list[Named]] = []
    left = set(wrong)
    # Alone a bug mends the modules that have no other; what two have changed together needs both in place.
    while left and options:
        base = [pick[0] for pick in picks]
        tried = [(option, still_wrong([*base, option])) for option in options]
        added: list[tuple[list[Named], set[str]]] = []
        for rest in sorted({frozenset(rest) for _, rest in tried if rest < left}, key=len):
            mended = left - rest
            equal = [option for option, other in tried if other == rest]
            overlap = any(mended & other for _, other in added)
            if overlap or {BUGS[name].decides for name, _ in equal} & _decided([*picks, *(pick for pick, _ in added)]):
                continue
            # Of a bug's variants that fit the one that changes the least is what can be said.
            equal.sort(key=lambda option: len(stages_changed(option[1])))
            names = dict.fromkeys(name for name, _ in equal)
            names = {name: None for name in names if name in DEPARTURES} or names  # see ``Namer.distinct``
            added.append(([next(o for o in equal if o[0] == name) for name in names], mended))
        # With the rounding of all of them: what then mends nothing was a coincidence.
        remaining = still_wrong([*base, *(pick[0] for pick, _ in added)], exact=True)
        proposed, added = len(added), [(pick, mended) for pick, mended in added if mended - remaining]
        if not added:
            break
        picks += [pick for pick, _ in added]
        left = remaining if len(added) == proposed else still_wrong([pick[0] for pick in picks], exact=True)
        decided = _decided(picks)
        options = [
            (name, change)
            for name, change in options
            if BUGS[name].decides not in decided and touched.get(id(change), left) & left
        ]
    judge.forget()
    return NamedModules(picks, [name for name in judge.wrong if name in left])


def _decided(picks: Sequence[Sequence[Named]]) -> set[str]:
    return {BUGS[name].decides for pick in picks for name, _ in pick[:1]}


def is_unit_gaussian(z: Tensor, centre: Tensor) -> bool:
    """Whether ``z`` (B, 4, h, w) looks like independent unit draws.

    Mean and variance, of all values and of each channel, and the largest value; no trace of the picture in it, and none
    of a value's neighbours.
    """
    parts = [z, *z.unbind(1)]
    others = [(z, centre), (z[..., 1:], z[..., :-1]), (z[..., 1:, :], z[..., :-1, :])]
    return (
        all(abs(float(p.mean())) <= _SIGMAS / math.sqrt(p.numel()) for p in parts)
        and all(abs(float(p.var()) - 1) <= _SIGMAS * math.sqrt(2 / p.numel()) for p in parts)
        and float(z.abs().max()) <= _LARGEST
        and all(abs(_correlation(a, b)) <= _SIGMAS / math.sqrt(a.numel()) for a, b in others if a.numel() > 2)
    )


def _log_variances(z: Tensor) -> Tensor:
    """Of all values and of each channel; (5,) for (B, 4, h, w)."""
    return torch.stack([z.var(), *z.var((0, 2, 3))]).clamp_min(1e-30).log()


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def _one_deviation_more(pipe: Any, stage: Any, image: Tensor, noise: Tensor, settings: Any) -> Tensor:
    return stage(image, noise, settings) + settings.noise_aug_strength


_MISSING = BUGS["noise_aug_missing"].variants[0]
# Bugs with a random draw of the port's own: changes that give the draw's centre, and centre + one standard deviation.
DRAWS: Mapping[str, tuple[tuple[Change, ...], tuple[Change, ...]]] = {
    "image_latents_sampled": ((), (Change(edit={"vae": lambda vae: sample_posterior(vae, torch.ones_like)}),)),
    "noise_aug_after_encode": ((_MISSING,), (_MISSING, Change(wrap={"image_latents": _one_deviation_more}))),
}
