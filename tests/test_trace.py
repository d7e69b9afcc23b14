"""The trace file: what is written comes back, what is no trace is refused in a line, memory stays bounded."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.parity import taps as tapping
from svdlab.parity.digests import DIGESTS
from svdlab.parity.probes import (
    CONDITIONING,
    EVERY_SHAPE,
    FRAMES,
    INPUTS,
    PER_STEP,
    SHAPES,
    STEP,
    execution_key,
    is_optional,
    probe_of,
)
from svdlab.parity.trace import DTYPES, FORMAT, METADATA_KEY, Trace
from svdlab.parity.writer import TraceWriter, versions_of_run
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=16, width=24, num_frames=3, num_inference_steps=2)
DOCS = Path(__file__).parents[1] / "docs" / "trace-format.md"


def tensors(dtype: torch.dtype = torch.float32, settings: GenerationSettings = SETTINGS) -> dict[str, Tensor]:
    """Random tensors of every probe, guided, one image, in a deliberately wrong order."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "B": 1,
        "V": 1,
        "G": 2,
        "H0": 20,
        "W0": 30,
        "H": 16,
        "W": 24,
        "F": 3,
        "L": 4,
        "2L": 8,
        "h": 2,
        "w": 3,
    }
    sizes |= {"P": 8, "D": 5, "S": 2, "S+1": 3}
    shapes = {**INPUTS, **CONDITIONING, **FRAMES}
    shapes |= {f"{name}.{k:03d}": shape for name, shape in STEP.items() for k in range(2)}
    shapes["unet.conv_in.000"] = ("G", "F", "D", "h", "w")
    shapes["image_encoder.visual_projection"] = ("B", "D")
    return {
        name: torch.randn([sizes.get(d, d) for d in shape], generator=generator).to(dtype)
        for name, shape in reversed(shapes.items())
    }


def write(path: Path, held: dict[str, Tensor] | None = None, **header: Any) -> Path:
    """A file made with the safetensors library alone, parts of its metadata replaced or left out (None)."""
    held = tensors() if held is None else held
    known = [name for name in held if probe_of(name) or tapping.split(name)]
    good = {
        "format": 1,
        "implementation": "port",
        "implementation_version": "0.1",
        "dtype": "float32",
        "settings": json.loads(SETTINGS.to_json()),
        "order": [*sorted(known, key=execution_key), *(name for name in held if name not in known)],
    }
    metadata = {k: v for k, v in {**good, **header}.items() if v is not None}
    save_file({k: v.contiguous() for k, v in held.items()}, path, metadata={METADATA_KEY: json.dumps(metadata)})
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trace_comes_back_from_disk(tmp_path: Path, dtype: str) -> None:
    held = tensors(DTYPES[dtype])
    held["sigmas"] = held["sigmas"].float()  # dtypes are mixed in one file
    held["guidance_scale"] = held["guidance_scale"].double()
    known = {"digests": {"inputs": "0f" * 32}, "versions": {"port": "1.2", "torch": "2"}}
    made = Trace(held, SETTINGS, "port", implementation_version="1.2", dtype=dtype, **known)
    path = tmp_path / "t.safetensors"
    back = made.save(path)
    assert (back.settings, back.dtype, back.implementation) == (SETTINGS, dtype, "port")
    assert back.implementation_version == "1.2"
    assert (back.digests, back.versions) == (known["digests"], known["versions"])
    assert list(back) == sorted(held, key=execution_key)
    for name, tensor in held.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    assert torch.equal(load_file(path)["latents.001"], held["latents.001"])
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_data_is_aligned_for_readers_that_map_the_file(tmp_path: Path) -> None:
    held = {
        "added_time_ids": torch.ones(1, 3).half(),
        "sigmas": torch.ones(3).double(),
        "timesteps": torch.ones(2),
    }
    path = tmp_path / "t.safetensors"
    Trace(held, SETTINGS, "port").save(path)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in held.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_execution_order() -> None:
    names = [
        "input.latents",
        "image_encoder.visual_projection",
        "image_embeddings",
        "vae.encoder.conv_in",
        "image_latents",
    ]
    names += [
        "guidance_scale",
        "model_input.000",
        "unet.conv_in.000",
        "noise_pred_uncond.000",
        "noise_pred.000",
    ]
    names += [
        "latents.000",
        "model_input.001",
        "unet.conv_out.001",
        "noise_pred.001",
        "vae.decoder.conv_in",
        "frames",
    ]
    assert sorted(reversed(names), key=execution_key) == names


