"""Every bug in a candidate's trace: each stage judged from the candidate's own tensors, each wrong one named alone.

In this order: the chain's verdict (``compare``); every stage's, and with taps every module's, from the candidate's own
tensors (``stages``, ``modules``); for each wrong stage the bugs of the catalogue that make it right (``naming``); and a
replay of the whole chain with all of them, whose result is reported whatever it is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from html import escape
from itertools import count, islice, product
from typing import Any, Literal
from xml.etree import ElementTree

from tqdm.auto import tqdm

from svdlab.errors import SvdlabError
from svdlab.files import json_value
from svdlab.parity.bugs import BUGS, DEPARTURES
from svdlab.parity.candidate import capture
from svdlab.parity.compare import THRESHOLD, Comparison, check_same_run, check_settings, compare
from svdlab.parity.modules import ModuleJudge, network_of, next_taps
from svdlab.parity.naming import Bugs, Found, Named, NamedModules, Namer, name_modules
from svdlab.parity.probes import INPUTS, execution_key, is_optional
from svdlab.parity.relations import Relation, axes_of, relate
from svdlab.parity.stages import Chain, StageJudge, Unit, distance, moved, stages_changed
from svdlab.parity.trace import Trace
from svdlab.parity.writer import version_of
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.stages import STAGE, STAGES, Change

Rules = Literal["diffusers", "stability"]
# How many combinations of equal sets are listed.
_LISTED = 16


@dataclass(frozen=True)
class Explanation:
    """Bugs that together give what the candidate has.

    Attributes:
        bugs: names in the catalogue, of departures too.
        ratio: the largest that any stage is left with, over its floor (at most 4).
        probe: where that is.
    """

    bugs: tuple[str, ...]
    ratio: float
    probe: str

    @property
    def causes(self) -> str:
        """What the port did, in words."""
        return "; ".join(BUGS[bug].said for bug in self.bugs)


@dataclass(frozen=True)
class StageVerdict:
    """What the candidate's own tensors say of one stage.

    Attributes:
        stage: its name.
        status: "right", "wrong", or "not_covered": the trace does not hold what it writes, or nothing behind it, or its
            rule is a scheduler's that svdlab does not have.
        ratio: the largest of its tensors, over its own floor; None where it is not covered.
        probe: the tensor that has it.
        judged_with: stages from which it cannot be told apart here, as no tensor between them is in the trace.
        bugs: sets of bugs, and of departures, that make it right; more than one: nothing in this trace tells them
            apart. With ``modules`` left, those that make the other wrong modules right.
        modules: taps of wrong modules that no bug makes right, in the order in which they run.
        next_taps: taps that divide what is left unexplained.
        untold: bugs with a random draw of the port's own that the values neither contradict nor prove.
        relation: how the tensor ``related``, the first that no bug explains, follows from the right one, if it does.
        why: it is not covered though the trace may hold it; else empty.
    """

    stage: str
    status: Literal["right", "wrong", "not_covered"]
    ratio: float | None = None
    probe: str | None = None
    judged_with: tuple[str, ...] = ()
    bugs: tuple[tuple[str, ...], ...] = ()
    modules: tuple[str, ...] = ()
    next_taps: tuple[str, ...] = ()
    relation: Relation | None = None
    related: str | None = None
    untold: tuple[str, ...] = ()
    why: str = ""

    @property
    def explained(self) -> bool:
        """Whether bugs of the catalogue account for all that is wrong in it."""
        return self.status == "wrong" and bool(self.bugs) and not self.modules and not self.next_taps


@dataclass(frozen=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        verdict: "parity" (every stage right, and the chain), "explained" (bugs and departures account for everything),
            "partly" (for some wrong stages or modules), or "unknown".
        comparison: of reference and candidate, over the whole chain.
        rules: whose choices are right: "diffusers", or "stability", the original's where diffusers departs from it.
        unlike_original: with "stability", the departures that every run of the original's code shows and the candidate
            does not: it does what diffusers does.
        stages: one verdict per stage, in the order in which they run.
        explanations: where it is "explained", best first. More than one: nothing in this trace tells them apart.
        confirmed_ratio: the largest ratio that the replay of the whole chain with all named bugs leaves, where stages
            that are not explained are given the candidate's results; None without a named bug.
        confirmed_at: where that is.
        inputs: random draws, and the image, in which the candidate differs from the reference.
        tried: the sets of bugs that were replayed.
        stopped: whether sets of several bugs were left untried for lack of time.
    """

    verdict: Literal["parity", "explained", "partly", "unknown"]
    comparison: Comparison
    stages: list[StageVerdict] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    confirmed_ratio: float | None = None
    confirmed_at: str | None = None
    inputs: list[str] = field(default_factory=list)
    tried: list[tuple[str, ...]] = field(default_factory=list)
    stopped: bool = False
    rules: Rules = "diffusers"
    unlike_original: list[str] = field(default_factory=list)

    @property
    def bugs(self) -> list[str]:
        """Everything named that is wrong by ``rules``: a departure is a bug where diffusers' choices are right."""
        return [name for name in self.named if self.rules == "diffusers" or name not in DEPARTURES]

    @property
    def departures(self) -> list[str]:
        """Where the candidate does what the original does, and diffusers does not."""
        return [name for name in self.named if name in DEPARTURES]

    @property
    def named(self) -> list[str]:
        """Every bug and every departure that is named: in every one of the equal sets of some stage."""
        named = {bug for s in self.stages if s.bugs for bug in set.intersection(*(set(b) for b in s.bugs))}
        if self.explanations:
            named |= set.intersection(*(set(e.bugs) for e in self.explanations))
        return [name for name in BUGS if name in named]

    @property
    def wrong(self) -> list[StageVerdict]:
        """The wrong stages."""
        return [stage for stage in self.stages if stage.status == "wrong"]

    @property
    def coverage(self) -> str:
        """How many stages the trace lets judge, in words."""
        left = [stage for stage in self.stages if stage.status == "not_covered"]
        text = f"{len(self.stages) - len(left)} of {len(self.stages)} stages judged"
        for why in dict.fromkeys(stage.why for stage in left):
            names = ", ".join(stage.stage for stage in left if stage.why == why)
            text += f", not {names}" + f" ({why})" * bool(why)
        return text

    @property
    def first_divergence(self) -> str | None:
        """The first probe at which the candidate as a whole leaves the reference."""
        return self.comparison.first_divergence

    @property
    def first_module(self) -> str | None:
        """The first wrong module, judged from the taps before it, that no bug explains."""
        return next((stage.modules[0] for stage in self.stages if stage.modules), None)

    @property
    def closest(self) -> tuple[tuple[str, ...], str] | None:
        """Where it is not all explained: what is named, and the first tensor that it leaves unexplained."""
        left = next((s.probe for s in self.stages if s.status == "wrong" and not s.explained), None)
        return (tuple(self.named), left) if left else None

    def summary(self) -> str:
        """A few lines for people."""
        worst = self.comparison.worst
        if self.verdict == "parity" and not self.departures:
            return f"parity: nothing to explain (worst ratio {worst.ratio:.3g}; {self.coverage})"
        if len(self.explanations) > 1:
            lines = [f"{' + '.join(e.bugs)}: {e.causes} (what is left: ratio {e.ratio:.2f})" for e in self.explanations]
            lines.append("these give the same tensors at this dtype and these settings")
        else:
            lines = [f"{name}: {BUGS[name].said}" for name in self.named]
            lines += [f"what is left: ratio {e.ratio:.2f}" for e in self.explanations]
            for stage in self.wrong:
                lines += [] if stage.explained else [_left_of(stage)]
            if not self.wrong and self.verdict in ("partly", "unknown"):
                lines.append("every stage is right from the candidate's own tensors")
        if self.comparison.first_non_finite:
            lines.insert(0, self.comparison.non_finite_text())
        if self.unlike_original:
            lines.append(f"it does what diffusers does, and not the original: {', '.join(self.unlike_original)}")
        if self.inputs:
            lines.append(f"the candidate ran on another {', '.join(self.inputs)} than the reference")
        if self.confirmed_ratio is not None:
            lines.append(f"confirmed by a replay of the whole chain: ratio {self.confirmed_ratio:.2f}")
            if not self.confirmed_ratio <= THRESHOLD:
                lines[-1] = (
                    f"a replay of the whole chain does not confirm it: ratio {self.confirmed_ratio:.3g} at "
                    f"{self.confirmed_at}"
                )
        if self.stopped and self.verdict != "explained":
            lines.append("time was up before all sets of several bugs were tried: taps tell more, or more seconds")
        wrong = ", ".join(stage.stage for stage in self.wrong) or "none"
        diverges = f"first divergence {self.first_divergence}; " if self.first_divergence else ""
        tried = "" if self.verdict in ("parity", "explained") else f"; {len(self.tried)} sets of bugs tried"
        with_whom = self.verdict + " with Stability's code" * (self.rules == "stability" and self.verdict == "parity")
        return "\n".join([f"{with_whom}; {diverges}wrong stages: {wrong}; {self.coverage}{tried}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "verdict": self.verdict,
            "first_divergence": self.first_divergence,
            "first_module": self.first_module,
            "stages": [json_value(asdict(stage)) for stage in self.stages],
            "bugs": self.bugs,
            "departures": self.departures,
            "rules": self.rules,
            "unlike_original": self.unlike_original,
            "confirmed_ratio": json_value(self.confirmed_ratio),
            "confirmed_at": self.confirmed_at,
            "coverage": self.coverage,
            "inputs": self.inputs,
            "explanations": [{"bugs": list(e.bugs), "ratio": e.ratio, "probe": e.probe} for e in self.explanations],
            "closest": self.closest and {"bugs": list(self.closest[0]), "unexplained": self.closest[1]},
            "tried": [list(names) for names in self.tried],
            "stopped": self.stopped,
            "floor": self.comparison.floor_from,
            "versions": {name: version_of(name) for name in ("svdlab", "torch", "diffusers")},
        }

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_junit(self) -> str:
        """One test case for each stage, for continuous integration: XML that JUnit's readers read."""
        left = [stage for stage in self.stages if stage.status == "not_covered"]
        counts = {"tests": len(self.stages), "failures": len(self.wrong), "errors": 0, "skipped": len(left)}
        attributes = {"name": "svdlab diagnose", **{key: str(count) for key, count in counts.items()}}
        suite = ElementTree.Element("testsuite", attributes)
        for stage in self.stages:
            case = ElementTree.SubElement(suite, "testcase", classname="stages", name=stage.stage)
            if stage.status == "not_covered":
                ElementTree.SubElement(case, "skipped", message=stage.why or "not covered by the trace")
            elif stage.status == "wrong":
                named = " or ".join(" + ".join(names) for names in stage.bugs)
                ElementTree.SubElement(case, "failure", message=named if stage.explained else _left_of(stage))
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def _repr_html_(self) -> str:
        return "".join(f"<p>{escape(line)}</p>" for line in self.summary().splitlines())


def _left_of(stage: StageVerdict) -> str:
    where = f"{stage.stage}: wrong at {stage.probe} (ratio {stage.ratio:.3g})"
    if stage.judged_with:
        where += f", judged together with {', '.join(stage.judged_with)}"
    if stage.modules:
        where += f", in {stage.modules[0]}" + (
            f" and {len(stage.modules) - 1} more modules" if len(stage.modules) > 1 else ""
        )
    text = f"{where}; no bug of the catalogue explains " + ("it" if not stage.bugs else "what is left of it")
    if stage.untold:
        text += f"; it may be {' or '.join(stage.untold)}, which these values cannot tell"
    if stage.relation:
        text += f"; {stage.related} is {stage.relation.text}"
    return text + (f"; taps to write next: {', '.join(stage.next_taps)}" if stage.next_taps else "")


def diagnose(
    reference: Trace,
    candidate: Trace,
    truth: Trace | None = None,
    *,
    pipe: SVDPipeline,
    candidate_truth: Trace | None = None,
    rules: Rules = "diffusers",
    max_bugs: int = 3,
    seconds: float | None = None,
    progress: bool = False,
    on_replay: Callable[[int], object] = lambda count: None,
) -> Diagnosis:
    """Name every bug behind a candidate's trace.

    Args:
        reference: diffusers' trace with all ``input.*`` probes.
        candidate: the port's trace of the same generation; any of the probes.
        truth: the reference in float64, for the chain's verdict; stages have floors of their own.
        pipe: svdlab with the same weights, in the reference's dtype.
        candidate_truth: the candidate's own code in float64 on the same inputs, for code that rounds more than
            diffusers because it works in another order.
        rules: "stability": a candidate is right where it does what Stability's code does, with any values of the
            arguments that this code takes.
        max_bugs: the largest set that is tried inside one stage; over stages there is no limit.
        seconds: after which no further set of several bugs is tried; single bugs always are, and what is being named
            is finished. None: no limit.
        progress: show a bar over replays.
        on_replay: called with the number of replays so far; what it raises ends the diagnosis.

    Raises:
        SvdlabError: traces that cannot be compared, a reference without inputs to replay or that is not what the
            checkpoint gives, another dtype.
    """
    if seconds is not None and not seconds > 0:
        raise SvdlabError(f"seconds: got {seconds}, allowed: more than 0, or none")
    late = math.inf if seconds is None else time.monotonic() + seconds
    comparison = compare(reference, candidate, truth)
    reference.require(["input.image", "input.clip_pixels", "input.noise", "input.latents"], "to replay")
    if candidate_truth is not None:
        check_settings(candidate, candidate_truth)
        check_same_run(candidate, candidate_truth)
        if candidate_truth.dtype != "float64":
            raise SvdlabError(f"{candidate_truth.label}: dtype {candidate_truth.dtype}, allowed: float64")
    replays = count(1)
    with tqdm(desc="replays", unit="replay", disable=not progress) as bar:

        def tick() -> None:
            bar.update()
            on_replay(next(replays))

        judge = StageJudge(reference, candidate, pipe, candidate_truth, tick)
        units = judge.units()
        namer = Namer(judge, units, max_bugs, tick, lambda: time.monotonic() > late)
        return _Diagnoser(judge, units, comparison, namer, rules).run()


@dataclass
class _Named:
    """What is known of one unit: equal sets of bugs, wrong modules that are left, taps to write."""

    sets: list[Found] = field(default_factory=list)
    partial: list[list[Named]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    next_taps: list[str] = field(default_factory=list)
    relation: Relation | None = None
    related: str | None = None


class _Diagnoser:
    def __init__(
        self, judge: StageJudge, units: list[Unit], comparison: Comparison, namer: Namer, rules: Rules
    ) -> None:
        self.rules = rules
        self.judge, self.units, self.comparison, self.namer, self.tick = judge, units, comparison, namer, namer.tick
        self.candidate, self.pipe = judge.candidate, judge.pipe
        self.modules: dict[str, ModuleJudge] = {}
        self.modules_named: dict[str, NamedModules] = {}
        self.certain: Bugs = ()

    def run(self) -> Diagnosis:
        for network in ("image_encoder", "vae.encoder", "unet", "vae.decoder"):
            if any(network_of(name) == network for name in self.candidate.taps):
                judge = ModuleJudge(self.judge, network)
                if self.judge.work.stages(judge.output) & self.judge.uncovered:
                    continue
                judge.judge()
                self.modules[network] = judge
        # Where few stages are judged together the answer is surest, and it helps with the others.
        order = {stage.name: i for i, stage in enumerate(STAGES)}
        units = sorted(self.units, key=lambda u: (len(u.blamed), min(order[s] for s in u.stages)))
        named = {unit.stages: self.name(unit) for unit in units if self.is_wrong(unit)}
        explanations = self.combined(named)
        stages = self.verdicts(named)
        complete = bool(explanations)
        chosen = self.chosen(named, explanations)
        ratio, probe = self.confirm(chosen, named) if chosen else (None, None)
        inputs = self.judge.differing_inputs
        if not named:
            verdict = "parity" if self.chain_is_right() and not inputs else "unknown"
        elif complete and not inputs and ratio is not None and ratio <= THRESHOLD:
            verdict = "explained"
        else:
            verdict = "partly" if chosen else "unknown"
        unlike: list[str] = []
        if self.rules == "stability":
            names = {name for name, _ in chosen}
            unlike = self.unlike_original(named, names)
            if verdict in ("parity", "explained") and names <= DEPARTURES.keys():
                verdict = "explained" if unlike else "parity"
        return Diagnosis(
            verdict,  # type: ignore[arg-type]
            self.comparison,
            stages,
            explanations if verdict == "explained" else [],
            ratio,
            probe,
            inputs,
            self.namer.tried,
            self.namer.stopped,
            self.rules,
            unlike,
        )

    def unlike_original(self, named: Mapping[frozenset[str], _Named], names: Set[str]) -> list[str]:
        """The departures that no run of the original's code lacks, and that a right stage shows not to be there."""
        decided = {BUGS[name].decides for name in names}
        return [
            name
            for name, original in DEPARTURES.items()
            if not original.argument and BUGS[name].decides not in decided and self.contradicts(original.change, named)
        ]

    def contradicts(self, change: Change, named: Mapping[frozenset[str], _Named]) -> bool:
        """Whether a change makes wrong what is right."""
        work, exact = (chain.changed([change]) for chain in (self.judge.work, self.judge.exact))
        return any(
            not self.judge.ratio(name, work, exact) <= THRESHOLD
            for unit in self.units
            if unit.stages not in named and unit.stages & stages_changed(change)
            for name in unit.ratios
        )

    def chain_is_right(self) -> bool:
        """Parity over the whole chain, or no more than the candidate's own rounding where that is known."""
        probes = self.comparison.probes
        floors = {p.name: max(p.floor, self.judge.candidate_rounding(p.name)) for p in probes}
        return all(p.divergence <= THRESHOLD * floors[p.name] for p in probes)

    def judges_of(self, unit: Unit) -> list[ModuleJudge]:
        """The module judges of the networks that a unit runs."""
        networks = dict.fromkeys(STAGE[s].network for s in (stage.name for stage in STAGES) if s in unit.stages)
        return [self.modules[network] for network in networks if network in self.modules]

    def is_wrong(self, unit: Unit) -> bool:
        """Whether a tensor or a module of a unit is."""
        return bool(unit.wrong) or any(judge.wrong for judge in self.judges_of(unit))

    def name(self, unit: Unit) -> _Named:
        """Everything that can be said of one wrong unit."""
        result = _Named()
        base = self.certain
        for judge in self.judges_of(unit):
            if not judge.wrong:
                continue
            made = self.named_modules(judge)
            result.partial += made.picks
            result.modules += [judge.taps[name] for name in made.left]
        picked = tuple(pick[0] for pick in result.partial)
        names = {name for name, _ in picked}
        base = (*(b for b in base if b[0] not in names), *picked)
        if not result.modules:
            if unit.wrong:
                result.sets = self.namer.name(unit, base, picked)
            else:  # only modules show it: what the stage writes is within rounding
                combos = islice(product(*result.partial), _LISTED)
                result.sets = [Found(tuple(combo), unit.ratio, next(iter(unit.ratios))) for combo in combos]
            result.sets = self.alternatives(unit, result)
        if result.sets:
            shared = set.intersection(*({(n, id(v)) for n, v in f.bugs} for f in result.sets))
            fresh = [b for b in result.sets[0].bugs if (b[0], id(b[1])) in shared]
        else:
            fresh = [pick[0] for pick in result.partial if len(pick) == 1]
        known = {name for name, _ in self.certain}
        self.certain = (*self.certain, *(b for b in fresh if b[0] not in known))
        if not result.sets:
            networks = dict.fromkeys(STAGE[s].network for s in unit.blamed if STAGE[s].network)
            for network in networks:
                result.next_taps += next_taps(self.judge, self.modules.get(network), network)
            self.relate(unit, result)
        return result

    def named_modules(self, judge: ModuleJudge) -> NamedModules:
        """What bugs explain of a network's wrong modules: once, however many units the network runs in."""
        if judge.network not in self.modules_named:
            options = self.namer.options((), Unit(frozenset(_stages_of(judge.network))))
            self.modules_named[judge.network] = name_modules(judge, options, self.tick)
        return self.modules_named[judge.network]

    def relate(self, unit: Unit, result: _Named) -> None:
        """Describe the first tensor that no bug explains: of the modules, where they are judged, else of the unit."""
        for judge in self.judges_of(unit):
            left = [name for name in judge.wrong if judge.taps[name] in result.modules]
            if left and judge.found[left[0]].shape == judge.right[left[0]].shape:
                result.related = judge.taps[left[0]]
                found, right, floor = judge.found[left[0]], judge.right[left[0]], judge.floors[left[0]]
                result.relation = relate(found, right, floor, axes_of(result.related))
                return
        if unit.wrong:
            name = unit.wrong[0]
            found, right = self.judge.known[name], self.judge.exact.expected(name)
            if found.shape == right.shape:
                result.related = name
                result.relation = relate(found, right, self.judge.floor(name), axes_of(name))

    def alternatives(self, unit: Unit, result: _Named) -> list[Found]:
        """Where the modules leave alternatives: each set with each of them that makes the unit right, too."""
        sets = list(result.sets)
        for pick in result.partial:
            for found in list(sets):
                for other in pick[1:]:
                    swapped = tuple(other if bug is pick[0] else bug for bug in found.bugs)
                    if swapped != found.bugs and unit.wrong and (more := self.namer.accept(swapped, unit)):
                        sets.append(more)
        return self.namer.distinct(sets)[:_LISTED]

    def combined(self, named: Mapping[frozenset[str], _Named]) -> list[Explanation]:
        """One set of each wrong unit, so that together the bugs are fewest; none where a unit is not explained."""
        if not named or any(not n.sets for n in named.values()):
            return []
        best: dict[tuple[str, ...], Explanation] = {}
        for combo in islice(product(*(n.sets for n in named.values())), 4096):
            names = {name for found in combo for name in found.names}
            if len({BUGS[name].decides for name in names}) < len(names):
                continue
            ordered = tuple(name for name in BUGS if name in names)
            worst = max(combo, key=lambda found: found.ratio)
            made = Explanation(ordered, worst.ratio, worst.probe)
            if ordered not in best or made.ratio < best[ordered].ratio:
                best[ordered] = made
        fewest = min((len(names) for names in best), default=0)
        return sorted((e for n, e in best.items() if len(n) == fewest), key=lambda e: e.ratio)[:_LISTED]

    def chosen(self, named: Mapping[frozenset[str], _Named], explanations: Sequence[Explanation]) -> Bugs:
        """The bugs, with the variants that fit, that the whole chain is replayed with."""
        wanted = set(explanations[0].bugs) if explanations else None
        chosen: dict[int, Named] = {}
        for unit in named.values():
            sets = [f for f in unit.sets if wanted is None or set(f.names) <= wanted]
            if sets:
                bugs: Sequence[Named] = sets[0].bugs
            else:
                bugs = [pick[0] for pick in unit.partial if len(pick) == 1]
            chosen.update({id(variant): (name, variant) for name, variant in bugs})
        return tuple(chosen.values())

    def confirm(self, bugs: Bugs, named: Mapping[frozenset[str], _Named]) -> tuple[float, str] | tuple[None, None]:
        """Replay the chain from its inputs; what no bug explains, or no rule covers, is given the candidate's result.

        Nothing where that leaves no tensor to compare.
        """
        known = {name: tensor for name, tensor in self.judge.known.items() if name in INPUTS}
        preprocessed = {stage for stages in named for stage in stages} & {"resize_image", "clip_pixels"}
        for stage in preprocessed:
            known.pop(STAGE[stage].writes[0], None)
        for name in set(self.judge.known) - known.keys() - INPUTS.keys():
            if self.judge.work.origin(name)[0] in self.judge.uncovered:
                known[name] = self.judge.known[name]
        for unit in self.units:
            if unit.stages in named and not named[unit.stages].sets:
                known.update({name: self.judge.known[name] for name in unit.ratios})
        changes = self.namer.concrete(bugs)
        assert changes is not None
        work, exact, nudged = (
            Chain(pipe, self.judge.settings, tensors, self.judge.guided, changes)
            for pipe, tensors in ((self.pipe, known), (self.judge.exact_pipe, known), (self.pipe, moved(known)))
        )
        floors = {p.name: p.floor for p in self.comparison.probes}
        ratios = {}
        for name in self.judge.judged:
            if name in known or not self.judge.is_covered(name, work):
                continue
            self.tick()
            wanted = exact.expected(name)
            floor = max(distance(work.expected(name), wanted), floors.get(name, 0.0))
            ratios[name] = self.judge.ratio_to(wanted, name, floor, nudged)
            if not ratios[name] <= THRESHOLD:
                return ratios[name], name
        if not ratios:
            return None, None
        worst = max(ratios, key=lambda n: ratios[n])
        return ratios[worst], worst

    def verdicts(self, named: Mapping[frozenset[str], _Named]) -> list[StageVerdict]:
        """Of every stage, from the units that it is in."""
        verdicts = []
        for stage in STAGES:
            units = [unit for unit in self.units if stage.name in unit.stages]
            wrong = [u for u in units if u.stages in named and stage.name in self.guilty(u, named[u.stages])]
            if not units:
                # What a trace holds only where it is asked for is not missed.
                if not all(is_optional(name) and name not in self.judge.reference for name in stage.writes):
                    foreign = stage.name in self.judge.uncovered
                    why = f"the scheduler is {self.judge.reference.scheduler}" if foreign else ""
                    verdicts.append(StageVerdict(stage.name, "not_covered", why=why))
                continue
            if not wrong:
                worst = max((u for u in units if u.stages not in named), key=lambda u: u.ratio, default=None)
                if worst is None:
                    verdicts.append(StageVerdict(stage.name, "right"))
                else:
                    verdicts.append(StageVerdict(stage.name, "right", worst.ratio, _worst_probe(worst)))
                continue
            # The unit that says most: the one with the fewest stages.
            unit = min(wrong, key=lambda u: (len(self.guilty(u, named[u.stages])), -u.ratio))
            made = named[unit.stages]
            sets = [f.names for f in made.sets] or (
                [tuple(dict.fromkeys(p[0][0] for p in made.partial if len(p) == 1))] if made.partial else []
            )
            own = tuple(dict.fromkeys(_of_stage(names, stage.name) for names in sets))
            others = self.guilty(unit, made) - {stage.name}
            verdict = StageVerdict(
                stage.name,
                "wrong",
                unit.ratio,
                _worst_probe(unit, first=True),
                tuple(s.name for s in STAGES if s.name in others),
                tuple(names for names in own if names),
                tuple(made.modules),
                tuple(made.next_taps),
                made.relation,
                made.related,
                tuple(sorted(self.namer.untold)) if stage.name == "image_latents" and not made.sets else (),
            )
            if self.rules == "stability" and made.sets and DEPARTURES.keys() >= set(made.sets[0].names):
                verdict = replace(verdict, status="right", ratio=made.sets[0].ratio, probe=made.sets[0].probe)
            verdicts.append(verdict)
        return verdicts

    def guilty(self, unit: Unit, named: _Named) -> frozenset[str]:
        """The stages of a unit that are wrong: those that its bugs change, or those that are not right elsewhere."""
        guilty: set[str] = set()
        for found in named.sets:
            for bug in found.bugs:
                # A network's bug can show in several stages; where it is said to be is enough if that is judged here.
                first = BUGS[bug[0]].stage
                guilty |= {first} if first in unit.stages else self.namer.changes_of(bug) - {"condition"}
        return frozenset(guilty) & unit.stages or unit.blamed


def _of_stage(names: tuple[str, ...], stage: str) -> tuple[str, ...]:
    """The bugs of a set that can change a stage."""
    return tuple(name for name in names if any(stage in stages_changed(variant) for variant in BUGS[name].variants))


def _stages_of(network: str) -> list[str]:
    return [stage.name for stage in STAGES if stage.network == network]


def _worst_probe(unit: Unit, first: bool = False) -> str:
    if first and unit.wrong:
        return min(unit.wrong, key=execution_key)
    return max(unit.ratios, key=lambda name: unit.ratios[name])


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


def finding(rows: Sequence[CatalogueRow]) -> str:
    """How many of the bugs that show at all each of the two tests sees, in a sentence or three."""
    shown = [row for row in rows if row.ratio > THRESHOLD or not row.passes_mse_bar]
    missed, seen = (sum(test) for test in zip(*((r.passes_mse_bar, r.ratio > THRESHOLD) for r in shown), strict=True))
    text = f"A port can pass MSE < 1e-3 and be wrong: {missed} of {len(shown)} known bugs do."
    text += f" The noise ratio catches {'all' if seen == len(shown) else seen} of them."
    if silent := len(rows) - len(shown):
        text += f" ({silent} more show at other settings only.)"
    return text


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
