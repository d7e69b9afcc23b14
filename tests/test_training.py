"""Training: every phase learns, resumes where it was interrupted, and ends in a checkpoint that diffusers loads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save
from torch import nn

from svdlab.cli.training import train_tiny
from svdlab.errors import SvdlabError
from svdlab.parity.reference import SMALL_DECODER, load_diffusers, small_decoder
from svdlab.svd import VAE, VAEConfig
from svdlab.svd.kernels import plain
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import TINY_VAE
from svdlab.svd.sampler import scalings
from svdlab.svd.settings import GenerationSettings
from svdlab.training import autoencoder, denoiser, evaluate
from svdlab.training.data import HELD_OUT, sample_image, sample_scene
from svdlab.training.fit import Muon, Phase, fit
from svdlab.training.recipe import Recipe, Schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("smoke")
    arguments = ["--smoke", "--out", str(folder / "out"), "--json", str(folder / "r.json")]
    result = CliRunner().invoke(train_tiny, arguments)
    assert result.exit_code == 0, result.output
    return folder / "out", json.loads((folder / "r.json").read_text())["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["image_encoder", "vae_crops", "small_decoder", "unet"])
def test_a_smoke_run_lowers_the_loss(smoke: tuple[Path, dict[str, list[float]]], phase: str) -> None:
    losses = smoke[1][phase]
    assert np.mean(losses[-8:]) < 0.95 * np.mean(losses[:4])


@pytest.mark.slow
def test_the_checkpoint_is_one_for_both(smoke: tuple[Path, dict[str, list[float]]]) -> None:
    folder = smoke[0]
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 20e6
    ours, theirs = SVDPipeline.from_pretrained(folder), load_diffusers(folder)
    theirs.set_progress_bar_config(disable=True)
    options = dict(height=64, width=64, num_frames=8, num_inference_steps=2)
    image = sample_image()
    mine = ours(image, output_type="np", progress=False, generator=torch.Generator().manual_seed(1), **options).frames
    other = theirs(image, output_type="np", generator=torch.Generator().manual_seed(1), **options).frames
    np.testing.assert_allclose(mine, other, atol=2e-3)
    frames = small_decoder(folder / SMALL_DECODER, ours.vae.config)(torch.randn(1, 2, 4, 8, 8), GenerationSettings())
    assert frames.shape == (1, 2, 3, 64, 64)
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert (config["sigma_min"], config["sigma_max"], config["prediction_type"]) == (0.002, 700.0, "v_prediction")
    networks = plain(ours.vae), plain(ours.image_encoder)
    latents = denoiser.encode_pool(Recipe().smoke(), *networks, CPU)[0].latents
    assert float(latents.std()) == pytest.approx(1, abs=0.05), "the scaling factor is that of these latents"


def line(steps: int, learning_rate: float = 0.1) -> Phase:
    """Fit y = 2 x: a matrix, which Muon trains, and a bias, which AdamW does."""

    def loss(call: object, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(64, 32, generator=generator)
        return (call(x) - 2 * x).square().mean()  # type: ignore[operator]

    torch.manual_seed(0)
    return Phase("line", nn.Linear(32, 32), loss, Schedule(steps, 16, learning_rate, ema_decay=0.9, warmup=5), "f")


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdlab.training.fit.SAVE_EVERY", 10)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = line(40)
    losses = fit(whole, tmp_path / "whole", 0, CPU)
    assert losses[-1] < 0.05 * losses[0]
    cut, steps = line(40), iter(range(40))
    inner = cut.loss

    def interrupted(call: object, generator: torch.Generator) -> torch.Tensor:
        if next(steps) == 25:
            raise KeyboardInterrupt
        return inner(call, generator)  # type: ignore[arg-type]

    cut.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        fit(cut, tmp_path / "cut", 0, CPU)
    again = line(40)
    assert len(fit(again, tmp_path / "cut", 0, CPU)) == 20, "from the last saved step"
    assert torch.equal(again.network.weight, whole.network.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (32, 8, 3, 3)])
def test_muon_steps_along_an_orthogonal_matrix(shape: tuple[int, ...]) -> None:
    """Whatever the gradient's singular values: the step's are all about the same, and as large as AdamW's."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = (torch.randn(shape).flatten(1) * torch.logspace(0, -1, int(np.prod(shape[1:])))).view(shape)
    optimizer = Muon([weight])
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    scale = 0.01 * 0.2 * max(weight.flatten(1).shape) ** 0.5
    values = torch.linalg.svdvals(weight.detach().flatten(1)) / scale
    assert 0.5 < float(values.min()) and float(values.max()) < 1.4
    assert float((weight.detach() * weight.grad).sum()) < 0


