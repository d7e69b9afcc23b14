"""The verdict: parity where there is parity, and the first probe and module where something was planted."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from chart_lines import drawn
from click.testing import CliRunner
from planted import planted
from rich.console import Console

from svdlab.cli import parity as commands
from svdlab.errors import SvdlabError
from svdlab.notebook.charts import plot_divergence
from svdlab.parity.candidate import capture
from svdlab.parity.compare import Comparison, Coverage, bound, compare, resolution
from svdlab.parity.probes import SHAPES
from svdlab.parity.reference import capture_diffusers, cast_diffusers, load_diffusers
from svdlab.parity.three_way import three_way
from svdlab.parity.trace import Trace
from svdlab.parity.writer import versions_of_run
from svdlab.svd.images import to_unit
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=32, width=32, num_frames=3, num_inference_steps=2, seed=3)


class Run:
    """A reference, its truth, and the pipelines that made them."""

    def __init__(self, tiny: Path, photo: Any) -> None:
        self.folder = tiny
        self.pipe = load_diffusers(tiny)
        self.reference = capture_diffusers(self.pipe, photo, SETTINGS, taps=["*"])
        wide = load_diffusers(tiny, torch.float64, weights_dtype=torch.float32)
        self.truth = capture_diffusers(wide, replay=self.reference, taps=["*"])
        self.svdlab = capture(SVDPipeline.from_pretrained(tiny), photo, SETTINGS, taps=["*"])

    def planted(self, taps: str) -> Comparison:
        """The verdict on diffusers as it stands now."""
        candidate = capture_diffusers(self.pipe, replay=self.reference, preprocess=True, taps=[taps])
        return compare(self.reference, candidate, self.truth)


@pytest.fixture(scope="module")
def run(tiny: Path, photo: Any) -> Run:
    with torch.no_grad():
        return Run(tiny, photo)


def relabelled(trace: Trace, **digests: str) -> Trace:
    """The trace in memory with other digests."""
    known = {"digests": trace.digests | digests, "versions": trace.versions}
    return Trace(dict(trace), trace.settings, trace.implementation, dtype=trace.dtype, **known)


def altered(trace: Trace, settings: GenerationSettings | None = None, **changes: Any) -> Trace:
    """The trace in memory with tensors replaced (None: left out); ``__`` stands for a dot."""
    new = {k.replace("__", "."): v for k, v in changes.items()}
    held = {k: new.get(k, trace[k]) for k in (*trace, *(n for n in new if n not in trace)) if new.get(k, 0) is not None}
    return Trace(held, settings or trace.settings, trace.implementation, dtype=trace.dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_videos_per_prompt": 2, "num_inference_steps": 1},
        {"max_guidance_scale": 1.0, "noise_aug_strength": 0.0},
        {"sigmas": (80.0, 2.0, 0.3), "decode_chunk_size": 2},
        {"cfg": "sequential", "decode": "exact", "decode_chunk_size": 1, "height": 40},
        {"dtype": "float16", "fps": 24},
        {"dtype": "bfloat16", "motion_bucket_id": 3},
        {"dtype": "float64", "num_inference_steps": 1},
    ],
    ids=lambda c: ",".join(c) or "default",
)
def test_svdlab_is_at_parity(tiny: Path, photo: Any, changes: dict[str, Any]) -> None:
    comparison = three_way(tiny, photo, SETTINGS.replace(**changes))
    assert comparison.verdict == "parity", comparison.summary()
    assert comparison.floor_from == "truth" and not comparison.missing and not comparison.extra
    assert {p.name for p in comparison.probes} == set(comparison.traces["reference"].probes)
    assert comparison["frames"].psnr is None or comparison["frames"].psnr > 20


def test_two_images_are_at_parity(tiny: Path, photo: Any, tmp_path: Path) -> None:
    """They have a path of their own through diffusers' repeats."""
    pictures = [photo.resize((240, 300)), photo.rotate(180).resize((240, 300))]
    comparison = three_way(tiny, pictures, SETTINGS, folder=tmp_path / "traces")
    assert comparison.verdict == "parity", comparison.summary()
    names = sorted(p.name for p in (tmp_path / "traces").iterdir())
    assert names == ["reference.safetensors", "svdlab.safetensors", "truth.safetensors"]
    again = compare(*(Trace.open(tmp_path / "traces" / f"{n}.safetensors") for n in ("reference", "svdlab", "truth")))
    assert again.probes == comparison.probes


