"""Approximations leave out what they say and nothing else, and what they cost is measured against what is exact."""

from __future__ import annotations

import functools
import itertools
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderTiny, DDIMScheduler
from matplotlib.text import Text
from safetensors.torch import load_file, save_file

from svdlab import GenerationSettings, SVDPipeline
from svdlab.bench import frontier as measuring
from svdlab.bench.frontier import EXACT, Row, Variant, frontier, frontier_table, make_call, psnr, ssim, to_json
from svdlab.cli.frontier import frontier as command
from svdlab.errors import SvdlabError
from svdlab.notebook.figures import plot_frontier
from svdlab.parity.reference import SMALL_DECODER, small_decoder
from svdlab.samples import sample_photo
from svdlab.svd import approximations
from svdlab.svd.approximations import APPROXIMATIONS, approximated, outermost_level
from svdlab.svd.checkpoint import checkpoint_path
from svdlab.svd.sampler import EulerScheduler
from svdlab.training.data import sample_image, sample_scene

SETTINGS = GenerationSettings(height=32, width=40, num_frames=3, num_inference_steps=4)


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny)


def run(pipe: SVDPipeline, settings: GenerationSettings = SETTINGS) -> tuple[torch.Tensor, list[int]]:
    """The latents, and how many videos each pass of the whole UNet held."""
    inputs = pipe.prepare(sample_photo(), settings, torch.Generator().manual_seed(0))
    passes: list[int] = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    try:
        return pipe.denoise(inputs, settings), passes
    finally:
        handle.remove()


@pytest.mark.parametrize("cfg", ["batched", "sequential"])
def test_deep_features_serve_two_steps(pipe: SVDPipeline, cfg: str) -> None:
    settings = SETTINGS.replace(cfg=cfg)
    exact, every = run(pipe, settings)
    found, passes = run(approximated(pipe, "deep_features"), settings)
    assert len(passes) == len(every) / 2 and not torch.allclose(found, exact, rtol=1e-2)
    assert not approximations._deep._kept, "nothing is kept of a generation that has ended"
    assert run(pipe, settings)[0].equal(exact), "the pipeline that was given is as it was"


def test_the_outermost_level_on_the_features_of_the_same_pass_is_the_whole(pipe: SVDPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    unet, configs = pipe.unet, pipe.configs
    sample = torch.randn(2, 3, configs.unet.in_channels, 4, 5, generator=generator)
    embeddings = torch.randn(2, 1, configs.image_encoder.projection_dim, generator=generator)
    features: list[torch.Tensor] = []
    handle = unet.up_blocks[-2].register_forward_hook(lambda module, args, out: features.append(out))
    with torch.no_grad():
        conditioning = unet.condition(embeddings, torch.tensor([[6.0, 127.0, 0.02]] * 2), 3)
        whole = unet(sample, torch.tensor(0.5), conditioning)
        handle.remove()
        torch.testing.assert_close(
            outermost_level(unet, sample, torch.tensor(0.5), conditioning, features[0]), whole, rtol=0, atol=0
        )


def test_guidance_in_an_interval_leaves_out_half_of_a_pass(pipe: SVDPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, every = run(pipe)
    monkeypatch.setattr(approximations, "GUIDED", (0.0, math.inf))
    found, passes = run(approximated(pipe, "guidance_interval"))
    assert found.equal(exact) and passes == every == [2] * 4
    sigmas = pipe.sigmas(SETTINGS)
    monkeypatch.setattr(approximations, "GUIDED", (float(sigmas[2]) * 0.9, float(sigmas[1]) * 1.1))
    found, passes = run(approximated(pipe, "guidance_interval"))
    assert passes == [1, 2, 2, 1] and not found.equal(exact)
    monkeypatch.setattr(approximations, "GUIDED", (0.0, 0.0))
    unguided, _ = run(pipe, SETTINGS.replace(max_guidance_scale=1.0))
    torch.testing.assert_close(run(approximated(pipe, "guidance_interval"))[0], unguided, rtol=1e-4, atol=1e-4)


def test_a_scheduler_whose_timesteps_are_no_sigmas_is_refused(pipe: SVDPipeline) -> None:
    fast = approximated(pipe, "guidance_interval")
    fast.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(SvdlabError, match="guidance_interval: got DDIMScheduler, allowed: SVD's Euler"):
        run(fast)
    assert isinstance(pipe.scheduler, EulerScheduler)


def test_both_at_once_in_any_order(pipe: SVDPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximations, "GUIDED", (0.0, 0.0))
    found, passes = run(approximated(pipe, "guidance_interval", "deep_features"))
    assert passes == [1, 1], "the conditional half, every second step"
    assert run(approximated(pipe, "deep_features", "guidance_interval"))[0].equal(found)


def test_a_name_that_is_none(pipe: SVDPipeline) -> None:
    with pytest.raises(SvdlabError, match="approximation: got 'deepcache', allowed: deep_features, guidance_interval"):
        approximated(pipe, "deepcache")
    assert all("arXiv" in one.source for one in APPROXIMATIONS.values())


def test_how_frames_are_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(2, 3, 32, 32, generator=generator) * 1.6 - 0.8
    assert psnr(frames, frames) == math.inf and ssim(frames, frames) == pytest.approx(1)
    assert psnr(frames + 0.02, frames) == pytest.approx(40, abs=0.01), "a hundredth of the range"
    assert psnr(frames * 3, (frames * 3).clamp(-1, 1)) == math.inf, "what is outside of the range is not shown"
    noise = torch.randn(frames.shape, generator=generator)
    likeness = [ssim(frames + scale * noise, frames) for scale in (0.0, 0.05, 0.2, 1.0)]
    assert likeness == sorted(likeness, reverse=True) and likeness[-1] < 0.5
    # A constant image of the same structure: the luminance term alone.
    x, y = torch.full((1, 3, 16, 16), -0.6), torch.full((1, 3, 16, 16), 0.2)
    assert ssim(x, y) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), rel=1e-6)


