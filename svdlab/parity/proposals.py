"""A map for a port's files, proposed from names, shapes and the reference's values.

A tensor is matched with a probe only where that is unambiguous, and left out otherwise with the reason: a wrong guess
is worse than none, because it hides a bug or makes one up. Names and values must not contradict each other.

- *By name*: the name says which probe it is (``NAMES``), and of the layouts that its shape allows one fits the
  reference's values clearly better than the others, or the shape allows only one.
- *By value*: the name says nothing, and the values are one probe's to within ``NEAR``, ``CLEARLY`` times nearer than
  any other's.

Distances are sines of the angle to the reference's tensor (both less their means), so that a factor or an offset, which
is the port's bug or its convention, does not decide; a match by value alone also needs factor 1 and offset 0. Only
orders with height before width are tried: one with width first is as likely a bug.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.parity import taps
from svdlab.parity.foreign import Source
from svdlab.parity.importers import (
    HALVES,
    PIXELS,
    RANGES,
    Entry,
    Map,
    arrange,
    base_of,
    has_both_halves,
    letters_of,
    range_of,
)
from svdlab.parity.probes import STEP, probe_of
from svdlab.parity.trace import Trace

# A tensor that is a probe's by value alone is this near, and every other probe this many times farther.
NEAR, CLEARLY = 1e-3, 10.0
# A tensor that is a probe's by its name is in the layout that is this near and this many times nearer than the others.
NEAR_LAYOUT, CLEARLY_LAYOUT = 0.3, 3.0
# Fewer values than this have no angle to speak of: they must be the reference's own, to within this much.
FEW, NEAR_FEW = 64, 1e-5
# Values compared per tensor while candidates are sought; the same places in all of one shape.
SAMPLE = 16384

# Names that mean one probe, each written as words without what separates them.
NAMES = {
    "input.source": ("inputsource",),
    "input.image": ("inputimage",),
    "input.clip_pixels": ("inputclippixels", "clippixels", "clipinput", "pixelvalues"),
    "input.noise": ("inputnoise",),
    "input.latents": ("inputlatents",),
    "image_embeddings": ("imageembeddings", "imageembeds", "imageemb", "clipembeddings", "clipembeds", "clipemb"),
    "image_latents": ("imagelatents", "condlatents", "conditioninglatents", "imglatents"),
    "added_time_ids": ("addedtimeids", "timeids", "addtimeids"),
    "sigmas": ("sigmas",),
    "timesteps": ("timesteps",),
    "guidance_scale": ("guidancescale", "guidancescales"),
    "model_input": ("modelinput", "unetinput", "latentmodelinput", "unetin"),
    "noise_pred_uncond": ("noisepreduncond", "uncondnoisepred", "noiseuncond"),
    "noise_pred_cond": ("noisepredcond", "condnoisepred", "noisecond"),
    "noise_pred": ("noisepred", "noiseprediction"),
    "latents": ("latents", "latent"),
    "frames": ("frames", "videoframes", "decodedframes"),
}
_PROBE_OF_NAME = {name: probe for probe, names in NAMES.items() for name in names}
# The UNet's output with both halves in one tensor gives two probes.
PAIR = "noise_pred_uncond + noise_pred_cond"
_PARTS = {PAIR: ("noise_pred_uncond", "noise_pred_cond")}
_NUMBER = re.compile(r"\d+")


@dataclass
class Proposal:
    """What was found.

    Attributes:
        mapping: the proposed map, as TOML; the empty text where nothing was found.
        said: a line for every tensor that has a place: what it was taken for and why, what was recognised.
        left_out: a line for every other tensor, with the reason.
    """

    mapping: str = ""
    said: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def map(self) -> Map:
        """The map to import with.

        Raises:
            SvdlabError: nothing was found.
        """
        if not self.mapping:
            reason = f" ({self.left_out[0]})" if self.left_out else ""
            raise SvdlabError(f"no tensor can be told without a map, allowed: --map{reason}")
        return Map.parse(self.mapping, "proposed map")


@dataclass(frozen=True)
class _Values:
    """A tensor's values at the sampled places; the same less their mean, and that one's norm."""

    raw: Tensor
    centred: Tensor
    mean: float
    norm: float


@dataclass(frozen=True)
class _Way:
    """One reading of a tensor: the probe with its step (or the pair), how to arrange it, and how near it then is.

    ``distance`` is the sine of the angle; ``factor`` and ``offset`` map the reference's values, whose standard
    deviation is ``spread``, to the tensor's.
    """

    name: str
    entry: Entry
    distance: float
    factor: float
    offset: float
    spread: float
    values: Tensor

    @property
    def near(self) -> bool:
        """Whether the values are the probe's but for rounding, a factor and an offset."""
        return self.distance <= (NEAR if self.values.numel() >= FEW else NEAR_FEW)

    @property
    def same_units(self) -> bool:
        """Whether the values are the reference's without a factor and an offset."""
        return abs(self.factor - 1) < 0.01 and abs(self.offset) <= 0.01 * self.spread

    @property
    def range(self) -> str | None:
        """The range that pixels are in, by factor and offset; None where it is the trace's own or an unknown one."""
        if self.name not in PIXELS or self.distance > 0.1:
            return None
        for name in RANGES:
            scale, offset = range_of(name, self.name)
            fits = abs(self.factor * scale - 1) < 0.02
            fits = fits and abs(self.offset * scale + offset) <= 0.02 * max(self.spread, 0.05)
            if fits and (scale, offset) != (1.0, 0.0):
                return name
        return None


