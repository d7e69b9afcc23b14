"""Diagnosis: candidates are diffusers with bugs planted in it; the names that come back must be those of these bugs."""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from both import loaded
from planted import (
    DEPARTURES,
    PLANTS,
    RELATED,
    UNKNOWN,
    Planted,
    compatible,
    guidance,
    keep,
    other_ramp,
    planted,
    wrap,
)

from svdlab import cli
from svdlab.errors import SvdlabError
from svdlab.notebook.tables import catalogue_table
from svdlab.parity.bugs import BUGS
from svdlab.parity.candidate import capture
from svdlab.parity.compare import compare
from svdlab.parity.diagnose import catalogue, diagnose
from svdlab.parity.modules import ModuleJudge
from svdlab.parity.reference import capture_diffusers
from svdlab.parity.stages import StageJudge
from svdlab.parity.trace import Trace
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGE, Change

SETTINGS = GenerationSettings(height=64, width=64, num_frames=4, num_inference_steps=3, seed=5)
ALL = PLANTS | UNKNOWN | RELATED
# A port's own random draws: fewer values do not tell their spread.
DRAWN = ("image_latents_sampled", "noise_aug_after_encode")
# Bugs that do nothing in float32, with one video, or with so few levels, or less than rounding at sigma 700.
HARMLESS = (
    *("init_noise_unscaled", "timestep_in_half", "vae_not_upcast", "clips_repeated_after_guidance", "head_counts"),
    "frames_truncated",  # shows in a probe that has to be asked for
)
# On random weights smaller than what rounding does in the whole stage, or a rounding itself: modules tell.
FAINT = ("group_norm_eps:vae_temporal", "norm_statistics_in_half")
# Within what rounding to the dtype of the trace does, in every module.
HIDDEN = ("vae_not_upcast",)


class Bench:
    """One checkpoint in both implementations, and one generation's reference and truth."""

    def __init__(
        self,
        folder: Path,
        photo: Any,
        settings: GenerationSettings,
        taps: tuple[str, ...] = (),
        optional: bool = False,
    ) -> None:
        self.asked: dict[str, Any] = {"taps": taps, "optional": optional}
        self.diffusers, wide, self.pipe = loaded(folder, settings.torch_dtype)
        self.reference = capture_diffusers(self.diffusers, photo, settings, **self.asked)
        self.truth = capture_diffusers(wide, replay=self.reference, **self.asked)

    def candidate(self, *names: str) -> Trace:
        with planted(self.diffusers, *names):
            return capture_diffusers(self.diffusers, replay=self.reference, preprocess=True, **self.asked)

    def diagnose(self, candidate: Trace, **options: Any) -> Any:
        return diagnose(self.reference, candidate, self.truth, pipe=self.pipe, **options)


@pytest.fixture(scope="module")
def bench(tiny: Path, photo: Any) -> Bench:
    return Bench(tiny, photo, SETTINGS)


@pytest.fixture(scope="module")
def short(tiny: Path, photo: Any) -> Bench:
    """A bench of one step, and of small frames: a stage is judged at each step alone."""
    return Bench(tiny, photo, SETTINGS.replace(height=32, width=32, num_inference_steps=1))


@pytest.fixture(scope="module")
def bench_of(tiny: Path, photo: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    """The bench on which a plant shows: its checkpoint and settings, and values enough for a random draw."""
    benches: dict[str, Bench] = {}
    folders = {"{}": tiny}

    def of(name: str, tapped: bool = False) -> Bench:
        plant = ALL[name]
        size = 64 if name in DRAWN else 32
        # A stage is judged at each step alone: one is enough.
        settings = SETTINGS.replace(**{"height": size, "width": size, "num_inference_steps": 1, **plant.settings})
        network = STAGE[plant.stage].network
        taps = {"vae.encoder": ("vae.encoder.*", "vae.quant_conv")}.get(network, (f"{network}.*",))
        taps = taps if tapped and network else ()
        key = json.dumps([dict(plant.unet), settings.model_dump(mode="json"), taps, plant.optional])
        if key not in benches:
            weights = json.dumps(dict(plant.unet))
            if weights not in folders:
                folders[weights] = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), unet=plant.unet)
            benches[key] = Bench(folders[weights], photo, settings, taps, plant.optional)
        return benches[key]

    return of


