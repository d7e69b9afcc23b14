"""The diffusers reference: observed, not changed; replayed exactly; restored however a capture ends."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pieces import in_pieces
from safetensors.torch import load_file, save_file

from svdlab.errors import SvdlabError
from svdlab.parity.candidate import capture
from svdlab.parity.digests import checkpoint_digest
from svdlab.parity.probes import INPUTS, SHAPES, STEP
from svdlab.parity.reference import capture_diffusers, cast_diffusers, load_diffusers
from svdlab.parity.trace import DTYPES, Trace
from svdlab.svd.images import to_unit
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=32, width=32, num_frames=3, num_inference_steps=2, seed=3)


@pytest.fixture(scope="module")
def diffusers(tiny: Path) -> Any:
    return load_diffusers(tiny)


@pytest.fixture(scope="module")
def reference(diffusers: Any, photo: Any) -> Trace:
    return capture_diffusers(diffusers, photo, SETTINGS)


def state(pipe: Any) -> tuple[Any, ...]:
    """Everything a capture touches."""
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module

    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks))
        for model in (pipe.unet, pipe.vae, pipe.image_encoder)
        for m in model.modules()
    ]
    attributes = {k: v for k, v in vars(pipe.video_processor).items() if callable(v)}
    bars = getattr(pipe, "_progress_bar_config", {}) or {}
    return module.randn_tensor, hooks, attributes, bars, pipe.vae.dtype, sorted(vars(pipe.scheduler))


def frames_of(pipe: Any, image: Any, settings: GenerationSettings) -> torch.Tensor:
    """diffusers called as anybody calls it."""
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        image,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        num_inference_steps=settings.num_inference_steps,
        generator=torch.Generator().manual_seed(settings.seed),
        output_type="pt",
    ).frames
    pipe.set_progress_bar_config()
    return result


def test_the_trace_is_what_diffusers_does(diffusers: Any, reference: Trace, photo: Any) -> None:
    frames = frames_of(diffusers, photo, SETTINGS)
    assert torch.equal(to_unit(reference["frames"]), frames)
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    assert torch.equal(reference["input.noise"], torch.randn(1, 3, 32, 32, generator=generator))
    assert torch.equal(reference["input.latents"], torch.randn(1, 3, 4, 4, 4, generator=generator))
    assert reference["added_time_ids"].tolist() == [pytest.approx([6, 127, 0.02])]
    assert reference["guidance_scale"].tolist() == [[1, 2, 3]]
    assert reference["sigmas"].tolist() == pytest.approx([700, 0.002, 0])
    assert list(reference.probes[: len(INPUTS)]) == list(INPUTS)
    once, steps = SHAPES.keys() - STEP.keys(), (f"{name}.{step:03d}" for name in STEP for step in range(2))
    assert set(reference) == {*once, *steps}


def digested(folder: Path, photo: Any, dtype: str, which: str, replay: Trace | None = None) -> Trace:
    """A trace of a folder's weights up to the draws, by either implementation."""
    settings = SETTINGS.replace(dtype=dtype)
    arguments: dict[str, Any] = {"until": "input.latents", "checkpoint": folder, "replay": replay}
    if which == "svdlab":
        return capture(SVDPipeline.from_pretrained(folder, dtype=DTYPES[dtype]), photo, settings, **arguments)
    return capture_diffusers(load_diffusers(folder, DTYPES[dtype]), photo, settings, **arguments)


def test_digests_are_of_the_weights_and_of_the_inputs(tiny: Path, photo: Any, tmp_path: Path) -> None:
    """The same for both implementations and every dtype; another for other weights, another image, another seed."""
    made = {(d, w): digested(tiny, photo, d, w) for d in ("float32", "bfloat16") for w in ("diffusers", "svdlab")}
    assert len({t.digests["checkpoint"] for t in made.values()}) == 1
    first = made["float32", "diffusers"]
    assert first.digests["inputs"] == made["float32", "svdlab"].digests["inputs"]
    truth = digested(tiny, None, "float64", "diffusers", first)
    assert truth.digests == first.digests and truth.versions == first.versions
    assert first.versions["torch"] == torch.__version__ and set(first.versions) == {"svdlab", "torch", "diffusers"}
    assert digested(tiny, photo.rotate(180), "float32", "svdlab").digests["inputs"] != first.digests["inputs"]
    assert digested(write_random_checkpoint(tmp_path / "w", seed=5), photo, "float32", "svdlab").digests == {
        "checkpoint": checkpoint_digest(tmp_path / "w"),
        "inputs": first.digests["inputs"],
    }
    assert checkpoint_digest(tmp_path / "w") != first.digests["checkpoint"]


