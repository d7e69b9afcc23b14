"""Judging each tapped module of a network from the candidate's own taps before it.

One pass of the network, in which every tapped module's output is compared with the candidate's tap and then replaced
by it: what comes behind runs on the candidate's own tensors, and an error in one module accuses no other. What lies
between two taps is judged with the later one. In later passes a module that a change does not touch, given what it was
given before, does not run again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from svdlab.parity import taps as tapping
from svdlab.parity.compare import THRESHOLD
from svdlab.parity.stages import Chain, StageJudge, distance
from svdlab.svd.kernels.registry import plain
from svdlab.svd.modules import state_of
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.stages import Change

# What runs behind each network's modules, by the network as stages name it.
_OUTPUT = {"image_encoder": "image_embeddings", "vae.encoder": "image_latents", "vae.decoder": "frames"}
# Modules of an up block that are given a skip connection, which is no tap of theirs.
_READS_SKIP = re.compile(r"unet\.up_blocks\.\d+(\.resnets\.\d+(\.spatial_res_block(\.(norm1|conv1|conv_shortcut))?)?)?")


def network_of(tap: str) -> str:
    """The network that a tap is of; the two halves of the VAE run at different times."""
    first = tap.split(".", 1)[0]
    if first != "vae":
        return first
    return "vae.decoder" if tap.startswith("vae.decoder") else "vae.encoder"


class ModuleJudge:
    """Judges the tapped modules of one network at one step.

    Args:
        stages: the judge of stages, whose tensors go into the network.
        network: "image_encoder", "vae.encoder", "vae.decoder" or "unet".
    """

    def __init__(self, stages: StageJudge, network: str) -> None:
        self.stages, self.network = stages, network
        candidate = stages.candidate
        names = [name for name in candidate.taps if network_of(name) == network]
        steps = {split[1] for name in names if (split := tapping.split(name)) and split[1] is not None}
        self.step = min(steps, default=0)
        self.taps = {base: name for name in names for base, step in [_split(name)] if step in (None, self.step)}
        self.found = {base: candidate.raw(name) for base, name in self.taps.items()}
        self.output = _OUTPUT.get(network) or f"noise_pred{'_cond' if stages.guided else ''}.{self.step:03}"
        self.work_pipe, self.exact_pipe = _plain(stages.pipe), _plain(stages.exact_pipe)
        self.order: list[str] = []
        self.right: dict[str, Tensor] = {}
        self.floors: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self._kept: dict[SVDPipeline, _Forced] = {}

    def judge(self) -> dict[str, float]:
        """Every tapped module's ratio, in the order in which they run."""
        work = self.run(self.work_pipe, (), keep=True).results
        self.right = self.run(self.exact_pipe, (), keep=True).results
        own = self._own_distances()
        self.order = list(self.right)
        for name, exact in self.right.items():
            if not bool(torch.isfinite(exact).all()):
                continue  # what went in is not finite
            rounding = max(distance(work[name], exact), self.stages.candidate_rounding(self.taps[name]))
            self.floors[name] = max(rounding, own.get(name, 0.0), self.stages.resolution)
            self.ratios[name] = distance(self.found[name], exact) / self.floors[name]
        self.ratios = {name: r for name, r in self.ratios.items() if not self._unsure(name)}
        if not self.wrong:
            self.forget()
        return self.ratios

    @property
    def wrong(self) -> list[str]:
        """The modules that rounding does not explain, in the order in which they run."""
        return [name for name, ratio in self.ratios.items() if not ratio <= THRESHOLD]

    def ratios_with(self, changes: Sequence[Change], exact: bool = False) -> dict[str, float]:
        """Every module's ratio with changes in place.

        Args:
            changes: of the network.
            exact: with the rounding of these changes in the floor; later passes run only what they change against it.
        """
        work = self.run(self.work_pipe, changes, keep=exact)
        wanted = self.run(self.exact_pipe, changes, keep=True) if exact else work
        ratios = {}
        for name in self.ratios:
            if name not in wanted.results:  # the change leaves the module out
                ratios[name] = float("inf")
                continue
            rounding = distance(work.results[name], wanted.results[name]) if exact else 0.0
            ratios[name] = wanted.distance(name) / max(self.floors[name], rounding)
        return ratios

    def forget(self) -> None:
        """Free what was kept of earlier passes."""
        self._kept.clear()

    def run(
        self,
        pipe: SVDPipeline,
        changes: Sequence[Change],
        taps: Mapping[str, Tensor] | None = None,
        known: Mapping[str, Tensor] | None = None,
        keep: bool = False,
    ) -> _Forced:
        """A pass in which every tapped module works on the taps before it."""
        made = _Forced(self.found, self._kept.get(pipe)) if taps is None else _Forced(taps)
        known = self.stages.known if known is None else known
        settings = self.stages.settings
        if self.network == "vae.decoder" and not settings.effective_decode_chunk:
            # The exact decode does not call the modules that are tapped.
            settings = settings.replace(decode="parity", decode_chunk_size=settings.num_frames)
        changed = Chain(pipe, settings, known, self.stages.guided, changes).pipe.with_own_modules()
        model = self.network.split(".")[0]
        with made.forcing({model: getattr(changed, model)}):
            Chain(changed, settings, known, self.stages.guided).expected(self.output)
        if keep:
            self._kept[pipe] = made
        return made

    def _own_distances(self) -> dict[str, float]:
        """The reference's, from its own taps, where it has the same."""
        reference = self.stages.reference
        taps = {base: reference[name] for base, name in self.taps.items() if name in reference}
        if not taps:
            return {}
        exact = self.run(self.exact_pipe, (), taps, self.stages.own.known).results
        return {name: distance(taps[name], tensor) for name, tensor in exact.items()}

    def _unsure(self, name: str) -> bool:
        """Whether a module is given a skip connection that is wrong and no tap."""
        if not _READS_SKIP.fullmatch(name):
            return False
        wrong = [n for n, r in self.ratios.items() if not r <= THRESHOLD and n.startswith("unet.down_blocks")]
        return bool(wrong) and any(skip not in self.found for skip in _skips(self.work_pipe.unet))