def test_optional_probes_have_their_places() -> None:
    names = ["sigmas", "guidance_scale", "latents.init", "model_input.000", "unet.conv_in.000", "noise_pred.000"]
    names += ["denoised.000", "latents.000", "model_input.001", "denoised.001", "latents.001", "frames", "frames_8bit"]
    assert sorted(reversed(names), key=execution_key) == names
    assert {name for name in names if is_optional(name)} == {
        "latents.init",
        "denoised.000",
        "denoised.001",
        "frames_8bit",
    }


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("latents.init", (1, 3, 4, 2, 2), r"latents\.init: shape \(1, 3, 4, 2, 2\), allowed: \(1, 3, 4, 2, 3\)"),
        ("denoised.001", (1, 4, 3, 2, 3), r"denoised\.001: shape .* allowed: \(1, 3, 4, 2, 3\)"),
        ("denoised.002", (1, 3, 4, 2, 3), r"denoised\.002: step 2"),
        ("denoised", (1, 3, 4, 2, 3), "'denoised': neither a probe nor a tap"),
        ("frames_8bit", (1, 3, 16, 24, 3), r"frames_8bit: shape .* allowed: \(1, 3, 3, 16, 24\)"),
    ],
)
def test_optional_probes_are_checked(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    good = {"latents.init": (1, 3, 4, 2, 3), "denoised.001": (1, 3, 4, 2, 3), "frames_8bit": (1, 3, 3, 16, 24)}
    held = tensors() | {probe: torch.ones(size) for probe, size in good.items()}
    path = tmp_path / "t.safetensors"
    assert list(Trace.open(write(path, held))) == sorted(held, key=execution_key)
    order = sorted(held, key=execution_key)
    i = order.index("denoised.001")
    with pytest.raises(SvdlabError, match=r"denoised\.001 after latents\.001, allowed: execution order"):
        Trace.open(write(path, held, order=[*order[:i], order[i + 1], order[i], *order[i + 2 :]]))
    with pytest.raises(SvdlabError, match=message):
        Trace.open(write(path, held | {name: torch.ones(shape)}))


def replaced(**changes: Tensor | None) -> dict[str, Tensor]:
    held = {**tensors(), **{k.replace("__", "."): v for k, v in changes.items()}}
    return {k: v for k, v in held.items() if v is not None}


def shuffled(first: str, second: str) -> list[str]:
    order = sorted(tensors(), key=execution_key)
    i, j = order.index(first), order.index(second)
    order[i], order[j] = order[j], order[i]
    return order


def edited(path: Path, before: str, after: str) -> None:
    """A trace with the first of a text in its safetensors header replaced."""
    raw = write(path).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].decode()
    assert before in header
    changed = header.replace(before, after, 1).encode("utf-8", "surrogateescape")
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[end:])


def sparse(path: Path, length: int) -> None:
    """A file that claims a header of so many bytes, and is as large, without taking room on the disk."""
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + length)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


