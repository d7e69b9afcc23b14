"""Judging each tapped module of a network from the candidate's own taps before it.

One pass of the network, in which every tapped module's output is compared with the candidate's tap and then replaced
by it: what comes behind runs on the candidate's own tensors, and an error in one module accuses no other. What lies
between two taps is judged with the later one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdlab.parity import taps as tapping
from svdlab.parity.compare import THRESHOLD
from svdlab.parity.stages import Chain, StageJudge, distance
from svdlab.svd.checkpoint import Components
from svdlab.svd.kernels.registry import plain
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

    def judge(self) -> dict[str, float]:
        """Every tapped module's ratio, in the order in which they run."""
        work = self.run(self.work_pipe, ())
        self.right = self.run(self.exact_pipe, ())
        own = self._own_distances()
        self.order = list(self.right)
        for name, exact in self.right.items():
            if not bool(torch.isfinite(exact).all()):
                continue  # what went in is not finite
            rounding = max(distance(work[name], exact), self.stages.candidate_rounding(self.taps[name]))
            self.floors[name] = max(rounding, own.get(name, 0.0), self.stages.resolution)
            self.ratios[name] = distance(self.found[name], exact) / self.floors[name]
        self.ratios = {name: r for name, r in self.ratios.items() if not self._unsure(name)}
        return self.ratios

    @property
    def wrong(self) -> list[str]:
        """The modules that rounding does not explain, in the order in which they run."""
        return [name for name, ratio in self.ratios.items() if not ratio <= THRESHOLD]

    def ratios_with(self, changes: Sequence[Change], exact: bool = False) -> dict[str, float]:
        """Every module's ratio with changes in place; ``exact``: with the rounding of these changes in the floor."""
        work = self.run(self.work_pipe, changes)
        wanted = self.run(self.exact_pipe, changes) if exact else work
        ratios = {}
        for name in self.ratios:
            if name not in wanted:  # the change leaves the module out
                ratios[name] = float("inf")
                continue
            floor = max(self.floors[name], distance(work[name], wanted[name]) if exact else 0.0)
            ratios[name] = distance(self.found[name], wanted[name]) / floor
        return ratios

    def run(
        self,
        pipe: SVDPipeline,
        changes: Sequence[Change],
        taps: Mapping[str, Tensor] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What every tapped module makes of the taps before it, in a trace's layout and in the order of running."""
        taps, made = self.found if taps is None else taps, _Forced(self.found if taps is None else taps)
        known = self.stages.known if known is None else known
        settings = self.stages.settings
        if self.network == "vae.decoder" and not settings.effective_decode_chunk:
            # The exact decode does not call the modules that are tapped.
            settings = settings.replace(decode="parity", decode_chunk_size=settings.num_frames)
        changed = Chain(pipe, settings, known, self.stages.guided, changes).pipe.with_own_modules()
        models = {"image_encoder": changed.image_encoder, "vae": changed.vae, "unet": changed.unet}
        for name, module in tapping.modules(models):
            if name in taps:
                module.register_forward_hook(partial(made.hook, name))
        chain = Chain(changed, settings, known, self.stages.guided)
        chain.expected(self.output)
        return made.results()

    def _own_distances(self) -> dict[str, float]:
        """The reference's, from its own taps, where it has the same."""
        reference = self.stages.reference
        taps = {base: reference[name] for base, name in self.taps.items() if name in reference}
        if not taps:
            return {}
        exact = self.run(self.exact_pipe, (), taps, self.stages.own.known)
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
    c = pipe.components
    return SVDPipeline(
        Components(plain(c.unet), plain(c.vae), plain(c.image_encoder), c.scheduler, c.feature_extractor)
    )


def _skips(unet: nn.Module) -> Iterator[str]:
    """The modules whose outputs are skip connections."""
    yield "unet.conv_in"
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        kind = "attentions" if len(block.attentions) else "resnets"
        yield from (f"unet.down_blocks.{i}.{kind}.{j}" for j in range(len(block.resnets)))
        yield from (f"unet.down_blocks.{i}.downsamplers.{j}" for j in range(len(block.downsamplers)))


class _Forced:
    """Hooks that keep what each module makes, and hand on the tap in its place."""

    def __init__(self, taps: Mapping[str, Tensor]) -> None:
        self.taps = taps
        self.parts: dict[str, list[Tensor]] = {}

    def hook(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        made = tapping.first_tensor(output)
        layout, tap = tapping.layout_of(name), self.taps[name]
        if layout == "positions":  # the same for each half of the batch
            self.parts[name] = [made]
            return tap.to(made)
        in_trace = tapping.from_svdlab(name, made)
        parts = self.parts.setdefault(name, [])
        if layout == "activation":  # a call may have a part of the batch or of the frames
            in_trace, tap = in_trace.flatten(0, 1), tap.flatten(0, 1)
        start = sum(len(part) for part in parts)
        parts.append(in_trace)
        given = tap[start : start + len(in_trace)]
        if given.shape != in_trace.shape:
            return None  # another shape is a distance without limit
        if layout != "activation":
            return given.to(made)
        forced = given.to(made).permute(0, 2, 3, 1).contiguous().reshape(made.shape)
        if isinstance(output, tuple):  # a down block: its last skip connection is its output
            _, skips = output
            return forced, [forced if skip is made else skip for skip in skips]
        return forced

    def results(self) -> dict[str, Tensor]:
        """By tap, in the order of the first calls."""
        made = {name: torch.cat(parts) for name, parts in self.parts.items()}
        return {n: t.reshape(self.taps[n].shape) if t.numel() == self.taps[n].numel() else t for n, t in made.items()}


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
