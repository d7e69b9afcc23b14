"""A port's own files, under any names and in any layout, become a trace; what is ambiguous or wrong is refused."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image
from planted import planted
from safetensors.torch import save_file
from torch import Tensor

from svdlab.errors import SvdlabError
from svdlab.parity.compare import compare
from svdlab.parity.foreign import Source, expand
from svdlab.parity.importers import Entry, Map, import_trace, letters_of
from svdlab.parity.probes import CONDITIONING, FRAMES, INPUTS, SHAPES, STEP, probe_of
from svdlab.parity.proposals import Proposal, named, propose
from svdlab.parity.trace import Trace
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=32, width=48, num_frames=3, num_inference_steps=2)
SIZES = {"B": 1, "V": 1, "G": 2, "H0": 20, "W0": 30, "H": 32, "W": 48, "F": 3, "L": 4, "2L": 8, "h": 4, "w": 6}
SIZES |= {"P": 8, "D": 5, "S": 2, "S+1": 3}


def values(settings: GenerationSettings = SETTINGS, **sizes: int) -> dict[str, Tensor]:
    """Random tensors of every probe, guided."""
    steps = {"S": settings.num_steps, "S+1": settings.num_steps + 1}
    known = {**SIZES, **sizes, **steps, "F": settings.num_frames or 0}
    generator = torch.Generator().manual_seed(0)
    shapes = {**INPUTS, **CONDITIONING, **FRAMES}
    shapes |= {f"{name}.{k:03d}": shape for name, shape in STEP.items() for k in range(settings.num_steps)}
    return {n: torch.randn([known.get(d, d) for d in shape], generator=generator) for n, shape in shapes.items()}


@pytest.fixture
def reference(tmp_path: Path) -> Trace:
    return Trace(values(), SETTINGS, "diffusers").save(tmp_path / "reference.safetensors")


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    folder = tmp_path / "dump"
    folder.mkdir()
    return folder


def imported(folder: Path, reference: Trace, text: str) -> Trace:
    """What a map makes of a folder."""
    return import_trace([folder], reference, Map.parse(text), folder.parent / "imported.safetensors").trace


def permuted(tensor: Tensor, have: str, want: str) -> np.ndarray:
    return tensor.permute([have.index(axis) for axis in want]).contiguous().numpy()


LAYOUTS = ("NFCHW", "NFHWC", "NCFHW", "NHWFC", "NCHWF", "FNCHW", "CFHWN", "WHCFN")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(reference: Trace, dump: Path, layout: str) -> None:
    for step in range(2):
        np.save(dump / f"x_{step:02}.npy", permuted(reference[f"latents.00{step}"], "NFCHW", layout))
    trace = imported(dump, reference, f'[probes.latents]\nfile = "x_{{step:02}}.npy"\nlayout = "{layout}"')
    assert trace.probes == ("latents.000", "latents.001")
    for name in trace.probes:
        assert torch.equal(trace[name], reference[name])


@pytest.mark.parametrize(
    ("layout", "make"),
    [
        ("NCHW", lambda t: t.flatten(0, 1)),
        ("NHWC", lambda t: t.flatten(0, 1).movedim(1, -1)),
        ("CNHW", lambda t: t.flatten(0, 1).transpose(0, 1)),
    ],
)
def test_frames_folded_into_the_batch(
    tmp_path: Path, dump: Path, layout: str, make: Callable[[Tensor], Tensor]
) -> None:
    reference = Trace(values(B=2, V=2, G=4), SETTINGS, "diffusers")
    np.save(dump / "x.npy", make(reference["model_input.001"]).contiguous().numpy())
    trace = imported(dump, reference, f'[probes."model_input.001"]\nlayout = "{layout}"\nframes_in_batch = true')
    assert torch.equal(trace["model_input.001"], reference["model_input.001"])


def test_axes_left_out_and_axes_of_one(reference: Trace, dump: Path) -> None:
    np.save(dump / "f.npy", permuted(reference["frames"], "NFCHW", "FHWCN")[..., 0])
    np.save(dump / "e.npy", reference["image_embeddings"][0, 0].numpy())
    np.save(dump / "g.npy", reference["guidance_scale"].reshape(1, 3, 1, 1, 1).numpy())
    np.save(dump / "l.npy", torch.stack([reference[f"latents.00{k}"][0] for k in range(2)], dim=-1).numpy())
    trace = imported(
        dump,
        reference,
        """
        [probes]
        frames = { file = "f.npy", layout = "FHWC" }
        image_embeddings = { file = "e.npy", layout = "C" }
        guidance_scale = { file = "g.npy", layout = "NF111" }
        latents = { file = "l.npy", layout = "FCHWS" }
        """,
    )
    assert len(trace) == 5
    for name in trace:
        assert torch.equal(trace[name], reference[name]), name


def test_embeddings_repeated_for_every_frame(reference: Trace, dump: Path) -> None:
    one = reference["image_embeddings"]
    np.save(dump / "e.npy", torch.cat([torch.zeros_like(one), one]).repeat_interleave(3, 0).numpy())
    np.save(dump / "l.npy", reference["image_latents"].unsqueeze(1).expand(-1, 3, -1, -1, -1).numpy())
    text = """
        [probes]
        image_embeddings = { file = "e.npy", layout = "NTC", frames_in_batch = true, guidance = "both" }
        image_latents = { file = "l.npy", layout = "NFCHW" }
        """
    trace = imported(dump, reference, text)
    for name in ("image_embeddings", "image_latents"):
        assert torch.equal(trace[name], reference[name])
    uneven = reference["image_latents"].unsqueeze(1).repeat(1, 3, 1, 1, 1)
    uneven[0, 2, 0, 0, 0] += 1e-6
    np.save(dump / "l.npy", uneven.numpy())
    with pytest.raises(SvdlabError, match="l.npy: as image_latents: its frames are not equal"):
        imported(dump, reference, text)


@pytest.mark.parametrize("guidance", ["both", "cond_first"])
def test_halves_of_the_guidance_in_one_tensor(reference: Trace, dump: Path, guidance: str) -> None:
    def halves(uncond: Tensor, cond: Tensor) -> np.ndarray:
        return torch.cat([uncond, cond] if guidance == "both" else [cond, uncond]).numpy()

    pred = [reference[f"noise_pred_{half}.001"] for half in ("uncond", "cond")]
    np.save(dump / "p1.npy", halves(*pred))
    np.save(dump / "m1.npy", halves(*reference["model_input.001"].chunk(2)))
    trace = imported(
        dump,
        reference,
        f"""
        [probes]
        noise_pred_uncond = {{ file = "p{{step}}.npy", guidance = "{guidance}" }}
        noise_pred_cond = {{ file = "p{{step}}.npy", guidance = "{guidance}" }}
        model_input = {{ file = "m{{step}}.npy", guidance = "{guidance}" }}
        """,
    )
    assert len(trace) == 3
    for name in trace:
        assert torch.equal(trace[name], reference[name]), name


def test_halves_of_the_guidance_in_two_tensors(reference: Trace, dump: Path) -> None:
    uncond, cond = reference["model_input.000"].chunk(2)
    save_file({"u/1": uncond.contiguous(), "c/1": cond.contiguous()}, dump / "x.safetensors")
    trace = imported(
        dump,
        reference,
        '[probes.model_input]\nguidance = "separate"\nfirst_step = 1\n'
        'uncond = { tensor = "u/{step}" }\ncond = { tensor = "c/{step}" }',
    )
    assert torch.equal(trace["model_input.000"], reference["model_input.000"])


@pytest.mark.parametrize(("range_", "scale", "offset"), [("0..1", 0.5, 0.5), ("0..255", 127.5, 127.5)])
def test_frames_in_another_range(reference: Trace, dump: Path, range_: str, scale: float, offset: float) -> None:
    np.save(dump / "f.npy", (reference["frames"].double() * scale + offset).numpy())
    for how in (f'range = "{range_}"', f"scale = {1 / scale}\noffset = {-offset / scale}"):
        trace = imported(dump, reference, f"[probes.frames]\n{how}")
        torch.testing.assert_close(trace["frames"].double(), reference["frames"].double(), rtol=0, atol=1e-12)


def test_a_source_in_8_bit_levels(dump: Path) -> None:
    held = values()
    levels = torch.randint(0, 256, (1, 3, 20, 30), dtype=torch.uint8)
    held["input.source"] = levels.float() / 255
    np.save(dump / "s.npy", levels.numpy())
    reference = Trace(held, SETTINGS, "diffusers")
    trace = imported(dump, reference, '[probes."input.source"]\nrange = "0..255"')
    torch.testing.assert_close(trace["input.source"].float(), held["input.source"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_every_kind_of_file(reference: Trace, dump: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    tensor = reference["latents.000"].to(kind)
    (dump / "x.bin").write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    save_file({"x": tensor}, dump / "x.safetensors")
    entries = {
        "x.bin": f'dtype = "{dtype}"\nshape = [1, 3, 4, 4, 6]',
        "x.safetensors": 'tensor = "x"',
    }
    if dtype != "bfloat16":
        np.savez(dump / "x.npz", x=tensor.numpy(), other=np.zeros(3))
        np.save(dump / "x.npy", np.asfortranarray(tensor.numpy()))
        np.save(dump / "big.npy", tensor.numpy().astype(tensor.numpy().dtype.newbyteorder(">")))
        entries |= {"x.npz": 'tensor = "x"', "x.npy": "", "big.npy": ""}
    for file, more in entries.items():
        trace = imported(dump, reference, f'dtype = "{dtype}"\n[probes."latents.000"]\nfile = "{file}"\n{more}')
        assert trace["latents.000"].dtype == kind and torch.equal(trace["latents.000"], tensor), file
        assert trace.dtype == trace.settings.dtype == dtype


def test_taps_and_integers(reference: Trace, dump: Path) -> None:
    activation = torch.randn(2, 3, 7, 2, 3)
    np.save(dump / "unet.conv_in_0.npy", activation.movedim(2, -1).flatten(0, 1).numpy())
    np.save(dump / "ids.npy", np.array([[6, 127, 1]]))
    trace = imported(
        dump,
        reference,
        """
        [probes]
        "unet.conv_in" = { file = "unet.conv_in_{step}.npy", layout = "NHWC", frames_in_batch = true }
        added_time_ids = { file = "ids.npy" }
        """,
    )
    assert torch.equal(trace["unet.conv_in.000"], activation)
    assert trace["added_time_ids"].tolist() == [[6.0, 127.0, 1.0]]


def test_letters_of_every_probe() -> None:
    assert {letters_of(name) for name in SHAPES if probe_of(f"{name}.000")} == {"NFCHW"}
    assert letters_of("input.clip_pixels") == letters_of("image_latents") == letters_of("input.source") == "NCHW"
    assert letters_of("image_embeddings") == "NTC" and letters_of("guidance_scale") == "NF"
    assert letters_of("sigmas") == "S" and letters_of("added_time_ids") == "NC"
    assert letters_of("unet.conv_in") == "NFCHW" and letters_of("image_encoder.visual_projection", False) == "NC"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[probes", "m.toml: not TOML"),
        ("[probes]", "m.toml: probes is empty, allowed: a table for each probe"),
        ('dtype = "int8"\n[probes]', "m.toml: dtype: got 'int8', allowed: float64, float32"),
        ("[probes.latent]", "probes.latent: neither a probe nor a tap"),
        ("[probes.latents]\nfle = 'x'", "probes.latents.fle: no such field, allowed: file, tensor, layout"),
        ("[probes.latents]\nlayout = 'NXC'", "probes.latents.layout: got 'NXC', allowed: axes out of NFCHWTS1"),
        ("[probes.latents]\nlayout = 'NNC'", "where N stands twice, allowed: once"),
        ("[probes.latents]\nguidance = 'both'", "probes.latents: guidance: got 'both', allowed: none"),
        ("[probes.latents]\nrange = '0..1'", "range: allowed for input.source, input.image, frames"),
        ("[probes.latents]\nlayout = 'NFCHW'\nframes_in_batch = true", "allowed: with an N and without an F"),
        ("[probes.frames]\nrange = '0..1'\nscale = 2.0", "range: not together with scale and offset"),
        ("[probes.frames]\nfile = 'x{step}.npy'", "{step} in 'x{step}.npy', allowed: in a probe of every step"),
        ("[probes.latents]\nfile = 'x.npy'", "probes.latents: a tensor of every step, allowed: {step} in file"),
        ("[probes.latents]\nfile = 'y{step}.npy'", "file 'y0.npy' is none of the files given, allowed: one of"),
        ("[probes.'latents.007']\nfile = 'x.npy'", "latents.007: step 7, allowed: 0 to 1"),
        ("[probes.'latents.000']\nfile = 'x.npy'\nlayout = 'NFHWC'", "allowed: (1, 3, 4, 4, 6)"),
        (
            "[probes.'latents.000']\nfile = 'x.npy'\nlayout = 'NCHW'",
            "x.npy: as latents.000: shape (1, 3, 4, 4, 6) has 5",
        ),
        ("[probes.'latents.000']\nfile = 'x.npy'\ntensor = 'x'", "tensor 'x', allowed: none, the file holds one"),
        ("[probes.'latents.000']\nfile = 'o.npy'", "o.npy: not a whole .npy file of numbers"),
        ("[probes.'latents.000']\nfile = 'c.npy'", "c.npy: dtype complex64, allowed: float64, float32"),
        ("[probes.'latents.000']\nfile = 'x.bin'", "x.bin: a .bin file says nothing about itself"),
        ("[probes.'latents.000']\nfile = 'x.bin'\ndtype = 'float32'\nshape = [3]", "x.bin: 8 bytes, allowed: 12"),
        ("[probes.latents]", "probes.latents: a tensor of every step"),
        ("[probes.frames]", "probes.frames: file is missing, allowed: one of the"),
    ],
)
def test_bad_maps_are_refused_in_a_line_and_nothing_is_written(
    reference: Trace,
    dump: Path,
    text: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.save(dump / "x.npy", reference["latents.000"].numpy())
    np.save(dump / "c.npy", np.zeros(3, np.complex64))
    (dump / "x.bin").write_bytes(bytes(8))
    if "o.npy" in text:
        np.save(dump / "o.npy", np.array([{}]), allow_pickle=True)
    map_path, out = dump.parent / "m.toml", dump.parent / "out.safetensors"
    map_path.write_text(text)
    assert reference.path is not None
    before = sorted(dump.parent.rglob("*"))
    code, printed, err = run(
        capsys, monkeypatch, "import", str(dump), "--reference", str(reference.path),
        "--map", str(map_path), "--out", str(out),
    )  # fmt: skip
    assert code == 2 and not printed and err.count("\n") == 1 and err.startswith("error: ") and message in err
    assert sorted(dump.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out: is missing, allowed: the trace to write, or --propose"),
        (["--out", "o.safetensors", "--propose", "m.toml"], "--propose: not together with --out"),
        (["--propose", "m.toml", "--map", "n.toml"], "--propose: not together with --map"),
        (["--out", "nowhere/o.safetensors"], "nowhere is no folder that can be written"),
        (["--out", "o.safetensors", "--map", "none.toml"], "none.toml: cannot be read as a map (No such file"),
        (["--out", "o.safetensors"], "no tensor can be told without a map, allowed: --map (x.npy: left out: neither"),
    ],
)
def test_options_that_make_no_import(
    tmp_path: Path,
    reference: Trace,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((7, 7)))
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, monkeypatch, "import", "x.npy", "--reference", "reference.safetensors", *arguments)
    assert code == 2 and not out and err.count("\n") == 1 and message in err, err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["nowhere.npy"], "nowhere.npy: no such file, allowed: .npy, .npz, .bin, .safetensors, or a folder"),
        (["x.pt"], "x.pt: suffix '.pt', allowed: .npy"),
        (["empty"], "empty: no file to read in this folder"),
        (["cut.npz"], "cut.npz: not a whole .npz file"),
        (["cut.safetensors"], "cut.safetensors: not a whole safetensors file"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, reference: Trace, files: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("x.pt", "cut.npz", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(SvdlabError) as caught:
        import_trace(files, reference, Map.parse("[probes.frames]"), tmp_path / "o.safetensors")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "packed.npz", "x.safetensors"])
def test_broken_files_are_refused_whatever_is_broken(tmp_path: Path, name: str) -> None:
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array, y=array)
    np.savez_compressed(tmp_path / "packed.npz", x=array, y=array)
    save_file({"x": torch.tensor(array), "y": torch.tensor(array)}, tmp_path / "x.safetensors")
    data, generator = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / f"broken{Path(name).suffix}", 0
    for _ in range(300):
        broken = bytearray(data)
        for place in generator.integers(0, len(data), size=3):
            broken[place] = generator.integers(256)
        path.write_bytes(broken[: generator.integers(len(data))] if generator.random() < 0.3 else broken)
        try:
            source = Source(path)
            for key in source.keys:
                source.load(key)
        except SvdlabError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 50


def test_a_file_among_the_arrays_that_is_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("readme.txt", "no array")
    with pytest.raises(SvdlabError, match="x.npz: readme.txt: no array"):
        Source(tmp_path / "x.npz").load("readme.txt")


def write_as_a_port_would(trace: Trace, folder: Path) -> None:
    """Channels last, foreign names, folded frames, both halves in one tensor, frames in [0, 1]."""
    folder.mkdir()
    for step in range(trace.settings.num_steps):
        for name, file in (("latents", "x_t"), ("noise_pred", "eps"), ("model_input", "unet_in")):
            np.save(folder / f"{file}_{step + 1}.npy", trace[f"{name}.{step:03d}"].movedim(2, -1).numpy())
        halves = [trace[f"noise_pred_{half}.{step:03d}"] for half in ("cond", "uncond")]
        np.save(folder / f"unet_out_{step + 1}.npy", torch.cat(halves).movedim(2, -1).flatten(0, 1).numpy())
    np.save(folder / "clip.npy", trace["image_embeddings"].expand(-1, trace.settings.num_frames or 1, -1).numpy())
    np.save(folder / "vae.npy", trace["image_latents"].movedim(1, -1)[0].numpy())
    np.save(folder / "ids.npy", trace["added_time_ids"][0].numpy())
    np.save(folder / "video.npy", (trace["frames"][0].movedim(1, -1) / 2 + 0.5).numpy())


MAP = """
implementation = "a port"