def test_every_tap_is_at_parity(run: Run) -> None:
    comparison = compare(run.reference, run.svdlab, run.truth)
    assert comparison.verdict == "parity" and comparison.first_module is None
    assert len(comparison.modules) == len(run.reference.taps) > 600
    worst = max(comparison.modules, key=lambda m: m.ratio)
    assert worst.ratio < 4, worst


@contextmanager
def hooked(module: torch.nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda m, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "probe"),
    [
        ("image_encoder.vision_model.encoder.layers.1.mlp.fc1", "image_embeddings"),
        ("vae.encoder.down_blocks.1.resnets.0.conv2", "image_latents"),
        ("unet.add_embedding", "noise_pred_uncond.000"),
        ("unet.down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_v", "noise_pred_uncond.000"),
        ("unet.up_blocks.0.resnets.1.temporal_res_block.conv1", "noise_pred_uncond.000"),
        ("unet.conv_out", "noise_pred_uncond.000"),
        ("vae.decoder.mid_block.attentions.0.to_q", "frames"),
        ("vae.decoder.time_conv_out", "frames"),
    ],
)
def test_a_planted_module_is_located(run: Run, name: str, probe: str) -> None:
    root, path = name.split(".", 1)
    with hooked(getattr(run.pipe, root).get_submodule(path), lambda output: output * 1.02):
        comparison = run.planted(f"{root}.*")
    assert comparison.first_divergence == probe
    found = comparison.first_module or ""
    assert found.removesuffix(".000") == name, comparison.summary()


def test_a_planted_probe_is_located(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = run.pipe
    with planted(pipe, "fps_not_decremented"):
        comparison = run.planted("unet.up_blocks.*")
    assert comparison.first_divergence == "added_time_ids" and comparison.verdict == "divergence"
    assert comparison.first_module is None, "a module that was given something else is not at fault"

    with monkeypatch.context() as patch:
        patch.setattr(pipe.feature_extractor, "image_mean", [0.5, 0.5, 0.5])
        comparison = run.planted("unet.up_blocks.*")
    assert comparison.first_divergence == "input.clip_pixels"

    with monkeypatch.context() as patch:
        draw = pipe.scheduler.scale_model_input
        patch.setattr(pipe.scheduler, "scale_model_input", lambda x, t: draw(x, t) * 1.0001)
        comparison = run.planted("unet.up_blocks.*")
    assert comparison.first_divergence == "model_input.000"


def test_the_numbers_are_the_definitions(run: Run) -> None:
    generator = torch.Generator().manual_seed(1)
    frames = run.reference["frames"] + 0.01 * torch.randn(run.reference["frames"].shape, generator=generator)
    comparison = compare(run.reference, altered(run.reference, frames=frames), run.truth)
    result = comparison["frames"]
    assert comparison.first_divergence == "frames"
    r, c, t = run.reference["frames"].double(), frames.double(), run.truth["frames"].double()
    assert result.divergence == pytest.approx(float((c - t).norm() / t.norm()), rel=1e-9)
    assert result.floor == pytest.approx(max(float((r - t).norm() / t.norm()), 2**-23), rel=1e-9)
    assert result.ratio == pytest.approx(result.divergence / result.floor)
    assert result.max_abs == pytest.approx(float((c - r).abs().max()))
    assert result.mse == pytest.approx(float((c - r).square().mean()))
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(r.flatten(), c.flatten(), dim=0)))
    shown = [to_unit(x) for x in (r, c)]
    assert comparison.passes_mse_bar, "an MSE of 1e-4 on the frames meets the usual threshold, and is no parity"
    assert result.psnr == pytest.approx(-10 * math.log10(float((shown[0] - shown[1]).square().mean())))
    same = compare(run.reference, run.reference, run.truth)
    assert same["frames"].psnr is None and same.worst.ratio <= 1 and same.verdict == "parity"


