"""The benchmark: both implementations do the same work in turns, and the numbers are what was timed."""

from __future__ import annotations

import json
import math
import os
import runpy
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner

from svdlab.bench.cases import Bench, Plan, compiled_vae
from svdlab.bench.profile import KINDS, OTHER, kind_of, seconds_by_kind
from svdlab.bench.timing import (
    COMPILED,
    DIFFUSERS,
    SVDLAB,
    SVDLAB_COMPILED,
    CaseResult,
    Timing,
    alternate,
    in_own_process,
    machine,
    power_law_exponent,
)
from svdlab.cli.bench import bench
from svdlab.errors import SvdlabError
from svdlab.svd import CLIPVisionConfig, UNetConfig, VAEConfig
from svdlab.svd.checkpoint import Configs
from svdlab.svd.memory import Simulation
from svdlab.svd.random_checkpoint import TINY_CLIP, TINY_UNET, TINY_VAE

TINY = Configs(UNetConfig(**TINY_UNET), VAEConfig(**TINY_VAE), CLIPVisionConfig(**TINY_CLIP))
SIZE = {"height": 32, "width": 40, "num_frames": 3}


def made(model: Path | str = "embedded", compile: bool = False, **given: Any) -> Bench:
    sizes = dict.fromkeys(("unet", "decode", "generation", "full-generation"), SIZE)
    growth = {"frames": (2, 3), "side": (32, 40)}
    plan = Plan(TINY, sizes, growth, pairs=2)
    options = {"num_inference_steps": 1, **given}
    return Bench(plan, str(model), "cpu", pairs=2, compile=compile, given=options, progress=False)


def outputs(runner: Bench, case: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """What each implementation computes in a case."""
    _, _, calls = runner.work(case, dtype)
    results = {}
    for name, call in calls.items():
        value = call()
        value = torch.cat(value) if isinstance(value, list) else getattr(value, "frames", value)
        results[name] = value.flatten()
    return results


@pytest.mark.parametrize(
    "given",
    [{}, {"cfg": "sequential", "decode": "exact", "num_videos_per_prompt": 2, "schedule": "ays"}],
    ids=["defaults", "others"],
)
@pytest.mark.parametrize("case", ["unet", "decode", "clip", "full-generation"])
def test_both_do_the_same_work(case: str, given: dict[str, Any]) -> None:
    results = outputs(made(**given), case)
    torch.testing.assert_close(results[SVDLAB], results[DIFFUSERS], rtol=1e-3, atol=2e-3)


def test_both_decode_in_the_chunks_that_were_asked_for() -> None:
    cut, whole = (outputs(made(decode_chunk_size=size), "decode") for size in (1, 3))
    torch.testing.assert_close(cut[SVDLAB], cut[DIFFUSERS], rtol=1e-3, atol=2e-3)
    assert (cut[SVDLAB] - whole[SVDLAB]).norm() > 1e-2 * whole[SVDLAB].norm()


def test_the_generation_is_that_of_the_checkpoint(tiny: Path) -> None:
    results = outputs(made(tiny), "generation")
    torch.testing.assert_close(results[SVDLAB], results[DIFFUSERS], rtol=1e-3, atol=2e-3)
    assert not torch.allclose(results[SVDLAB], outputs(made(tiny), "full-generation")[SVDLAB], atol=0.05)


def test_the_weights_are_shared() -> None:
    runner = made()
    for name in ("unet", "vae", "image_encoder"):
        own, reference = runner.networks(name, "float32")
        assert runner.networks(name, "float32")[0] is own
        theirs = reference.state_dict()
        assert all(value.data_ptr() == theirs[key].data_ptr() for key, value in own.state_dict().items())


def test_implementations_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in (SVDLAB, DIFFUSERS)}  # type: ignore[misc]
    timings = alternate(calls, 3, "cpu")
    a, b = SVDLAB, DIFFUSERS
    assert order == [a, b, a, b, b, a, a, b], "one run to warm up, then pairs whose order changes"
    assert all(len(t.seconds) == 3 and min(t.seconds) > 0 for t in timings.values())