@pytest.mark.slow
def test_the_frontier(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CONVERGED_STEPS", 8)
    variants = (
        EXACT,
        Variant("2 steps", {"num_inference_steps": 2}),
        Variant("DPM++ 2M", solver="dpm_solver"),
        Variant("deep features", approximations=("deep_features",)),
        Variant("bfloat16", {"dtype": "bfloat16"}),
    )
    given = SETTINGS.model_dump(include={"height", "width", "num_frames", "num_inference_steps"})
    clips: dict[str, torch.Tensor] = {}
    rows = frontier(str(tiny), images=2, pairs=2, settings=given, variants=variants, progress=False, clips=clips)
    exact, *others = rows
    assert [row.name for row in rows] == [variant.name for variant in variants]
    assert (exact.psnr, exact.speedup, exact.speedup_range) == (math.inf, 1, (1, 1)) and exact.noise_ratio <= 4
    assert exact.ssim == pytest.approx(1)
    assert all(row.noise_ratio > 100 and row.psnr < 90 and row.ssim < 1 for row in others)
    assert all(row.seconds > 0 and row.from_converged > 0 and row.motion_error is None for row in rows)
    written = to_json(rows, "cpu", 2)
    assert written["rows"][0]["psnr"] is None and written["rows"][1]["psnr"] == others[0].psnr
    page = runpy.run_path(str(Path(__file__).parent.parent / "docs/make_performance.py"))["frontier_text"](written)
    assert page.endswith(frontier_table(rows).to_markdown()) and "2 first frames" in page and "2 steps" in page
    assert "Noise ratio" in plot_frontier(rows).alt
    pipe = SVDPipeline.from_pretrained(tiny, compat="diffusers")
    settings = pipe.resolve(GenerationSettings(**given))
    inputs = pipe.prepare(sample_image(0), settings, torch.Generator().manual_seed(0))
    assert list(clips) == [row.name for row in rows], "of the first image"
    assert torch.equal(clips["2 steps"], make_call(pipe, settings, variants[1])(inputs))


def test_what_is_slow_is_not_run_again_to_be_timed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = list[str]()

    def in_turns(calls: Any, pairs: int, *_: Any) -> dict[str, tuple[float, ...]]:
        timed.extend(calls)
        return {name: (1e-6,) * pairs for name in calls}

    monkeypatch.setattr(measuring, "CONVERGED_STEPS", 2)
    monkeypatch.setattr(measuring, "in_turns", in_turns)
    given = SETTINGS.model_dump(include={"height", "width", "num_frames"}) | {"num_inference_steps": 1}
    for limit, names in ((1e9, ["exact", "2 steps"]), (0, ["exact"])):
        monkeypatch.setattr(measuring, "_SLOW", limit)
        variants = (EXACT, Variant("2 steps", {"num_inference_steps": 2}))
        _, row = frontier(str(tiny), images=1, pairs=2, settings=given, variants=variants, progress=False)
        assert timed == names and (row.seconds > 1e-6) == (row.speedup < 1) == (limit == 0)
        timed.clear()


def test_no_name_lies_on_another() -> None:
    """Fourteen ways, some of them neighbours."""
    at = [(2.34, 4.7e4), (2.37, 9.5e3), (2.03, 2.3e5), (1.31, 3.2e4), (1.72, 1.6e4), (1.86, 3.2e4), (1.9, 3.0e4)]
    at += [(2.04, 9.5e3), (0.23, 580), (2.45, 1.6e4), (1.08, 3.7e4), (3.3, 2.1e5), (3.04, 3.0e4), (1.0, 0.6)]
    rows = [Row(f"way number {i}", 1, x, (x, x), y, 50, 1, 1, None) for i, (x, y) in enumerate(at)]
    plot = plot_frontier(rows)
    plot.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in plot.axes[0].texts]
    assert len(boxes) == len(rows)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