def test_large_tensors_are_compared_in_blocks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(run.reference, run.svdlab, run.truth)["frames"]
    monkeypatch.setattr("svdlab.parity.compare.BLOCK", 1000)
    parts = compare(run.reference, run.svdlab, run.truth)["frames"]
    assert parts.divergence == pytest.approx(whole.divergence) and parts.max_abs == whole.max_abs
    assert (parts.floor, parts.mse, parts.cosine) == pytest.approx((whole.floor, whole.mse, whole.cosine))


def test_a_zero_reference_is_measured_absolutely(run: Run) -> None:
    zero = torch.zeros_like(run.reference["image_embeddings"])
    reference, truth = (altered(t, image_embeddings=zero) for t in (run.reference, run.truth))
    result = compare(reference, altered(reference, image_embeddings=zero + 0.5), truth)
    assert result["image_embeddings"].divergence == pytest.approx(0.5)
    assert result["image_embeddings"].zero_reference and result["image_embeddings"].cosine is None
    assert result.first_divergence == "image_embeddings"
    assert json.loads(result.to_json())["probes"]
    assert compare(reference, reference, truth)["image_embeddings"].ratio == 0


def test_a_partial_trace_compares_on_what_it_has(run: Run) -> None:
    keep = ("sigmas", "latents.000", "latents.001")
    few = Trace({name: run.svdlab[name] for name in keep}, SETTINGS, "port")
    comparison = compare(run.reference, few, run.truth)
    assert comparison.verdict == "parity" and [p.name for p in comparison.probes] == list(keep)
    assert "frames" in comparison.missing and "latents.000" not in comparison.missing
    assert f"{len(comparison.missing)} probes missing" in comparison.summary()
    assert comparison.coverage.judged == ["sigmas", "latents"] and not comparison.coverage.complete
    assert len(comparison.coverage.missing) == 15 and "frames" in comparison.coverage.missing
    assert comparison.summary().startswith("parity on 2 of 17 kinds of probe (partial: missing input.source, ")
    assert "parity:" not in comparison.summary() and comparison.summary() in comparison._repr_html_()
    data = comparison.to_dict()
    assert data["verdict"] == "parity" and data["summary"] == comparison.summary()
    assert data["coverage"] == asdict(comparison.coverage)
    one_step_less = compare(run.reference, altered(run.svdlab, noise_pred__001=None), run.truth)
    assert not one_step_less.coverage.missing and not one_step_less.coverage.complete
    assert one_step_less.summary().startswith("parity on 17 of 17 kinds of probe (partial: missing noise_pred.001): ")
    whole = compare(run.reference, run.svdlab, run.truth)
    assert whole.coverage == Coverage(list(SHAPES), [], True) and whole.summary().startswith("parity: worst")
    back = compare(few, run.reference)
    assert "frames" in back.extra and not back.missing
    none = Trace({"unet.conv_in.000": run.svdlab["unet.conv_in.000"]}, SETTINGS, "port")
    with pytest.raises(SvdlabError, match="no probe in common"):
        compare(run.reference, none, run.truth)