@dataclass
class _Foreign:
    """One tensor of the port's files."""

    source: Source
    key: str
    files: int

    @property
    def label(self) -> str:
        """File and tensor."""
        return self.source.label(self.key)

    @cached_property
    def tensor(self) -> Tensor:
        """Its values."""
        return self.source.load(self.key)

    @property
    def text(self) -> str:
        """What names it: the tensor's name, or the file's where it holds one tensor whose name means nothing."""
        alone = len(self.source.keys) == 1 and named(self.key) is None and not taps.split(self.key)
        return self.source.path.stem if alone else self.key

    def entry(self, **options: Any) -> Entry:
        """Where it lies, and how."""
        where: dict[str, Any] = {"tensor": self.key} if len(self.source.keys) > 1 else {}
        if self.files > 1:
            where["file"] = self.source.path.name
        return Entry(**where, **options)


def named(text: str) -> tuple[str, int | None] | None:
    """The probe that a name means, and the number in it: "latents_03" -> ("latents", 3); or None.

    A probe of every step needs one number, any other none.
    """
    lowered = re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower()
    numbers = [int(n) for n in _NUMBER.findall(lowered)]
    words = [w for w in re.split(r"[^a-z]+", _NUMBER.sub(" ", lowered)) if w not in ("", "step", "t")]
    probe = _PROBE_OF_NAME.get("".join(words))
    if probe is None or len(numbers) > 1 or (probe in STEP) != bool(numbers):
        return None
    return probe, numbers[0] if numbers else None


def propose(sources: Sequence[Source], reference: Trace) -> Proposal:
    """Propose a map from names, shapes and values.

    Args:
        sources: the port's files.
        reference: the trace that the port replayed, with as many tensors as there are.

    Raises:
        SvdlabError: a file cannot be read.
    """
    return _Proposer(sources, reference).run()