def test_ratios_are_paired() -> None:
    timings = {SVDLAB: Timing((1.0, 2.0, 4.0), 2**30), DIFFUSERS: Timing((2.0, 6.0, 4.0), 2**31)}
    result = CaseResult("unet", "float32", {"height": 8}, 8 * 10**9, {**timings, COMPILED: Timing((1.0, 1.0, 1.0), 0)})
    written = result.to_dict(peak_flops=8e9)
    assert (written["svdlab_s"], written["diffusers_s"], written["pairs"]) == (2.0, 4.0, 3)
    assert (written["ratio"], written["ratio_range"]) == (2.0, [1.0, 3.0])
    assert (written["compiled_ratio"], written["compiled_ratio_range"]) == (0.5, [0.25, 1.0])
    assert written["floor_s"] == 1.0 and written["svdlab_of_matrix_peak"] == 0.5
    assert (written["svdlab_peak_gib"], written["diffusers_peak_gib"]) == (1.0, 2.0)


def test_a_compiled_vae_leaves_the_other_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: torch.nn.Sequential(module))
    runner = made(compile=True)
    _, vae = runner.networks("vae", "float32")
    before = vae.decoder
    assert compiled_vae(vae).decoder is not before and vae.decoder is before


def test_compiled_is_timed_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda module: (compiled.append(type(module).__name__), module)[1])
    runner = made(compile=True)
    assert list(runner.run("unet", "float32").timings) == [SVDLAB, DIFFUSERS, COMPILED, SVDLAB_COMPILED]
    assert compiled == ["UNetSpatioTemporalConditionModel", "UNet"]
    assert list(runner.run("decode", "float32").timings) == [SVDLAB, DIFFUSERS, COMPILED]
    assert compiled[2:] == ["TemporalDecoder"]
    runner.run("full-generation", "float32")
    assert set(compiled[3:]) == {
        "UNetSpatioTemporalConditionModel",
        "UNet",
        "TemporalDecoder",
        "CLIPVisionModelWithProjection",
    }


def test_a_profile_tells_kinds_of_operation_apart() -> None:
    kinds = {
        "aten::addmm": "linear layers",
        "mkldnn::_linear_pointwise": "linear layers",
        "mkldnn::_convolution_pointwise": "convolutions",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::native_group_norm": "norms",
        "aten::copy_": "copies",
        "aten::silu_": "elementwise",
        "aten::empty": OTHER,
        "aten::expand": OTHER,
        "aten::upsample_bilinear2d": OTHER,
        "sm80_xmma_fprop_implicit_gemm_f16_cudnn_conv": "convolutions",
        "ampere_fp16_s16816gemm_fp16_128x64": "linear layers",
        "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>": "elementwise",
        "Memcpy DtoD": "copies",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
    a, images, kernel = torch.randn(512, 512), torch.randn(4, 32, 64, 64), torch.randn(32, 32, 3, 3)
    for call, kind in ((lambda: a @ a, "linear layers"), (lambda: torch.conv2d(images, kernel), "convolutions")):
        call()
        found = seconds_by_kind(call, "cpu")
        assert list(found) == [*KINDS, OTHER] and max(found, key=lambda k: found[k]) == kind


def test_flops_are_those_of_the_products() -> None:
    settings = made().settings("clip", "float32")
    tower, tokens, width = TINY.image_encoder, 50, TINY.image_encoder.hidden_size
    layer = 4 * tokens * width**2 + 2 * tokens * width * tower.intermediate_size + 2 * tokens**2 * width
    patches = (tokens - 1) * 3 * tower.patch_size**2 * width
    expected = 2 * (tower.num_hidden_layers * layer + patches + width * tower.projection_dim)
    assert Simulation(TINY, settings).flops("image_encoder") == expected
    one, two = (made().settings("unet", "float32", num_frames=n) for n in (4, 8))
    ratio = Simulation(TINY, two).flops("unet_batched") / Simulation(TINY, one).flops("unet_batched")
    assert 1.95 < ratio < 2.05, "frames cost alike but for the attention among them"


def test_the_exponent_of_a_power_law() -> None:
    x = [1.0, 2.0, 5.0]
    assert power_law_exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)


