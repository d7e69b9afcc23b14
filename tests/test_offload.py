"""Component offload, and decode chunks chosen by the memory that is free."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableVideoDiffusionPipeline
from pieces import in_pieces
from PIL import Image

from svdlab.cli.generate import generate
from svdlab.errors import SvdlabError
from svdlab.svd import memory
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings

SMALL = GenerationSettings(height=32, width=40, num_frames=3, num_inference_steps=2)
NETWORKS = ("image_encoder", "vae", "unet")
# The same memory under another name: what is moved to it has visibly been moved.
DEVICE = torch.device("cpu:0")


def offloaded(tiny: Path, dtype: torch.dtype = torch.float32) -> tuple[SVDPipeline, list[tuple[str, str]]]:
    """A pipeline and the log of what its networks do: ("vae", "in"), ("vae", "runs"), ("vae", "out")."""
    pipe, log = SVDPipeline.from_pretrained(tiny, dtype=dtype), []
    pipe.enable_model_cpu_offload(device=DEVICE)
    for name in NETWORKS:
        _watch(getattr(pipe, name), name, log)
    return pipe, log


def _watch(module: Any, name: str, log: list[tuple[str, str]]) -> None:
    move = module.to

    def to(target: Any) -> Any:
        if not isinstance(target, torch.dtype):
            log.append((name, "in" if target == DEVICE else "out"))
        return move(target)

    module.to = to
    for layer in module.modules():
        layer.register_forward_pre_hook(lambda *_: log.append((name, "runs")))


def test_a_network_runs_on_the_device_and_alone(tiny: Path, photo: Image.Image) -> None:
    pipe, log = offloaded(tiny)
    pipe.generate(photo, SMALL, progress=False)
    inside: list[str] = []
    for name, what in log:
        if what == "in":
            inside.append(name)
        elif what == "out":
            inside.remove(name)
        else:
            assert inside == [name]
    assert not inside
    assert [name for name, what in log if what == "in"] == ["image_encoder", "vae", "unet", "vae"]
    assert {name for name, what in log if what == "runs"} == set(NETWORKS)


@pytest.mark.parametrize(("dtype", "levels"), [("float32", 0), ("float16", 3)])
def test_offloading_changes_nothing(tiny: Path, photo: Image.Image, dtype: str, levels: int) -> None:
    """In half precision a weight that lies channels_last is summed in another order, and rounds elsewhere."""
    settings = SMALL.replace(dtype=dtype)
    plain = SVDPipeline.from_pretrained(tiny, dtype=settings.torch_dtype).generate(photo, settings, progress=False)
    pipe, _ = offloaded(tiny, settings.torch_dtype)
    (clip,) = pipe.generate(photo, settings, progress=False)
    assert np.abs(clip.frames.astype(int) - plain[0].frames).max() <= levels
    assert pipe.dtype == settings.torch_dtype and pipe.vae.quant_conv.weight.dtype == settings.torch_dtype


def test_a_network_leaves_the_device_when_a_run_fails(tiny: Path, photo: Image.Image) -> None:
    pipe, log = offloaded(tiny)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(photo, 32, 40, 3, 2, callback_on_step_end=stop, progress=False)
    assert log[-1] == ("unet", "out")


@pytest.mark.parametrize("free", [0, 2**40])
def test_the_other_networks_leave_for_a_decode_that_does_not_fit_beside_them(
    tiny: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    pipe, log = SVDPipeline.from_pretrained(tiny), []
    (expected,) = pipe.generate(photo, SMALL, progress=False)
    for name in NETWORKS:
        _watch(getattr(pipe, name), name, log)
    monkeypatch.setattr(SVDPipeline, "device", DEVICE)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (clip,) = pipe.generate(photo, SMALL, progress=False)
    moves = [entry for entry in log if entry[1] != "runs"]
    assert np.array_equal(clip.frames, expected.frames) and pipe._offload_device is None
    if free:
        assert not moves and not said
    else:
        assert moves == [(name, way) for way in ("out", "in") for name in ("unet", "image_encoder")]
        assert log[-3] == ("vae", "runs")
        assert [str(w.message) for w in said] == ["svdlab: the UNet and the image encoder leave cpu:0 for the decode"]


def test_the_name_and_arguments_are_those_of_diffusers(tiny: Path) -> None:
    theirs = inspect.signature(StableVideoDiffusionPipeline.enable_model_cpu_offload).parameters
    assert list(inspect.signature(SVDPipeline.enable_model_cpu_offload).parameters) == list(theirs)
    pipe = SVDPipeline.from_pretrained(tiny)
    pipe.enable_model_cpu_offload(1)
    assert pipe.device == torch.device("cuda:1") == pipe.with_own_modules().device
    pipe.enable_model_cpu_offload(device="cuda:2")
    assert pipe.device == torch.device("cuda:2")


def test_generate_offloads(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(SVDPipeline, "enable_model_cpu_offload", lambda self, device: asked.append(device))
    Image.new("RGB", (40, 32)).save(tmp_path / "a.png")
    size = ["--height", "32", "--width", "40", "--num-frames", "2", "--num-inference-steps", "1"]
    files = [str(tmp_path / "a.png"), "--out", str(tmp_path / "a.gif"), "--model", str(tiny)]
    result = CliRunner().invoke(generate, [*files, *size, "--offload"])
    assert result.exit_code == 0 and asked == ["cpu"], result.output


# --- decode_chunk_size="auto" ---


def decoded(pipe: SVDPipeline, free: float, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, int]:
    """Frames, and the chunk in which they were decoded with so many bytes free."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    seen: list[int] = []
    decode = pipe.vae.decode_videos
    monkeypatch.setattr(
        pipe.vae, "decode_videos", lambda latents, chunk=None: (seen.append(chunk), decode(latents, chunk))[1]
    )
    settings = SMALL.replace(num_frames=4, decode_chunk_size="auto", **changes)
    latents = torch.randn(1, 4, 4, 4, 5, generator=torch.Generator().manual_seed(1))
    frames = pipe.decode(latents, settings)
    monkeypatch.undo()
    return frames, seen[0]