@pytest.mark.parametrize("name", [name for name in PLANTS if name not in (*FAINT, *HIDDEN)])
def test_every_bug_is_named(bench_of: Callable[..., Bench], name: str) -> None:
    bench = bench_of(name)
    found = bench.diagnose(bench.candidate(name))
    bug = name.split(":")[0]
    assert found.verdict == "explained" and found.named == [bug], found.summary()
    assert (found.bugs, found.departures) == ([bug], [bug] if bug in DEPARTURES else []), found.summary()
    assert [e.bugs for e in found.explanations] == [(bug,)], found.summary()
    assert found.explanations[0].ratio <= 4 and found.confirmed_ratio is not None and found.confirmed_ratio <= 4
    right = {stage.stage for stage in found.stages if stage.status == "right"}
    assert PLANTS[name].stage not in right and len(right) >= len(found.stages) - 3, found.summary()


def test_what_gives_the_same_tensors_is_given_as_equal(tiny: Path, photo: Any) -> None:
    """The scale of the only frame is the ramp's upper end: as if constant, or as if it fell."""
    one = dict(height=32, width=32, num_frames=1, num_inference_steps=1, min_guidance_scale=2.0)
    bench = Bench(tiny, photo, SETTINGS.replace(**one))
    with ExitStack() as stack:
        guidance(other_ramp(3.0, 3.0), keep)(bench.diffusers, stack)
        candidate = bench.candidate()
    found = bench.diagnose(candidate)
    assert found.verdict == "explained" and found.named == [], found.summary()
    assert {e.bugs for e in found.explanations} == {("guidance_constant",), ("guidance_ramp_ends",)}, found.summary()
    assert "these give the same tensors" in found.summary()


# --- the original's choices ---


@pytest.fixture(scope="module")
def original(tiny: Path, photo: Any) -> Bench:
    """A bench on which all departures show."""
    return Bench(tiny, photo, SETTINGS.replace(height=32, width=32, num_inference_steps=1), optional=True)


def test_the_original_s_choices_together_are_no_bugs(original: Bench) -> None:
    candidate = original.candidate(*DEPARTURES)
    found = original.diagnose(candidate)
    assert (found.verdict, found.bugs, found.departures) == ("explained", list(DEPARTURES), list(DEPARTURES))
    assert found.summary().count("no bug, the original's choice") == len(DEPARTURES)
    found = original.diagnose(candidate, rules="stability")
    assert found.verdict == "parity" and found.departures == list(DEPARTURES), found.summary()
    assert not found.wrong and not found.unlike_original and "parity with Stability's code" in found.summary()
    written = json.loads(found.to_json())
    assert (written["bugs"], written["departures"], written["rules"]) == ([], list(DEPARTURES), "stability")


def test_a_bug_beside_the_original_s_choices(original: Bench) -> None:
    """One in a stage of its own, one in a network that departs, too."""
    found = original.diagnose(original.candidate("quick_gelu", "gelu_tanh", *DEPARTURES), rules="stability")
    assert (found.verdict, found.bugs, found.departures) == ("explained", ["quick_gelu", "gelu_tanh"], list(DEPARTURES))
    assert {stage.stage for stage in found.wrong} == {"image_embedding", "predict_noise"}


def test_diffusers_is_not_at_parity_with_the_original(original: Bench) -> None:
    """What the original's code takes as arguments may be what diffusers does, and its constants may not."""
    found = original.diagnose(original.candidate(), rules="stability")
    assert found.verdict == "explained" and found.named == [], found.summary()
    assert found.unlike_original == ["resnet_norm_eps", "frames_truncated"]
    assert "it does what diffusers does, and not the original: resnet_norm_eps" in found.summary()


