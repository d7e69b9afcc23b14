"""Damaged traces: a comparison or a diagnosis that holds, or an error in a line, in time and in memory."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import damage_bytes, damage_json, fuzz
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from svdlab.errors import SvdlabError
from svdlab.parity.candidate import capture
from svdlab.parity.compare import Comparison, compare
from svdlab.parity.diagnose import diagnose
from svdlab.parity.trace import METADATA_KEY, Trace
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.settings import GenerationSettings

SMALL = GenerationSettings(height=16, width=16, num_frames=2, num_inference_steps=2)
VALUES = (0.0, 1.0, -1.0, 1e-30, 1e-200, 1e38, 1e200, 1e308, float("nan"), float("inf"), -float("inf"))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
NAMES = (
    *("frames", "sigmas", "latents.000", "latents.001", "latents.999999999", "latents.0000", "latents.٠٠١", "x", ""),
    *("unet.conv_in.000", "unet.conv_in", "vae.decoder.conv_in", "image_encoder.visual_projection", "__metadata__"),
    *("\x1b[31mred\x1b[0m", "[/x]", "a\nb", "a\0b", "n" * 100_000, "unet." + "down_blocks.0." * 1000),
)


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def double(tiny: Path) -> SVDPipeline:
    return SVDPipeline.from_pretrained(tiny, dtype=torch.float64)


@pytest.fixture(scope="module")
def traces(
    pipe: SVDPipeline, double: SVDPipeline, photo: Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A reference, a truth, and a port that is at parity; "wrong" is one that is not."""
    folder = tmp_path_factory.mktemp("fuzz")
    taps = ["unet.conv_in", "vae.decoder.conv_in", "image_encoder.visual_projection"]
    reference = capture(pipe, photo.resize((24, 24)), SMALL, taps=taps, optional=True)
    made = {
        "reference": reference,
        "candidate": reference,
        "truth": capture(double, settings=SMALL.replace(dtype="float64"), replay=reference, taps=taps, optional=True),
        "wrong": capture(pipe.with_bugs("fps_not_decremented"), settings=SMALL, replay=reference),
    }
    return {name: _saved(trace, folder / f"{name}.safetensors") for name, trace in made.items()}


def _saved(trace: Trace, path: Path) -> Path:
    trace.save(path)
    return path


def damaged(chance: random.Random, source: Path, target: Path, tensors: float = 0.5) -> Path:
    """A trace with damaged bytes, a damaged table, damaged metadata, or, with a probability, other tensors."""
    data = source.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    table: dict[str, Any] = json.loads(data[8:end])
    way = 3 if chance.random() < tensors else chance.randrange(3)
    if way == 0:
        target.write_bytes(damage_bytes(chance, data, chance.choice((1, 3))))
    elif way <= 2:
        if way == 1:
            table = damage_json(chance, table, chance.choice((1, 2)))
        else:
            metadata = damage_json(chance, json.loads(table["__metadata__"][METADATA_KEY]), chance.choice((1, 2)))
            text = json.dumps(metadata)
            table["__metadata__"][METADATA_KEY] = chance.choice((text, text, text[:-1], "[" * 5000, "9" * 5000))
        header = json.dumps(table).encode("utf-8", "surrogatepass")
        target.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    else:
        held, metadata = load_file(source), table["__metadata__"]
        header = json.loads(metadata[METADATA_KEY])
        for _ in range(chance.choice((1, 1, 3))):
            _change_a_tensor(chance, held, header["order"])
        save_file(held, target, metadata={METADATA_KEY: json.dumps(header)})
    return target