NAN = torch.full((1, 3, 4, 2, 3), float("nan"))
GARBAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (lambda p: None, "no such file"),
    "not safetensors": (
        lambda p: p.write_bytes(b"PK\x03\x04 a zip or a pickle"),
        "not a whole safetensors file",
    ),
    "empty file": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "truncated": (lambda p: p.write_bytes(write(p).read_bytes()[:-5]), "not a whole safetensors file"),
    "truncated header": (
        lambda p: p.write_bytes(write(p).read_bytes()[:100]),
        "not a whole safetensors file",
    ),
    "a folder": (lambda p: p.mkdir(), "no regular file, allowed: a safetensors file"),
    "a pipe": (lambda p: os.mkfifo(p), "no regular file, allowed: a safetensors file"),
    "a header that ends nowhere": (
        lambda p: p.write_bytes(b"\xff" * 8 + write(p).read_bytes()[8:]),
        "with a header of 18446744073709551615",
    ),
    "a large header": (lambda p: sparse(p, 2**27), "a header of 134217728 bytes, allowed: at most"),
    "header no text": (lambda p: edited(p, "F32", "F\udc80"), "not text in UTF-8"),
    "deep header": (lambda p: edited(p, "[", "[" * 90_000), "nested deeper than"),
    "long number": (lambda p: edited(p, "[1,", f"[{'1' * 5000},"), "a number of over"),
    "huge shape": (lambda p: edited(p, "[1,", "[1000000000,"), "bytes for F32 of shape (10000"),
    "a tensor twice": (lambda p: edited(p, '"input.image":', '"input.noise":'), "stands twice"),
    "a hole": (lambda p: edited(p, '"data_offsets":[0,', '"data_offsets":[4,'), "of the data, allowed: from 0"),
    "more data": (lambda p: p.write_bytes(write(p).read_bytes() + b"\0"), "36805 bytes of data, allowed: 36804"),
    "deep metadata": (lambda p: write(p, digests=nested(50)), "JSON nested deeper than 32 levels"),
    "NaN in settings": (lambda p: write(p, settings={"fps": math.nan}), "got the number 'NaN', allowed: finite"),
    "many steps": (
        lambda p: write(p, settings={**json.loads(SETTINGS.to_json()), "num_inference_steps": 10**8}),
        "settings: num_inference_steps: got 100000000, allowed: integer >= 1, <= 1000",
    ),
    "other digits": (lambda p: write(p, replaced(**{"latents.٠٠١": torch.ones(1)})), "neither a probe nor a tap"),
    "more digits": (lambda p: write(p, replaced(latents__0001=torch.ones(1))), "'latents.0001': neither"),
    "a name that a terminal obeys": (
        lambda p: write(p, replaced(**{"\x1b[31mred\x1b[0m" * 10**5: torch.ones(1)})),
        "neither a probe nor a tap",
    ),
    "no trace": (lambda p: save_file({"w": torch.ones(2)}, p), "not a trace"),
    "metadata no JSON": (lambda p: save_file(tensors(), p, metadata={METADATA_KEY: "{"}), "'svdlab.trace': not JSON"),
    "other version": (lambda p: write(p, format=2), "trace format version 2, allowed: 1"),
    "no version": (lambda p: write(p, format=None), "trace format version None"),
    "no implementation": (lambda p: write(p, implementation=None), "implementation is missing"),
    "dtype": (lambda p: write(p, dtype="int8"), "dtype: got 'int8', allowed: float64"),
    "no settings": (lambda p: write(p, settings=None), "settings is missing"),
    "bad settings": (lambda p: write(p, settings={"fps": 0}), "settings: fps"),
    "unresolved": (lambda p: write(p, settings={}), "settings: height is null"),
    "digests": (lambda p: write(p, digests=["ab"]), "digests: got list, allowed: an object"),
    "unknown digest": (lambda p: write(p, digests={"input": "ab" * 32}), "allowed: checkpoint, inputs"),
    "short digest": (lambda p: write(p, digests={"inputs": "ab"}), "digests: inputs: got 'ab', allowed: 64"),
    "no digest": (lambda p: write(p, digests={"inputs": 1}), "digests: inputs: got 1, allowed: 64"),
    "versions": (lambda p: write(p, versions={"torch": 2}), "versions: got something else, allowed: an object of"),
    "empty trace": (lambda p: write(p, {}), "empty trace"),
    "no order": (lambda p: write(p, order=None), "order is missing"),
    "order leaves out": (lambda p: write(p, order=["sigmas"]), "order: leaves out"),
    "order names more": (
        lambda p: write(p, order=[*sorted(tensors()), "frames.x"]),
        "frames.x, which is not in the file",
    ),
    "order twice": (lambda p: write(p, order=["sigmas", "sigmas"]), "order: sigmas is listed twice"),
    "order of steps": (
        lambda p: write(p, order=shuffled("latents.000", "latents.001")),
        "allowed: execution order",
    ),
    "unknown probe": (
        lambda p: write(p, replaced(latent=torch.ones(1))),
        "'latent': neither a probe nor a tap",
    ),
    "unknown tap": (lambda p: write(p, replaced(unet__nothing=torch.ones(1))), "'unet.nothing': neither"),
    "step without zeros": (lambda p: write(p, replaced(latents__1=torch.ones(1))), "'latents.1': neither"),
    "too many steps": (
        lambda p: write(p, replaced(latents__002=torch.ones(1, 3, 4, 2, 3))),
        "latents.002: step 2",
    ),
    "flattened frames": (
        lambda p: write(p, replaced(latents__001=torch.ones(3, 4, 2, 3))),
        "latents.001: shape (3, 4,",
    ),
    "frames last": (
        lambda p: write(p, replaced(frames=torch.ones(1, 3, 3, 24, 16))),
        "frames: shape (1, 3, 3, 24, 16), allowed: (1, 3, 3, 16, 24)",
    ),
    "sigma count": (lambda p: write(p, replaced(sigmas=torch.ones(2))), "sigmas: shape (2,), allowed: (3,)"),
    "videos": (
        lambda p: write(p, replaced(image_latents=torch.ones(2, 4, 2, 3))),
        "image_latents: shape (2,",
    ),
    "integers": (lambda p: write(p, replaced(sigmas=torch.ones(3, dtype=torch.int64))), "sigmas: dtype I64"),
    "NaN": (lambda p: write(p, replaced(latents__001=NAN)), "latents.001: 72 of 72 values are NaN"),
    "infinity": (
        lambda p: write(p, replaced(latents__001=NAN.nan_to_num(float("inf")))),
        "latents.001: 72 of 72",
    ),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_one_line_that_names_the_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.safetensors"
    make, message = GARBAGE[case]
    make(path)
    with pytest.raises(SvdlabError) as error:
        dict(Trace.open(path))
    text = str(error.value)
    assert message in text and str(path) in text and text.isprintable() and len(text) <= 1000, text