@pytest.mark.parametrize("name", FAINT)
def test_modules_show_what_a_stage_does_not(bench_of: Callable[..., Bench], name: str) -> None:
    bench = bench_of(name, tapped=True)
    found = bench.diagnose(bench.candidate(name))
    assert found.bugs == [name.split(":")[0]], found.summary()
    assert [stage.stage for stage in found.wrong] == [PLANTS[name].stage]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_rounding_hides_is_not_named(bench_of: Callable[..., Bench], name: str) -> None:
    bench = bench_of(name, tapped=True)
    found = bench.diagnose(bench.candidate(name))
    assert found.verdict == "parity" and found.bugs == [] and found.wrong == []


def _stacks(count: int, at_once: range, inside: str = "", seed: int = 2) -> list[tuple[str, ...]]:
    """Bugs that can stand in one port, each in another place; ``inside``: all of this stage."""
    choice = random.Random(seed)
    names = [
        name
        for name, plant in PLANTS.items()
        if name != "init_noise_unscaled"  # too small to see at sigma 700
        and name not in FAINT
        and not name.endswith("_in_half")  # below the rounding of larger ones
        and not plant.unet
        and not plant.optional
        and not plant.settings.keys() & {"dtype", "num_videos_per_prompt"}
        and (not inside or plant.stage == inside)
    ]
    stacks = []
    while len(stacks) < count:
        drawn = choice.sample(names, choice.choice(at_once))
        # In the catalogue's order, in which one lies around the other.
        stack = tuple(sorted(drawn, key=lambda name: list(BUGS).index(name.split(":")[0])))
        # In different stages, or all in one.
        stages = {PLANTS[name].stage for name in stack}
        if inside or len(stages) == len(stack):
            if all(compatible(a, b) for a, b in itertools.combinations(stack, 2)):
                stacks.append(stack)
    return stacks


def _named(bench: Bench, stack: tuple[str, ...]) -> tuple[bool, str]:
    """Whether all bugs of a stack are named, and that no other is."""
    found = bench.diagnose(bench.candidate(*stack))
    wanted = {name.split(":")[0] for name in stack}
    assert set(found.named) <= wanted, (stack, found.summary())
    sets = [set(explanation.bugs) for explanation in found.explanations]
    # One below what the rounding of the others explains may stay unnamed.
    assert not sets or any(names <= wanted for names in sets), (stack, found.summary())
    return found.verdict == "explained" and wanted in sets, f"{stack}: {found.summary()}"


@pytest.mark.slow
def test_stacks_in_different_stages(bench: Bench) -> None:
    """Two to eight at once: no limit on the number of bugs, and an early one hides no later one."""
    results = [_named(bench, stack) for stack in _stacks(6, range(2, 9))]
    assert all(named for named, _ in results), "\n".join(text for named, text in results if not named)


@pytest.mark.slow
def test_stacks_inside_one_stage(short: Bench) -> None:
    """Two or three inside one network, without taps."""
    results = [_named(short, stack) for stack in _stacks(3, range(2, 4), "predict_noise")]
    assert all(named for named, _ in results), "\n".join(text for named, text in results if not named)


def test_time_that_is_up_ends_the_search_for_sets_and_nothing_else(bench_of: Callable[..., Bench]) -> None:
    """A single bug is named however short the time; what many in one stage explain is left open, and said."""
    bench, soon = bench_of("gelu_tanh"), {"seconds": 1e-9}
    alone = bench.diagnose(bench.candidate("gelu_tanh", "quick_gelu"), **soon)
    assert alone.verdict == "explained" and alone.bugs == ["quick_gelu", "gelu_tanh"], alone.summary()
    many = ("gelu_tanh", "heads_not_reversed", "alpha_swapped_unet", "sincos_order")
    found = bench.diagnose(bench.candidate(*many), **soon)
    assert found.verdict == "unknown" and found.stopped and "time was up" in found.summary(), found.summary()
    assert json.loads(found.to_json())["stopped"] is True
    for seconds in (0, -1, math.nan):
        with pytest.raises(SvdlabError, match="seconds: got"):
            bench.diagnose(bench.candidate(), seconds=seconds)


