"""Another library's scheduler in svdlab: diffusers' frames under it, and verdicts that say what they do not judge."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import AysSchedules
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from svdlab.errors import SvdlabError
from svdlab.parity.candidate import capture
from svdlab.parity.compare import THRESHOLD, Comparison, compare
from svdlab.parity.diagnose import diagnose
from svdlab.parity.reference import capture_diffusers, load_diffusers
from svdlab.parity.stages import StageJudge
from svdlab.svd.checkpoint import SVD_SCHEDULER
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.sampler import EulerScheduler, align_your_steps
from svdlab.svd.schedulers import RULES, label
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=32, width=40, num_frames=2, num_inference_steps=3, seed=4)
CALL: dict[str, Any] = dict(height=32, width=40, num_frames=2, num_inference_steps=3, output_type="pt")
V = dict(prediction_type="v_prediction")


class ConsistencyScheduler:
    """Of the kind that AnimateLCM's checkpoint for SVD comes with: fewer levels, and noise anew in every step."""

    order = 1
    init_noise_sigma = (700.0**2 + 1) ** 0.5
    config: dict[str, Any] = {}

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.sigmas = torch.tensor([*np.geomspace(700, 0.1, num_inference_steps), 0.0], dtype=torch.float32)
        self.timesteps = (0.25 * self.sigmas[:-1].log()).to(device)
        self.at = 0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample / (self.sigmas[self.at] ** 2 + 1) ** 0.5

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        sigma, then = self.sigmas[self.at : self.at + 2]
        self.at += 1
        denoised = sample / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5
        noise = randn_tensor(sample.shape, device=sample.device, dtype=sample.dtype)
        return SimpleNamespace(prev_sample=denoised + then * noise)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler, exponential": lambda: EulerDiscreteScheduler.from_config(
        {**SVD_SCHEDULER, "use_karras_sigmas": False, "use_exponential_sigmas": True}
    ),
    "dpm++ 2m karras": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True, **V),
    "unipc": lambda: UniPCMultistepScheduler(**V),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**V),
    "lcm, without sigmas": lambda: LCMScheduler(**V),
    "animatelcm's kind": ConsistencyScheduler,
}


@pytest.fixture(scope="module")
def small(photo: Image.Image) -> Image.Image:
    return photo.resize((64, 48))


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    pipe = load_diffusers(tiny)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def exact(tiny: Path) -> Any:
    return load_diffusers(tiny, torch.float64)


@pytest.fixture(scope="module")
def own(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny, compat="diffusers")


def with_scheduler(pipe: SVDPipeline, scheduler: Any) -> SVDPipeline:
    return SVDPipeline(**{**pipe.components, "scheduler": scheduler}, compat=pipe.compat)


def judged(reference: Any, exact: Any, own: SVDPipeline, image: Any, settings: Any, scheduler: Any) -> Comparison:
    """diffusers, diffusers in float64 and svdlab, each with its own copy of a scheduler."""
    reference.scheduler, exact.scheduler = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    theirs = capture_diffusers(reference, image, settings)
    truth = capture_diffusers(exact, replay=theirs)
    return compare(theirs, capture(with_scheduler(own, scheduler), image, settings), truth)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_parity_with_diffusers_under_the_same_scheduler(
    reference: Any, exact: Any, own: SVDPipeline, small: Image.Image, name: str
) -> None:
    """Every probe, latents and frames among them, against diffusers in float64, also where the steps draw noise."""
    result = judged(reference, exact, own, small, SETTINGS, SCHEDULERS[name]())
    assert result.verdict == "parity" and result.worst.ratio <= THRESHOLD, result.summary()
    assert {"sigmas", "timesteps", "latents.002", "frames"} <= {p.name for p in result.probes} and not result.missing
    assert result["frames"].floor < 1e-3, "a truth with other draws would let everything pass"
    assert {trace.scheduler for trace in result.traces.values()} == {label(SCHEDULERS[name]())}


@pytest.mark.parametrize("name", ["dpm++ 2m karras", "euler ancestral"])
def test_a_call_is_diffusers_call(reference: Any, own: SVDPipeline, small: Image.Image, name: str) -> None:
    """Assigned, as users do; with draws from torch's own generator; and once more, from the start."""
    own = with_scheduler(own, own.scheduler)
    reference.scheduler = own.scheduler = scheduler = SCHEDULERS[name]()
    assert own.scheduler is scheduler and own.components["scheduler"] is scheduler
    for seed in (0, 1):
        made = []
        for pipe in (reference, own):
            torch.manual_seed(seed)
            made.append(pipe(small, generator=torch.Generator().manual_seed(seed), **CALL).frames)
        torch.testing.assert_close(made[1], made[0], atol=2e-4, rtol=0)
    other = with_scheduler(own, EulerScheduler.from_config(SVD_SCHEDULER))
    frames = other(small, generator=torch.Generator().manual_seed(1), progress=False, **CALL).frames
    assert (frames - made[0]).abs().max() > 1e-2, "the scheduler would change nothing"