def test_a_probe_that_the_truth_lacks_falls_back_to_the_bound(run: Run) -> None:
    truth = altered(run.truth, frames=None)
    comparison = compare(run.reference, run.svdlab, truth)
    assert comparison["frames"].floor_from == "bound" and comparison["latents.001"].floor_from == "truth"
    assert comparison["frames"].floor == bound("frames", "float32")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fps", 8),
        ("max_guidance_scale", 2.0),
        ("noise_aug_strength", 0.1),
        ("motion_bucket_id", 1),
        ("num_videos_per_prompt", 2),
        ("decode_chunk_size", 2),
        ("num_inference_steps", 3),
        ("sigmas", (3.0, 1.0, 0.0)),
    ],
)
def test_other_settings_are_refused(run: Run, field: str, value: Any) -> None:
    held = {"added_time_ids": run.reference["added_time_ids"]}
    other = Trace(held, SETTINGS.replace(**{field: value}), "port")
    with pytest.raises(
        SvdlabError, match=rf"port float32 \(in memory\): settings: {field} is .*, allowed: .*as in diffusers"
    ):
        compare(run.reference, other)


def test_settings_that_mean_the_same_are_accepted(run: Run) -> None:
    held = {"added_time_ids": run.reference["added_time_ids"]}
    for changes in (
        {"seed": 9},
        {"cfg": "sequential"},
        {"decode": "exact", "decode_chunk_size": 1},
        {"decode_chunk_size": 3},
    ):
        compare(run.reference, Trace(held, SETTINGS.replace(**changes), "port"))


def test_bad_traces_are_one_line(run: Run) -> None:
    with pytest.raises(
        SvdlabError,
        match=r"^diffusers float32 \(in memory\): dtype float32, allowed as truth for float32: float64$",
    ):
        compare(run.reference, run.svdlab, run.reference)
    bad = altered(run.reference, frames=run.reference["frames"] * float("nan"))
    message = r"^diffusers float32 \(in memory\): frames: 9216 of 9216 values are NaN or infinite$"
    for arguments in ((bad, run.svdlab, run.truth), (run.reference, run.svdlab, None)):
        with pytest.raises(SvdlabError, match=message):
            compare(*arguments, perturbed=None if arguments[2] else bad)
    wide = altered(run.truth, frames=run.truth["frames"] * float("inf"))
    with pytest.raises(SvdlabError, match=r"^diffusers float64 \(in memory\): frames: 9216 of 9216 values are NaN"):
        compare(run.reference, run.svdlab, wide)
    two = {"added_time_ids": torch.ones(2, 3)}
    with pytest.raises(SvdlabError, match=r"added_time_ids: shape \(2, 3\), allowed: \(1, 3\), as in diffusers"):
        compare(run.reference, Trace(two, SETTINGS, "port"))


def test_optional_probes_are_judged_where_both_traces_have_them(run: Run, photo: Any) -> None:
    reference = capture_diffusers(run.pipe, photo, SETTINGS, optional=True)
    wide = load_diffusers(run.folder, torch.float64, weights_dtype=torch.float32)
    truth = capture_diffusers(wide, replay=reference, optional=True)
    pipe = SVDPipeline.from_pretrained(run.folder)
    candidate = capture(pipe, photo, SETTINGS, optional=True)
    assert {n for n in reference if n not in run.reference} == {
        "latents.init",
        "denoised.000",
        "denoised.001",
        "frames_8bit",
    }
    sigmas = reference["sigmas"]
    torch.testing.assert_close(reference["latents.init"], reference["input.latents"] * (sigmas[0] ** 2 + 1).sqrt())
    torch.testing.assert_close(reference["denoised.001"], reference["latents.001"])  # the last sigma is zero
    shown = (to_unit(reference["frames"]) * 255).round()
    assert torch.equal(reference["frames_8bit"], shown) and shown.max() > 1
    equal = altered(truth, frames_8bit=reference["frames_8bit"])  # no value of the reference rounds otherwise
    # One that does is still rounding then. How many of svdlab's own do depends on the processor: 26 of 9216 with AVX2.
    one = reference["frames_8bit"].clone()
    one.view(-1)[0] += 1
    assert compare(reference, altered(reference, frames_8bit=one), equal).verdict == "parity"
    for second in ({"truth": truth}, {}):
        result = compare(reference, candidate, **second)
        assert result.verdict == "parity" and result.coverage.complete, result.summary()
        assert {"latents.init", "frames_8bit"} <= {p.name for p in result.probes} and not result.missing
        flipped = candidate["frames_8bit"].clone()
        flipped.view(-1)[0] += 1
        assert compare(reference, altered(candidate, frames_8bit=flipped), **second).verdict == "parity"
        wrong = altered(candidate, frames_8bit=candidate["frames_8bit"] + 1)
        assert compare(reference, wrong, **second).first_divergence == "frames_8bit"
    unscaled = capture(pipe.with_bugs("init_noise_unscaled"), photo, SETTINGS, optional=True)
    assert compare(reference, unscaled, truth).first_divergence == "latents.init"
    assert compare(reference, run.svdlab, truth).coverage.complete