CLEAN: list[dict[str, Any]] = [
    {},
    {"max_guidance_scale": 1.0},
    {"num_frames": 1, "min_guidance_scale": 2.0},
    {"fps": 30, "motion_bucket_id": 200, "noise_aug_strength": 0.4},
    {"decode_chunk_size": 3, "height": 40},
    {"sigmas": (90.0, 3.0, 0.0)},
    {"num_videos_per_prompt": 2, "num_inference_steps": 1},
]


@pytest.mark.slow
def test_no_false_alarm_in_twenty_clean_runs(tiny: Path, photo: Any) -> None:
    dtypes = itertools.cycle(["float32", "bfloat16", "float16"])
    runs = list(zip(range(20), itertools.cycle(CLEAN), dtypes))  # noqa: B905 - two of them never end
    for seed, change, dtype in runs:
        settings = SETTINGS.replace(**{"height": 32, "width": 32, **change}, seed=seed, dtype=dtype)
        plain, wide, pipe = loaded(tiny, settings.torch_dtype)
        reference = capture_diffusers(plain, photo, settings)
        truth = capture_diffusers(wide, replay=reference)
        found = diagnose(reference, capture(pipe, photo, settings), truth, pipe=pipe)
        assert found.verdict == "parity" and not found.explanations, (change, dtype, found.summary())


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_bug_outside_the_catalogue_is_unknown(bench_of: Callable[..., Bench], name: str) -> None:
    bench, plant = bench_of(name, tapped=True), UNKNOWN[name]
    found = bench.diagnose(bench.candidate(name))
    assert (found.verdict, found.explanations, found.bugs) == ("unknown", [], []), found.summary()
    assert found.first_divergence == plant.first_probe
    assert found.first_module == plant.first_module
    assert plant.stage in [stage.stage for stage in found.wrong]
    assert "unknown" in found.summary()


# What the port that this project grew out of still had when it was read line by line, all at once.
PORT = (
    *("clip_resize_nearest", "quick_gelu", "vae_encoder_padding_symmetric", "image_latents_sampled"),
    *("image_latents_scaled", "c_skip_with_square_root", "transformer_alpha_swapped", "frame_position_first_parallel"),
    *("sinusoids_without_exp", "geglu_halves_exchanged", "heads_not_reversed", "temporal_group_norm_per_frame_unet"),
    *("temporal_group_norm_per_frame_vae", "group_norm_eps:unet", "group_norm_eps:vae_temporal", "decode_chunked"),
)


@pytest.mark.slow
def test_sixteen_at_once(tiny: Path, photo: Any) -> None:
    """Every wrong stage is found, and where taps tell the bugs of a network apart every bug is named."""
    taps = ("unet.*", "vae.decoder.*")
    at = Bench(tiny, photo, SETTINGS.replace(num_inference_steps=1), taps=taps)
    found = at.diagnose(at.candidate(*sorted(PORT, key=lambda name: list(BUGS).index(name.split(":")[0]))))
    assert {PLANTS[name].stage for name in PORT} == {stage.stage for stage in found.wrong}, found.summary()
    assert found.verdict == "explained" and set(found.named) == {name.split(":")[0] for name in PORT}, found.summary()
    assert len(found.explanations) == 1 and found.confirmed_ratio is not None and found.confirmed_ratio <= 4


def test_an_unknown_bug_hides_no_known_one(bench: Bench) -> None:
    """One that nothing explains stands before, between and behind known ones."""
    known = ("quick_gelu", "fps_not_decremented", "c_skip_with_square_root")
    found = bench.diagnose(bench.candidate("image_mirrored", "stale_latents", *known))
    assert found.verdict == "partly" and set(found.named) == set(known), found.summary()
    left = {stage.stage: stage.relation for stage in found.wrong if not stage.explained}
    assert set(left) == {"resize_image", "model_input"} and left["resize_image"].kind == "flip"
    assert found.confirmed_ratio is not None and found.confirmed_ratio <= 4