def test_a_step_that_runs_the_network_twice(reference: Any, own: SVDPipeline, small: Image.Image) -> None:
    reference.scheduler = HeunDiscreteScheduler(**V)
    pipe = with_scheduler(own, HeunDiscreteScheduler(**V))
    made = [p(small, generator=torch.Generator().manual_seed(0), **CALL).frames for p in (reference, pipe)]
    torch.testing.assert_close(made[1], made[0], atol=2e-4, rtol=0)
    assert pipe.num_timesteps == reference.num_timesteps == 5
    message = "scheduler: HeunDiscreteScheduler runs the UNet 5 times in 3 steps, allowed in a trace: once a step"
    for record in (lambda: capture(pipe, small, SETTINGS), lambda: capture_diffusers(reference, small, SETTINGS)):
        with pytest.raises(SvdlabError, match=message):
            record()


def test_clips_of_settings_repeat_and_leave_torchs_generator_as_it_was(own: SVDPipeline, small: Image.Image) -> None:
    pipe = with_scheduler(own, SCHEDULERS["euler ancestral"]())
    before = torch.get_rng_state()
    first, second = (pipe.generate(small, SETTINGS, progress=False)[0].frames for _ in range(2))
    assert np.array_equal(first, second) and torch.equal(before, torch.get_rng_state())
    assert not np.array_equal(first, pipe.generate(small, SETTINGS.replace(seed=5), progress=False)[0].frames)


def test_two_threads_do_not_share_steps(own: SVDPipeline, small: Image.Image) -> None:
    pipe, made = with_scheduler(own, SCHEDULERS["unipc"]()), []
    alone = pipe(small, generator=torch.Generator().manual_seed(0), progress=False, **CALL).frames

    def run() -> None:
        made.append(pipe(small, generator=torch.Generator().manual_seed(0), progress=False, **CALL).frames)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and all(torch.equal(frames, alone) for frames in made)


# --- named and explicit sigmas ---


def test_align_your_steps_as_published() -> None:
    published = AysSchedules["StableDiffusionVideoSigmas"]
    np.testing.assert_array_equal(np.float32(align_your_steps(10)), np.float32(published))
    np.testing.assert_allclose(align_your_steps(20)[::2], published, rtol=1e-12)
    assert align_your_steps(1) == [pytest.approx(700), 0.0]
    between = np.log(align_your_steps(20)[1])
    assert between == pytest.approx((np.log(published[0]) + np.log(published[1])) / 2)


@pytest.mark.parametrize("discrete", [False, True], ids=["svd's euler", "another euler"])
def test_a_named_schedule_is_diffusers_with_those_sigmas(
    reference: Any, exact: Any, own: SVDPipeline, small: Image.Image, discrete: bool
) -> None:
    scheduler = EulerDiscreteScheduler(**V) if discrete else EulerDiscreteScheduler.from_config(SVD_SCHEDULER)
    result = judged(reference, exact, own, small, SETTINGS.replace(schedule="ays"), scheduler)
    assert result.verdict == "parity", result.summary()
    assert torch.equal(result.traces["candidate"]["sigmas"], torch.tensor(align_your_steps(3)))


def test_a_named_schedule_is_its_sigmas(own: SVDPipeline, small: Image.Image) -> None:
    named = {**CALL, "num_inference_steps": 10, "output_type": "latent", "progress": False}
    named = [{**named, "schedule": "ays"}, {**named, "sigmas": AysSchedules["StableDiffusionVideoSigmas"]}]
    made = [own(small, generator=torch.Generator().manual_seed(0), **options).frames for options in named]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("scheduler", "change", "message"),
    [
        (
            "dpm++ 2m karras",
            dict(sigmas=(9.0, 1.0, 0.0)),
            "sigmas: DPMSolverMultistepScheduler has noise levels of its",
        ),
        ("dpm++ 2m karras", dict(schedule="ays"), "schedule: DPMSolverMultistepScheduler has noise levels of its own"),
    ],
)
def test_sigmas_that_a_scheduler_does_not_take(
    own: SVDPipeline, reference: Any, small: Image.Image, scheduler: str, change: dict[str, Any], message: str
) -> None:
    reference.scheduler = SCHEDULERS[scheduler]()
    pipe, settings = with_scheduler(own, SCHEDULERS[scheduler]()), SETTINGS.replace(**change)
    for run in (
        lambda: pipe.generate(small, settings, progress=False),
        lambda: capture(pipe, small, settings),
        lambda: capture_diffusers(reference, small, settings),
    ):
        with pytest.raises(SvdlabError, match=message):
            run()