def overflowed(trace: Trace, *names: str) -> Trace:
    """The trace in memory with infinity for the first value and NaN for the second of some tensors."""
    held = {name: trace[name].clone() for name in trace}
    for name in names:
        held[name].view(-1)[0], held[name].view(-1)[1] = float("inf"), float("nan")
    return Trace(held, trace.settings, "port", dtype="float16")


def test_a_candidate_that_overflows_is_located(run: Run) -> None:
    """The first of them, how many, and how near the reference is to what the candidate's dtype holds."""
    few = altered(run.svdlab, **{name.replace(".", "__"): None for name in run.svdlab.taps})
    bad = overflowed(few, "noise_pred_cond.001", "latents.001", "frames")
    result = compare(run.reference, bad, run.truth)
    assert result.verdict == "divergence" and not result.passes_mse_bar
    assert result.first_divergence == result.first_non_finite == "noise_pred_cond.001"
    assert result["noise_pred_cond.001"].non_finite == 2 and result["noise_pred_uncond.001"].non_finite == 0
    assert result["frames"].ratio == math.inf
    largest = run.reference["noise_pred_cond.001"].abs().max()
    count = run.reference["noise_pred_cond.001"].numel()
    assert (
        f"NaN or infinity first at noise_pred_cond.001, 2 of {count} values, the 18 tensors compared before it are "
        f"finite; the reference's largest |value| there is {largest:.5g}, float16 holds 65504" in result.summary()
    )
    data = json.loads(result.to_json(), parse_constant=pytest.fail)
    at = {p["name"]: p for p in data["probes"]}
    assert data["first_non_finite"] == "noise_pred_cond.001" and data["frames_mse"] is None
    assert (at["frames"]["ratio"], at["frames"]["psnr"], at["frames"]["non_finite"]) == (None, None, 2)
    assert "inf" in result._repr_html_()
    whole = compare(run.reference, few, run.truth)
    assert drawn(plot_divergence(whole, result, "overflow").spec)["overflow"]["frames"] is None, "a gap in the line"
    assert result["frames"].floor == whole["frames"].floor
    assert whole.first_non_finite is None and whole.to_dict()["first_non_finite"] is None
    assert "the first tensor compared" in compare(run.reference, overflowed(few, "input.source"), run.truth).summary()


def test_an_overflow_in_a_module_is_located_there(run: Run) -> None:
    tap = "unet.mid_block.resnets.0.temporal_res_block.conv1.000"
    result = compare(run.reference, overflowed(run.svdlab, tap, "noise_pred_uncond.000"), run.truth)
    assert result.first_non_finite == result.first_module == tap


def test_commands_take_an_overflow(run: Run, tmp_path: Path) -> None:
    r, c, js = (tmp_path / name for name in ("r.safetensors", "c.safetensors", "c.json"))
    run.reference.save(r)
    overflowed(run.svdlab, "latents.000").save(c)
    assert invoke("compare", r, c, "--json", js) == 1
    assert json.loads(js.read_text(), parse_constant=pytest.fail)["first_non_finite"] == "latents.000"
    assert invoke("diagnose", r, c, "--model", run.folder) in (1, 2), "a verdict or a line, and no traceback"
    assert invoke("compare", c, r) == 2


