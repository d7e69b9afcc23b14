"""Damaged checkpoints: a checkpoint loads and makes a clip, or is refused in a line, in time and in memory."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzzing import damage_bytes, damage_json, fuzz
from safetensors.torch import load_file, save_file
from sparse import sparse_file

from svdlab.parity.digests import checkpoint_digest
from svdlab.samples import sample_picture
from svdlab.svd.convert import convert
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.random_checkpoint import write_random_checkpoint
from svdlab.svd.settings import GenerationSettings
from svdlab.tensors import TensorFile

INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
TEXTS = (
    *("unet/config.json", "vae/config.json", "image_encoder/config.json"),
    *("scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json", "model_index.json", INDEX),
)
WEIGHTS = ("unet/a.safetensors", "vae/diffusion_pytorch_model.safetensors", "image_encoder/model.safetensors")
SMALL = GenerationSettings(height=32, width=32, num_frames=2, num_inference_steps=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint smaller than the tiny one, its UNet in two files."""
    folder = write_random_checkpoint(
        tmp_path_factory.mktemp("fuzz") / "sharded",
        unet={"block_out_channels": (32, 32), "num_attention_heads": (2, 2)},
        vae={"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 1},
        image_encoder={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    )
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    names = {key: ("a", "b")[n % 2] + ".safetensors" for n, key in enumerate(sorted(state))}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, folder / "unet" / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    whole.unlink()
    return folder


def damaged_weights(chance: random.Random, data: bytes) -> bytes:
    """A safetensors file with a damaged header, or with damaged bytes."""
    size = int.from_bytes(data[:8], "little")
    way = chance.randrange(4)
    if way == 0:
        return damage_bytes(chance, data, chance.choice((1, 3)))
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    if way == 1:  # one tensor alone, which safetensors itself would not refuse
        entry = header[chance.choice([key for key in header if key != "__metadata__"])]
        entry["dtype"] = chance.choice({"F32": ("I32", "U32"), "F16": ("I16",)}.get(entry["dtype"], ("I64", "C64")))
    else:
        header = damage_json(chance, header, chance.choice((1, 2)))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in one file."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_random_checkpoint(
        folder / "folder",
        unet={"block_out_channels": (32, 32), "num_attention_heads": (2, 2)},
        vae={"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
        image_encoder={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    )
    return convert(folder / "folder", folder / "one.safetensors").target


def test_damaged_single_files(single: Path, tmp_path: Path) -> None:
    file, path = TensorFile(single), tmp_path / "damaged.safetensors"
    shapes = {name: list(entry.shape) for name, entry in file.entries.items()}
    held = json.loads(file.metadata["svdlab.config"])

    def single_files(chance: random.Random) -> None:
        """Names and shapes that are in themselves a file, or options that are in themselves JSON."""
        damaged, options = dict(shapes), held
        way = chance.randrange(4)
        for name in chance.sample(list(damaged), chance.choice((1, 2, 10))) if way < 2 else ():
            part = chance.choice(name.split("."))
            if way == 0:
                names = [other for other in damaged if part in other.split(".")]
                damaged = {other: damaged[other] for other in damaged if other not in names}
            else:
                damaged[name] = chance.choice(([], [0], [7] * 5, damaged[name][::-1], [s * 64 for s in damaged[name]]))
        if way == 2:
            options = damage_json(chance, held, chance.choice((1, 2)))
        if way == 3:
            path.write_bytes(damage_bytes(chance, single.read_bytes(), 1))
        else:
            metadata = {"svdlab.config": json.dumps(options)}
            sparse_file(path, {name: tuple(shape) for name, shape in damaged.items()}, "F32", metadata)
        if chance.random() < 0.3:
            checkpoint_digest(path)
        SVDPipeline.from_pretrained(path)

    tally = fuzz(single_files, cases=100, memory=4 * single.stat().st_size)
    assert tally.total() < 50 or min(tally["accepted"], tally["refused"]) > tally.total() // 20


def test_damaged_checkpoints(sharded: Path, tmp_path: Path) -> None:
    picture = sample_picture("embedded")
    size = sum(path.stat().st_size for path in sharded.rglob("*") if path.is_file())
    folder = tmp_path / "damaged"
    shutil.copytree(sharded, folder, copy_function=lambda a, b: Path(b).symlink_to(a))

    def checkpoints(chance: random.Random) -> None:
        name = chance.choice(TEXTS * 3 + WEIGHTS)
        (folder / name).unlink()
        try:
            damage_and_use(name, (sharded / name).read_bytes(), chance)
        finally:
            (folder / name).unlink()
            (folder / name).symlink_to(sharded / name)

    def damage_and_use(name: str, data: bytes, chance: random.Random) -> None:
        if name.endswith(".safetensors"):
            (folder / name).write_bytes(damaged_weights(chance, data))
        elif chance.random() < 0.15:
            (folder / name).write_bytes(damage_bytes(chance, data, chance.choice((1, 3))))
        else:
            changed = damage_json(chance, json.loads(data), chance.choice((1, 1, 2, 4)))
            (folder / name).write_text(json.dumps(changed, ensure_ascii=chance.random() < 0.5))
        if chance.random() < 0.3:
            checkpoint_digest(folder)
        pipe = SVDPipeline.from_pretrained(folder)
        if chance.random() < 0.1:
            pipe.generate(picture, SMALL)

    # What the first one makes stays: threads, caches, modules.
    SVDPipeline.from_pretrained(sharded).generate(picture, SMALL)
    tally = fuzz(checkpoints, cases=300, memory=4 * size)
    assert tally.total() < 50 or min(tally["accepted"], tally["refused"]) > tally.total() // 10
