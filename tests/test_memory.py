"""Simulated memory against what the allocator really gives, and what fits a budget."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pieces import in_pieces

from svdlab.cli.memory import memory
from svdlab.errors import SvdlabError
from svdlab.svd import CLIPVisionConfig, UNetConfig, VAEConfig
from svdlab.svd import memory as memory_module
from svdlab.svd.architectures import ARCHITECTURES
from svdlab.svd.checkpoint import Configs
from svdlab.svd.kernels import attention, decode, norm, pieces, use_kernels
from svdlab.svd.memory import Simulation, least_bytes, measured_peak, simulate
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import TINY_CLIP, TINY_UNET, TINY_VAE
from svdlab.svd.settings import GIB, GenerationSettings
from svdlab.svd.workloads import NETWORKS, WORKLOADS, workload_calls

# Large enough that the fused attention's buffers, which do not grow with the tokens, stay small beside the rest.
CLIP = CLIPVisionConfig(**{**TINY_CLIP, "patch_size": 14, "hidden_size": 128, "intermediate_size": 512})
TINY = Configs(UNetConfig(**TINY_UNET), VAEConfig(**TINY_VAE), CLIP)
SMALL = GenerationSettings(height=48, width=72, num_frames=5)
pytestmark = pytest.mark.usefixtures("kernels_on")


def simulated(settings: GenerationSettings, configs: Configs = TINY, device: str = "cpu") -> Simulation:
    return Simulation(configs, settings, device)


@functools.cache
def real_network(name: str, dtype: torch.dtype) -> Any:
    return use_kernels(NETWORKS[name](getattr(TINY, name)).to(dtype).eval().requires_grad_(False))


def peaks(name: str, dtype: str) -> list[tuple[int, int]]:
    """What the simulation says, and what the allocator sees, for each chunk."""
    settings = SMALL.replace(dtype=dtype)
    network = real_network(WORKLOADS[name], settings.torch_dtype)
    call, new = workload_calls(TINY, settings)[name], functools.partial(torch.zeros, dtype=settings.torch_dtype)
    pairs = []
    for chunk in (1, 3) if name.startswith("decode") else (None,):
        call(network, new, chunk)  # weights are prepared by the first call
        measured = measured_peak(lambda chunk=chunk: call(network, new, chunk))  # type: ignore[misc]
        pairs.append((simulated(settings).footprint(name, chunk).activations, measured))
    return pairs


def peaks_without_amx(name: str, dtype: str) -> list[tuple[int, int]]:
    """``peaks`` in a process of its own, where torch's attention does not lay out its operands anew for AMX.

    It does so in a buffer that no GPU has, on the CPUs that have AMX; the limit has to be set before torch is loaded.
    """
    code = (
        "import json, torch, test_memory; torch.set_num_threads(1); torch.set_grad_enabled(False); "
        f"print(json.dumps(test_memory.peaks({name!r}, {dtype!r})))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_simulated_peaks_are_those_that_the_allocator_sees(name: str, dtype: str) -> None:
    for expected, measured in (peaks_without_amx if dtype == "bfloat16" else peaks)(name, dtype):
        assert expected == pytest.approx(measured, rel=0.1)


def test_prepared_weights_are_those_that_the_first_call_keeps() -> None:
    network = use_kernels(NETWORKS["vae"](TINY.vae).eval().requires_grad_(False))
    calls = workload_calls(TINY, SMALL)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for name in ("vae_encode", "decode_exact"):
            calls[name](network, torch.zeros, 1)
    kept = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    own = sum(p.nbytes for p in network.parameters())
    assert own < simulated(SMALL).weights["vae"] == pytest.approx(own + sum(kept), rel=0.1)


def test_a_whole_generation_peaks_where_its_largest_stage_does(tiny: Path, photo: Any) -> None:
    pipe = SVDPipeline.from_pretrained(tiny)
    settings = SMALL.replace(num_inference_steps=1, height=96, width=128)
    pipe.generate(photo, settings, progress=False)
    configs = Configs(pipe.unet.config, pipe.vae.config, pipe.image_encoder.config)
    names = ("image_encoder", "vae_encode", "unet_batched", "decode_exact")
    largest = max(simulated(settings, configs).footprint(name).activations for name in names)
    inputs = pipe.prepare(photo, settings, torch.Generator())
    assert largest == pytest.approx(measured_peak(lambda: pipe.run(inputs, settings)), rel=0.1)


def test_measured_peak_is_that_of_the_moment() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000).add_(1)

    def together() -> list[torch.Tensor]:
        return [torch.ones(1000) for _ in range(3)]

    assert measured_peak(one_after_the_other) == pytest.approx(4000, rel=0.01)
    assert measured_peak(together) == pytest.approx(12000, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_shapes_that_are_known_are_those_that_torch_works_out(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SMALL.replace(dtype=dtype)
    names = ("vae_encode", "unet_batched", "decode_exact")
    quick = [simulated(settings, device="cuda").footprint(name, 2) for name in names]
    monkeypatch.setattr(memory_module, "KnownShapes", contextlib.nullcontext)
    assert quick == [simulated(settings, device="cuda").footprint(name, 2) for name in names]


# --- the published architecture ---


SIZE = {"height": 576, "width": 1024, "num_frames": 14}


def full_size(**changes: Any) -> Simulation:
    settings = GenerationSettings(**SIZE, dtype="float16").replace(**changes)
    return simulate(ARCHITECTURES["svd"], settings, "cuda")


@pytest.mark.parametrize(
    ("device", "changes"),
    [
        ("cpu", {"dtype": "bfloat16", "num_frames": 1}),
        ("cuda", {"num_videos_per_prompt": 2}),
        ("cuda", {"height": 256, "width": 8}),
    ],
)
def test_the_least_is_below_what_is_simulated_and_not_far_below(device: str, changes: dict[str, Any]) -> None:
    settings = SMALL.replace(**changes)
    simulation = simulated(settings, device=device)
    each = [simulation.footprint(name, 1) for name in ("unet_sequential", "vae_encode", "decode_parity")]
    peak = max(footprint.activations for footprint in each)
    assert peak / 20 < least_bytes(TINY, settings) < peak


@pytest.mark.parametrize(("device", "name"), [("cpu", "unet_batched"), ("cuda", "decode_exact")])
def test_pieces_that_are_left_out_take_no_memory(monkeypatch: pytest.MonkeyPatch, device: str, name: str) -> None:
    """A simulated piece takes as long whatever its size, and a clip of 80,000 lines has a hundred thousand."""
    settings = SMALL.replace(height=32, width=40, num_frames=4)
    monkeypatch.setitem(pieces.NUMBERS, "cpu", 2**12)
    monkeypatch.setattr(pieces, "NUMBERS_ELSEWHERE", 2**12)
    monkeypatch.setattr(attention, "LONG", 16)
    monkeypatch.setattr(attention, "SCORES", 2**8)
    short = simulated(settings, device=device).footprint(name, 2)
    for module in (pieces, decode, norm, attention):
        monkeypatch.setattr(module, "each", list)
    assert simulated(settings, device=device).footprint(name, 2) == short


def test_pieces_that_are_simulated() -> None:
    assert pieces.each(range(0, 10, 3)) == [0, 3, 6, 9]
    token = pieces.simulating.set(True)
    try:
        found = [pieces.each(range(0, size, 3)) for size in (1, 4, 7, 10**9)]
    finally:
        pieces.simulating.reset(token)
    assert found == [[0], [0, 3], [0, 3, 6], [0, 3, 999_999_999]]


def test_the_published_architectures_weights() -> None:
    parameters = {name: size / 2 for name, size in full_size().weights.items()}
    assert parameters == {"image_encoder": 632_076_800, "vae": 97_742_847, "unet": 1_524_623_082}


def test_what_memory_depends_on() -> None:
    batched, sequential = (full_size().footprint(f"unet_{cfg}").activations for cfg in ("batched", "sequential"))
    assert 0.45 * batched < sequential < 0.6 * batched
    wide = full_size(dtype="float32").footprint("unet_batched").activations
    assert wide == pytest.approx(2 * batched, rel=0.02)
    unguided = full_size(max_guidance_scale=1.0).footprint("unet_batched").activations
    assert unguided == pytest.approx(sequential, rel=0.02)
    parity = [full_size().footprint("decode_parity", chunk).activations for chunk in (2, 4, 14)]
    assert parity[0] * 1.9 < parity[1] and parity[1] * 3 < parity[2]
    exact = [full_size().footprint("decode_exact", chunk).activations for chunk in (1, 2, 4, 8)]
    assert exact == sorted(exact) and exact[-1] < 0.7 * parity[-1]


def test_the_exact_decode_holds_one_video_and_a_chunk() -> None:
    """A frame of the chunk takes six: it is twice as wide before it is convolved, and then normalised."""
    widest_video = 14 * 576 * 1024 * 128 * 2
    frame = widest_video / 14
    one, two = (full_size().footprint("decode_exact", chunk).activations for chunk in (1, 2))
    assert widest_video < one < widest_video + 7 * frame and one < two < widest_video + 12 * frame


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_larger_chunk_never_takes_less(device: str) -> None:
    with in_pieces(20000):
        simulation = simulated(SMALL, device=device)
        peaks = [simulation.footprint("decode_exact", chunk).activations for chunk in range(1, 6)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]


def test_attention_makes_no_matrix_of_scores() -> None:
    once, twice = (full_size(height=h, num_frames=1).footprint("unet_batched").activations for h in (576, 1152))
    assert twice == pytest.approx(2 * once, rel=0.05)


def test_offloading_leaves_one_network() -> None:
    simulation = full_size()
    decode = simulation.footprint("decode_exact")
    others = simulation.weights["unet"] + simulation.weights["image_encoder"]
    assert simulation.peak(decode, offload=False) == simulation.peak(decode, offload=True) + others


def test_the_largest_chunk_is_the_last_that_fits() -> None:
    simulation, budget = full_size(), 5 * GIB
    option = simulation.option("sequential", True, "exact", budget)
    assert option.fits and option.decode_chunk_size == 6
    last, too_large = (simulation.footprint("decode_exact", size).peak for size in (6, 7))
    assert last <= budget < too_large


# --- the command ---


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    result = CliRunner().invoke(memory, [*arguments, "--json", str(tmp_path / "m.json")])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output, json.loads((tmp_path / "m.json").read_text())


def test_fourteen_frames_fit_eight_gib_as_they_are_made_by_default(tmp_path: Path) -> None:
    code, out, written = run(tmp_path, *"--model svd --dtype float16 --budget-gib 8".split())
    assert {name: written["settings"][name] for name in SIZE} == SIZE
    assert code == 0 and written["fits"] and "weights included" in out and written["reserve_gib"] == 0.75
    best = written["best"]
    assert best["decode"] == "exact" and best["cfg"] == "batched" and not best["offload"]
    assert best["peak_gib"] <= 8 - 0.75 and best["decode_chunk_size"] >= 2
    assert written["decode_chunk_size"] == best["decode_chunk_size"]
    assert [stage["name"] for stage in written["stages"]] == list(WORKLOADS)
    assert all(stage["peak_gib"] > stage["weights_gib"] > 0.1 for stage in written["stages"])
    of_two = next(stage for stage in written["stages"] if stage["name"] == "decode_exact")
    others = [stage["peak_beside_all_weights_gib"] for stage in written["stages"][:3]]
    assert of_two["decode_chunk_size"] == 2 and max(of_two["peak_gib"], *others) <= 7


def test_fourteen_frames_fit_six_gib_with_offload(tmp_path: Path) -> None:
    code, _, written = run(tmp_path, *"--model svd --dtype float16 --budget-gib 6".split())
    assert code == 0 and written["best"]["offload"] and written["best"]["decode"] == "exact"


def test_nothing_fits_a_budget_below_the_weights(tmp_path: Path) -> None:
    code, out, written = run(tmp_path, "--model", "svd", "--dtype", "float16", "--budget-gib", "2")
    assert code == 1 and not written["fits"] and written["decode_chunk_size"] is None
    assert (
        "nothing fits 2 GiB: the least is" in out
        and "0.75 reserved" in out
        and not any(o["fits"] for o in written["options"])
    )


def test_the_settings_are_those_of_a_generation(tmp_path: Path, tiny: Path) -> None:
    arguments = ["--model", str(tiny), "--decode-chunk-size", "3", "--num-videos-per-prompt", "2", "--device", "cpu"]
    code, _, written = run(tmp_path, *arguments)
    assert code == 0 and written["settings"]["height"] == 64 and "options" not in written
    chunks = {stage["name"]: stage["decode_chunk_size"] for stage in written["stages"]}
    assert chunks["decode_exact"] == chunks["decode_parity"] == 3 and chunks["unet_batched"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "60"], "height: got 60, allowed: integer >= 8, <= 16384, a multiple of 8"),
        (["--device", "gpu7"], "--device: got 'gpu7', allowed: cpu, cuda, cuda:1, mps"),
        (["--budget-gib", "1", "--reserve-gib", "1"], "--reserve-gib: got 1, allowed: less than --budget-gib, 1"),
        (["--model", "nothing here"], "model: 'nothing here' is no folder"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SvdlabError, match=message):
        run(tmp_path, *arguments)