def test_two_schedules_are_refused() -> None:
    with pytest.raises(SvdlabError, match="schedule: got ays beside sigmas, allowed: one of the two"):
        GenerationSettings(schedule="ays", sigmas=(1.0, 0.0))
    with pytest.raises(SvdlabError, match="schedule: got 'linear', allowed: karras, ays"):
        GenerationSettings(schedule="linear")


# --- what cannot be, and what is not judged ---


def test_a_changed_rule_beside_a_scheduler_that_brings_its_own_is_refused(own: SVDPipeline, small: Image.Image) -> None:
    pipe = with_scheduler(own, SCHEDULERS["unipc"]())
    for changed in (pipe.with_bugs("timestep_unscaled"), pipe.with_stage(timesteps=lambda sigmas: sigmas[:-1])):
        with pytest.raises(SvdlabError, match="timesteps: changed, allowed with UniPCMultistepScheduler"):
            changed.generate(small, SETTINGS, progress=False)
    frames = pipe.with_bugs("fps_not_decremented")(small, progress=False, **CALL).frames
    assert frames.isfinite().all()


def test_it_is_not_saved_as_what_it_is_not(own: SVDPipeline, tmp_path: Path) -> None:
    pipe = with_scheduler(own, SCHEDULERS["unipc"]())
    with pytest.raises(SvdlabError, match=r"scheduler: got UniPCMultistepScheduler\(prediction_type='v_prediction'\)"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class Unrepeatable(ConsistencyScheduler):
    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        self.at += 1
        return SimpleNamespace(prev_sample=sample + torch.randn_like(sample))


def test_draws_that_no_run_repeats_are_refused_in_a_trace(own: SVDPipeline, small: Image.Image) -> None:
    pipe = with_scheduler(own, Unrepeatable())
    with (
        torch.random.fork_rng(),
        pytest.raises(SvdlabError, match="scheduler: Unrepeatable draws random numbers that a trace cannot repeat"),
    ):
        capture(pipe, small, SETTINGS)


def test_traces_of_two_schedulers_are_not_compared(own: SVDPipeline, small: Image.Image, tmp_path: Path) -> None:
    one = capture(own, small, SETTINGS)
    other = capture(with_scheduler(own, SCHEDULERS["unipc"]()), small, SETTINGS, path=tmp_path / "unipc.safetensors")
    assert other.scheduler == label(SCHEDULERS["unipc"]()) and one.scheduler == label(own.scheduler)
    with pytest.raises(SvdlabError, match="unipc.safetensors: scheduler: UniPC.*, allowed: EulerDisc"):
        compare(one, other)


def test_a_diagnosis_says_which_rules_it_does_not_judge(own: SVDPipeline, reference: Any, small: Image.Image) -> None:
    """svdlab's Euler is not what a trace of another sampler is measured by; all else is judged, and named."""
    reference.scheduler = scheduler = SCHEDULERS["dpm++ 2m karras"]()
    theirs = capture_diffusers(reference, small, SETTINGS, optional=True)
    pipe = with_scheduler(own, scheduler)
    port = capture(pipe.with_bugs("fps_not_decremented"), replay=theirs, optional=True)
    found = diagnose(theirs, port, pipe=own)
    status = {stage.stage: stage.status for stage in found.stages}
    assert {name for name in status if status[name] == "not_covered"} == set(RULES)
    assert {name for name in status if status[name] == "wrong"} == {"time_ids"} and status["predict_noise"] == "right"
    assert f"(the scheduler is {theirs.scheduler})" in found.summary()
    assert (found.verdict, found.bugs) == ("explained", ["fps_not_decremented"])
    recorded = [theirs.versions, found.to_dict()["versions"], *found.comparison.to_dict()["versions"].values()]
    assert {versions["diffusers"] for versions in recorded} == {version("diffusers")}
    # Given the scheduler, svdlab's pipeline still has no rule of its own.
    assert StageJudge(theirs, port, pipe).uncovered == set(RULES)
    assert not StageJudge(theirs, port, pipe).work.stages("frames") & set(RULES)
