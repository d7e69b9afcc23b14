"""Bundles: a module or stage run again from the files alone gives the files' outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from svdlab.errors import SvdlabError
from svdlab.parity.bundle import make_bundles, write_bundles
from svdlab.parity.candidate import capture
from svdlab.parity.trace import Trace
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=64, width=64, num_frames=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def reference(pipe: SVDPipeline, photo: Any, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("bundles") / "reference.safetensors"
    return capture(pipe, photo, SETTINGS, taps=["*"], path=path, optional=True)


def _files(
    pipe: SVDPipeline, reference: Trace, what: str, folder: Path, step: int = 0
) -> tuple[dict[str, Tensor], ...]:
    target = folder / what.replace("*", "all")
    write_bundles(make_bundles(pipe, what, reference, step), target, "Made in a test.")
    names = [f"{name}.safetensors" for name in ("inputs", "outputs", "weights")]
    return tuple(load_file(target / name) if (target / name).exists() else {} for name in names)


# One module's rounding in float32, and that of a whole chain of them.
ROUNDING, CHAIN = 1e-5, 1e-4


def _close(found: Tensor, expected: Tensor, limit: float = ROUNDING) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < limit


@pytest.fixture(scope="module")
def diffusers(tiny: Path) -> Any:
    from svdlab.parity.reference import load_diffusers

    return load_diffusers(tiny, torch.float32, "cpu")


def _fresh(diffusers: Any, name: str, weights: dict[str, Tensor]) -> nn.Module:
    """diffusers' module with nothing but the bundle's weights, whose keys are the checkpoint's."""
    component, path = name.split(".", 1)
    module = getattr(diffusers, component).get_submodule(path)
    relative = {key.removeprefix(f"{path}."): value for key, value in weights.items()}
    assert all(key.startswith(f"{path}.") for key in weights)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for value in module.state_dict().values():
        value.zero_()
    module.load_state_dict(relative, strict=True)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    return module


@pytest.mark.parametrize("step", [0, 1])
def test_diffusers_resnet_runs_from_the_files(
    pipe: SVDPipeline, reference: Trace, diffusers: Any, tmp_path: Path, step: int
) -> None:
    # With 32 channels in 32 groups a norm would take the time embedding out again.
    name = "unet.down_blocks.1.resnets.0"
    inputs, outputs, weights = _files(pipe, reference, name, tmp_path, step)
    assert set(inputs) == {"hidden_states", "temb"} and set(outputs) == {"output"}
    x = inputs["hidden_states"]
    found = _fresh(diffusers, name, weights)(
        x.flatten(0, 1), inputs["temb"].repeat_interleave(3, 0), torch.zeros(len(x), 3)
    )
    _close(found.unflatten(0, (-1, 3)), outputs["output"])
    _close(outputs["output"], reference[f"{name}.{step:03}"])


