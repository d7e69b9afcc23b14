"""The plants: each shows exactly from its first probe on, and leaves diffusers as it was; the catalogue meets each."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from both import loaded
from planted import PLANTS, RELATED, UNKNOWN, Planted, planted

from svdlab.parity.bugs import BUGS
from svdlab.parity.candidate import capture
from svdlab.parity.reference import capture_diffusers
from svdlab.parity.trace import Trace
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGE, Change

SETTINGS = GenerationSettings(height=32, width=32, num_frames=4, num_inference_steps=1, seed=5)
THRESHOLD = 4
# What a port draws itself is not the replay's: these are compared before the draw.
DRAWN = ("image_latents_sampled", "noise_aug_after_encode")
# On random weights smaller than the rounding of float32: judged in float64, from the candidate's own latents.
FAINT = ("group_norm_eps:vae_temporal",)
# Roundings: whatever comes behind one is rounded anew, so that only the first module tells whether it is the same one.
ROUNDINGS = {
    "vae_not_upcast": "vae.encoder.conv_in",
    "norm_statistics_in_half": "unet.down_blocks.0.resnets.0.spatial_res_block.norm1",
}
ALL = PLANTS | UNKNOWN | RELATED


class Bench:
    """One checkpoint in diffusers, also in float64, and in svdlab, and one generation's clean trace."""

    def __init__(self, folder: Path, photo: Any, settings: GenerationSettings, optional: bool) -> None:
        self.plain, self.wide, self.pipe = loaded(folder, settings.torch_dtype)
        self.optional = optional
        self.clean = capture_diffusers(self.plain, photo, settings, optional=optional)
        self.correct = self.variant(Change())

    @functools.cache  # noqa: B019 - as long as the module's tests run
    def planted(self, name: str, wide: bool = False) -> Trace:
        pipe = self.wide if wide else self.plain
        with planted(pipe, name):
            return capture_diffusers(pipe, replay=self.clean, preprocess=True, optional=self.optional)

    def variant(self, change: Change, until: str | None = None, taps: Sequence[str] = ()) -> Trace:
        pipe, asked = self.pipe.with_changes(change), {"until": until, "taps": taps, "optional": self.optional}
        return capture(pipe, replay=self.clean, preprocess=True, **asked)


@pytest.fixture(scope="module")
def bench_of(photo: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Planted], Bench]:
    """The bench on which a plant shows."""
    folders: dict[str, Path] = {}
    benches: dict[str, Bench] = {}

    def bench(plant: Planted) -> Bench:
        weights = json.dumps(dict(plant.unet))
        if weights not in folders:
            folders[weights] = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), unet=plant.unet)
        key = f"{weights} {dict(plant.settings)} {plant.optional}"
        if key not in benches:
            benches[key] = Bench(folders[weights], photo, SETTINGS.replace(**plant.settings), plant.optional)
        return benches[key]

    return bench


def test_every_bug_of_the_catalogue_is_planted() -> None:
    assert {name.split(":")[0] for name in PLANTS} == set(BUGS)
    for name, plant in ALL.items():
        assert plant.stage in STAGE, name
        assert not plant.first_module or plant.stage in ("image_embedding", "image_latents", "predict_noise", "decode")
        if name in BUGS:
            assert (plant.stage, plant.first_probe) == (BUGS[name].stage, BUGS[name].first_probe), name


@pytest.mark.parametrize("name", ALL)
def test_a_plant_shows_from_its_first_probe_on(bench_of: Callable[[Planted], Bench], name: str) -> None:
    bench = bench_of(ALL[name])
    candidate = bench.planted(name)
    clean = bench.clean
    different = [p for p in clean.probes if p not in candidate or not torch.equal(clean[p], candidate[p])]
    assert different[0] == ALL[name].first_probe
    assert different[-1] == clean.probes[-1]


@pytest.mark.parametrize("name", [name for name, plant in UNKNOWN.items() if plant.first_module])
def test_the_first_wrong_module_is_the_one_that_a_plant_names(bench_of: Callable[[Planted], Bench], name: str) -> None:
    bench, plant = bench_of(UNKNOWN[name]), UNKNOWN[name]
    taps = ["vae.*"] if plant.stage in ("image_latents", "decode") else ["image_encoder.*"]
    taps = taps if plant.stage != "predict_noise" else ["unet.*"]
    clean = capture_diffusers(bench.plain, replay=bench.clean, preprocess=True, taps=taps)
    with planted(bench.plain, name):
        candidate = capture_diffusers(bench.plain, replay=bench.clean, preprocess=True, taps=taps)
    assert next(tap for tap in clean.taps if not torch.equal(clean[tap], candidate[tap])) == plant.first_module


