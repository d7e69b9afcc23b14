"""Each kernel against the plain layer in float64, and what happens where one does not run or is switched off."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import run
from torch import Tensor, nn

from svdlab import GenerationSettings, SVDPipeline
from svdlab.errors import SvdlabError
from svdlab.samples import sample_photo
from svdlab.svd import kernels
from svdlab.svd.approximations import approximated
from svdlab.svd.kernels import norm, packed, registry, upsample
from svdlab.svd.kernels.attention import scaled_dot_product_attention
from svdlab.svd.kernels.registry import FAST, FLOATS, KERNELS, OFF, Kernel, noise_ratio, plain, use_kernels, verdict
from svdlab.svd.layers import GEGLU, Conv2d, FrameGroupNorm, Upsample
from svdlab.svd.modules import own_modules
from svdlab.svd.stages import Change


def ratio(candidate: Tensor, reference: Tensor, truth: Tensor) -> float:
    """The noise ratio: the candidate's distance from the truth over the reference's."""
    floor = max(float((reference - truth).norm() / truth.norm()), torch.finfo(reference.dtype).eps)
    return float((candidate - truth).norm() / truth.norm()) / floor


def used(name: str, dtype: torch.dtype) -> bool:
    return verdict(KERNELS[name], "cpu", dtype).used


pytestmark = pytest.mark.usefixtures("kernels_on")


@pytest.fixture
def fresh(kernels_on: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Verdicts as in a new process, before and after."""
    registry.forget()
    yield monkeypatch
    monkeypatch.undo()
    registry.forget()


# --- each kernel against its plain layer ---


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_is_used_agrees_with_the_plain_layer(name: str, dtype: torch.dtype) -> None:
    """With other weights and inputs than the first trial's."""
    if used(name, dtype):
        torch.manual_seed(123)
        assert noise_ratio(*KERNELS[name].trial(), "cpu", dtype) <= 4


def test_float32_kernels_run_on_every_cpu() -> None:
    wide = {name for name, kernel in KERNELS.items() if torch.float32 in kernel.dtypes}
    assert {name for name in wide if used(name, torch.float32)} == wide


@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("positions", [300, 3000])
@pytest.mark.parametrize("fast", [True, False])
def test_group_norm_keeps_its_digits_beside_a_large_mean(positions: int, offset: float, fast: bool) -> None:
    """Torch's channels-last kernel does not, which once put the first step's prediction off by a percent."""
    generator = torch.Generator().manual_seed(10)
    rows = torch.randn(2, positions, 64, generator=generator) * 0.1 + offset * torch.randn(64, generator=generator)
    layer = FrameGroupNorm(64, 1e-6)
    layer.weight.data = torch.rand(64, generator=generator) + 0.5
    layer.bias.data = torch.randn(64, generator=generator)

    def reference(dtype: torch.dtype) -> Tensor:
        x = rows.to(dtype).transpose(1, 2).contiguous()
        return F.group_norm(x, 32, layer.weight.to(dtype), layer.bias.to(dtype), 1e-6).transpose(1, 2)

    assert (rows.numel() <= norm.FEW_NUMBERS) == (positions == 300), "one size for each way"
    own = use_kernels(layer) if fast else layer
    result = own(rows.unflatten(1, (-1, 10))[:, None])[:, 0].flatten(1, 2)
    assert ratio(result, reference(torch.float32), reference(torch.float64)) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "spread"), [(40, 1.0), (400, 1.0), (900, 1.0), (900, 6.0)])
def test_attention_of_any_length(length: int, spread: float, dtype: torch.dtype) -> None:
    """Few, all and many positions go different ways; with the larger spread a few keys win everything."""
    generator = torch.Generator().manual_seed(12)
    tokens = (spread * torch.randn(3, 2, length, 2, 32, generator=generator)).to(dtype).transpose(2, 3)
    expected, truth = (F.scaled_dot_product_attention(*t) for t in (tokens, tokens.double()))
    assert ratio(scaled_dot_product_attention(*tokens), expected, truth) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(10, 14), (9, 13), (10, 13)])