@pytest.mark.usefixtures("kernels_on")
def test_the_chunk_grows_with_what_is_free_and_the_result_does_not_change(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = SVDPipeline.from_pretrained(tiny)
    settings = SMALL.replace(num_frames=4)
    simulation = memory.Simulation(pipe.configs, settings, "cpu")
    with in_pieces(20000):
        needed = [simulation.footprint("decode_exact", chunk).activations for chunk in range(1, 5)]
        results = [decoded(pipe, need / 0.9 + 1, monkeypatch) for need in needed]
    largest = [max(chunk for chunk, n in enumerate(needed, 1) if n <= need) for need in needed]
    assert [chunk for _, chunk in results] == largest and len(set(largest)) >= 3
    for frames, _ in results:
        torch.testing.assert_close(frames, results[0][0], rtol=1e-4, atol=1e-4)
    assert decoded(pipe, 0, monkeypatch)[1] == 1, "a decode is tried even where the simulation says it will not fit"


def test_what_is_free_is_what_the_machine_has() -> None:
    assert 2**20 < memory.free_bytes("cpu") < 2**50


def test_auto_is_a_setting_like_others() -> None:
    settings = GenerationSettings.from_json(GenerationSettings(decode_chunk_size="auto").to_json())
    assert settings.decode_chunk_size == "auto" and settings.replace(num_frames=8).effective_decode_chunk is None
    for wrong in ("all", 0):
        with pytest.raises(SvdlabError, match="decode_chunk_size: got .*, allowed: integer >= 1, <= 10000 or auto or"):
            GenerationSettings(decode_chunk_size=wrong)


def test_auto_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 32)).save(tmp_path / "a.png")
    size = ["--height", "32", "--width", "40", "--num-frames", "2", "--num-inference-steps", "1"]
    files = [str(tmp_path / "a.png"), "--out", str(tmp_path / "a.gif"), "--model", str(tiny)]
    assert CliRunner().invoke(generate, [*files, *size, "--decode-chunk-size", "auto"]).exit_code == 0
    refused = CliRunner().invoke(generate, [*files, *size, "--decode-chunk-size", "some"])
    assert refused.exit_code == 2 and "decode-chunk-size" in refused.output