def _change_a_tensor(chance: random.Random, held: dict[str, torch.Tensor], order: list[str]) -> None:
    name = chance.choice(sorted(held))
    tensor = held[name].clone()
    way = chance.randrange(6)
    if way == 0 and tensor.numel():  # an earlier change may have left none
        tensor = tensor.double()
        tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice(VALUES)
        tensor = tensor.to(chance.choice((held[name].dtype, torch.float64)))
    elif way == 1:
        tensor = tensor.double().fill_(chance.choice(VALUES)).to(chance.choice(DTYPES[:4]))
    elif way == 2:
        tensor = tensor.to(chance.choice(DTYPES))
    elif way == 3:
        shape = chance.choice(([], [0], [1], [tensor.numel()], [*tensor.shape, 1], list(tensor.shape)[::-1]))
        tensor = tensor.reshape(shape) if torch.Size(shape).numel() == tensor.numel() else torch.ones(shape)
    elif way == 4:
        tensor = tensor * chance.choice((1 + 1e-6, 1.1, -1, 1e30))
    if way == 5:
        del held[name]
        if (other := chance.choice(NAMES)) != "__metadata__":
            held[other] = tensor
            if chance.random() < 0.8 and name in order:  # an earlier change may have left it out
                order[order.index(name) : order.index(name) + 1] = [other] if other not in order else []
    else:
        held[name] = tensor.contiguous()


def check(result: Comparison) -> None:
    """What a comparison says of itself holds, and it can be shown."""
    if result.verdict == "parity":
        assert all(p.ratio <= result.threshold and not p.non_finite for p in result.probes)
    json.loads(result.to_json(), parse_constant=lambda text: pytest.fail(f"{text} in the JSON"))
    shown = io.StringIO()
    Console(file=shown, width=200).print(result.table(every=True))
    assert all(line.isprintable() for line in shown.getvalue().split("\n"))


def test_compare(traces: dict[str, Path], tmp_path: Path) -> None:
    def damaged_traces_through_compare(chance: random.Random) -> None:
        role = chance.choice(("candidate", "candidate", "reference", "truth"))
        paths = {**traces, role: damaged(chance, traces[role], tmp_path / "damaged.safetensors")}
        opened = {name: Trace.open(path) for name, path in paths.items()}
        check(compare(opened["reference"], opened["candidate"], chance.choice((opened["truth"], None))))

    tally = fuzz(damaged_traces_through_compare)
    assert sum(tally.values()) < 300 or min(tally["accepted"], tally["refused"]) > 30


def test_diagnose(pipe: SVDPipeline, traces: dict[str, Path], tmp_path: Path) -> None:
    def damaged_traces_through_diagnose(chance: random.Random) -> None:
        role = chance.choice(("candidate", "wrong", "reference"))
        path = damaged(chance, traces[role], tmp_path / "damaged.safetensors", tensors=0.9)
        opened = {name: Trace.open(path) for name, path in {**traces, role: path}.items()}
        # A trace that no bug explains has hundreds of sets to try: 25 s on a slow core, were it not for the limit.
        port = opened[role if role == "wrong" else "candidate"]
        found = diagnose(opened["reference"], port, pipe=pipe, seconds=5)
        check(found.comparison)
        json.dumps(found.to_dict(), allow_nan=False)
        assert found.summary() and found.to_junit()

    tally = fuzz(damaged_traces_through_diagnose, cases=8)
    assert sum(tally.values()) < 8 or tally["accepted"] > 0


@pytest.mark.parametrize("value", [1e200, 1e-200])
@pytest.mark.parametrize("function", ["compare", "diagnose"])
def test_values_whose_squares_no_float_holds_are_no_parity(
    double: SVDPipeline, photo: Image.Image, function: str, value: float
) -> None:
    trace = capture(double, photo, SMALL.replace(dtype="float64"))
    latents = torch.full((1, 2, 4, 2, 2), value, dtype=torch.float64)
    one, two = (
        Trace({**trace, "latents.001": latents * times}, trace.settings, "port", dtype="float64") for times in (1, 3)
    )
    reason = "large" if value > 1 else "small"
    with pytest.raises(SvdlabError, match=rf"latents\.001: values too {reason} to compare"):
        compare(one, two) if function == "compare" else diagnose(one, two, pipe=double)