def test_files_of_another_recipe_are_refused(tmp_path: Path) -> None:
    fit(line(3), tmp_path, 0, CPU)
    with pytest.raises(SvdlabError, match=r"line\.safetensors: made by another recipe"):
        fit(replace(line(3), fingerprint="other"), tmp_path, 0, CPU)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    fit(line(3), tmp_path, 0, CPU)
    path = tmp_path / "line.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    progress = '{"step": 3, "fingerprint": "f"}'
    for data, message in (
        (whole[:-4], "line.safetensors: not a readable safetensors file"),
        (b"", "line.safetensors: not a readable safetensors file"),
        (save(tensors), "line.safetensors: progress: step is missing"),
        (save(tensors, {"progress": "[" * 100}), "line.safetensors: progress: JSON nested deeper"),
        (save(tensors, {"progress": progress.replace("3", "-3")}), "progress: step: got -3, allowed: greater"),
        (save({}, {"progress": progress}), "line.safetensors: holds other weights than line's"),
    ):
        path.write_bytes(data)
        with pytest.raises(SvdlabError) as error:
            fit(line(3), tmp_path, 0, CPU)
        assert message in str(error.value)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    with pytest.raises(SvdlabError, match="the loss of step 0 is nan"):
        fit(replace(line(3), loss=lambda call, _: call(torch.full((1, 32), float("nan"))).mean()), tmp_path, 0, CPU)