def off(trace: Trace) -> Trace:
    """Every tensor but the inputs five percent off."""
    return altered(trace, **{n: trace[n] * 1.05 for n in trace.probes if not n.startswith("input.")})


def test_exchanged_arguments_are_refused(run: Run) -> None:
    """A wrong candidate in the reference's place would widen every floor to its own divergence."""
    wrong = off(run.reference)
    assert compare(run.reference, wrong, run.truth).verdict == "divergence"
    with pytest.raises(SvdlabError, match=r"image_embeddings is 0.05 away .* reference and candidate exchanged"):
        compare(wrong, run.reference, run.truth)
    with pytest.raises(SvdlabError, match="implementation 'diffusers', allowed: 'svdlab'"):
        compare(run.svdlab, run.reference, run.truth)
    assert compare(wrong, run.reference).verdict == "divergence"


def test_a_truth_of_another_seed_is_refused(run: Run, photo: Any) -> None:
    wide = load_diffusers(run.folder, torch.float64, weights_dtype=torch.float32)
    other = capture_diffusers(wide, photo, SETTINGS.replace(seed=4))
    for reference in (run.reference, altered(run.reference, input__noise=None)):
        with pytest.raises(SvdlabError, match=r"input\.(noise|latents) is not that of .*--inputs"):
            compare(reference, off(run.reference), other)
    reference, other = (altered(t, input__noise=None, input__latents=None) for t in (run.reference, other))
    with pytest.raises(SvdlabError, match="allowed: at most"):
        compare(reference, off(reference), other)


def test_a_truth_of_another_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    wide = load_diffusers(write_random_checkpoint(tmp_path, seed=9), torch.float64, weights_dtype=torch.float32)
    with pytest.raises(SvdlabError, match="another checkpoint"):
        compare(run.reference, off(run.reference), capture_diffusers(wide, replay=run.reference))


def test_a_rerun_of_another_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    pipe = load_diffusers(write_random_checkpoint(tmp_path, seed=9))
    with pytest.raises(SvdlabError, match="another checkpoint"):
        compare(run.reference, off(run.reference), perturbed=capture_diffusers(pipe, replay=run.reference, perturb=0))


@pytest.mark.parametrize("field", ["checkpoint", "inputs"])
def test_a_floor_of_other_digests_is_refused(run: Run, field: str) -> None:
    """Whatever the values say: a truth of almost the same weights widens floors by less than is noticed."""
    ours, other = "0a" * 32, "0b" * 32
    reference = relabelled(run.reference, **{field: ours})
    same, wrong = (relabelled(run.truth, **{field: digest}) for digest in (ours, other))
    assert compare(reference, run.svdlab, same).verdict == "parity"
    assert compare(reference, relabelled(run.svdlab, **{field: other}), same).verdict == "parity"
    message = rf"^diffusers float64 .*: digests: {field} is 0b0b.*, allowed: 0a0a.*, as in diffusers float32"
    with pytest.raises(SvdlabError, match=message):
        compare(reference, run.svdlab, wrong)
    moved = relabelled(run.reference, **{field: other})
    with pytest.raises(SvdlabError, match=rf"digests: {field} is 0b0b"):
        compare(reference, run.svdlab, perturbed=moved)
    compare(reference, run.svdlab, altered(run.truth))  # without digests the other checks stand alone


def test_values_whose_squares_overflow_are_no_parity(run: Run) -> None:
    huge = altered(run.reference, latents__001=run.reference["latents.001"].double() * 1e200)
    with pytest.raises(SvdlabError, match=r"latents\.001: values too large"):
        compare(run.reference, huge, run.truth)