@pytest.fixture
def small(tiny: Path, tmp_path: Path) -> Path:
    """An untrained small decoder for the tiny checkpoint's latents."""
    levels = len(SVDPipeline.from_pretrained(tiny).vae.config.block_out_channels)
    widths = {f"{part}_block_out_channels": (8,) * levels for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1,) * levels for part in ("encoder", "decoder")}
    AutoencoderTiny(**widths, **blocks).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_small_decoder_takes_the_vaes_place(tiny: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CONVERGED_STEPS", 2)
    given = SETTINGS.model_dump(include={"height", "width", "num_frames"}) | {"num_inference_steps": 1}
    variants, clips = (EXACT, Variant("small decoder", decoder="small")), dict[str, torch.Tensor]()
    measure: Any = functools.partial(
        frontier, str(tiny), images=1, pairs=1, settings=given, variants=variants, progress=False
    )
    assert [row.name for row in measure()] == ["exact"], "the checkpoint has none of its own"
    _, row = measure(decoder=str(small), clips=clips)
    assert row.noise_ratio > 1000 and row.psnr < 40, "it was not trained"
    pipe = SVDPipeline.from_pretrained(tiny, compat="diffusers")
    settings = pipe.resolve(GenerationSettings(**given))
    inputs = pipe.prepare(sample_image(0), settings, torch.Generator().manual_seed(0))
    latents = pipe.denoise(inputs, settings)
    (theirs,) = [AutoencoderTiny.from_pretrained(small).decode(video).sample for video in latents]
    torch.testing.assert_close(clips["small decoder"][0], theirs, rtol=1e-4, atol=1e-5)


def test_what_is_no_small_decoder(tiny: Path, small: Path, tmp_path: Path) -> None:
    vae = SVDPipeline.from_pretrained(tiny).vae.config
    with pytest.raises(SvdlabError, match="small decoder: .*nowhere: not an AutoencoderTiny of diffusers: "):
        small_decoder(tmp_path / "nowhere", vae)
    with pytest.raises(SvdlabError, match="small decoder: .*vae: not an AutoencoderTiny of diffusers: "):
        small_decoder(tiny / "vae", vae)
    weights = small / "diffusion_pytorch_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if name != "decoder.layers.0.weight"}
    with pytest.raises(SvdlabError, match=r"got \(latent channels, pixels per latent\) .*, allowed: \(4, 16\)"):
        small_decoder(small, vae.replace(block_out_channels=(32,) * 5, down_block_types=("DownEncoderBlock2D",) * 5))
    save_file(kept, weights)
    with pytest.raises(SvdlabError, match="small decoder: .*: its file lacks decoder.layers.0.weight"):
        small_decoder(small, vae)


def test_a_variant_that_there_is_not() -> None:
    with pytest.raises(SvdlabError, match="solver: got 'dpm', allowed: euler, dpm_solver"):
        Variant("fast", solver="dpm")
    with pytest.raises(SvdlabError, match="decoder: got 'tiny', allowed: vae, small"):
        Variant("fast", decoder="tiny")


def test_the_embedded_checkpoints_small_decoder_rebuilds_what_its_vae_does() -> None:
    pipe = SVDPipeline.from_pretrained()
    decode = small_decoder(checkpoint_path("embedded") / SMALL_DECODER, pipe.vae.config)
    settings = pipe.resolve(GenerationSettings(num_inference_steps=1))
    for index in range(4):
        truth = torch.from_numpy(sample_scene(index).clip(8, 7, 127)).permute(0, 3, 1, 2).float() * 2 - 1
        latents = pipe.vae.encode(truth).latent_dist.mode() * pipe.vae.config.scaling_factor
        assert psnr(decode(latents[None], settings)[0], truth) > 25


def test_what_is_not_exact_is_no_measure(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = SVDPipeline.from_pretrained(tiny, compat="diffusers").with_bugs("fps_not_decremented")
    monkeypatch.setattr(measuring.SVDPipeline, "from_pretrained", lambda *_, **__: wrong)
    given = SETTINGS.model_dump(include={"height", "width", "num_frames"}) | {"num_inference_steps": 1}
    with pytest.raises(SvdlabError, match="the exact clip's noise ratio is .*, allowed: at most 4"):
        frontier(str(tiny), images=1, settings=given, variants=(EXACT,), progress=False)


def test_bad_input_before_any_work() -> None:
    with pytest.raises(SvdlabError, match="--plot: got 'x.gif', allowed: .png, .svg, .pdf"):
        CliRunner().invoke(command, ["--plot", "x.gif"], catch_exceptions=False)