def test_diffusers_transformer_runs_from_the_files(
    pipe: SVDPipeline, reference: Trace, diffusers: Any, tmp_path: Path
) -> None:
    name = "unet.up_blocks.1.attentions.1"
    inputs, outputs, weights = _files(pipe, reference, name, tmp_path)
    assert set(inputs) == {"hidden_states", "encoder_hidden_states"}
    x, context = inputs["hidden_states"], inputs["encoder_hidden_states"]
    assert not context[: len(context) // 2].any() and context[len(context) // 2 :].any()
    found = _fresh(diffusers, name, weights)(
        x.flatten(0, 1), context.repeat_interleave(3, 0), torch.zeros(len(x), 3), return_dict=False
    )[0]
    _close(found.unflatten(0, (-1, 3)), outputs["output"])


def test_diffusers_blocks_run_from_the_files(
    pipe: SVDPipeline, reference: Trace, diffusers: Any, tmp_path: Path
) -> None:
    name = "unet.down_blocks.0"
    inputs, outputs, weights = _files(pipe, reference, name, tmp_path)
    x = inputs["hidden_states"]
    shared = {
        "temb": inputs["temb"].repeat_interleave(3, 0),
        "encoder_hidden_states": inputs["encoder_hidden_states"].repeat_interleave(3, 0),
        "image_only_indicator": torch.zeros(len(x), 3),
    }
    found, states = _fresh(diffusers, name, weights)(x.flatten(0, 1), **shared)
    _close(found.unflatten(0, (-1, 3)), outputs["output"])
    for i, state in enumerate(states):
        _close(state.unflatten(0, (-1, 3)), outputs[f"output_states.{i}"])
    for name in ("unet.up_blocks.0", "unet.up_blocks.1"):
        inputs, outputs, weights = _files(pipe, reference, name, tmp_path)
        skips = [inputs[f"res_hidden_states_tuple.{i}"].flatten(0, 1) for i in range(2)]
        given = {"temb": inputs["temb"].repeat_interleave(3, 0), "image_only_indicator": torch.zeros(len(x), 3)}
        assert "encoder_hidden_states" in inputs
        if name == "unet.up_blocks.1":  # the other has no attention
            given["encoder_hidden_states"] = shared["encoder_hidden_states"]
        found = _fresh(diffusers, name, weights)(
            inputs["hidden_states"].flatten(0, 1), res_hidden_states_tuple=tuple(skips), **given
        )
        _close(found.unflatten(0, (-1, 3)), outputs["output"])


@pytest.mark.parametrize(
    "name",
    [
        "unet.conv_in",
        "unet.mid_block.resnets.1.temporal_res_block.conv2",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.resnets.0.spatial_res_block.time_emb_proj",
        "unet.down_blocks.0.attentions.0.time_pos_embed",
        "vae.encoder.down_blocks.0.resnets.0.conv1",
        "image_encoder.vision_model.encoder.layers.1.mlp.fc1",
    ],
)
def test_layers_run_from_the_files(pipe: SVDPipeline, reference: Trace, tmp_path: Path, name: str) -> None:
    inputs, outputs, weights = _files(pipe, reference, name, tmp_path)
    x = inputs["hidden_states"]
    path = name.split(".", 1)[1]
    weight = {key.removeprefix(f"{path}."): value for key, value in weights.items()}
    if name.endswith("time_pos_embed"):
        h = F.silu(F.linear(x, weight["linear_1.weight"], weight["linear_1.bias"]))
        found = F.linear(h, weight["linear_2.weight"], weight["linear_2.bias"])
    elif weight["weight"].ndim == 2:
        channels_last = x.movedim(2, -1) if x.ndim == 5 else x
        found = F.linear(channels_last, weight["weight"], weight.get("bias"))
        found = found.movedim(-1, 2) if x.ndim == 5 else found
    elif weight["weight"].ndim == 4:
        found = F.conv2d(x.flatten(0, 1), weight["weight"], weight["bias"], padding=1).unflatten(0, x.shape[:2])
    else:
        found = F.conv3d(x.transpose(1, 2), weight["weight"], weight["bias"], padding=(1, 0, 0)).transpose(1, 2)
    _close(found, outputs["output"])


def test_diffusers_unet_runs_from_the_files(
    pipe: SVDPipeline, reference: Trace, diffusers: Any, tmp_path: Path
) -> None:
    inputs, outputs, weights = _files(pipe, reference, "unet", tmp_path, 1)
    assert set(weights) == set(diffusers.unet.state_dict())
    found = diffusers.unet(
        inputs["model_input"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        inputs["added_time_ids"],
        return_dict=False,
    )[0]
    _close(found, torch.cat([outputs["noise_pred_uncond"], outputs["noise_pred_cond"]]))


def test_every_stage_gives_what_the_reference_has(pipe: SVDPipeline, reference: Trace, tmp_path: Path) -> None:
    from svdlab.svd.stages import STAGES

    for stage in STAGES:
        inputs, outputs, weights = _files(pipe, reference, stage.name, tmp_path, 1)
        assert bool(weights) == bool(stage.network)
        assert bool(inputs) == (stage.name not in ("time_ids", "sigmas", "guidance_ramp"))
        if stage.name == "condition":
            continue
        assert set(outputs) == set(stage.writes)
        for name, tensor in outputs.items():
            right = reference[f"{name}.001" if stage.per_step else name]
            if stage.name == "to_8bit":  # a value between two levels falls to either
                assert float((tensor - right).abs().max()) <= 1
            else:
                _close(tensor.expand_as(right), right, CHAIN)
        if stage.name == "euler_step":
            _close(inputs["latents"], reference["latents.000"], CHAIN)
            slope = (inputs["next_sigma"] - inputs["sigma"]) / inputs["sigma"]
            removed = (outputs["latents"] - inputs["latents"]) / slope  # latents - denoised
            c = inputs["sigma"] ** 2 + 1
            expected = inputs["latents"] - inputs["latents"] / c + inputs["sigma"] / c.sqrt() * inputs["noise_pred"]
            _close(removed, expected, CHAIN)


def test_decoder_and_chunks(pipe: SVDPipeline, photo: Any, tmp_path: Path) -> None:
    chunked = capture(pipe, photo, SETTINGS.replace(decode_chunk_size=2))
    made = make_bundles(pipe, "vae.decoder.conv_in", chunked)[0]
    assert made.calls == 2 and made.outputs["output"].shape[1] == 2
    assert "It ran 2 times there" in made.readme("")
    inputs, outputs, weights = _files(pipe, chunked, "vae.decoder", tmp_path)
    assert all(key.startswith("decoder.") for key in weights)
    _close(outputs["frames"], chunked["frames"], CHAIN)


def test_a_pattern_gives_a_folder_for_each(pipe: SVDPipeline, reference: Trace, tmp_path: Path) -> None:
    bundles = make_bundles(pipe, "unet.mid_block.resnets.?", reference)
    folders = write_bundles(bundles, tmp_path / "all", "")
    assert [f.name for f in folders] == ["unet.mid_block.resnets.0", "unet.mid_block.resnets.1"]
    assert all({p.name for p in f.iterdir()} >= {"README.md", "inputs.safetensors"} for f in folders)


def test_the_pipeline_is_left_as_it_was(pipe: SVDPipeline, reference: Trace) -> None:
    make_bundles(pipe, "unet.conv_in", reference)
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    assert "condition" not in vars(pipe.unet)


def test_command(
    tiny: Path, reference: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = tmp_path / "resnet", tmp_path / "bundle.json"
    name, model = "unet.down_blocks.0.resnets.0", ["--model", str(tiny)]
    given = [name, str(reference.path), "--out", str(out), "--step", "1"]
    code, text, err = run(capsys, monkeypatch, "bundle", *given, *model, "--json", str(result))
    assert code == 0, err
    assert f"{out}: 2 inputs, 1 outputs" in text
    about = json.loads(result.read_text())["bundles"]
    assert [(b["name"], b["step"], b["inputs"]) for b in about] == [(name, 1, ["hidden_states", "temb"])]
    readme = (out / "README.md").read_text()
    assert readme.startswith(f"# {name} at denoising step 1\n")
    assert "| `hidden_states` | (2, 3, 32, 8, 8) | batch, frame, channel, height, width | float32 |" in readme
    assert "| `spatial_res_block.norm1` | group norm of each frame, 32 groups, eps 1e-06 |" in readme
    key = "down_blocks.0.resnets.0.spatial_res_block.conv1.weight"
    assert f"| `{key}` | `spatial_res_block.conv1.weight` | (32, 32, 3, 3) | float32 |" in readme
    with safe_open(out / "weights.safetensors", "pt") as file:
        assert file.metadata() == {"prefix": "down_blocks.0.resnets.0."}
    code, _, err = run(capsys, monkeypatch, "bundle", *given, *model)
    assert code == 2 and "is there already" in err
    for what, step, expected in (
        ("unet.nothing", "0", "allowed: a stage"),
        ("unet.nothing*", "0", "names no module"),
        (name, "2", "step: got 2, allowed: 0 to 1"),
    ):
        code, _, err = run(
            capsys,
            monkeypatch,
            "bundle",
            what,
            str(reference.path),
            "--out",
            str(tmp_path / "x"),
            "--step",
            step,
            *model,
        )
        assert code == 2 and expected in err


def test_another_model_is_refused(reference: Trace, tmp_path: Path) -> None:
    other = SVDPipeline.from_pretrained(write_random_checkpoint(tmp_path / "other", seed=5))
    with pytest.raises(SvdlabError, match="image_embeddings is .* away from what this model gives"):
        make_bundles(other, "unet.conv_in", reference)