def test_without_a_truth_the_floor_says_what_it_is(run: Run) -> None:
    bare = compare(run.reference, run.svdlab)
    assert bare.verdict == "parity" and bare.floor_from == "bound" and "bound from the dtype" in bare.floor_text()
    moved = capture_diffusers(run.pipe, replay=run.reference, perturb=0)
    rerun = compare(run.reference, run.svdlab, perturbed=moved)
    assert rerun.verdict == "parity" and rerun.floor_from == "perturbed" and "last place" in rerun.floor_text()
    with hooked(run.pipe.unet.conv_in, lambda output: output * 1.01):
        candidate = capture_diffusers(run.pipe, replay=run.reference)
    for arguments in ({}, {"perturbed": moved}):
        assert compare(run.reference, candidate, **arguments).first_divergence == "noise_pred_uncond.000"


@pytest.mark.parametrize(("dtype", "seed"), [("float32", 1), ("float32", 2), ("float16", 1), ("bfloat16", 1)])
def test_the_bound_and_the_perturbation_stand_for_the_truth(tiny: Path, photo: Any, dtype: str, seed: int) -> None:
    """Both stand-ins cover the measured floor within the verdict's factor."""
    settings = SETTINGS.replace(dtype=dtype, seed=seed, num_inference_steps=2 * seed)
    pipe = load_diffusers(tiny, settings.torch_dtype)
    reference = capture_diffusers(pipe, photo, settings)
    moved = capture_diffusers(pipe, replay=reference, perturb=seed)
    truth = capture_diffusers(cast_diffusers(pipe, torch.float64), replay=reference)
    by_truth = compare(reference, reference, truth)
    by_rerun = compare(reference, reference, perturbed=moved)
    for probe in by_truth.probes:
        assert probe.floor <= 4 * bound(probe.name, dtype), probe
        assert probe.floor <= 4 * by_rerun[probe.name].floor, probe
        assert (
            by_rerun[probe.name].floor <= 8 * max(probe.floor, resolution(dtype)) or probe.name == "input.clip_pixels"
        )


def test_json_holds_the_contract(run: Run) -> None:
    data = json.loads(compare(run.reference, run.svdlab, run.truth).to_json())
    assert data["verdict"] == "parity" and data["first_divergence"] is None
    assert set(data["probes"][0]) >= {"name", "divergence", "floor", "ratio", "max_abs", "mse"}
    assert [p["name"] for p in data["probes"]] == list(run.reference.probes)
    assert data["versions"] == dict.fromkeys(("compare", "reference", "candidate", "truth"), versions_of_run())
    assert data["digests"]["truth"] == data["digests"]["reference"] == run.reference.digests != {}


def test_tables_and_plots(run: Run) -> None:
    few = {name: run.svdlab[name] for name in run.svdlab.probes}
    bad = few | {"latents.001": few["latents.001"] + 1}
    comparison = compare(run.reference, Trace(bad, SETTINGS, "<port>"), run.truth)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison)
    text = console.export_text()
    assert "latents.001" in text and "divergence: first at latents.001" in text and "against the truth" in text
    page = comparison._repr_html_()
    assert "&lt;port&gt;" in page and "<port>" not in page and "http" not in page
    assert page.count("<rect") == len(comparison.probes)
    styles = {row[0].text: {cell.style for cell in row} for row in comparison.table(every=True).rows}
    assert styles["latents.001"] == {"bad"} and styles["latents.000"] == {""}
    long = compare(run.reference, run.svdlab, run.truth)
    rows = long.table().rows
    assert ["..."] in rows and len(rows) < 48 < len(long.table(every=True).rows)
    lines = drawn(plot_divergence(long, comparison, "latents shifted").spec)
    at = {line: points["latents.001"] for line, points in lines.items()}
    assert at["latents shifted"] > at["parity tolerance: 4 x floor"] > at["svdlab float32"]