def test_a_rerun_with_perturbed_inputs_has_the_inputs_of_what_it_reruns(diffusers: Any, reference: Trace) -> None:
    moved = capture_diffusers(diffusers, replay=reference, perturb=0, until="image_embeddings")
    assert not torch.equal(moved["input.latents"], reference["input.latents"])
    assert moved.digests == reference.digests and set(moved.digests) == {"inputs"}
    assert not capture_diffusers(diffusers, replay=reference, until="input.noise").digests


def test_the_digest_of_a_checkpoint_is_of_every_byte_and_not_of_the_files(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    shutil.copytree(tiny, folder)
    one = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(one)
    assert checkpoint_digest(folder) == checkpoint_digest(tiny)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, one.parent / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (one.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    one.unlink()
    assert checkpoint_digest(folder) == checkpoint_digest(tiny)
    raw = bytearray((one.parent / "b.safetensors").read_bytes())
    raw[-1] ^= 1
    (one.parent / "b.safetensors").write_bytes(raw)
    assert checkpoint_digest(folder) != checkpoint_digest(tiny)
    (one.parent / "b.safetensors").write_bytes(raw[:-1])
    with pytest.raises(SvdlabError, match=r"b\.safetensors: not a whole safetensors file"):
        checkpoint_digest(folder)


def test_guidance_and_the_model_input_are_as_the_probes_say(reference: Trace) -> None:
    scale = reference["guidance_scale"][:, :, None, None, None]
    uncond, cond = reference["noise_pred_uncond.001"], reference["noise_pred_cond.001"]
    assert torch.equal(reference["noise_pred.001"], uncond + scale * (cond - uncond))
    given = reference["model_input.000"]
    sigma = reference["sigmas"][0]
    assert torch.equal(given[1:, 0, 4:], reference["image_latents"])
    assert given[0, :, 4:].abs().max() == 0
    start = reference["input.latents"] * (sigma**2 + 1) ** 0.5 / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(given[:1, :, :4], start)


def test_a_capture_changes_nothing(diffusers: Any, reference: Trace, photo: Any, tmp_path: Path) -> None:
    before = state(diffusers)
    shared: dict[str, Any] = {"taps": ["*"], "path": tmp_path / "t.safetensors"}
    capture_diffusers(diffusers, photo, SETTINGS, **shared)
    capture_diffusers(diffusers, photo, SETTINGS, until="image_latents", perturb=0, **shared)
    assert state(diffusers) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_after_an_error(
    diffusers: Any,
    reference: Trace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    before = state(diffusers)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.scheduler, "step", fail)
        with pytest.raises(error):
            capture_diffusers(diffusers, replay=reference, path=tmp_path / "t.safetensors", taps=["*conv_in"])
    assert state(diffusers) == before
    assert not list(tmp_path.iterdir())


def test_a_replay_needs_no_seed_and_no_image(diffusers: Any, reference: Trace, tmp_path: Path) -> None:
    replay = reference.save(tmp_path / "t.safetensors")
    again = capture_diffusers(diffusers, settings=SETTINGS.replace(seed=99), replay=replay)
    redone = capture_diffusers(diffusers, replay=replay, preprocess=True)
    for name in reference:
        assert torch.equal(again[name], reference[name]), name
        assert torch.equal(redone[name], reference[name]), name


def test_a_port_need_not_record_the_source(diffusers: Any, reference: Trace) -> None:
    held = {name: reference[name] for name in reference if name != "input.source"}
    replay = Trace(held, SETTINGS, "port")
    again = capture_diffusers(diffusers, replay=replay)
    assert "input.source" not in again
    assert torch.equal(again["frames"], reference["frames"])
    with pytest.raises(SvdlabError, match="input.source is missing, needed to redo the preprocessing"):
        capture_diffusers(diffusers, replay=replay, preprocess=True)


@pytest.mark.parametrize("name", ["input.noise", "input.latents", "input.image", "input.clip_pixels"])
def test_a_replay_without_an_input_is_refused(diffusers: Any, reference: Trace, name: str) -> None:
    replay = Trace({k: v for k, v in reference.items() if k != name}, SETTINGS, "port")
    with pytest.raises(SvdlabError, match=f"{name} is missing, needed to replay"):
        capture_diffusers(diffusers, replay=replay)


def test_a_replay_of_another_size_is_refused(diffusers: Any, reference: Trace) -> None:
    with pytest.raises(
        SvdlabError, match=r"input.image: the replayed shape \(1, 3, 32, 32\), allowed: \(1, 3, 64, 32\)"
    ):
        capture_diffusers(diffusers, settings=SETTINGS.replace(height=64), replay=reference)


def test_the_truth_is_float64_on_the_same_inputs(tiny: Path, reference: Trace) -> None:
    truth = capture_diffusers(load_diffusers(tiny, torch.float64, weights_dtype=torch.float32), replay=reference)
    assert truth.dtype == "float64" and truth["noise_pred.000"].dtype == torch.float64
    assert truth["input.clip_pixels"].dtype == torch.float64
    for name in ("input.noise", "input.latents", "input.source"):
        assert torch.equal(truth[name].double(), reference[name].double())
    for name in reference:
        far = (truth[name].double() - reference[name].double()).norm() / truth[name].double().norm()
        assert far < 1e-3, name
    # Preprocessing in float64, networks on the reference's pixels: the embedding knows no resize error.
    pixels = (truth["input.clip_pixels"] - reference["input.clip_pixels"]).abs().max()
    embedding = (truth["image_embeddings"] - reference["image_embeddings"]).abs().max()
    assert 1e-7 < pixels and embedding < 2e-6


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 2),
        ({"num_videos_per_prompt": 2}, 1),
        ({"max_guidance_scale": 1.0}, 1),
        ({"sigmas": (80.0, 2.0, 0.0)}, 1),
        ({"sigmas": (80.0, 2.0, 0.5)}, 1),
        ({"num_inference_steps": 1}, 1),
        ({"decode_chunk_size": 2}, 2),
        ({"num_frames": 1, "min_guidance_scale": 2.0}, 1),
        ({"dtype": "bfloat16"}, 2),
    ],
)
def test_svdlab_and_diffusers_record_the_same_tensors(
    tiny: Path, photo: Any, changes: dict[str, Any], images: int
) -> None:
    """Names, shapes and taps; the values are test_compare's matter."""
    settings = SETTINGS.replace(**changes)
    pictures = [photo, photo.rotate(90)][:images] if images > 1 else photo
    pictures = [p.resize((240, 230)) for p in pictures] if images > 1 else photo
    patterns = ["unet.down_blocks.0.*", "unet.time_*", "unet.add_*", "vae.*", "image_encoder.*"]
    dtype = settings.torch_dtype
    ours = capture(SVDPipeline.from_pretrained(tiny, dtype=dtype), pictures, settings, taps=patterns)
    theirs = capture_diffusers(load_diffusers(tiny, dtype), pictures, settings, taps=patterns)
    # svdlab embeds the time before it takes the frames apart; the rest runs in one order.
    in_order = [[n for n in trace if "time_emb_proj" not in n] for trace in (ours, theirs)]
    assert in_order[0] == in_order[1]
    assert {n: ours.shape(n) for n in ours} == {n: theirs.shape(n) for n in theirs}
    assert ours.settings == theirs.settings and ours.dtype == theirs.dtype == settings.dtype
    assert len(ours.taps) > 200