# --- the command ---


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(bench, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_quick_runs_every_case_and_writes_what_it_prints(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    options = ["--quick", "--profile", "--dtype", "float32", "--pairs", "1", "--num-inference-steps", "1"]
    result = run(*options, *files)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "b.json").read_text())
    assert [case["name"] for case in written["cases"]] == ["unet", "decode", "clip", "generation", "full-generation"]
    for case in written["cases"]:
        assert {"svdlab_s", "diffusers_s", "ratio", "ratio_range", "tflop", "floor_s"} <= case.keys()
        assert f"{case['svdlab_s']:.3g}" in result.output and f"{case['ratio']:.2f}" in result.output
        assert case["svdlab_peak_gib"] > 0 and case["dtype"] == "float32"
    assert [row["axis"] for row in written["growth"]] == ["frames", "pixels"]
    assert all(math.isfinite(row["svdlab_exponent"]) for row in written["growth"])
    assert written["matrix_peak_gflops"]["float32"] > 0 and written["quick"]
    assert f"instruction_set {written['machine']['instruction_set']}" in result.output
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    for case in written["cases"]:
        assert set(case["profile_s"]) == {SVDLAB, DIFFUSERS} and case["profile_s"][SVDLAB]["linear layers"] > 0
    page = runpy.run_path(str(Path(__file__).parent.parent / "docs/make_performance.py"))
    table = page["cpu_table"]([written])
    assert page["profile_text"](written).count("if nothing but convolutions and linear layers took time") == 5
    assert table.count(written["machine"]["instruction_set"]) == 5 and f"{written['cases'][0]['ratio']:.2f}" in table


def test_a_case_has_a_process_of_its_own() -> None:
    """And what it finds comes back, errors too."""
    assert in_own_process(os.getpid) != os.getpid()
    result = in_own_process(made().run, "clip", "float32")
    assert result.name == "clip" and len(result.ratios(DIFFUSERS)) == 2
    with pytest.raises(SvdlabError, match="nowhere"):
        in_own_process(made("nowhere").run, "generation", "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "b.gif"], "--plot: got 'b.gif', allowed: .png, .svg, .pdf"),
        (["--device", "cuda"], "--device: got 'cuda', but torch sees no such device here; allowed: cpu"),
        (["--device", "mps"], "--device: got 'mps', but torch sees no such device here; allowed: cpu"),
        (["--decode-chunk-size", "auto"], "decode_chunk_size: got 'auto', allowed here: integer >= 1"),
        (["--fps", "0"], "fps: got 0, allowed: integer >= 1"),
        (["--json", "nowhere/b.json"], "nowhere is no folder that can be written"),
    ],
)
def test_bad_input(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Bench, "run", lambda *_: pytest.fail("something ran"))
    with pytest.raises(SvdlabError, match=message):
        run(*arguments)


def test_a_gpu_gets_the_published_size_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to know what would run on one."""
    asked: list[tuple[Plan, list[str], list[str], bool]] = []
    found = {"machine": {}, "matrix_peak_gflops": {}, "cases": [], "growth": []}

    def run_all(self: Bench, cases: Any, dtypes: Any, quick: bool, beside: int) -> dict[str, Any]:
        assert not beside
        asked.append((self.plan, list(cases), list(dtypes), quick))
        return found

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(Bench, "run_all", run_all)
    assert run("--device", "cuda").exit_code == 0
    ((plan, cases, dtypes, quick),) = asked
    assert cases == ["unet", "growth", "decode", "clip", "generation", "full-generation"]
    assert dtypes == ["float16"] and not quick
    assert plan.sizes["full-generation"] == {"height": 576, "width": 1024, "num_frames": 14}


def test_both_run_beside_busy_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as were asked for, while cases are timed and not a moment longer."""
    children = psutil.Process().children
    seen = []
    monkeypatch.setattr(
        Bench, "run", lambda *_: seen.append(len(children())) or CaseResult("clip", "float32", {}, 1, {})
    )
    monkeypatch.setattr(CaseResult, "to_dict", lambda *_: {})
    before = len(children())
    found = made().run_all(["clip"], ["float32"], quick=True, beside=2)
    assert (seen, len(children()), found["beside"]) == ([before + 2], before, 2)


def test_the_machine_is_named() -> None:
    about = machine("cpu")
    assert about["model"] and about["instruction_set"] == torch.backends.cpu.get_cpu_capability()