[probes]
latents = { file = "x_t_{step}.npy", layout = "NFHWC", first_step = 1 }
noise_pred = { file = "eps_{step}.npy", layout = "NFHWC", first_step = 1 }
model_input = { file = "unet_in_{step}.npy", layout = "NFHWC", first_step = 1 }
image_embeddings = { file = "clip.npy", layout = "NFC" }
image_latents = { file = "vae.npy", layout = "HWC" }
added_time_ids = { file = "ids.npy", layout = "C" }
frames = { file = "video.npy", layout = "FHWC", range = "0..1" }

[probes.noise_pred_cond]
file = "unet_out_{step}.npy"
layout = "NHWC"
frames_in_batch = true
guidance = "cond_first"
first_step = 1

[probes.noise_pred_uncond]
file = "unet_out_{step}.npy"
layout = "NHWC"
frames_in_batch = true
guidance = "cond_first"
first_step = 1
"""


@pytest.fixture(scope="module")
def traces(tiny: Path, photo: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace]:
    """diffusers on a random checkpoint, and svdlab on the same inputs."""
    from svdlab.parity.candidate import capture
    from svdlab.parity.reference import capture_diffusers, load_diffusers
    from svdlab.svd.pipeline import SVDPipeline

    folder = tmp_path_factory.mktemp("traces")
    settings = GenerationSettings(height=64, width=96, num_frames=3, num_inference_steps=2)
    pipe = load_diffusers(tiny, torch.float32, "cpu")
    reference = capture_diffusers(pipe, photo, settings, path=folder / "reference.safetensors")
    port = capture(SVDPipeline.from_pretrained(tiny), replay=reference, path=folder / "port.safetensors")
    return reference, port


def test_a_folder_of_channels_last_arrays_with_foreign_names_reaches_parity(
    traces: tuple[Trace, Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, port = traces
    write_as_a_port_would(port, tmp_path / "dump")
    (tmp_path / "map.toml").write_text(MAP)
    out, found = tmp_path / "port.safetensors", tmp_path / "found.json"
    code, printed, _ = run(
        capsys, monkeypatch, "import", str(tmp_path / "dump"), "--reference", str(reference.path),
        "--map", str(tmp_path / "map.toml"), "--out", str(out), "--json", str(found),
    )  # fmt: skip
    assert code == 0 and "14 probes, 0 taps, a port float32" in printed and "not used" not in printed
    trace = Trace.open(out)
    assert json.loads(found.read_text())["probes"] == list(trace.probes)
    assert set(trace.probes) == {n for n in port.probes if not n.startswith("input.")} - {
        "sigmas", "timesteps", "guidance_scale",
    }  # fmt: skip
    for name in trace.probes:
        if name != "frames":
            assert torch.equal(trace[name], port[name]), name
    assert compare(reference, trace).verdict == "parity"
    code, printed, _ = run(capsys, monkeypatch, "compare", str(reference.path), str(out))
    assert code == 0
    # The same files with two of them exchanged are not at parity: the import does not make them fit.
    first, second = (tmp_path / "dump" / f"x_t_{step}.npy" for step in (1, 2))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    wrong = import_trace([tmp_path / "dump"], reference, Map.parse(MAP), out).trace
    assert compare(reference, wrong).first_divergence == "latents.000"


def test_the_bugs_of_a_port_are_named_from_its_folder_of_arrays(
    tiny: Path, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs planted in diffusers, foreign names, channels last: through the two commands, with nothing else given."""
    from svdlab.parity.reference import capture_diffusers, load_diffusers

    pipe = load_diffusers(tiny, torch.float32, "cpu")
    settings = GenerationSettings(height=32, width=48, num_frames=3, num_inference_steps=2)
    reference = capture_diffusers(pipe, photo, settings, path=tmp_path / "reference.safetensors")
    bugs = ["fps_not_decremented", "image_latents_scaled", "c_skip_with_square_root", "alpha_swapped_vae"]
    out, found = tmp_path / "port.safetensors", tmp_path / "found.json"
    (tmp_path / "map.toml").write_text(MAP)
    for there, verdict in ((bugs, "explained"), ([], "parity")):
        with planted(pipe, *there):
            write_as_a_port_would(capture_diffusers(pipe, replay=reference), folder := tmp_path / verdict)
        command = ("import", str(folder), "--reference", str(reference.path), "--map", str(tmp_path / "map.toml"))
        assert run(capsys, monkeypatch, *command, "--out", str(out))[0] == 0
        command = ("diagnose", str(reference.path), str(out), "--model", str(tiny), "--json", str(found))
        code, printed, _ = run(capsys, monkeypatch, *command)
        assert json.loads(found.read_text())["verdict"] == verdict and code == bool(there), printed
        written = json.loads(found.read_text())
        assert sorted(written["bugs"]) == sorted(there), printed