@pytest.mark.parametrize("changes", [{}, {"cfg": "sequential", "num_videos_per_prompt": 2, "dtype": "bfloat16"}])
def test_taps_of_sinusoids(tiny: Path, photo: Any, changes: dict[str, Any]) -> None:
    """Of the timestep in every step; of fps, motion and augmentation; of the frames: in float32, whatever runs."""
    settings = SETTINGS.replace(**changes)
    theirs = capture_diffusers(load_diffusers(tiny, settings.torch_dtype), photo, settings, taps=["unet.*time_proj"])
    pipe = SVDPipeline.from_pretrained(tiny, dtype=settings.torch_dtype)
    ours = capture(pipe, replay=theirs, settings=settings, taps=["unet.*time_proj"])
    names = ["unet.time_proj.000", "unet.add_time_proj", "unet.down_blocks.0.attentions.0.time_proj"]
    videos = settings.num_videos_per_prompt
    assert [ours.shape(n) for n in names] == [(2 * videos, 32), (6 * videos, 32), (settings.num_frames, 32)]
    assert set(names) < set(theirs.taps) == set(ours.taps)
    for name in theirs.taps:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
        assert ours[name].dtype == torch.float32


@pytest.mark.usefixtures("kernels_on")
def test_taps_join_what_is_computed_a_few_frames_at_a_time(tiny: Path, photo: Any) -> None:
    pipe = SVDPipeline.from_pretrained(tiny)
    settings = SETTINGS.replace(num_inference_steps=1, num_videos_per_prompt=2)
    whole = capture(pipe, photo, settings, taps=["unet.*", "vae.decoder.*"])
    with in_pieces(1):
        pieces = capture(pipe, photo, settings, taps=["unet.*", "vae.decoder.*"])
    assert list(pieces) == list(whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()), msg=name)