def _ratio(found: Trace, same: Trace, truth: Trace, since: str) -> tuple[float, str]:
    """How far the first trace is from the truth, over how far the second one is: the largest from a probe on."""
    ratios, names = {}, list(same.probes)
    for probe in names[names.index(since) :]:
        if probe in found:  # the variant's run may have been stopped
            wanted = truth[probe].double()
            size = float(wanted.norm()) or 1.0
            eps = torch.finfo(torch.float32).eps if same.dtype != "float16" else torch.finfo(torch.float16).eps
            floor = max(float((same[probe].double() - wanted).norm()) / size, eps)
            if probe == "frames_8bit":  # a value between two levels falls to either
                floor = max(floor, 1 / size)
            agree = found[probe].shape == wanted.shape
            ratios[probe] = float((found[probe].double() - wanted).norm()) / size / floor if agree else float("inf")
    worst = max(ratios, key=lambda probe: ratios[probe])
    return ratios[worst], worst


@pytest.mark.parametrize("name", FAINT)
def test_a_variant_gives_what_a_plant_gives_that_rounding_hides(
    bench_of: Callable[[Planted], Bench], tiny: Path, name: str
) -> None:
    bench, bug = bench_of(PLANTS[name]), BUGS[name.split(":")[0]]
    candidate, pipe = bench.planted(name, wide=True), SVDPipeline.from_pretrained(tiny, dtype=torch.float64)
    settings = pipe.resolve(candidate.settings)
    latents, frames = candidate[f"latents.{settings.num_steps - 1:03}"], candidate["frames"]

    def distance(change: Change) -> float:
        return float((pipe.with_changes(change).decode(latents, settings) - frames).norm() / frames.norm())

    # diffusers gives its frames in float32.
    floor = torch.finfo(torch.float32).eps
    assert distance(Change()) > 20 * floor, "the plant does nothing"
    assert min(map(distance, bug.variants)) < floor


@pytest.mark.parametrize(("name", "tap"), ROUNDINGS.items())
def test_a_variant_rounds_as_a_plant_does(bench_of: Callable[[Planted], Bench], name: str, tap: str) -> None:
    bench = bench_of(PLANTS[name])
    full = tap if tap.startswith("vae") else f"{tap}.000"
    with planted(bench.plain, name):
        candidate = capture_diffusers(bench.plain, replay=bench.clean, preprocess=True, taps=[tap])[full].double()

    def distance(change: Change) -> float:
        return float((bench.variant(change, taps=[tap])[full].double() - candidate).norm())

    assert distance(BUGS[name].variants[0]) < 0.2 * distance(Change())


@pytest.mark.parametrize("name", [name for name in PLANTS if name not in (*FAINT, *ROUNDINGS)])
def test_a_variant_of_the_catalogue_gives_what_the_plant_gives(bench_of: Callable[[Planted], Bench], name: str) -> None:
    bench, bug = bench_of(PLANTS[name]), BUGS[name.split(":")[0]]
    until = "input.clip_pixels" if name in DRAWN else None
    candidate, truth = bench.planted(name), bench.planted(name, wide=True)
    # What svdlab is without the bug; nothing where the comparison ends before the bug.
    since = until or PLANTS[name].first_probe
    correct = float("inf") if until else _ratio(bench.correct, candidate, truth, since)[0]
    found = []
    for change in bug.variants:
        found.append(_ratio(bench.variant(change, until), candidate, truth, since))
        if found[-1][0] <= min(THRESHOLD, correct / 2):
            return
    raise AssertionError(f"no variant: {found}; correct: {correct}")


def test_nothing_is_left_behind(bench_of: Callable[[Planted], Bench]) -> None:
    bench = bench_of(PLANTS["fps_not_decremented"])
    names = [n for n, plant in PLANTS.items() if n != "guidance_per_step" and not plant.settings and not plant.unet]
    with pytest.raises(KeyError), planted(bench.plain, *names, "no such bug"):
        pass
    again = capture_diffusers(bench.plain, replay=bench.clean, preprocess=True)
    assert all(torch.equal(bench.clean[probe], again[probe]) for probe in bench.clean)