def test_a_tensor_loads_when_it_is_asked_for(tmp_path: Path) -> None:
    trace = Trace.open(write(tmp_path / "t.safetensors", replaced(latents__001=NAN)))
    assert trace.shape("latents.001") == (1, 3, 4, 2, 3)
    assert trace["latents.000"].shape == (1, 3, 4, 2, 3)
    with pytest.raises(SvdlabError, match=r"latents\.001"):
        trace["latents.001"]
    with pytest.raises(KeyError):
        trace["latents.007"]


def test_a_trace_that_is_truncated_while_it_is_open(tmp_path: Path) -> None:
    """Of a file that is mapped into memory the process would die."""
    trace = Trace.open(write(tmp_path / "t.safetensors"))
    os.truncate(tmp_path / "t.safetensors", 5000)
    with pytest.raises(SvdlabError, match=r"t\.safetensors: changed by another process"):
        dict(trace)


def test_a_trace_that_is_written_anew_while_it_is_open(tmp_path: Path) -> None:
    trace = Trace.open(write(tmp_path / "t.safetensors"))
    with (tmp_path / "t.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\0" * 100)
    with pytest.raises(SvdlabError, match=r"t\.safetensors: changed by another process"):
        dict(trace)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(SvdlabError, match=r"a\\x00b\.safetensors: no such file"):
        Trace.open("a\0b.safetensors")


class Counted(str):
    """A name that counts how often it is compared with another one."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_opening_a_trace_is_linear_in_its_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SVD-XT with all taps has 19,000: a search through a list for each would take 180 million comparisons."""
    held = {f"unet.down_blocks.{i}.resnets.0.000": torch.ones(1, 3, 1, 1, 1) for i in range(1000)}
    path = write(tmp_path / "t.safetensors", held)
    read = Trace._read_header
    monkeypatch.setattr(Trace, "_read_header", lambda self, given: tuple(map(Counted, read(self, given))))
    Counted.compared = 0
    trace = Trace.open(path)
    assert len(trace.taps) == 1000 and trace.probes == ()
    assert trace.shape("unet.down_blocks.999.resnets.0.000") == (1, 3, 1, 1, 1)
    assert Counted.compared < 20 * len(held)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_capture_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"the run before")
    with pytest.raises(error), TraceWriter(SETTINGS, "port", path=path) as writer:
        writer.put("sigmas", torch.ones(3))
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert path.read_bytes() == b"the run before"