def test_taps_record_nothing_of_another_thread(tiny: Path, photo: Any) -> None:
    """A capture's hooks are its own: the same pipeline may run elsewhere at the same time."""
    pipe, settings = SVDPipeline.from_pretrained(tiny), SETTINGS.replace(num_frames=2, num_inference_steps=1)
    alone = capture(pipe, photo, settings, taps=["*"])
    inputs = pipe.prepare(photo, settings, torch.Generator().manual_seed(0))
    done, errors = threading.Event(), []

    def run() -> None:
        try:
            while not done.is_set():
                pipe.run(inputs, settings)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        beside = capture(pipe, photo, settings, taps=["*"])
    finally:
        done.set()
        thread.join()
    assert not errors
    assert {name: beside.shape(name) for name in beside} == {name: alone.shape(name) for name in alone}
    for name, tensor in alone.items():
        assert torch.equal(beside[name], tensor), name


def test_half_precision_restores_the_upcast_vae(tiny: Path, photo: Any) -> None:
    pipe = load_diffusers(tiny, torch.float16)
    trace = capture_diffusers(pipe, photo, SETTINGS.replace(num_inference_steps=1), taps=["vae.encoder.conv_in"])
    assert trace["vae.encoder.conv_in"].dtype == torch.float32
    assert trace["image_latents"].dtype == torch.float16 and pipe.vae.dtype == torch.float16

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError

    handle = pipe.vae.encoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        capture_diffusers(pipe, replay=trace)
    handle.remove()
    assert pipe.vae.dtype == torch.float16
    cast_diffusers(pipe, torch.float64)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.image_encoder.dtype == torch.float64


@pytest.mark.parametrize("until", ["input.noise", "image_latents", "guidance_scale", "model_input.000", "latents.000"])
def test_until_stops_there(tiny: Path, diffusers: Any, reference: Trace, until: str) -> None:
    theirs = capture_diffusers(diffusers, replay=reference, until=until)
    ours = capture(SVDPipeline.from_pretrained(tiny), replay=reference, until=until)
    assert until in theirs and until in ours
    order = list(reference)
    assert set(theirs) == set(order[: order.index(until) + 1]) or until == "input.noise"
    assert "frames" not in ours and "model_input.001" not in ours


def test_a_perturbed_run_moves_by_roundings(diffusers: Any, reference: Trace) -> None:
    moved = capture_diffusers(diffusers, replay=reference, perturb=1)
    for name in reference.probes:
        far = float((moved[name] - reference[name]).norm() / reference[name].norm())
        changed = name not in ("input.source", "added_time_ids", "sigmas", "timesteps", "guidance_scale")
        assert (1e-8 < far < 1e-3) if changed else far == 0, (name, far)
    again = capture_diffusers(diffusers, replay=reference, perturb=1)
    assert torch.equal(again["frames"], moved["frames"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_guidance_scale": 3.0, "max_guidance_scale": 1.0}, "diffusers fails at a ramp from 3 to 1"),
        ({"num_frames": 1}, "diffusers fails at a ramp"),
    ],
)
def test_what_diffusers_fails_at_is_said(diffusers: Any, photo: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SvdlabError, match=message):
        capture_diffusers(diffusers, photo, SETTINGS.replace(**changes))


def test_bad_requests_are_one_line(diffusers: Any, photo: Any, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": None}, "image: got none"),
        ({"image": "photo.png"}, "image: got str"),
        ({"image": [photo, photo.resize((100, 100))]}, "one size for all images"),
        ({"image": torch.rand(1, 3, 8, 8)}, "8-bit levels"),
        ({"image": photo, "taps": ["unet.down_block.*"]}, "taps: 'unet.down_block.\\*' names no module"),
        ({"image": photo, "until": "noise_pred.009"}, "until: got 'noise_pred.009'"),
        ({"image": photo, "path": tmp_path / "no" / "t.safetensors"}, "no does not exist"),
    ]
    for arguments, message in cases:
        with pytest.raises(SvdlabError, match=message):
            capture_diffusers(diffusers, settings=SETTINGS, **arguments)
    with pytest.raises(SvdlabError, match="diffusers cannot load it"):
        load_diffusers(tmp_path)