def test_upsampling(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Doubled sides run as a convolution of the small image, others do not; both after each other in one module."""
    generator = torch.Generator().manual_seed(13)
    own = use_kernels(Upsample(32).to(dtype))
    x = torch.randn(2, 3, 5, 7, 32, generator=generator).to(dtype)
    for target in (size, (10, 14), size):
        expected, truth = (
            F.conv2d(F.interpolate(t.flatten(0, 1).permute(0, 3, 1, 2), size=target), weight, bias, padding=1)
            for t, weight, bias in (
                (x, own.conv.weight, own.conv.bias),
                (x.double(), own.conv.weight.double(), own.conv.bias.double()),
            )
        )
        assert ratio(own(x, target).flatten(0, 1).permute(0, 3, 1, 2), expected, truth) <= 2


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_fused_geglu_has_both_gelus(approximate: str) -> None:
    layer = GEGLU(32, 48)
    layer.approximate = approximate
    fast, x = use_kernels(own_modules(layer)), torch.randn(4, 7, 32)
    truth = plain(fast).double()(x.double())
    layer.float()
    assert float((fast(x) - truth).norm() / truth.norm()) < 1e-6
    other = copy.deepcopy(layer)
    other.approximate = {"none": "tanh", "tanh": "none"}[approximate]
    assert float((other(x) - truth).norm() / truth.norm()) > 1e-5, "the two differ"


# --- packed weights ---


def test_a_packed_weight_serves_every_size() -> None:
    """A layer called at one size and then at another multiplies by the same weight."""
    layer = use_kernels(nn.Linear(48, 80))
    for count in (1, 3000, 7, 64):
        x = torch.randn(count, 48)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def in_place(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.mul_(2)


def through_data(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data.mul_(2)


def other_data(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.data = 2 * parameter.data


def another_parameter(layer: nn.Module) -> None:
    layer.weight, layer.bias = (nn.Parameter(2 * p.detach()) for p in (layer.weight, layer.bias))


def loaded(layer: nn.Module) -> None:
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def fused_step(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def one_number(layer: nn.Module) -> None:
    layer.weight.data.view(-1)[-1] += 1


def rows_exchanged(layer: nn.Module) -> None:
    layer.weight.data.copy_(layer.weight.data.roll(2, 0))


@pytest.mark.parametrize(
    "edit",
    [in_place, through_data, other_data, another_parameter, loaded, fused_step, one_number, rows_exchanged],
    ids=lambda edit: edit.__name__,
)
def test_what_happens_to_the_weights_is_in_the_next_result(edit: Any) -> None:
    """Torch counts no version for half of these edits."""
    x = torch.randn(1, 2, 8, 8, 32)
    for layer in (use_kernels(Conv2d(32, 32, 3, padding=1)), use_kernels(nn.Linear(32, 33))):
        before = layer(x)
        edit(layer)
        after = plain(layer)(x)
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(layer(x), after)


def test_one_generation_compares_its_weights_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SVDPipeline.from_pretrained(tiny)
    settings = GenerationSettings(height=32, width=32, num_frames=2, num_inference_steps=3)
    inputs = pipe.prepare(sample_photo(), settings, torch.Generator().manual_seed(0))
    compared: list[Any] = []
    content = registry.content
    monkeypatch.setattr(registry, "content", lambda weight: (compared.append(1), content(weight))[1])

    def comparisons(pipe: SVDPipeline, **given: Any) -> int:
        compared.clear()
        pipe.denoise(inputs, settings, **given)
        return len(compared)

    comparisons(pipe)  # with the kernels' trials
    alone = comparisons(pipe)
    assert comparisons(pipe) == alone, "and each generation anew"
    assert comparisons(approximated(pipe, "guidance_interval", "deep_features")) <= alone

    def twice(pipe: SVDPipeline, stage: Any, *args: Any) -> Tensor:
        return stage(*args)

    # Who could edit weights between two steps: a callback, a probe, a stage or a hook of somebody else's, a subclass.
    staged = pipe.with_stage(euler_step=pipe.euler_step)
    hooked = pipe.with_own_modules()
    hooked.unet.conv_in.register_forward_hook(lambda *args: None)
    wrapped = approximated(pipe, "guidance_interval").with_changes(Change(wrap={"predict_noise": twice}))
    derived = copy.copy(pipe)
    derived.__class__ = type("Derived", (SVDPipeline,), {})
    assert (
        min(
            comparisons(pipe, callback=lambda *args: None),
            comparisons(pipe, probe=lambda *args: None),
            *(comparisons(other) for other in (staged, wrapped, hooked, derived)),
        )
        > 2 * alone
    )


def test_an_edit_between_two_steps_is_in_the_next_one(tiny: Path) -> None:
    pipe = SVDPipeline.from_pretrained(tiny)
    settings = GenerationSettings(height=32, width=32, num_frames=2, num_inference_steps=3)
    inputs = pipe.prepare(sample_photo(), settings, torch.Generator().manual_seed(0))

    def edit(pipe: SVDPipeline, step: int, *rest: Any) -> None:
        if step == 0:
            pipe.unet.conv_out.weight.data.mul_(2)

    unedited = pipe.denoise(inputs, settings)
    found = pipe.denoise(inputs, settings, callback=edit)
    pipe.unet.conv_out.weight.data.div_(2)
    slow = pipe.with_changes()
    slow.unet = plain(pipe.unet)
    expected = slow.denoise(inputs, settings, callback=edit)
    assert (found - expected).norm() < 1e-4 * expected.norm() < 1e-2 * (found - unedited).norm()


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = use_kernels(nn.Linear(48, 80)).to(torch.float64).float()
        x = torch.randn(3, 48)
        torch.testing.assert_close(layer(x), plain(layer)(x))
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), plain(layer)(x))


def test_autocast_gets_the_plain_layers(tiny: Path) -> None:
    """It gives a layer float32 weights and bfloat16 numbers, which oneDNN's packed products refuse."""
    pipe = SVDPipeline.from_pretrained(tiny)
    slow = pipe.with_changes()
    slow.unet, slow.vae, slow.image_encoder = map(plain, (pipe.unet, pipe.vae, pipe.image_encoder))
    options = dict(height=32, width=32, num_frames=2, num_inference_steps=1, output_type="pt", progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        fast, expected = (
            p(sample_photo(), generator=torch.Generator().manual_seed(0), **options).frames  # type: ignore[arg-type]
            for p in (pipe, slow)
        )
    torch.testing.assert_close(fast, expected)


def test_modules_that_share_weights_share_what_is_packed_of_them() -> None:
    layer = use_kernels(nn.Linear(48, 80))
    other, x = own_modules(layer), torch.randn(5, 48)
    assert torch.equal(layer(x), other(x)) and layer.cache is other.cache
    assert copy.deepcopy(layer).cache is not layer.cache


# --- which are used ---


def test_plain_undoes_use_kernels() -> None:
    network = nn.Sequential(nn.Linear(3, 4), Conv2d(4, 4, 3), GEGLU(4, 4), Upsample(32))
    kinds = [type(m) for m in network.modules()]
    assert all(type(m) in FAST.values() for m in use_kernels(network)), "every layer here has a kernel"
    slow = plain(network)
    assert [type(m) for m in slow.modules()] == kinds
    assert all(a is b for a, b in zip(network.parameters(), slow.parameters(), strict=True))


def test_autograd_gets_the_plain_layer() -> None:
    layer, x = use_kernels(GEGLU(32, 48)), torch.randn(2, 5, 32)
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.proj.weight.grad is not None and layer.proj.weight.grad.any()


def test_a_kernel_that_raises_is_not_used(fresh: pytest.MonkeyPatch) -> None:
    """What oneDNN does in bfloat16 on a CPU without AVX-512."""
    message = "mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx_ne_convert or avx512bw\nsecond line"

    def refuse(weight: Tensor, *rest: Any) -> Tensor:
        raise RuntimeError(message)

    class OneDNN:
        _reorder_linear_weight = staticmethod(refuse)

    fresh.setattr(packed, "onednn", OneDNN())
    found = verdict(KERNELS["packed_linear"], "cpu", torch.bfloat16)
    assert not found.used and "needs the cpu support avx_ne_convert" in found.why and "\n" not in found.why
    layer, x = use_kernels(nn.Linear(8, 4).bfloat16()), torch.randn(2, 8).bfloat16()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_kernel_that_disagrees_is_not_used(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(upsample, "summed_taps", lambda weight: 1.001 * weight.repeat(4, 1, 1, 1)[..., :2, :2])
    found = verdict(KERNELS["small_image_upsample"], "cpu", torch.float32)
    assert not found.used and "disagrees with the plain layer: noise ratio" in found.why


def test_a_trial_runs_the_kernel_itself(fresh: pytest.MonkeyPatch) -> None:
    """Asked during its own trial, ``usable`` must not send the fast layer back to the plain one."""
    calls: list[str] = []
    original = packed.linear
    fresh.setattr(packed, "linear", lambda *args: (calls.append("fast"), original(*args))[1])
    assert used("packed_linear", torch.float32) and calls == ["fast"]


def test_a_trial_leaves_the_random_numbers_alone(fresh: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    kernels.table()
    assert torch.equal(torch.randn(4), expected)


def test_threads_wait_for_one_trial(fresh: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    kernel = KERNELS["packed_linear"]

    def trial() -> Any:
        tried.append(1)
        return kernel.trial()

    counted = Kernel("counted", "", (torch.float32,), trial)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(verdict(counted, "cpu", torch.float32).used)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4 and len(tried) == 1


def test_an_accelerator_is_simulated_with_what_serves_accelerators() -> None:
    serving = {name for name, kernel in KERNELS.items() if verdict(kernel, "meta", torch.float16).used}
    assert (
        serving
        == {name for name, kernel in KERNELS.items() if kernel.accelerators}
        == {
            "group_norm",
            "in_place",
            "chunked_decode",
        }
    )


@pytest.mark.parametrize("names", ["group_norm", "packed_linear, chunked_decode", "all"])
def test_kernels_can_be_switched_off(fresh: pytest.MonkeyPatch, names: str) -> None:
    fresh.setenv(OFF, names)
    off = {row["name"] for row in kernels.table() if row["why"] == f"switched off by {OFF}"}
    assert off == (set(KERNELS) if names == "all" else {name.strip() for name in names.split(",")})


def test_an_unknown_kernel_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(OFF, "warp_drive")
    with pytest.raises(SvdlabError, match=f"{OFF}: got 'warp_drive', allowed: all, or some of packed_linear"):
        use_kernels(nn.Linear(3, 4))(torch.randn(2, 3))


def test_the_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "kernels", "--json", str(tmp_path / "k.json"))
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["instruction_set"] == torch.backends.cpu.get_cpu_capability() and found["instruction_set"] in out
    rows = found["kernels"]
    assert code == 0 and all(name in out for name in KERNELS)
    assert {(row["name"], row["dtype"]) for row in rows} == {(n, str(d)[6:]) for n in KERNELS for d in FLOATS}
    assert all(isinstance(row["used"], bool) and row["why"] for row in rows)


@pytest.mark.slow
def test_the_plain_network_gets_the_same_verdicts(tmp_path: Path) -> None:
    """Every kernel switched off, in a process of its own: parity, the exact decode, the diagnosis."""
    script = """
import torch
from svdlab.parity.diagnose import diagnose
from svdlab.parity import capture
from svdlab.parity.three_way import three_way
from svdlab.svd import kernels
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings
from PIL import Image
import numpy as np, sys

assert not any(row["used"] for row in kernels.table())
folder = write_random_checkpoint(sys.argv[1])
image = Image.fromarray((np.random.default_rng(0).random((300, 260, 3)) * 255).astype(np.uint8))
settings = GenerationSettings(height=32, width=40, num_frames=4, num_inference_steps=2)
for dtype in ("float32", "bfloat16"):
    found = three_way(folder, image, settings.replace(dtype=dtype))
    assert found.verdict == "parity", found.summary()
    if dtype == "float32":
        reference, truth = found.traces["reference"], found.traces["truth"]
pipe = SVDPipeline.from_pretrained(folder)
for bug in ("fps_not_decremented", "alpha_swapped_unet", "decode_chunked"):
    broken = capture(pipe.with_bugs(bug), replay=reference, preprocess=True)
    found = diagnose(reference, broken, truth, pipe=pipe)
    assert [e.bugs for e in found.explanations] == [(bug,)], found.summary()
latents = torch.randn(1, 4, 4, 4, 5, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    whole, *exact = (
        pipe.decode(latents, settings.replace(decode="exact", decode_chunk_size=n)) for n in (None, 1, 2, 3)
    )
assert all((frames - whole).abs().max() < 1e-4 for frames in exact)
print("the same")
"""
    environment = {**os.environ, OFF: "all"}
    command = [sys.executable, "-c", script, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("the same\n"), done.stderr[-2000:]