def test_the_loss_is_zero_at_the_right_v() -> None:
    """The v that the loss asks for is the one that the sampler reads back to the clean latents."""
    recipe = replace(Recipe().smoke(), drop_both=0.0, drop_embedding=0.0, drop_latents=0.0)
    clean = torch.randn(3, 8, 4, 2, 2)
    pool = denoiser.Pool(
        clean,
        torch.randn(3, 1, 4, 2, 2),
        torch.full((3, 1), 0.1),
        torch.randn(3, 1, 5),
        torch.ones(3, 2),
        torch.ones(3, 8, 1, 2, 2),
        torch.zeros(1, 8, 4, 2, 2),
    )
    seen = {}

    def call(sample: torch.Tensor, timesteps: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sigma = (4 * timesteps).exp().view(-1, 1, 1, 1, 1)
        noisy = sample[:, :, :4] * (sigma**2 + 1) ** 0.5
        row = [int((clean - n).abs().flatten(1).mean(1).argmin()) for n in noisy]
        v = (clean[row] - noisy / (sigma**2 + 1)) * (-((sigma**2 + 1) ** 0.5) / sigma)
        seen["denoised"] = scalings(sigma).c_skip * noisy + scalings(sigma).c_out * v - clean[row]
        return v

    recipe = replace(recipe, sigma=(-3.0, 0.5), sigma_uniform=0.0)
    assert float(denoiser.loss(recipe, pool)(call, torch.Generator().manual_seed(0))) < 1e-6
    assert float(seen["denoised"].abs().max()) < 1e-4


def test_conditions_are_dropped_as_often_as_the_recipe_says() -> None:
    recipe = replace(Recipe(), unet=replace(Recipe().unet, batch=4000))
    pool = denoiser.Pool(
        torch.ones(1, 1, 4, 1, 1),
        torch.ones(1, 1, 4, 1, 1),
        torch.ones(1, 1),
        torch.ones(1, 1, 2),
        torch.ones(1, 2),
        torch.ones(1, 1, 1, 1, 1),
        torch.full((1, 1, 4, 1, 1), 1e6),
    )
    kept = {}

    def call(sample: torch.Tensor, _: torch.Tensor, embeddings: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        kept["latents"], kept["embedding"] = sample[:, 0, 4, 0, 0] != 0, embeddings[:, 0, 0] != 0
        kept["faded"] = sample[:, 0, 0, 0, 0] > 1e3
        return sample[:, :, :4]

    denoiser.loss(recipe, pool)(call, torch.Generator().manual_seed(0))
    latents, embedding = kept["latents"], kept["embedding"]
    assert float((~latents & ~embedding).float().mean()) == pytest.approx(recipe.drop_both, abs=0.02)
    assert torch.equal(kept["faded"], ~latents & ~embedding), "without both, a clip is learnt that fades"
    assert float((latents & ~embedding).float().mean()) == pytest.approx(recipe.drop_embedding, abs=0.02)
    assert float((~latents & embedding).float().mean()) == pytest.approx(recipe.drop_latents, abs=0.02)


def test_rare_displacements_are_drawn_as_often_as_others() -> None:
    recipe = replace(Recipe(), unet=replace(Recipe().unet, batch=4000))
    motion = torch.tensor([[6.0, 20.0]] * 95 + [[6.0, 255.0]] * 5)
    one = torch.ones(100, 1, 4, 1, 1)
    pool = denoiser.Pool(one, one, one[:, :, 0, 0, 0], one[..., 0, 0], motion, one[:, :, :1], one[:1])
    drawn = {}

    def call(sample: torch.Tensor, _: torch.Tensor, embeddings: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        drawn["fast"] = (ids[:, 1] == 255) & (embeddings[:, 0, 0] != 0)
        drawn["seen"] = embeddings[:, 0, 0] != 0
        return sample[:, :, :4]

    denoiser.loss(recipe, pool)(call, torch.Generator().manual_seed(0))
    assert float(drawn["fast"].sum() / drawn["seen"].sum()) == pytest.approx(0.5, abs=0.03)


def test_disturbed_latents_teach_the_temporal_branches_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = autoencoder.initialise_(VAE(VAEConfig(**TINY_VAE)))
    frames = torch.rand(1, 3, 3, 16, 16) * 2 - 1

    def loss(call: object, generator: torch.Generator) -> torch.Tensor:
        rebuilt, *_ = call(frames, torch.randn(1, 3, 4, 2, 2, generator=generator))  # type: ignore[operator]
        return (rebuilt - frames).square().mean()

    before = {name: value.clone() for name, value in vae.state_dict().items()}
    schedule = Schedule(2, 1, 1e-3, ema_decay=0.5, warmup=1)
    fit(Phase("steady", autoencoder.TemporalDecoder(vae, 0.1), loss, schedule, "f"), tmp_path, 0, CPU)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    temporal = {name for name in before if re.search("temporal_res_block|time_mixer|time_conv_out", name)}
    assert changed and changed <= temporal
    assert {name.rpartition(".")[0] for name in changed} >= {"decoder.time_conv_out"}
    assert any("temporal_res_block" in name for name in changed)


def test_training_never_draws_what_is_held_out() -> None:
    frames, _ = autoencoder.draw(torch.Generator().manual_seed(0), Recipe(), 8, 64)
    assert frames.shape == (8, 3, 64, 64) and HELD_OUT > 2**31


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    result = CliRunner().invoke(train_tiny, ["--smoke", "--out", str(tmp_path)])
    assert "exists, allowed: a new folder" in str(result.exception)


def test_figures_of_a_perfect_model_pass_and_of_a_still_one_do_not() -> None:
    """The bars themselves, on clips made by the truth instead of a model."""

    class Truth(evaluate.Sampler):
        def __init__(self) -> None:
            self.scenes, self.num_frames = [sample_scene(i) for i in range(8)], 8

    sample = Truth()

    def clips(fps: float, bucket: float = 127) -> np.ndarray:
        return np.stack([s.clip(8, fps, bucket) for s in sample.scenes])

    forward = {fps: sample.forward(clips(fps)) for fps in (7, 14, 28)}
    by_bucket = {b: sample.forward(clips(7, b)) for b in (20, 127, 255)}
    still = {b: 0 * d for b, d in by_bucket.items()}
    pale = np.stack([s.clip(8, 7, 127, fade=0.2) for s in sample.scenes])
    for figure in (
        evaluate.displacement_ratio("", forward[7], forward[28], 4),
        evaluate.displacement_error(forward, by_bucket),
        evaluate.bucket_rank(by_bucket),
        evaluate.direction(sample, [clips(7), clips(28)]),
        evaluate.first_frame(sample, clips(7)),
        evaluate.guidance(clips(7), pale, clips(7.1)),
        evaluate.area(sample, clips(7)),
        evaluate.area(sample, pale),
        evaluate.fps_not_decremented(forward[7], forward[7] + 0.01, sample.forward(clips(8))),
    ):
        assert figure.passed, figure
    assert not evaluate.displacement_ratio("", forward[7], forward[14], 4).passed
    assert not evaluate.displacement_error(forward, still).passed
    assert not evaluate.bucket_rank({b: -d for b, d in by_bucket.items()}).passed
    assert not evaluate.direction(sample, [clips(7)[:, ::-1]]).passed
    assert not evaluate.first_frame(sample, clips(7)[:, ::-1]).passed
    assert not evaluate.guidance(clips(7), pale, clips(10)).passed
    assert not evaluate.area(sample, np.clip(1.4 * clips(7), 0, 1)).passed
    assert not evaluate.fps_not_decremented(forward[7], forward[7] + 0.01, sample.forward(clips(6))).passed