def test_memory_is_bounded_by_one_tensor(tmp_path: Path) -> None:
    settings = SETTINGS.replace(num_inference_steps=24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with TraceWriter(settings, "port", path=tmp_path / "t.safetensors") as writer:
        for step in range(24):
            tensor = torch.full((1, 3, 4, 256, 512), float(step))
            alive = weakref.ref(tensor)
            writer.put(f"latents.{step:03d}", tensor)
            del tensor
            assert alive() is None, "the writer keeps the tensor"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert (tmp_path / "t.safetensors").stat().st_size > 144 * 2**20
    assert grown < 64, f"{grown:.0f} MiB for 144 MiB of trace in tensors of 6 MiB"
    assert float(writer.trace["latents.023"].min()) == 23


@pytest.mark.parametrize("to_file", [False, True])
def test_parts_are_joined(tmp_path: Path, to_file: bool) -> None:
    clips = torch.randn(2, 3, 4, 2, 2)
    with TraceWriter(SETTINGS, "port", path=tmp_path / "t.safetensors" if to_file else None) as writer:
        for part in clips.flatten(0, 1).split(2):
            writer.extend("vae.decoder.conv_in", part, frames=3)
        writer.extend("unet.conv_in.000", clips[:1])
        writer.extend("unet.conv_in.000", clips[1:].transpose(-1, -2))  # not contiguous
    assert torch.equal(writer.trace["vae.decoder.conv_in"], clips)
    assert torch.equal(writer.trace["unet.conv_in.000"], torch.cat([clips[:1], clips[1:].transpose(-1, -2)]))


def test_a_trace_in_memory_does_not_alias_the_run() -> None:
    tensor = torch.ones(3)
    with TraceWriter(SETTINGS, "port") as writer:
        writer.put("sigmas", tensor)
        tensor.zero_()
    assert writer.trace["sigmas"].sum() == 3


def test_a_probe_is_recorded_once() -> None:
    with pytest.raises(SvdlabError, match="sigmas: recorded twice"), TraceWriter(SETTINGS, "port") as writer:
        writer.put("sigmas", torch.ones(3))
        writer.put("sigmas", torch.ones(3))


@pytest.mark.parametrize(
    ("name", "layout", "split"),
    [
        ("unet.conv_in.000", None, ("unet.conv_in", 0)),
        ("unet.down_blocks.0.resnets.0.012", None, ("unet.down_blocks.0.resnets.0", 12)),
        ("unet.down_blocks.0.resnets.0", "activation", None),
        (
            "unet.up_blocks.1.attentions.2.time_pos_embed",
            "positions",
            ("unet.up_blocks.1.attentions.2.time_pos_embed", None),
        ),
        ("unet.add_embedding", "vector", ("unet.add_embedding", None)),
        ("vae.decoder.up_blocks.3.resnets.2.temporal_res_block", "activation", None),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", None, None),
        ("vae.encoder.conv_in.000", None, None),
    ],
)
def test_tap_names(name: str, layout: str | None, split: tuple[str, int | None] | None) -> None:
    assert tapping.layout_of(name) == layout
    if split or layout is None:
        assert tapping.split(name) == split


def documented() -> str:
    return DOCS.read_text()


def test_the_documented_example_is_a_trace(tmp_path: Path) -> None:
    block = re.search(r"<!-- example -->\s*```json\n(.*?)```", documented(), re.S)
    assert block, "docs/trace-format.md shows a real header"
    example = json.loads(block[1])
    settings = GenerationSettings.from_json(json.dumps(example["settings"]))
    assert set(example) == {*TraceWriter(SETTINGS, "port").header(), "digests", "versions", "scheduler"}
    assert set(example["digests"]) == set(DIGESTS) and set(example["versions"]) == set(versions_of_run())
    assert set(example["settings"]) == set(GenerationSettings.model_fields)
    sizes = {"B": 1, "V": 1, "G": 2, "H0": 9, "W0": 9, "P": 224, "D": 32, "L": 4, "2L": 8, "h": 8, "w": 8}
    sizes |= {"F": settings.num_frames, "H": settings.height, "W": settings.width, "S": 1, "S+1": 2}
    held = {}
    for name in example["order"]:
        base, _ = probe_of(name) or ("", 0)
        held[name] = torch.ones([sizes.get(d, d) for d in SHAPES[base]])
    path = tmp_path / "example.safetensors"
    save_file(held, path, metadata={METADATA_KEY: json.dumps(example)})
    assert list(Trace.open(path)) == example["order"]


def test_every_probe_is_documented_with_its_shape() -> None:
    text = documented()
    for name, shape in EVERY_SHAPE.items():
        shown = f"{name}.NNN" if name in PER_STEP else name
        spec = ", ".join(str(d) for d in shape) + ("," if len(shape) == 1 else "")
        assert f"| `{shown}` | ({spec}) |" in text, f"{shown} ({spec})"
    assert f"`{METADATA_KEY}`" in text and f'"format": {FORMAT}' in text


def test_the_documented_writer_works(tmp_path: Path) -> None:
    """The page's own few lines of code, which use nothing of svdlab."""
    block = re.search(r"<!-- writer -->\s*```python\n(.*?)```", documented(), re.S)
    assert block and "svdlab" not in re.sub(r"svdlab\.trace", "", block[1])
    scope: dict[str, Any] = {}
    exec(block[1], scope)  # noqa: S102
    held = {name: (tuple(t.shape), t.numpy().tobytes()) for name, t in tensors().items() if "." not in name}
    header = json.loads(
        json.dumps({**TraceWriter(SETTINGS, "port").header(), "order": sorted(held, key=execution_key)})
    )
    scope["write_trace"](tmp_path / "t.safetensors", header, held)
    trace = Trace.open(tmp_path / "t.safetensors")
    for name in held:
        assert torch.equal(trace[name], tensors()[name])