class _Proposer:
    def __init__(self, sources: Sequence[Source], reference: Trace) -> None:
        self.reference = reference
        self.frames = reference.settings.num_frames or 1
        self.found = Proposal()
        self.foreign: list[_Foreign] = []
        for source in sources:
            if source.path.suffix == ".bin":
                self.found.left_out.append(f"{source.path}: left out: a .bin file says nothing about itself")
                continue
            self.foreign += [_Foreign(source, key, len(sources)) for key in source.keys]
        names = [source.path.name for source in sources]
        self.doubled = {name for name in names if names.count(name) > 1}
        # Readings of tensors whose name says which probe they are, but not in which layout.
        self.unsettled: dict[int, list[_Way]] = {}
        self._places: dict[tuple[int, ...], Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.targets: dict[str, _Values] = {}
        for name in reference.probes:
            self._target(name, reference[name])
        for step in range(reference.settings.num_steps):
            parts = [f"{part}.{step:03d}" for part in _PARTS[PAIR]]
            if all(part in reference for part in parts):
                self._target(f"{PAIR}.{step:03d}", torch.cat([reference[part] for part in parts]))

    def _target(self, name: str, tensor: Tensor) -> None:
        self.shapes[name], self.targets[name] = tuple(tensor.shape), self._sampled(tensor)

    def run(self) -> Proposal:
        names = self._named()
        choices: list[tuple[_Foreign, tuple[_Way, str] | str]] = []
        for foreign in self.foreign:
            choices.append((foreign, self._choose(foreign, names.get(id(foreign)))))
            foreign.__dict__.pop("tensor", None)  # one at a time is held in memory
        claims: dict[str, list[_Foreign]] = defaultdict(list)
        chosen: list[tuple[_Foreign, _Way, str]] = []
        settled = _settled(choices)
        for foreign, choice in choices:
            if isinstance(choice, str):
                choice = self._as_other_steps(foreign, settled) or choice
            if isinstance(choice, str):
                self._leave(foreign, choice)
                continue
            chosen.append((foreign, *choice))
            for name in _probes(choice[0].name):
                claims[name].append(foreign)
        entries: dict[str, Entry] = {}
        for foreign, way, why in chosen:
            rivals = next((claims[name] for name in _probes(way.name) if len(claims[name]) > 1), None)
            if rivals is not None:
                self._leave(foreign, f"{' and '.join(f.label for f in rivals)} both look like {way.name}")
                continue
            entries |= dict.fromkeys(_probes(way.name), way.entry)
            self.found.said.append(f"{foreign.label}: {way.name}{_options(way.entry)}, {why}")
        self.found.mapping = to_toml(entries, self.reference.settings.num_steps) if entries else ""
        return self.found

    def _as_other_steps(self, foreign: _Foreign, settled: dict[str, set[str]]) -> tuple[_Way, str] | None:
        """A tensor whose layout its values do not tell, in the one that the other steps under its name are in."""
        ways = self.unsettled.get(id(foreign), [])
        fitting = [way for way in ways if settled.get(_base(way.name)) == {_options(way.entry)}]
        return (fitting[0], "by its name, in the layout of other steps") if len(fitting) == 1 else None

    def _leave(self, foreign: _Foreign, why: str) -> None:
        self.found.left_out.append(f"{foreign.label}: left out: {why}")

    def _named(self) -> dict[int, str]:
        """The probe that each tensor's name means, with its step; where all steps are there, they may count from 1.

        A tap is told by its exact name only.
        """
        meant = {id(f): found for f in self.foreign if (found := named(f.text)) is not None}
        steps = self.reference.settings.num_steps
        numbers: dict[str, set[int]] = defaultdict(set)
        for probe, number in meant.values():
            if number is not None:
                numbers[probe].add(number)
        names = {id(f): f.text for f in self.foreign if f.text in self.reference.taps}
        for key, (probe, number) in meant.items():
            first = 1 if numbers[probe] == set(range(1, steps + 1)) else 0
            names[key] = probe if number is None else f"{probe}.{number - first:03d}"
        return names

    def _ways(self, foreign: _Foreign) -> Iterator[_Way]:
        """Every reading of a tensor that its shape allows, with how near it is."""
        if foreign.text in self.reference.taps and foreign.text not in self.targets:
            self._target(foreign.text, self.reference[foreign.text])
        made: dict[str, tuple[tuple[int, ...], _Values] | None] = {}
        for name, target in self.targets.items():
            if name != foreign.text and name in self.reference.taps:
                continue
            base = _base(name)
            kind = base if base == PAIR or base in HALVES or has_both_halves(base) else letters_of(base)
            for options in _readings(base):
                key = f"{kind} {options}"
                if key not in made:
                    tensor = self._arranged(foreign.tensor, base, options)
                    made[key] = None if tensor is None else (tuple(tensor.shape), self._sampled(tensor))
                reading = made[key]
                if reading is not None and reading[0] == self.shapes[name]:
                    yield _way(name, foreign.entry(**options), reading[1], target)

    def _arranged(self, tensor: Tensor, base: str, options: dict[str, Any]) -> Tensor | None:
        """The tensor in a trace's layout, for the pair with the unconditional half first; None where it cannot be."""
        if len(options["layout"]) != tensor.ndim:
            return None
        try:
            parts = [arrange(tensor, Entry(**options), part, self.frames) for part in _PARTS.get(base, (base,))]
        except SvdlabError:
            return None
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _sampled(self, tensor: Tensor) -> _Values:
        """Values at the same places of every tensor of this shape, in float64."""
        if tensor.numel() > SAMPLE:
            shape = tuple(tensor.shape)
            if shape not in self._places:
                generator = torch.Generator().manual_seed(0)
                places = [torch.randint(0, size, (SAMPLE,), generator=generator) for size in shape]
                self._places[shape] = torch.stack(places)
            tensor = tensor[tuple(self._places[shape])]
        raw = tensor.reshape(-1).double()
        mean = float(raw.mean())
        return _Values(raw, raw - mean, mean, float((raw - mean).norm()))

    def _choose(self, foreign: _Foreign, name: str | None) -> tuple[_Way, str] | str:
        """The one reading, and why it is the one; or why there is none."""
        if foreign.source.path.name in self.doubled:
            return "another file has the same name"
        if not foreign.tensor.numel() or not bool(torch.isfinite(foreign.tensor).all()):
            return "its values are not finite" if foreign.tensor.numel() else "it is empty"
        ways = list(self._ways(foreign))
        best = min(ways, key=lambda way: way.distance, default=None)
        if name is None:
            return self._by_value(foreign, ways, best)
        # A prediction whose batch holds both halves is the pair, though its name says the whole.
        base, _, step = name.rpartition(".")
        wanted = {name, f"{PAIR}.{step}"} if base == "noise_pred" else {name}
        own = [way for way in ways if way.name in wanted]
        if not own:
            if name not in self.targets:
                return f"its name says {name}, which the reference does not have"
            shape = tuple(foreign.tensor.shape)
            return f"its name says {name}, but no known layout makes {self.shapes[name]} of its shape {shape}"
        near = min(own, key=lambda way: way.distance)
        if best is not None and best.name not in wanted and _contradicts(best, near):
            how = "those of" if best.near and best.same_units else "nearer to those of"
            return f"its name says {name}, its values are {how} {best.name}"
        others = [way for way in own if not self._equal(foreign, way, near)]
        if others:
            second = min(way.distance for way in others)
            if near.distance > NEAR_LAYOUT or second < CLEARLY_LAYOUT * near.distance:
                self.unsettled[id(foreign)] = own
                return f"its name says {name}, but {_ways_said([near, *others])} fit about as well"
        return self._with_range(near, "by its name and values" if others else "by its name")

    def _by_value(self, foreign: _Foreign, ways: list[_Way], best: _Way | None) -> tuple[_Way, str] | str:
        if best is None:
            return "neither its name nor its shape is that of a probe"
        if not best.near:
            return f"its name says nothing, its values are no probe's (nearest {best.name}, off by {best.distance:.2g})"
        # What is hardly farther off counts as near; below the limit distances are rounding.
        limit = max(CLEARLY * best.distance, 1e-6)
        close = [way for way in ways if way.distance < limit]
        rivals = [way for way in close if way.same_units or way.range]
        if not rivals:
            return f"its values are those of {best.name} times {best.factor:.4g}, {best.offset:.4g} added"
        best = min(rivals, key=lambda way: way.distance)
        others = [way for way in rivals if not self._equal(foreign, way, best)]
        if others:
            return f"its values are as near to {_ways_said([best, *others])}"
        return self._with_range(best, "by its values")

    def _with_range(self, way: _Way, why: str) -> tuple[_Way, str] | str:
        """The reading with the range that its pixels are in."""
        if way.range is not None:
            return replace(way, entry=way.entry.model_copy(update={"range": way.range})), why
        if way.name in ("input.image", "frames"):
            if float(way.values.min()) >= 0 and float(self.targets[way.name].raw.min()) < -0.1:
                return f"it has no negative values, {way.name} has some, and the range cannot be told from its values"
        return way, why

    def _equal(self, foreign: _Foreign, one: _Way, other: _Way) -> bool:
        """Whether two readings make the same tensor of the same probe."""
        if one.name != other.name or not torch.equal(one.values, other.values):
            return False
        made = []
        for way in (one, other):
            options = way.entry.model_dump(include={"layout", "guidance", "frames_in_batch"})
            made.append(self._arranged(foreign.tensor, _base(way.name), options))
        return made[0] is not None and made[1] is not None and torch.equal(made[0], made[1])


def _settled(choices: Sequence[tuple[_Foreign, tuple[_Way, str] | str]]) -> dict[str, set[str]]:
    """How the steps of each target are written, among those that are told."""
    settled: dict[str, set[str]] = defaultdict(set)
    for _, choice in choices:
        if not isinstance(choice, str) and choice[0].name != _base(choice[0].name):
            settled[_base(choice[0].name)].add(_options(choice[0].entry))
    return settled


def _base(name: str) -> str:
    """A target's name without its step."""
    return PAIR if name.startswith(PAIR) else base_of(name)


def _probes(name: str) -> tuple[str, ...]:
    """The probes that a target stands for."""
    return tuple(f"{part}{name.removeprefix(PAIR)}" for part in _PARTS[PAIR]) if name.startswith(PAIR) else (name,)


def _way(name: str, entry: Entry, x: _Values, r: _Values) -> _Way:
    """How near a reading's values are to a target's."""
    spread = r.norm / r.raw.numel() ** 0.5
    if r.raw.numel() < FEW or x.norm == 0 or r.norm == 0:
        distance = float((x.raw - r.raw).norm() / r.raw.norm().clamp_min(1e-30))
        return _Way(name, entry, distance, 1.0, 0.0, spread, x.raw)
    product = float(x.centred @ r.centred)
    factor = product / r.norm**2
    # The sine from what is left over: 1 - cosine**2 would lose half of the digits.
    sine = float((x.centred - factor * r.centred).norm()) / x.norm
    return _Way(name, entry, sine if product > 0 else 1.0, factor, x.mean - factor * r.mean, spread, x.raw)


def _contradicts(best: _Way, near: _Way) -> bool:
    """Whether the values speak against what the name says: they are another probe's, or rather those than its own.

    Steps of one probe are alike, and a port that counts otherwise is off by one: there nearer is enough.
    """
    if near.near and near.same_units:
        return False
    clearly = 1.0 if _base(best.name) == _base(near.name) else CLEARLY_LAYOUT
    return (best.near and best.same_units) or (best.distance <= NEAR_LAYOUT and clearly * best.distance < near.distance)


def _ways_said(ways: Sequence[_Way]) -> str:
    ways = sorted(ways, key=lambda way: way.distance)[:2]
    return " and ".join(f"{way.name}{_options(way.entry)}, off by {way.distance:.2g}," for way in ways).rstrip(",")


def _readings(base: str) -> Iterator[dict[str, Any]]:
    """The layouts and conventions that are tried for a target, the plainest first."""
    probe = _PARTS[base][0] if base in _PARTS else base
    letters = letters_of(probe)
    orders = {
        "NFCHW": ("NFCHW", "NCFHW", "NFHWC"),
        "NCHW": ("NCHW", "NHWC"),
        "NTC": ("NTC", "NC"),
        "NF": ("NF", "NF111"),
    }.get(letters, (letters,))
    layouts: dict[tuple[str, bool], None] = {}
    for order in orders:
        layouts[order, False] = None
        if base != PAIR:
            layouts[order.replace("N", ""), False] = None
    folded: tuple[str, ...] = ("NCHW", "NHWC") if letters == "NFCHW" else ()
    if probe in ("image_embeddings", "image_latents", "added_time_ids"):  # repeated for every frame
        folded = orders
        repeated = [order.replace("N", "NF") for order in orders] + ["NCFHW"] * (letters == "NCHW")
        for order in repeated:
            layouts[order, False] = None
            layouts[order.replace("N", ""), False] = None
    layouts |= dict.fromkeys((order, True) for order in folded)
    for layout, frames_in_batch in layouts:
        guidance: tuple[str | None, ...] = (None,)
        if "N" in layout and base == PAIR:
            guidance = ("both", "cond_first")
        elif "N" in layout and has_both_halves(probe):
            guidance = (None, "cond_first")
        elif "N" in layout and probe in HALVES and probe not in _PARTS[PAIR]:
            guidance = (None, "both", "cond_first")
        for halves in guidance:
            yield {"layout": layout, "frames_in_batch": frames_in_batch, "guidance": halves}


def _options(entry: Entry) -> str:
    """What was recognised, in words."""
    words = [f"layout {entry.layout}"]
    if entry.frames_in_batch:
        words.append("frames folded into the batch")
    if entry.guidance == "both":
        words.append("both halves of the guidance, the unconditional one first")
    if entry.guidance == "cond_first":
        words.append("both halves of the guidance, the conditional one first")
    if entry.range:
        words.append(f"pixels in {entry.range.replace('..', ' to ')}")
    return f" ({', '.join(words)})"


def to_toml(entries: dict[str, Entry], steps: int) -> str:
    """A map as TOML; a probe that has all its steps, named alike but for the number, becomes one entry."""
    lines = ["[probes]"]
    for name, entry in _gathered(entries, steps).items():
        fields = entry.model_dump(exclude_defaults=True)
        inner = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
        key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
        lines.append(f"{key} = {{ {inner} }}")
    return "\n".join(lines) + "\n"


def _gathered(entries: dict[str, Entry], num_steps: int) -> dict[str, Entry]:
    gathered: dict[str, Entry] = {}
    families: dict[str, dict[int, Entry]] = defaultdict(dict)
    for name, entry in entries.items():
        probe = probe_of(name)
        if probe is not None and probe[1] is not None:
            families[probe[0]][probe[1]] = entry
        else:
            gathered[name] = entry
    for base, steps in families.items():
        # A pattern for a part of the steps would take in tensors that were left out.
        pattern = _pattern(steps) if len(steps) == num_steps else None
        if pattern is not None:
            gathered[base] = pattern
        else:
            gathered |= {f"{base}.{step:03d}": entry for step, entry in sorted(steps.items())}
    return gathered


def _pattern(steps: dict[int, Entry]) -> Entry | None:
    """One entry that stands for several steps', or None."""
    first = min(steps)
    entry = steps[first]
    for where in ("file", "tensor"):
        text = getattr(entry, where) or ""
        for match in _NUMBER.finditer(text):
            start = int(match[0]) - first
            for width in (len(match[0]), 0) if start >= 0 else ():
                head, tail = text[: match.start()], text[match.end() :]
                if all(
                    steps[step] == entry.model_copy(update={where: f"{head}{step + start:0{width}d}{tail}"})
                    for step in steps
                ):
                    number = f"{{step:0{width}}}" if width > 1 else "{step}"
                    return entry.model_copy(update={where: f"{head}{number}{tail}", "first_step": start})
    return None