def proposed(folder: Path, reference: Trace) -> Proposal:
    return propose([Source(path) for path in expand([folder])], reference)


def test_a_map_is_proposed_for_foreign_names_by_values(
    traces: tuple[Trace, Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder as with a map, without one: everything is found, everything recognised is said."""
    reference, port = traces
    write_as_a_port_would(port, tmp_path / "dump")
    out, map_path, found = tmp_path / "port.safetensors", tmp_path / "m.toml", tmp_path / "found.json"
    arguments = ["import", str(tmp_path / "dump"), "--reference", str(reference.path)]
    code, printed, _ = run(capsys, monkeypatch, *arguments, "--out", str(out), "--json", str(found))
    assert code == 0 and "left out" not in printed, printed
    said = json.loads(found.read_text())["guessed"]

    def of(file: str) -> str:
        return next(line for line in said if f"{file}: " in line)

    assert "noise_pred_uncond + noise_pred_cond.000 (layout NHWC, frames folded into the batch" in of("unet_out_1.npy")
    assert "the conditional one first" in of("unet_out_1.npy")
    assert "image_embeddings (layout NFC)" in of("clip.npy")
    assert "frames (layout FHWC, pixels in 0 to 1)" in of("video.npy")
    assert "latents.001 (layout NFHWC), by its values" in of("x_t_2.npy")
    trace = Trace.open(out)
    with_map = import_trace([tmp_path / "dump"], reference, Map.parse(MAP), tmp_path / "with_map.safetensors").trace
    assert trace.probes == with_map.probes
    for name in trace.probes:
        assert torch.equal(trace[name], with_map[name]), name
    # The map can be written, edited and given back.
    code, printed, _ = run(capsys, monkeypatch, *arguments, "--propose", str(map_path))
    assert code == 0 and map_path.read_text() in printed
    assert 'latents = { file = "x_t_{step}.npy", layout = "NFHWC", first_step = 1 }' in map_path.read_text()
    code, _, _ = run(capsys, monkeypatch, *arguments, "--map", str(map_path), "--out", str(out))
    assert code == 0 and Trace.open(out).probes == with_map.probes


def test_shuffled_tensors_of_equal_shape_are_never_misplaced(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    """Names that mean nothing: each is found by its values, or left out. Names that lie: none is believed."""
    reference, port = traces
    videos = [name for name in port.probes if port.shape(name) == port.shape("latents.000")]
    images = ["input.image", "input.noise"]
    for seed in range(8):
        generator = np.random.default_rng(seed)
        for lying in (False, True):
            folder = tmp_path / f"{seed}{lying}"
            folder.mkdir()
            truth = {}
            for group in (videos, images):
                order = generator.permutation(len(group))
                for place, name in enumerate(group):
                    source = group[order[place]]
                    file = name if lying else f"tensor{chr(97 + place)}{len(group)}"
                    # Noise of a port that is not at parity, on every other one.
                    noise = float(generator.choice([0, 1e-7, 1e-2, 0.3, 3]))
                    values = port[source] + noise * port[source].std() * torch.randn(port.shape(source))
                    layout = generator.choice(["NFCHW", "NFHWC", "NCFHW"]) if group is videos else "NCHW"
                    have = "NFCHW" if group is videos else "NCHW"
                    np.save(folder / f"{file}.npy", permuted(values, have, layout))
                    truth[f"{file}.npy"] = (source, layout, noise)
            found = proposed(folder, reference)
            for line in found.said:
                file = Path(line.split(": ")[0]).name
                source, layout, noise = truth[file]
                # With the values drowned in noise a lying name cannot be told.
                if not lying or noise <= 0.1:
                    assert f": {source} (layout {layout})" in line, (line, truth[file])
            if not lying:
                exact = {file for file, (_, _, noise) in truth.items() if noise <= 1e-7}
                assert exact <= {Path(line.split(": ")[0]).name for line in found.said}


def test_what_is_ambiguous_is_left_out_and_says_why(reference: Trace, dump: Path) -> None:
    np.save(dump / "a.npy", torch.randn(1, 3, 4, 4, 6).numpy())
    np.save(dump / "b.npy", (reference["input.latents"] * 700).numpy())
    np.save(dump / "latents_0.npy", reference["latents.001"].numpy())
    np.save(dump / "frames.npy", reference["frames"].abs().numpy())
    np.save(dump / "c.npy", torch.zeros(7, 7).numpy())
    np.save(dump / "image_latents.npy", torch.zeros(7).numpy())
    np.save(dump / "d.npy", reference["noise_pred.000"].numpy())
    np.save(dump / "e.npy", reference["noise_pred.000"].numpy())
    np.save(dump / "f.npy", np.full(3, np.nan, np.float32))
    (dump / "g.bin").write_bytes(bytes(8))
    found = proposed(dump, reference)
    assert not found.said and not found.mapping
    reasons = {Path(line.split(": ")[0]).name: line for line in found.left_out}
    assert len(reasons) == 10
    assert "its values are no probe's" in reasons["a.npy"]
    assert "those of input.latents times 700" in reasons["b.npy"]
    assert "its name says latents.000, its values are those of latents.001" in reasons["latents_0.npy"]
    assert "its name says frames, but frames (layout NFCHW)" in reasons["frames.npy"]
    assert "neither its name nor its shape" in reasons["c.npy"]
    assert "no known layout makes (1, 4, 4, 6) of its shape (7,)" in reasons["image_latents.npy"]
    assert "both look like noise_pred.000" in reasons["d.npy"] and "both look like" in reasons["e.npy"]
    assert "not finite" in reasons["f.npy"] and "says nothing about itself" in reasons["g.bin"]
    with pytest.raises(SvdlabError, match="no tensor can be told without a map"):
        found.map()


def test_frames_whose_range_cannot_be_told_are_left_out(tmp_path: Path, dump: Path) -> None:
    settings = SETTINGS.replace(num_frames=2)
    reference = Trace(values(settings), settings, "diffusers")
    for wrong in (reference["frames"].abs(), torch.rand(1, 2, 3, 32, 48) * 255):
        np.save(dump / "frames.npy", wrong.numpy())
        found = proposed(dump, reference)
        assert not found.said and "the range cannot be told from its values" in found.left_out[0]
    np.save(dump / "frames.npy", ((reference["frames"] + 0.05 * torch.randn(1, 2, 3, 32, 48)) * 127.5 + 127.5).numpy())
    assert "frames (layout NFCHW, pixels in 0 to 255)" in proposed(dump, reference).said[0]


def test_a_layout_that_sizes_do_not_tell_is_told_by_values_or_left_out(tmp_path: Path) -> None:
    """As many frames as channels: frames first or channels first?"""
    settings = SETTINGS.replace(num_frames=4)
    reference = Trace(values(settings), settings, "diffusers")
    for noise, expected in ((0.05, "latents.000 (layout NCFHW), by its name and values"), (5.0, None)):
        folder = tmp_path / str(noise)
        folder.mkdir()
        swapped = (reference["latents.000"] + noise * torch.randn(1, 4, 4, 4, 6)).transpose(1, 2)
        np.save(folder / "latents_0.npy", swapped.numpy())
        found = proposed(folder, reference)
        if expected is None:
            assert not found.said and "fit about as well" in found.left_out[0]
        else:
            assert expected in found.said[0]


def test_a_step_that_has_diverged_has_the_layout_of_the_others(tmp_path: Path, dump: Path) -> None:
    settings = SETTINGS.replace(num_frames=4)
    reference = Trace(values(settings), settings, "diffusers")
    held = [reference["latents.000"], torch.randn(1, 4, 4, 4, 6)]
    for step in range(2):
        np.save(dump / f"latents_{step}.npy", permuted(held[step], "NFCHW", "NCFHW"))
    found = proposed(dump, reference)
    assert "latents.001 (layout NCFHW), by its name, in the layout of other steps" in found.said[1]
    trace = import_trace([dump], reference, found.map(), tmp_path / "o.safetensors").trace
    assert torch.equal(trace["latents.001"], held[1])
    # Where the others do not agree, there is no layout to go by.
    settings = settings.replace(num_inference_steps=3)
    reference = Trace(values(settings), settings, "diffusers")
    for step, layout in enumerate(("NFCHW", "NCFHW")):
        np.save(dump / f"latents_{step}.npy", permuted(reference[f"latents.00{step}"], "NFCHW", layout))
    np.save(dump / "latents_2.npy", held[1].numpy())
    found = proposed(dump, reference)
    assert len(found.said) == 2 and "fit about as well" in found.left_out[0]


def test_a_step_that_is_nearer_to_another_step_is_left_out_and_no_pattern_takes_it_in(dump: Path) -> None:
    """Steps are alike: a port may count otherwise, or be wrong. The entries that are left are one by one."""
    settings = SETTINGS.replace(num_inference_steps=3)
    held = values(settings)
    held["latents.001"] = held["latents.000"] + 0.02 * torch.randn(1, 3, 4, 4, 6)
    reference = Trace(held, settings, "diffusers")
    for step in (0, 2):
        np.save(dump / f"latents_{step}.npy", reference[f"latents.00{step}"].numpy())
    np.save(dump / "latents_1.npy", (held["latents.000"] + 0.01 * torch.randn(1, 3, 4, 4, 6)).numpy())
    found = proposed(dump, reference)
    assert [Path(line.split(": ")[0]).name for line in found.said] == ["latents_0.npy", "latents_2.npy"]
    assert "its name says latents.001, its values are nearer to those of latents.000" in found.left_out[0]
    made = import_trace([dump], reference, found.map(), dump.parent / "o.safetensors")
    assert made.trace.probes == ("latents.000", "latents.002")
    assert [Path(label).name for label in made.unused] == ["latents_1.npy"]


def test_steps_that_the_files_do_not_have_are_said(reference: Trace, dump: Path) -> None:
    np.save(dump / "l1.npy", reference["latents.001"].numpy())
    made = import_trace(
        [dump], reference, Map.parse('[probes.latents]\nfile = "l{step}.npy"'), dump.parent / "o.safetensors"
    )
    assert made.absent == {"latents": [0]} and made.trace.probes == ("latents.001",)


def test_a_wrong_port_is_imported_as_it_is(reference: Trace, dump: Path) -> None:
    """A scaled tensor keeps its factor; a transposed one is not turned back."""
    np.save(dump / "image_latents.npy", (0.18215 * reference["image_latents"]).numpy())
    np.save(dump / "noise_pred.1.npy", (reference["noise_pred.001"] + torch.randn(1, 3, 4, 4, 6)).numpy())
    found = proposed(dump, reference)
    assert len(found.said) == 2 and not found.left_out
    trace = import_trace([dump], reference, found.map(), dump.parent / "o.safetensors").trace
    torch.testing.assert_close(trace["image_latents"], 0.18215 * reference["image_latents"])
    square = Trace(values(h=4, w=4, H=32, W=32), SETTINGS.replace(width=32), "diffusers")
    folder = dump.parent / "square"
    folder.mkdir()
    np.save(folder / "latents.0.npy", square["latents.000"].transpose(-1, -2).contiguous().numpy())
    found = proposed(folder, square)
    for line in found.said:
        assert "latents.000 (layout NFCHW), by its name" in line


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("latents.003", ("latents", 3)),
        ("latents_step_03", ("latents", 3)),
        ("step3_latents", ("latents", 3)),
        ("noisePredUncond_12", ("noise_pred_uncond", 12)),
        ("image_latents", ("image_latents", None)),
        ("IMAGE-EMBEDS", ("image_embeddings", None)),
        ("latents", None),
        ("image_latents_3", None),
        ("latents_1_2", None),
        ("hidden", None),
    ],
)
def test_names(text: str, meant: tuple[str, int | None] | None) -> None:
    assert named(text) == meant


def test_names_that_count_from_one(reference: Trace, dump: Path) -> None:
    for step in range(2):
        np.save(dump / f"latents_{step + 1}.npy", (reference[f"latents.00{step}"] + torch.randn(1, 3, 4, 4, 6)).numpy())
    found = proposed(dump, reference)
    assert not found.left_out
    assert found.mapping.splitlines()[1:] == [
        'latents = { file = "latents_{step}.npy", layout = "NFCHW", first_step = 1 }'
    ]


def test_taps_by_their_exact_name(tmp_path: Path, dump: Path) -> None:
    activation = torch.randn(2, 3, 7, 2, 3)
    reference = Trace({**values(), "unet.conv_in.000": activation}, SETTINGS, "diffusers")
    save_file({"unet.conv_in.000": activation.movedim(2, -1).flatten(0, 1).contiguous()}, dump / "x.safetensors")
    found = proposed(dump, reference)
    assert "unet.conv_in.000 (layout NHWC, frames folded into the batch), by its name and values" in found.said[0]
    trace = import_trace([dump], reference, found.map(), tmp_path / "o.safetensors").trace
    assert torch.equal(trace["unet.conv_in.000"], activation)


def test_the_worked_example_of_the_page(tmp_path: Path, dump: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "importing.md").read_text()
    example = re.search(r"<!-- example -->\n```toml\n(.*?)```", text, re.DOTALL)
    assert example is not None
    shapes = dict(re.findall(r"^    dump/(\S+) +\(([\d, ]+)\)", text, re.MULTILINE))
    settings = GenerationSettings(height=64, width=64, num_frames=8)
    reference = Trace(values(settings, H=64, W=64, h=8, w=8, D=1024), settings, "diffusers")
    for file, sizes in shapes.items():
        size = [int(n) for n in sizes.split(",")]
        for step in range(1, 26 if "_1." in file else 2):
            np.save(dump / file.replace("_1.", f"_{step}."), np.ones(size, np.float32))
    trace = imported(dump, reference, example[1])
    assert trace.implementation == "my port"
    assert len(trace.probes) == 3 + 3 * 25
    fields = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))
    assert fields | set(re.findall(r"`(offset|shape|implementation_version)`", text)) >= {
        *Map.model_fields,
        *(name for name in Entry.model_fields if name not in ("uncond", "cond")),
    }