def test_a_port_s_own_noise_is_no_bug_of_the_latents(bench: Bench) -> None:
    """Noise that was not replayed, and scaled latents: no spread proves that the noise came after the encode."""

    def plant(seed: int) -> Planted:
        def own_noise(pipe: Any, stack: ExitStack) -> None:
            def encode(original: Any, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                own = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
                strength = bench.reference.settings.noise_aug_strength
                return original(image + strength * (own - bench.reference["input.noise"]), *args, **kwargs)

            wrap(stack, pipe, "_encode_vae_image", encode)

        return Planted(own_noise, "image_latents", "own noise")

    for seed in range(3):
        for other in ((), ("image_latents_scaled",)):
            with planted(bench.diffusers, *other), ExitStack() as stack:
                plant(seed).plant(bench.diffusers, stack)
                candidate = capture_diffusers(
                    bench.diffusers, replay=bench.reference, preprocess=True, until="image_latents"
                )
            found = bench.diagnose(candidate)
            assert found.verdict == "unknown" and found.bugs == [], found.summary()


def test_another_library_s_resize_is_described(bench: Bench) -> None:
    found = bench.diagnose(bench.candidate("frame_resize_other_lanczos"))
    assert found.verdict == "unknown" and found.bugs == []
    assert [stage.stage for stage in found.wrong] == ["resize_image"]


@pytest.mark.slow
def test_another_checkpoint(tmp_path: Path, photo: Any) -> None:
    """Other weights, another VAE, other settings: stacks again."""
    vae = dict(block_out_channels=(64, 32), down_block_types=("DownEncoderBlock2D",) * 2)
    settings = SETTINGS.replace(height=16, width=16, fps=12, max_guidance_scale=4.0)
    other = Bench(write_random_checkpoint(tmp_path, seed=21, vae=vae), photo, settings)
    results = [_named(other, stack) for stack in _stacks(2, range(4, 9), seed=7)]
    assert all(named for named, _ in results), "\n".join(text for named, text in results if not named)


def test_a_bug_below_the_noise_of_the_chain_shows_in_its_stage(bench: Bench) -> None:
    """At sigma 700 the two first-noise scales differ by a millionth: 8 roundings of one stage, none of the chain."""
    found = bench.diagnose(bench.candidate("init_noise_unscaled"))
    assert found.comparison.verdict == "parity"
    assert [e.bugs for e in found.explanations] == [("init_noise_unscaled",)], found.summary()


def test_half_precision(tiny: Path, photo: Any) -> None:
    half = Bench(tiny, photo, SETTINGS.replace(dtype="bfloat16"))
    for name in ("timestep_unscaled", "image_latents_scaled", "guidance_swapped"):
        found = half.diagnose(half.candidate(name))
        assert (name,) in [e.bugs for e in found.explanations], found.summary()


def test_a_partial_trace_is_enough(bench: Bench) -> None:
    whole = bench.candidate("sincos_order")
    few = {name: whole[name] for name in ("image_latents", "noise_pred.000", "noise_pred.001")}
    found = bench.diagnose(Trace(few, whole.settings, "port", dtype=whole.dtype))
    assert [e.bugs for e in found.explanations] == [("sincos_order",)]


def test_without_a_truth(bench: Bench) -> None:
    found = diagnose(bench.reference, bench.candidate("prediction_epsilon"), pipe=bench.pipe)
    assert [e.bugs for e in found.explanations] == [("prediction_epsilon",)]


def test_a_replay_without_guidance_does_not_match_a_guided_candidate(short: Bench) -> None:
    """One step of a ramp over steps is its start, 1: the replay has half the batch. Only the model's input tells."""
    whole = short.candidate("uncond_latents_kept")
    few = {name: whole[name] for name in ("image_latents", "model_input.000", "noise_pred.000")}
    found = short.diagnose(Trace(few, whole.settings, "port", dtype=whole.dtype))
    assert [e.bugs for e in found.explanations] == [("uncond_latents_kept",)], found.summary()


@pytest.mark.slow
def test_the_catalogue_in_a_notebook(bench: Bench) -> None:
    rows = catalogue(bench.reference, bench.truth, bench.pipe)
    assert {row.bug for row in rows} == set(BUGS)
    assert all(row.ratio > 4 for row in rows if row.bug not in HARMLESS), [r for r in rows if r.ratio <= 4]
    by_name = {row.bug: row for row in rows}
    assert by_name["fps_not_decremented"].passes_mse_bar and not by_name["decode_unscaled"].passes_mse_bar
    assert f"MSE < 1e-3 misses {sum(r.passes_mse_bar for r in rows)}," in catalogue_table(rows).caption


def test_the_command(bench: Bench, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    reference, truth = tmp_path / "reference.safetensors", tmp_path / "truth.safetensors"
    bench.reference.save(reference)
    bench.truth.save(truth)
    cases = {"clean": ((), 0, "parity"), "fps": (("fps_not_decremented",), 1, "explained")}
    for name, (bugs, code, verdict) in cases.items():
        candidate = tmp_path / f"{name}.safetensors"
        bench.candidate(*bugs).save(candidate)
        result = tmp_path / f"{name}.json"
        arguments = [str(reference), str(candidate), "--truth", str(truth), "--model", str(tiny), "--json", str(result)]
        monkeypatch.setattr("sys.argv", ["svdlab", "diagnose", *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        assert leave.value.code == code
        written = json.loads(result.read_text())
        assert (
            written["verdict"] == verdict and [e["bugs"] for e in written["explanations"]] == [list(bugs)][: len(bugs)]
        )
        assert written["bugs"] == written["departures"] == list(bugs)
    assert "fed fps instead of fps - 1" in capsys.readouterr().out

    (tmp_path / "cut.safetensors").write_bytes(reference.read_bytes()[:1000])
    monkeypatch.setattr("sys.argv", ["svdlab", "diagnose", str(reference), str(tmp_path / "cut.safetensors")])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_reference_that_cannot_be_replayed(bench: Bench) -> None:
    bare = {n: bench.reference[n] for n in bench.reference if not n.startswith("input.")}
    reference = Trace(bare, SETTINGS.replace(**bench.reference.settings.model_dump()), "bare", dtype="float32")
    with pytest.raises(SvdlabError, match="input.image"):
        diagnose(reference, bench.candidate("sigmas_not_karras"), pipe=bench.pipe)


def test_the_module_agrees_with_compare(bench: Bench) -> None:
    candidate = bench.candidate("gelu_tanh")
    found = bench.diagnose(candidate)
    comparison = compare(bench.reference, candidate, bench.truth)
    assert found.first_divergence == comparison.first_divergence and found.comparison.verdict == "divergence"


def test_a_value_that_is_not_finite_accuses_its_stage_only(bench: Bench) -> None:
    whole = bench.candidate("fps_not_decremented")
    tensors = {name: whole[name].clone() for name in whole}
    tensors["noise_pred_cond.001"][0, 1, 0, 0, 0] = math.nan
    tensors["noise_pred.001"][0, 1, 0, 0, 0] = math.nan
    found = bench.diagnose(Trace(tensors, whole.settings, "port", dtype=whole.dtype))
    assert found.named == ["fps_not_decremented"] and found.verdict == "partly", found.summary()
    assert {stage.stage for stage in found.wrong} <= {"time_ids", "condition", "predict_noise"}
    assert found.summary().splitlines()[1].startswith("NaN or infinity first at noise_pred_cond.001, 1 of")
    json.loads(found.to_json(), parse_constant=pytest.fail)


def test_the_next_taps_close_in_on_the_module(tiny: Path, photo: Any) -> None:
    """Each round writes the taps that the last one asked for, until one module is left."""
    settings = SETTINGS.replace(height=32, width=32, num_inference_steps=1)
    taps: set[str] = set()
    for _ in range(6):
        at = Bench(tiny, photo, settings, taps=tuple(taps))
        found = at.diagnose(at.candidate("reflect_padding"), max_bugs=1)
        stage = next(s for s in found.wrong if s.stage == "predict_noise")
        if not stage.next_taps:
            break
        assert len(stage.next_taps) <= 4 and not taps & set(stage.next_taps)
        taps |= set(stage.next_taps)
    assert found.first_module == UNKNOWN["reflect_padding"].first_module, (taps, found.summary())


def test_the_candidate_s_own_rounding(bench: Bench) -> None:
    """Code that rounds more than diffusers is excused by its own float64 trace, and a bug in it is not."""
    clean = bench.candidate()

    def rounded(trace: Trace) -> Trace:
        tensors = {name: trace[name].clone() for name in trace}
        noise = torch.randn(tensors["frames"].shape, generator=torch.Generator().manual_seed(3))
        tensors["frames"] += 2e-5 * tensors["frames"].norm() / noise.norm() * noise
        return Trace(tensors, trace.settings, trace.implementation, dtype=trace.dtype)

    def exact(trace: Trace) -> Trace:
        tensors = {name: trace[name].double() for name in trace}
        return Trace(tensors, trace.settings, trace.implementation, dtype="float64")

    port = rounded(clean)
    assert [stage.stage for stage in bench.diagnose(port, max_bugs=1).wrong] == ["decode"]
    assert bench.diagnose(port, candidate_truth=exact(clean)).verdict == "parity"
    broken = bench.candidate("decode_unscaled")
    found = bench.diagnose(rounded(broken), candidate_truth=exact(broken))
    assert found.bugs == ["decode_unscaled"], found.summary()
    with pytest.raises(SvdlabError, match="allowed: float64"):
        bench.diagnose(port, candidate_truth=clean)


def test_a_reference_of_another_checkpoint_is_refused(bench: Bench, tmp_path: Path) -> None:
    other = SVDPipeline.from_pretrained(write_random_checkpoint(tmp_path, seed=99))
    with pytest.raises(SvdlabError, match="is not what the checkpoint gives"):
        diagnose(bench.reference, bench.candidate("fps_not_decremented"), pipe=other)


def test_a_result_for_continuous_integration(bench: Bench) -> None:
    found = bench.diagnose(bench.candidate("fps_not_decremented", "stale_latents"))
    suite = ElementTree.fromstring(found.to_junit())
    failed = {case.get("name"): case[0].get("message") for case in suite if len(case) and case[0].tag == "failure"}
    assert set(failed) == {"time_ids", "model_input"} and suite.get("failures") == "2"
    assert failed["time_ids"] == "fps_not_decremented" and "no bug of the catalogue" in str(failed["model_input"])


def test_no_later_object_passes_for_one_of_a_kept_pass(bench_of: Callable[..., Bench]) -> None:
    """A module stands by the identities of what it holds: those of a pass that is kept must not be free for others."""

    class Held:
        pass

    made: list[weakref.ref[Held]] = []

    def edit(unet: Any) -> None:
        unet.conv_in.held = Held()
        made.append(weakref.ref(unet.conv_in.held))

    bench = bench_of("gelu_tanh", tapped=True)
    judge = ModuleJudge(StageJudge(bench.reference, bench.candidate("gelu_tanh"), bench.pipe), "unet")
    judge.judge()
    judge.ratios_with([Change(edit={"unet": edit})], exact=True)
    gc.collect()
    assert len(made) == 2 and all(ref() is not None for ref in made)
    judge.forget()
    gc.collect()
    assert all(ref() is None for ref in made)


def test_a_trace_that_leaves_nothing_to_confirm(bench_of: Callable[..., Bench]) -> None:
    """A network that is explained in part, and no tensor behind it: nothing is left to replay."""
    bench = bench_of("reflect_padding", tapped=True)
    whole = bench.candidate("gelu_tanh", "reflect_padding")
    kept = [name for name in whole if name.startswith(("unet.", "noise_pred_uncond.000", "noise_pred_cond.000"))]
    found = bench.diagnose(Trace({n: whole[n] for n in kept}, whole.settings, "port", dtype=whole.dtype))
    assert found.verdict == "partly" and found.bugs == ["gelu_tanh"], found.summary()
    assert json.loads(found.to_json(), parse_constant=pytest.fail)["bugs"] == ["gelu_tanh"]