def invoke(command: str, *arguments: object) -> int:
    """A command's exit code; bad input is an SvdlabError, which the command line turns into exit code 2."""
    result = CliRunner().invoke(getattr(commands, command), [str(a) for a in arguments])
    if isinstance(result.exception, SvdlabError):
        assert "\n" not in str(result.exception)
        return 2
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code


SMALL = ("--height", 32, "--width", 32, "--num-frames", 2, "--num-inference-steps", 1)


def test_commands(tiny: Path, photo: Any, tmp_path: Path) -> None:
    """Trace, truth, replay, comparison: the page's workflow, with its exit codes and JSON."""
    photo.save(tmp_path / "photo.png")
    r, t, c, bad, out = (tmp_path / f"{n}.safetensors" for n in ("r", "t", "c", "bad", "out"))
    model, js = ("--model", tiny), tmp_path / "result.json"
    image = ("--image", tmp_path / "photo.png")
    assert (
        invoke(
            "trace",
            "--implementation",
            "diffusers",
            "--out",
            r,
            *SMALL,
            *model,
            *image,
            "--dtype",
            "bfloat16",
        )
        == 0
    )
    assert (
        invoke("trace", "--implementation", "diffusers", "--out", t, "--inputs", r, "--dtype", "float64", *model) == 0
    )
    assert invoke("trace", "--implementation", "svdlab", "--out", c, "--inputs", r, "--json", js, *model) == 0
    assert json.loads(js.read_text())["probes"] == list(Trace.open(r).probes)
    assert Trace.open(t).dtype == "float64" and Trace.open(c).settings == Trace.open(r).settings
    assert invoke("compare", r, c, "--truth", t, "--json", js) == 0
    assert json.loads(js.read_text())["verdict"] == "parity"
    assert invoke("compare", r, c, "--rerun", *model) == 0
    assert invoke("compare", r, c, "--rerun") == 2, "the embedded checkpoint is not that of the reference"
    # Weights that no tensor shows to be others.
    shutil.copytree(tiny, tmp_path / "almost")
    weights = tmp_path / "almost" / "unet" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-4] ^= 1
    weights.write_bytes(raw)
    almost = ("--model", tmp_path / "almost")
    assert invoke("compare", r, c, "--rerun", *almost) == 2
    inputs = ("--implementation", "diffusers", "--out", bad, "--inputs", r, "--dtype", "float64")
    assert invoke("trace", *inputs, *almost) == 0
    assert invoke("compare", r, c, "--truth", bad) == 2
    assert invoke("compare", r, c) == 0

    altered(Trace.open(c), sigmas=Trace.open(c)["sigmas"] * 1.1).save(bad)
    assert invoke("compare", r, bad, "--truth", t, "--json", js) == 1
    assert json.loads(js.read_text())["first_divergence"] == "sigmas"

    other = ("--implementation", "svdlab", "--out", out, *model)
    assert invoke("trace", *other, "--inputs", r, "--fps", 8, "--until", "added_time_ids") == 0
    assert invoke("compare", r, out) == 2
    assert invoke("compare", r, js) == 2
    assert invoke("compare", r, c, "--truth", t, "--rerun") == 2
    assert invoke("trace", *other, *image, "--inputs", r) == 2
    assert invoke("trace", *other, "--image", js) == 2
    assert invoke("trace", *other, *image, "--fps", 0) == 2
    assert invoke("trace", *other, *image, "--sigmas", "9,x") == 2
    assert invoke("trace", *other, *image, "--taps", "nothing") == 2


def test_parity_command(tiny: Path, tmp_path: Path) -> None:
    js = tmp_path / "result.json"
    assert (
        invoke(
            "parity",
            "--model",
            tiny,
            *SMALL,
            "--until",
            "latents.000",
            "--json",
            js,
            "--keep",
            tmp_path / "t",
        )
        == 0
    )
    data = json.loads(js.read_text())
    assert data["verdict"] == "parity" and data["probes"][-1]["name"] == "latents.000"
    assert data["truth"] == str(tmp_path / "t" / "truth.safetensors")
