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
from svdlab.svd.checkpoint import checkpoint_folder, load_components
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
    ],
)
def test_damaged_configs(copy: Path, name: str, text: str, message: str) -> None:
    (copy / name).write_text(text)
    with pytest.raises(SvdlabError, match=message) as error:
        load_components(copy)
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SvdlabError, match="is no diffusers checkpoint: model_index.json is missing"):
        checkpoint_folder(tmp_path)
    with pytest.raises(SvdlabError, match="is no folder, allowed: a folder, owner/name, embedded"):
        checkpoint_folder(tmp_path / "nowhere")


def test_a_hub_name_with_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        SvdlabError, match="model: 'svdlab-nobody/nothing' is no folder and the hub did not give it"
    ) as error:
        checkpoint_folder("svdlab-nobody/nothing")
    assert "\n" not in str(error.value)


def test_the_embedded_checkpoint_loads() -> None:
    assert load_components().unet.config.num_frames >= 1
