"""Loading: folders, shards, variants, and every kind of damage named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdlab.errors import SvdlabError
from svdlab.svd.checkpoint import checkpoint_path, load_components
from svdlab.svd.random_checkpoint import write_random_checkpoint

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def _edit(path: Path, change: Callable[[dict], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def test_diffusers_loads_what_svdlab_writes(tiny: Path) -> None:
    from diffusers import StableVideoDiffusionPipeline

    pipe = StableVideoDiffusionPipeline.from_pretrained(tiny)
    own = load_components(tiny)
    for name in ("unet", "vae", "image_encoder"):
        expected = getattr(pipe, name).state_dict()
        state = getattr(own, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_seed_gives_the_same_checkpoint(tiny: Path, tmp_path: Path) -> None:
    again = write_random_checkpoint(tmp_path / "again")
    other = write_random_checkpoint(tmp_path / "other", seed=1)
    assert (again / UNET).read_bytes() == (tiny / UNET).read_bytes() != (other / UNET).read_bytes()


def test_shards_and_variants(copy: Path) -> None:
    expected = load_components(copy).unet.state_dict()
    state = load_file(copy / UNET)
    (copy / UNET).unlink()
    keys = sorted(state)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({k: state[k] for k in part}, copy / "unet" / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(v, expected[k]) for k, v in load_components(copy).unet.state_dict().items())

    with pytest.raises(SvdlabError, match=r"diffusion_pytorch_model.fp16.safetensors: missing"):
        load_components(copy, variant="fp16")
    save_file({k: v.half() for k, v in state.items()}, copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    for name in ("vae/diffusion_pytorch_model", "image_encoder/model"):
        whole = load_file(copy / f"{name}.safetensors")
        save_file({k: v.half() for k, v in whole.items()}, copy / f"{name}.fp16.safetensors")
    half = load_components(copy, dtype=torch.float16, variant="fp16")
    assert half.unet.conv_in.weight.dtype == torch.float16


def test_an_old_position_ids_buffer_is_no_weight(copy: Path) -> None:
    path = copy / "image_encoder/model.safetensors"
    _edit(path, lambda s: s.update({"vision_model.embeddings.position_ids": torch.arange(50)[None]}))
    load_components(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("conv_in.bias"),
            r"diffusion_pytorch_model.safetensors: weight 'conv_in.bias' is missing \(1 in all",
        ),
        (lambda s: s.update(extra=torch.zeros(1)), "weight 'extra' has no place in this architecture"),
        (
            lambda s: s.update({"conv_in.bias": torch.zeros(31)}),
            r"weight 'conv_in.bias' has shape \(31,\), the config wants \(32,\)",
        ),
    ],
)
def test_missing_extra_and_misshapen_weights_are_named(copy: Path, change: Callable, message: str) -> None:
    _edit(copy / UNET, change)
    with pytest.raises(SvdlabError, match=message) as error:
        load_components(copy)
    assert "\n" not in str(error.value)


def test_damaged_and_pickled_files(copy: Path) -> None:
    whole = (copy / UNET).read_bytes()
    (copy / UNET).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        SvdlabError, match="diffusion_pytorch_model.safetensors: not a readable safetensors file"
    ) as error:
        load_components(copy)
    assert "\n" not in str(error.value)
    (copy / UNET).unlink()
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SvdlabError, match=r"there is diffusion_pytorch_model.bin\).*never a pickle"):
        load_components(copy)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("unet/config.json", "{", "unet/config.json: not JSON"),
        ("unet/config.json", "[]", "unet/config.json: holds a list, allowed: a JSON object"),
        (
            "unet/config.json",
            '{"class_embed_type": "x"}',
            "unet/config.json: option 'class_embed_type' is not implemented",
        ),
        ("vae/config.json", '{"block_out_channels": [33]}', "vae/config.json: block_out_channels: got 33"),
        (
            "feature_extractor/preprocessor_config.json",
            "{}",
            "preprocessor_config.json: image_mean is missing",
        ),
        (
            "scheduler/scheduler_config.json",
            '{"foo": 1}',
            "scheduler_config.json: option 'foo' is not implemented",
        ),
        ("unet/config.json", '{"in_channels": 4}', "do not belong together"),
        ("unet/config.json", "[" * 100_000, "unet/config.json: JSON nested deeper than 32"),
        ("unet/config.json", '{"num_frames": %s}' % ("9" * 5000), "JSON with a number of over 400 digits"),
        ("unet/config.json", '{"num_frames": 1e999}', "got the number '1e999', allowed: finite numbers"),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline"}', "pipeline 'StableDiffusionPipeline' is not"),
        ("model_index.json", "[]", "model_index.json: holds a list"),
    ],
)
def test_damaged_configs(copy: Path, name: str, text: str, message: str) -> None:
    (copy / name).write_text(text)
    with pytest.raises(SvdlabError, match=message) as error:
        load_components(copy)
    assert "\n" not in str(error.value)


FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "clip": "image_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "pixels": "feature_extractor/preprocessor_config.json",
}
LEVELS = "or a list with one for each level"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clip", {"image_size": "x"}, "image_size: got 'x', allowed: a valid integer"),
        ("clip", {"patch_size": 0}, "patch_size: got 0, allowed: greater than or equal to 1"),
        ("clip", {"patch_size": 225}, "patch_size: got 225, allowed: at most image_size, 224"),
        (
            "clip",
            {"num_hidden_layers": 1_000_000},
            "num_hidden_layers: got 1000000, allowed: less",
        ),
        ("clip", {"num_attention_heads": 0}, "num_attention_heads: got 0, allowed: greater"),
        (
            "clip",
            {"layer_norm_eps": float("nan")},
            "got the number 'NaN', allowed: finite numbers",
        ),
        ("clip", {"layer_norm_eps": -1.0}, "layer_norm_eps: got -1.0, allowed: greater than 0"),
        ("clip", {"num_channels": 4}, "num_channels: got 4, allowed: 3"),
        (
            "clip",
            {"projection_dim": 16},
            "cross_attention_dim 32 and image_encoder projection_dim 16",
        ),
        (
            "unet",
            {"num_attention_heads": 0.0},
            f"heads: got 0.0, allowed: an integer from 1 to 65536, {LEVELS}",
        ),
        (
            "unet",
            {"layers_per_block": None},
            f"block: got None, allowed: an integer from 1 to 16, {LEVELS}",
        ),
        ("unet", {"layers_per_block": [1, True]}, "layers_per_block: got (1, True), allowed: an integer"),
        (
            "unet",
            {"transformer_layers_per_block": [[1], 1]},
            "got 1 depths for a level, allowed: at least 2",
        ),
        (
            "unet",
            {"transformer_layers_per_block": 16, "layers_per_block": 16},
            "makes 1056 transformer layers with layers_per_block, allowed: at most 512",
        ),
        ("unet", {"block_out_channels": []}, "block_out_channels: got (), allowed"),
        ("unet", {"block_out_channels": "32"}, "block_out_channels: got '32', allowed: a valid tuple"),
        ("unet", {"num_frames": 10**6}, "num_frames: got 1000000, allowed: less than or equal to 10000"),
        ("unet", {"x" * 10_000: 1}, "is not implemented; known: addition_time_embed_dim"),
        ("vae", {"layers_per_block": [2]}, "layers_per_block: got (2,), allowed: a valid integer"),
        ("vae", {"force_upcast": 1}, "force_upcast: got 1, allowed: a valid boolean"),
        ("vae", {"scaling_factor": 0}, "scaling_factor: got 0, allowed: greater than or equal to 0.001"),
        (
            "scheduler",
            {"sigma_max": 1e39},
            "sigma_min, sigma_max: got 0.002, 1e+39, allowed: 0 <",
        ),
        ("scheduler", {"use_karras_sigmas": 1}, "use_karras_sigmas: got 1, allowed"),
        ("pixels", {"image_mean": [0.5, 0.5]}, "image_mean.2 is missing"),
        ("pixels", {"image_std": [0.5, 0, 0.5]}, "image_std.1: got 0, allowed: greater"),
    ],
)
def test_an_option_of_another_type_or_size_is_refused(copy: Path, name: str, change: dict, message: str) -> None:
    options = json.loads((copy / FILES[name]).read_text())
    (copy / FILES[name]).write_text(json.dumps({**options, **change}))
    with pytest.raises(SvdlabError) as error:
        load_components(copy)
    assert message in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 800


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused(copy: Path, dtype: torch.dtype) -> None:
    _edit(copy / UNET, lambda state: state.update({"conv_in.bias": torch.zeros(32).to(dtype)}))
    with pytest.raises(SvdlabError, match=r"weight 'conv_in.bias' is \w+, allowed: F64, F32, F16, BF16"):
        load_components(copy)


def test_a_bad_index_is_refused(copy: Path) -> None:
    state = load_file(copy / UNET)
    (copy / UNET).unlink()
    save_file(state, copy / "unet/a.safetensors")
    save_file({"conv_in.bias": state["conv_in.bias"]}, copy / "unet/b.safetensors")
    for weight_map, message in (
        ({"conv_in.weight": "a.safetensors", "conv_in.bias": "b.safetensors"}, "weight 'conv_in.bias' is in another"),
        ({"x": "../a.safetensors"}, "weight_map: got '../a.safetensors', allowed: *.safetensors beside it"),
        ({"x": "a.bin"}, "weight_map: got 'a.bin', allowed: *.safetensors beside it"),
        ({"x": 1}, "weight_map.x: got 1, allowed: a valid string"),
        ({}, "weight_map: got {}, allowed: "),
        (None, "weight_map: got None, allowed: "),
    ):
        (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        with pytest.raises(SvdlabError) as error:
            load_components(copy)
        assert message in str(error.value)


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SvdlabError, match="is no diffusers checkpoint: model_index.json is missing"):
        checkpoint_path(tmp_path)
    with pytest.raises(SvdlabError, match="is no folder, allowed: a folder, owner/name, embedded"):
        checkpoint_path(tmp_path / "nowhere")


def test_a_hub_name_with_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        SvdlabError, match="model: 'svdlab-nobody/nothing' is no folder and the hub did not give it"
    ) as error:
        checkpoint_path("svdlab-nobody/nothing")
    assert "\n" not in str(error.value)


def test_the_embedded_checkpoint_loads() -> None:
    assert load_components().unet.config.num_frames >= 1


def test_the_embedded_checkpoint_has_no_revisions() -> None:
    with pytest.raises(SvdlabError, match="revision: got 'v2', allowed: none with embedded"):
        checkpoint_path("embedded", revision="v2")
