"""Every bug of the catalogue changes the output from its first probe on, and leaves no trace in the pipeline."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from svdlab.errors import SvdlabError
from svdlab.parity.bugs import BUGS, check_bugs, first_probe
from svdlab.svd import images
from svdlab.svd.pipeline import Inputs, SVDPipeline
from svdlab.svd.settings import GenerationSettings
from svdlab.svd.stages import STAGE, STAGES, Change

SETTINGS = GenerationSettings(height=32, width=32, num_frames=3, num_inference_steps=3)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def clean(pipe: SVDPipeline, photo: Image.Image) -> Tensors:
    return _run(pipe, photo)


def _run(pipe: SVDPipeline, photo: Image.Image, settings: GenerationSettings = SETTINGS) -> Tensors:
    recorded: Tensors = {}
    inputs = pipe.prepare(photo, settings, torch.Generator().manual_seed(0))
    pipe.run(inputs, settings, probe=lambda name, value: recorded.setdefault(name, value.clone()))
    return recorded


def _equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# They do nothing in float32, without a third level, or to the tensors of a run.
ELSEWHERE = {("vae_not_upcast", 0), ("head_counts", 0), ("frames_truncated", 0)}
VARIANTS = [(name, i) for name, bug in BUGS.items() for i in range(len(bug.variants))]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_bug_shows_from_its_first_probe_to_the_frames(
    pipe: SVDPipeline, photo: Image.Image, clean: Tensors, name: str, variant: int
) -> None:
    bug = BUGS[name]
    if (name, variant) in ELSEWHERE:
        pytest.skip("tests/test_planted.py has what it takes")
    if name == "clips_repeated_after_guidance":
        twice = SETTINGS.replace(num_videos_per_prompt=2)
        runs = [_run(p, photo, twice) for p in (pipe, pipe.with_changes(bug.variants[variant]))]
        assert not torch.equal(runs[0]["frames"], runs[1]["frames"])
        return
    recorded = _run(pipe.with_changes(bug.variants[variant]), photo)
    different = [probe for probe in clean if not torch.equal(recorded[probe], clean[probe])]
    if name == "decode_chunked" and variant >= SETTINGS.num_frames:
        assert set(different) <= {"frames"}  # chunks of so many frames are the whole clip, to within rounding
        return
    assert different and different[-1] == "frames"
    if variant == 0:
        assert different[0] == bug.first_probe
    assert _equal(_run(pipe, photo), clean), "the bug left something behind"


def test_every_bug_says_where_it_comes_from() -> None:
    assert all(bug.name == name and bug.cause and ":" in bug.diffusers for name, bug in BUGS.items())
    assert all(stage in STAGE for bug in BUGS.values() for change in bug.variants for stage in change.wrap)


def test_nothing_is_left_behind_when_a_run_fails(pipe: SVDPipeline, clean: Tensors, photo: Image.Image) -> None:
    broken = pipe.with_bugs("alpha_swapped_unet", "sincos_order", "gelu_tanh", "alpha_swapped_vae")
    inputs = broken.prepare(photo, SETTINGS, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        broken.run(Inputs(None, inputs.image, inputs.clip_pixels, inputs.noise, inputs.latents[..., :2]), SETTINGS)
    assert _equal(_run(pipe, photo), clean)


def test_bugs_exclude_each_other_where_they_decide_the_same() -> None:
    with pytest.raises(SvdlabError, match="timestep_unscaled and timestep_negated exclude each other"):
        check_bugs("timestep_unscaled", "timestep_negated")
    with pytest.raises(SvdlabError, match="bugs: got 'nothing', allowed: .*fps_not_decremented"):
        check_bugs("nothing")
    check_bugs("alpha_swapped_unet", "gelu_tanh")


def test_the_order_in_which_bugs_are_named_does_not_matter(pipe: SVDPipeline, photo: Image.Image) -> None:
    names = ("time_ids_reordered", "fps_not_decremented", "noise_aug_after_encode", "image_latents_scaled")
    one, other = _run(pipe.with_bugs(*names), photo), _run(pipe.with_bugs(*reversed(names)), photo)
    assert _equal(one, other)
    assert one["added_time_ids"].tolist() == [[127.0, 7.0, pytest.approx(0.02)]]


def test_bugs_add_up_whether_injected_at_once_or_one_by_one(pipe: SVDPipeline, photo: Image.Image) -> None:
    """A wrapper of the first injection runs the networks that the second one has edited."""
    at_once = pipe.with_bugs("image_latents_scaled", "alpha_swapped_unet", "image_latents_sampled")
    one_by_one = pipe.with_bugs("image_latents_scaled").with_bugs("alpha_swapped_unet")
    one_by_one = one_by_one.with_bugs("image_latents_sampled")
    assert _equal(_run(at_once, photo), _run(one_by_one, photo))


def test_threads_with_different_bugs_and_one_with_none(pipe: SVDPipeline, photo: Image.Image, clean: Tensors) -> None:
    """They share every weight, at the same time; each gives the frames of its own bugs."""
    pipes = {
        "one": pipe.with_bugs("alpha_swapped_unet", "gelu_tanh", "group_norm_eps", "fps_not_decremented"),
        "other": pipe.with_bugs("transformer_alpha_swapped", "geglu_halves_exchanged", "guidance_swapped"),
        "clean": pipe,
    }
    wanted = {name: clean if of is pipe else _run(of, photo) for name, of in pipes.items()}
    results: dict[str, list[Tensors]] = {name: [] for name in pipes}

    def work(name: str) -> None:
        with torch.no_grad():  # grad mode belongs to a thread
            for _ in range(3):
                results[name].append(_run(pipes[name], photo))

    threads = [threading.Thread(target=work, args=(name,)) for name in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, found in results.items():
        assert len(found) == 3 and all(_equal(one, wanted[name]) for one in found), name
    frames = [wanted[name]["frames"] for name in pipes]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(frames, 2))


def test_half_precision_encodes_beside_another_thread(tiny: Path, photo: Image.Image) -> None:
    """The encoder runs in float32; the VAE that another thread decodes with stays in float16, and nothing is kept."""
    half = SVDPipeline.from_pretrained(tiny, dtype=torch.float16)
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []
    half.vae.encoder.conv_in.register_forward_hook(
        lambda module, *_: dtypes.append((module.weight.dtype, half.vae.encoder.conv_in.weight.dtype))
    )
    half.generate(photo, SETTINGS.replace(dtype="float16"), progress=False)
    assert dtypes == [(torch.float32, torch.float16)]
    assert all(layer.cache.empty for layer in half.vae.modules() if hasattr(layer, "cache"))


# --- a stage replaced by a function ---


def test_a_function_in_a_stage_s_place(pipe: SVDPipeline, photo: Image.Image, clean: Tensors) -> None:
    def time_ids(settings: GenerationSettings) -> torch.Tensor:
        return torch.tensor([[settings.fps - 2, settings.motion_bucket_id, settings.noise_aug_strength]])

    recorded = _run(pipe.with_stage(time_ids=time_ids), photo)
    assert recorded["added_time_ids"].tolist() == [[5.0, 127.0, pytest.approx(0.02)]]
    assert not torch.equal(recorded["frames"], clean["frames"]) and _equal(_run(pipe, photo), clean)


def test_the_fix_as_a_function_undoes_the_bug(pipe: SVDPipeline, photo: Image.Image, clean: Tensors) -> None:
    broken = pipe.with_stage(timesteps=lambda sigmas: -sigmas[:-1].log())
    assert _equal(_run(broken, photo), _run(pipe.with_bugs("timestep_negated"), photo))
    assert _equal(_run(broken.with_stage(timesteps=lambda sigmas: 0.25 * sigmas[:-1].log()), photo), clean)


def test_a_function_replaces_an_injected_bug(pipe: SVDPipeline, photo: Image.Image, clean: Tensors) -> None:
    """What a reader of a notebook does: the fix, written in a cell, on a port that has the bug and another one."""

    def fixed(settings: GenerationSettings) -> torch.Tensor:
        return torch.tensor([[settings.fps - 1, settings.motion_bucket_id, settings.noise_aug_strength]])

    broken = pipe.with_bugs("fps_not_decremented", "time_ids_reordered")
    assert _equal(_run(broken.with_stage(time_ids=fixed), photo), clean)
    both = pipe.with_bugs("fps_not_decremented", "timestep_negated").with_stage(time_ids=fixed)
    assert _equal(_run(both, photo), _run(pipe.with_bugs("timestep_negated"), photo))


def test_stages_keep_no_graph(pipe: SVDPipeline) -> None:
    """Called by hand, outside of ``no_grad``: the fast kernels run, in chunks where asked."""
    latents = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        assert torch.equal(pipe.decode(latents, SETTINGS), pipe.decode(latents.requires_grad_(), SETTINGS).detach())
        assert not pipe.decode(latents, SETTINGS).requires_grad


def test_a_wrapper_is_given_the_pipeline_and_the_stage(pipe: SVDPipeline, photo: Image.Image) -> None:
    def brighter(of: SVDPipeline, stage: object, latents: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
        assert of.vae is pipe.vae
        return stage(latents, settings) + 1  # type: ignore[operator]

    recorded = _run(pipe.with_changes(Change(wrap={"decode": brighter})), photo)
    torch.testing.assert_close(recorded["frames"], _run(pipe, photo)["frames"] + 1)


def test_unknown_stages_are_refused(pipe: SVDPipeline) -> None:
    with pytest.raises(SvdlabError, match="stage: got 'fps', allowed: resize_image, clip_pixels"):
        pipe.with_stage(fps=lambda settings: None)


def test_the_stages_are_the_pipeline_s_and_write_what_a_run_records(pipe: SVDPipeline, clean: Tensors) -> None:
    written = [name for stage in STAGES for name in stage.writes]
    recorded = list(dict.fromkeys(name.partition(".0")[0] for name in clean))
    assert [n for n in written if n in recorded] == [n for n in recorded if n in written], "the order of execution"
    assert set(recorded) - set(written) == {"input.source", "input.noise", "input.latents"}
    assert all(callable(getattr(pipe, stage.name)) for stage in STAGES)
    known = {"input.source", "input.noise", "input.latents"}
    for stage in STAGES:
        assert set(stage.reads) <= known | {"latents"}, f"{stage.name} reads what nothing before it writes"
        known |= set(stage.writes)


def test_where_a_stage_shows_first() -> None:
    assert first_probe("initial_latents") == "model_input.000"
    assert first_probe("condition") == "noise_pred_uncond.000"
    assert first_probe("decode") == "frames"


# --- the facts, in numbers ---


def test_the_antialiasing_resize_equals_diffusers() -> None:
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    for size in ((512, 600), (224, 224), (100, 300), (225, 1001)):
        image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        expected = _resize_with_antialiasing(image, (224, 224))
        torch.testing.assert_close(images.resize_with_antialiasing(image, 224), expected)


def test_what_the_model_is_told(pipe: SVDPipeline) -> None:
    """fps - 1 first, a quarter of ln(sigma), the ramp along frames."""
    assert pipe.time_ids(SETTINGS).tolist() == [[6, 127, pytest.approx(0.02)]]
    torch.testing.assert_close(pipe.timesteps(torch.tensor([700.0, 1.0, 0.0])), torch.tensor([1.637770, 0.0]))
    assert pipe.guidance_ramp(SETTINGS).tolist() == [1.0, 2.0, 3.0]