def _split(name: str) -> tuple[str, int | None]:
    return tapping.split(name) or (name, None)


def _plain(pipe: SVDPipeline) -> SVDPipeline:
    """With the plain layers, whose every module is called."""
    components = {name: plain(c) if isinstance(c, nn.Module) else c for name, c in pipe.components.items()}
    return SVDPipeline(**components, compat=pipe.compat)


def _skips(unet: nn.Module) -> Iterator[str]:
    """The modules whose outputs are skip connections."""
    yield "unet.conv_in"
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        kind = "attentions" if len(block.attentions) else "resnets"
        yield from (f"unet.down_blocks.{i}.{kind}.{j}" for j in range(len(block.resnets)))
        yield from (f"unet.down_blocks.{i}.downsamplers.{j}" for j in range(len(block.downsamplers)))


class _Forced:
    """A pass: keeps what each tapped module makes, and hands on the tap in its place.

    Args:
        taps: by their names without step.
        before: an earlier pass. Where neither a module nor what it is given has changed since, that pass's call stands.

    Attributes:
        calls: of every tapped module, by tap.
        results: what each module made, in a trace's layout, by tap and in the order of running.
    """

    def __init__(self, taps: Mapping[str, Tensor], before: _Forced | None = None) -> None:
        self.taps, self.before = taps, before
        self.models: dict[str, nn.Module] = {}
        self.states: dict[str, list[object]] = {}
        self.calls: dict[str, list[_Call]] = {}
        self.ended: list[_Call] = []
        self.measured: dict[str, tuple[list[Tensor], float]] = dict(before.measured) if before else {}

    @contextmanager
    def forcing(self, models: dict[str, nn.Module]) -> Iterator[None]:
        """In networks of the caller's own."""
        # Held as long as the pass is: no later object takes the identity of one that a state names.
        self.models = models
        self.states = {f"{model}.{path}": state_of(m) for model, n in models.items() for path, m in n.named_modules()}
        earlier = self.before.states if self.before else {}
        changed = [name for name, state in self.states.items() if state != earlier.get(name)]
        forced: list[tuple[nn.Module, RemovableHandle]] = []
        for name, module in list(tapping.modules(models)):
            if name in self.taps:
                stands = self.before and not any(n == name or n.startswith(f"{name}.") for n in changed)
                before = self.before.calls.get(name, []) if self.before and stands else []
                vars(module)["forced"] = _Place(self, name, before)
                module.__class__ = _forced_class(type(module))
                forced.append((module, module.register_forward_hook(partial(self._hook, name))))
        yield
        # A pipeline with a changed stage lives until the garbage collector comes; what was made here must not.
        for module, handle in forced:
            handle.remove()
            del vars(module)["forced"]
        self.before = None

    def call(self, place: _Place, module: nn.Module, kind: type[nn.Module], args: tuple[Any, ...]) -> Any:
        """A tapped module's call, or the earlier one that stands."""
        calls = self.calls.setdefault(place.name, [])
        earlier = place.before[len(calls)] if len(calls) < len(place.before) else None
        if earlier is None or not _same(args, earlier.args):
            calls.append(_Call(place.name, args, len(self.ended)))
            return kind.forward(module, *args)
        for call in (*earlier.inside, earlier):
            self.calls.setdefault(call.name, []).append(call)
            self.ended.append(call)
        return earlier.handed_on

    def _hook(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        call = self.calls[name][-1]
        if call.part is None:  # else it stands
            self._force(call, output)
        return call.handed_on

    def _force(self, call: _Call, output: Any) -> None:
        """Keep what was made; the tap in its place."""
        made = tapping.first_tensor(output)
        layout, tap = tapping.layout_of(call.name), self.taps[call.name]
        part = tapping.from_svdlab(call.name, made)
        if layout == "activation":  # a call may have a part of the batch or of the frames
            part, tap = part.flatten(0, 1), tap.flatten(0, 1)
        # Positions are the same for each half of the batch.
        earlier = [] if layout == "positions" else self.calls[call.name][:-1]
        start = sum(len(c.part) for c in earlier if c.part is not None)
        given = tap[start : start + len(part)]
        call.inside, call.part, call.handed_on = self.ended[call.start :], part, output
        self.ended.append(call)
        if given.shape != part.shape:
            return  # another shape is a distance without limit
        if layout != "activation":
            call.handed_on = given.to(made)
            return
        call.handed_on = forced = given.to(made).permute(0, 2, 3, 1).contiguous().reshape(made.shape)
        if isinstance(output, tuple):  # a down block: its last skip connection is its output
            _, skips = output
            call.handed_on = forced, [forced if skip is made else skip for skip in skips]

    @cached_property
    def parts(self) -> dict[str, list[Tensor]]:
        """What each call of a module made."""
        parts: dict[str, list[Tensor]] = {}
        for call in self.ended:
            assert call.part is not None
            once = tapping.layout_of(call.name) == "positions"
            parts[call.name] = [call.part] if once else [*parts.get(call.name, ()), call.part]
        return parts

    @cached_property
    def results(self) -> dict[str, Tensor]:
        results = {}
        for name, parts in self.parts.items():
            made, tap = torch.cat(parts), self.taps[name]
            results[name] = made.reshape(tap.shape) if made.numel() == tap.numel() else made
        return results

    def distance(self, name: str) -> float:
        """Of the tap from what the module made."""
        parts = self.parts[name]
        same, value = self.measured.get(name, ([], math.nan))
        if len(same) != len(parts) or any(a is not b for a, b in zip(same, parts, strict=True)):
            value = distance(self.taps[name], self.results[name])
            self.measured[name] = parts, value
        return value


@dataclass(frozen=True)
class _Place:
    """A module's place in a pass: its tap, and its calls in the earlier pass as far as they may stand."""

    of: _Forced
    name: str
    before: Sequence[_Call]


def _forced_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of module whose calls go through ``_Forced``; by the class, as a pipeline may copy the module."""

    def forward(module: Any, *args: Any) -> Any:
        return module.forced.of.call(module.forced, module, kind, args)

    return type(kind.__name__, (kind,), {"forward": forward})


@dataclass(eq=False)
class _Call:
    """A call of a module.

    Attributes:
        name: its tap.
        args: what it was given.
        start: how many calls had ended before.
        inside: those that ended inside.
        part: what it made, in a trace's layout with the frames folded into the batch.
        handed_on: what the modules behind it are given.
    """

    name: str
    args: tuple[Any, ...]
    start: int
    inside: Sequence[_Call] = ()
    part: Tensor | None = None
    handed_on: Any = None


def _same(given: object, before: object) -> bool:
    """Whether a module is given equal tensors; what is neither tensor nor made of such is never the same."""
    if isinstance(given, Tensor):
        if not isinstance(before, Tensor) or given.shape != before.shape or given.dtype != before.dtype:
            return False
        return given is before or torch.equal(given, before)
    if isinstance(given, (tuple, list)):
        return type(given) is type(before) and len(given) == len(before) and all(map(_same, given, before))
    if is_dataclass(given):
        return type(given) is type(before) and all(
            _same(getattr(given, f.name), getattr(before, f.name)) for f in fields(given)
        )
    return given is before is None or (type(given) is type(before) is int and given == before)


def next_taps(stages: StageJudge, judge: ModuleJudge | None, network: str, count: int = 4) -> list[str]:
    """The few taps that divide what is left of the search for the first wrong module, evenly.

    They lie between the last right tap before it and itself, in the order in which the modules finish. None where it is
    the only module there.
    """
    names = _order(stages, network)
    if judge is None:
        return _evenly(names, count)
    tapped = [name for name in names if name in judge.found]
    # Where all that is tapped is right, it is behind.
    end = names.index(judge.wrong[0]) if judge.wrong else len(names)
    before = [name for name in tapped if names.index(name) < end]
    return _evenly(names[names.index(before[-1]) + 1 if before else 0 : end], count)


def _order(stages: StageJudge, network: str) -> list[str]:
    """The tapped modules of a network, in the order in which they finish."""
    pipe = _plain(stages.pipe).with_own_modules()
    settings = stages.settings.replace(decode="parity", decode_chunk_size=stages.settings.num_frames)
    names: dict[str, None] = {}
    models = {"image_encoder": pipe.image_encoder, "vae": pipe.vae, "unet": pipe.unet}
    for name, module in tapping.modules(models):
        if network_of(name) == network:
            module.register_forward_hook(lambda module, args, output, name=name: names.setdefault(name))
    output = _OUTPUT.get(network) or f"noise_pred{'_cond' if stages.guided else ''}.000"
    Chain(pipe, settings, stages.known, stages.guided).expected(output)
    return list(names)


def _evenly(names: Sequence[str], count: int) -> list[str]:
    if len(names) <= count:
        return list(names)
    return [names[(i + 1) * len(names) // (count + 1)] for i in range(count)]
