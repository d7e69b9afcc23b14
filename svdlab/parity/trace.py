"""A trace: every intermediate tensor of one generation under its name, and the settings that made it, in one
file.

The file format is open: ``docs/trace-format.md`` says all that a port in another language needs to write one.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from importlib import metadata as distribution
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError
from svdlab.files import atomic_path
from svdlab.parity import taps as tapping
from svdlab.svd.settings import GenerationSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from svdlab.svd.pipeline import Inputs, SVDPipeline

FORMAT = 1
METADATA_KEY = "svdlab.trace"
COPY_BYTES = 8 * 2**20

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODE_OF = {dtype: code for code, dtype in _CODES.items()}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}

# Probes in the order in which one generation makes them, with their shapes. B images given, V videos (B times
# the videos per image), F frames, H x W pixels, h x w latents of L channels, S steps, D embedding width, P
# CLIP pixels; G is V, or 2V with guidance (the unconditional half first).
INPUTS = {
    "input.source": ("B", 3, "H0", "W0"),
    "input.image": ("B", 3, "H", "W"),
    "input.clip_pixels": ("B", 3, "P", "P"),
    "input.noise": ("B", 3, "H", "W"),
    "input.latents": ("V", "F", "L", "h", "w"),
}
CONDITIONING = {
    "image_embeddings": ("V", 1, "D"),
    "image_latents": ("V", "L", "h", "w"),
    "added_time_ids": ("V", 3),
    "sigmas": ("S+1",),
    "timesteps": ("S",),
    "guidance_scale": ("V", "F"),
}
STEP = {
    "model_input": ("G", "F", "2L", "h", "w"),
    "noise_pred_uncond": ("V", "F", "L", "h", "w"),
    "noise_pred_cond": ("V", "F", "L", "h", "w"),
    "noise_pred": ("V", "F", "L", "h", "w"),
    "latents": ("V", "F", "L", "h", "w"),
}
FRAMES = {"frames": ("V", "F", 3, "H", "W")}
_SHAPES = {**INPUTS, **CONDITIONING, **STEP, **FRAMES}
_STEP_PROBE = re.compile(rf"({'|'.join(STEP)})\.(\d{{3,}})")


class Stop(Exception):  # noqa: N818 - it is no error
    """Leaves a pipeline once the last probe that was asked for is recorded."""


def probe_of(name: str) -> tuple[str, int | None] | None:
    """Split a probe's name: ``latents.003`` -> ("latents", 3), ``frames`` -> ("frames", None); or None."""
    if match := _STEP_PROBE.fullmatch(name):
        return match[1], int(match[2])
    return (name, None) if name in _SHAPES and name not in STEP else None


def execution_key(name: str) -> tuple[int, int, int]:
    """Sort key of execution order: a tap stands before the first probe that its module can change."""
    if (probe := probe_of(name)) is not None:
        base, step = probe
        if base in INPUTS:
            return 0, 0, list(INPUTS).index(base)
        if base in CONDITIONING:
            return 1, 0, 2 * list(CONDITIONING).index(base) + 1
        if base in STEP:
            return 2, step or 0, (0, 2, 3, 4, 5)[list(STEP).index(base)]
        return 3, 0, 1
    tap = tapping.split(name)
    if tap is None:
        raise SvdlabError(f"{name!r} is neither a probe nor a tap")
    base, step = tap
    if base.startswith("image_encoder."):
        return 1, 0, 0
    if base.startswith("vae."):
        return (3, 0, 0) if base.startswith("vae.decoder") else (1, 0, 2)
    # What no step changes is computed before the first one.
    return (1, 0, 99) if step is None else (2, step, 1)


def is_tap(name: str) -> bool:
    """Whether ``name`` is an inner tap rather than a probe."""
    return probe_of(name) is None


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> "float16".

    Raises:
        SvdlabError: a dtype that a trace cannot hold.
    """
    if dtype not in _NAME_OF:
        raise SvdlabError(f"dtype: got {str(dtype).removeprefix('torch.')}, allowed: {', '.join(DTYPES)}")
    return _NAME_OF[dtype]


class Trace(Mapping[str, Tensor]):
    """Named tensors of one generation in execution order; opened from a file it loads a tensor when asked for
    it.

    Attributes:
        order: the names, in execution order.
        settings: what made it, with height, width and number of frames resolved.
        implementation: "diffusers", "svdlab" or a port's own name; ``implementation_version`` beside it.
        dtype: the dtype the networks ran in: "float64", "float32", "float16" or "bfloat16".
        path: the file, or None for a trace in memory.
        label: the file's name, or what it is, for tables and errors.
    """

    _file: Any

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        settings: GenerationSettings,
        implementation: str,
        *,
        implementation_version: str = "",
        dtype: str = "float32",
    ) -> None:
        self._tensors: Mapping[str, Tensor] | None = dict(tensors)
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self.path: Path | None = None
        self.settings = settings
        self.implementation = implementation
        self.implementation_version = implementation_version
        self.dtype = dtype
        self.label = f"{implementation} {dtype} (in memory)"
        self.order = self._checked_order(sorted(tensors, key=_key_or_last))
        self._check()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """Open a trace file and check everything about it but the values; tensors load when asked for.

        Raises:
            SvdlabError: no such file, not a safetensors file or a truncated one, not a trace, another format
                version, bad settings, no tensors, an unknown probe or order, a shape that contradicts the
                settings. One line, with the file's and the tensor's name.
        """
        self = cls.__new__(cls)
        self.path = Path(path)
        self.label = str(path)
        self._tensors = None
        if not self.path.is_file():
            raise SvdlabError(f"{path}: no such file, allowed: a trace written by 'svdlab trace'")
        try:
            self._file = safe_open(os.fspath(path), framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SvdlabError(f"{path}: not a whole safetensors file ({reason})") from None
        header = self._read_header(self._file.metadata() or {})
        self._shapes = {}
        for name in self._file.keys():
            part = self._file.get_slice(name)
            if part.get_dtype() not in _CODES:
                raise SvdlabError(f"{path}: {name}: dtype {part.get_dtype()}, allowed: {', '.join(_CODES)}")
            self._shapes[name] = tuple(part.get_shape())
        self.order = self._checked_order(header.get("order"))
        self._check()
        return self

    def _read_header(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        if METADATA_KEY not in metadata:
            raise SvdlabError(f"{self.label}: not a trace: its safetensors metadata has no {METADATA_KEY!r}")
        try:
            header = json.loads(metadata[METADATA_KEY])
        except json.JSONDecodeError as error:
            raise SvdlabError(f"{self.label}: metadata {METADATA_KEY!r} is not JSON ({error})") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            got = header.get("format") if isinstance(header, dict) else header
            raise SvdlabError(f"{self.label}: trace format version {got!r}, allowed: {FORMAT}")
        for field in ("implementation", "implementation_version"):
            if not isinstance(header.get(field), str):
                raise SvdlabError(f"{self.label}: {field}: got {header.get(field)!r}, allowed: a string")
        if header.get("dtype") not in DTYPES:
            raise SvdlabError(f"{self.label}: dtype: got {header.get('dtype')!r}, allowed: {', '.join(DTYPES)}")
        if not isinstance(header.get("settings"), dict):
            raise SvdlabError(f"{self.label}: settings: got {header.get('settings')!r}, allowed: an object")
        try:
            self.settings = GenerationSettings.from_json(json.dumps(header["settings"]))
        except SvdlabError as error:
            raise SvdlabError(f"{self.label}: settings: {error}") from None
        self.implementation = header["implementation"]
        self.implementation_version = header["implementation_version"]
        self.dtype = header["dtype"]
        return header

    def _checked_order(self, order: object) -> tuple[str, ...]:
        if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
            raise SvdlabError(f"{self.label}: order: got {_short(order)}, allowed: a list of every tensor's name")
        if not self._shapes:
            raise SvdlabError(f"{self.label}: an empty trace: it holds no tensor")
        if len(set(order)) != len(order):
            twice = next(name for name in order if order.count(name) > 1)
            raise SvdlabError(f"{self.label}: order: {twice} stands twice, allowed: once")
        for name in [*order, *self._shapes]:
            if name not in self._shapes:
                raise SvdlabError(f"{self.label}: order: names {name}, which is not in the file")
            if probe_of(name) is None and tapping.split(name) is None:
                raise SvdlabError(f"{self.label}: {_short(name)}: neither a probe nor a tap of docs/trace-format.md")
        if missing := [name for name in self._shapes if name not in set(order)]:
            raise SvdlabError(f"{self.label}: order: leaves out {missing[0]}")
        probes = [name for name in order if not is_tap(name)]
        for before, after in zip(probes, probes[1:], strict=False):
            # Conditioning has no order of its own; denoising steps do.
            first, second = (key if key[0] > 1 else (key[0], 0, 0) for key in map(execution_key, (before, after)))
            if second < first:
                raise SvdlabError(f"{self.label}: order: {after} after {before}, allowed: execution order")
        return tuple(order)

    def _check(self) -> None:
        for field in ("height", "width", "num_frames"):
            if getattr(self.settings, field) is None:
                raise SvdlabError(f"{self.label}: settings: {field} is null, allowed: the resolved value")
        _check_shapes(self.label, self._shapes, self.settings)

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of section 5's tensors, in execution order."""
        return tuple(sorted((n for n in self.order if not is_tap(n)), key=execution_key))

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the inner taps, as ordered in the trace."""
        return tuple(name for name in self.order if is_tap(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without loading it."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        """Load one tensor.

        Raises:
            KeyError: the trace does not hold it.
            SvdlabError: it holds NaN or infinity.
        """
        if name not in self._shapes:
            raise KeyError(name)
        tensor = self._tensors[name] if self._tensors is not None else self._file.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise SvdlabError(f"{self.label}: {name}: {bad} of {tensor.numel()} values are NaN or infinite")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __repr__(self) -> str:
        return f"Trace({self.label!r}, {len(self.probes)} probes, {len(self.taps)} taps)"

    def save(self, path: str | os.PathLike[str]) -> Trace:
        """Write to ``path``, one tensor in memory at a time; returns the trace opened from there."""
        with TraceWriter(
            self.settings,
            self.implementation,
            implementation_version=self.implementation_version,
            dtype=self.dtype,
            path=path,
        ) as writer:
            for name in self.order:
                writer.put(name, self[name])
        return writer.trace

    def require(self, names: Sequence[str], purpose: str) -> None:
        """Refuse a trace that lacks any of ``names``.

        Raises:
            SvdlabError: naming the file, the first missing tensor and the purpose.
        """
        for name in names:
            if name not in self:
                raise SvdlabError(f"{self.label}: {name} is missing, needed {purpose}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _key_or_last(name: str) -> tuple[int, int, int]:
    return execution_key(name) if probe_of(name) or tapping.split(name) else (9, 0, 0)


def _check_shapes(label: str, shapes: Mapping[str, tuple[int, ...]], settings: GenerationSettings) -> None:
    """Every probe's and tap's shape against the settings, and against each other."""
    steps = settings.num_steps
    known: dict[str, int] = {
        "F": settings.num_frames or 0,
        "H": settings.height or 0,
        "W": settings.width or 0,
        "S": steps,
        "S+1": steps + 1,
    }

    def expected(spec: tuple[int | str, ...]) -> str:
        return (
            "("
            + ", ".join(str(d if isinstance(d, int) else known.get(d, d)) for d in spec)
            + ("," * (len(spec) < 2))
            + ")"
        )

    for name in sorted(shapes, key=execution_key):
        shape = shapes[name]
        if (probe := probe_of(name)) is None:
            base, step = tapping.split(name) or ("", None)
            spec: tuple[int | str, ...] = {
                "activation": (
                    "*",
                    1 if base.startswith(("vae.encoder", "vae.quant")) else "F",
                    "*",
                    "*",
                    "*",
                ),
                "vector": ("*", "*"),
                "positions": ("F", "*"),
            }.get(tapping.layout_of(base) or "", ("*",) * len(shape))
        else:
            (base, step), spec = probe, _SHAPES[probe[0]]
        if step is not None and step >= steps:
            raise SvdlabError(f"{label}: {name}: step {step}, allowed: 0 to {steps - 1}, as the settings have it")
        good = len(shape) == len(spec) and 0 not in shape
        for size, dim in zip(shape, spec, strict=False):
            if isinstance(dim, int):
                good = good and size == dim
            elif dim != "*":
                _derive(known, settings)
                good = good and known.setdefault(dim, size) == size
        if good and "G" in known and "V" in known:
            good = known["G"] in (known["V"], 2 * known["V"])
        if not good:
            raise SvdlabError(f"{label}: {name}: shape {shape}, allowed: {expected(spec)}")


def _derive(known: dict[str, int], settings: GenerationSettings) -> None:
    if "B" in known:
        known.setdefault("V", known["B"] * settings.num_videos_per_prompt)
    if "L" in known:
        known.setdefault("2L", 2 * known["L"])


class TraceWriter:
    """Collects tensors into a :class:`Trace`: in memory, or streamed to a file.

    To a file, a tensor goes to the host and to disk at once. The bound on host memory is the largest single
    tensor and one copy buffer of ``COPY_BYTES``, however long the run is; the disk holds the data twice while
    the file is put together, because a safetensors file begins with a header that knows every tensor. Use as
    a context manager: an exception or Ctrl-C leaves no file.

    Args:
        settings: resolved settings (height, width and number of frames are not None).
        implementation: who made the tensors.
        implementation_version: its version.
        dtype: what the networks ran in.
        path: the file, or None to keep the tensors in memory.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        implementation: str,
        *,
        implementation_version: str = "",
        dtype: str = "float32",
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.settings = settings
        self.implementation = implementation
        self.implementation_version = implementation_version
        self.dtype = dtype
        self.path = None if path is None else Path(path)
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[tuple[int, ...], torch.dtype, int]]] = {}
        self._memory: dict[str, list[Tensor]] = {}
        self._frames: dict[str, int] = {}
        self._spill: BinaryIO | None = None
        self._trace: Trace | None = None

    def __enter__(self) -> TraceWriter:
        if self.path is not None:
            if not self.path.parent.is_dir():
                raise SvdlabError(f"{self.path}: the folder {self.path.parent} does not exist")
            self._target = self._stack.enter_context(atomic_path(self.path))
            self._spill = self._stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, value, traceback)
            return
        with self._stack:
            if self.path is None:
                tensors = {name: self._joined(name) for name in sorted(self._memory, key=execution_key)}
                self._trace = Trace(
                    tensors,
                    self.settings,
                    self.implementation,
                    implementation_version=self.implementation_version,
                    dtype=self.dtype,
                )
            else:
                self._assemble()
        if self.path is not None:
            self._trace = Trace.open(self.path)

    @property
    def trace(self) -> Trace:
        """The finished trace, after the ``with`` block."""
        assert self._trace is not None, "the writer is still open"
        return self._trace

    def put(self, name: str, tensor: Tensor) -> None:
        """Record one whole tensor.

        Raises:
            SvdlabError: the name is taken, or it is neither a probe nor a tap, or the dtype is not a float.
        """
        if name in self._pieces:
            raise SvdlabError(f"{name}: recorded twice in one trace")
        self.extend(name, tensor)

    def extend(self, name: str, tensor: Tensor, frames: int | None = None) -> None:
        """Record a part of a tensor, to be joined with the other parts along the first axis.

        Args:
            name: probe or tap.
            tensor: (rows, ...).
            frames: with it the joined rows are (videos * frames, ...) and become (videos, frames, ...) in the
                trace.
        """
        execution_key(name)
        dtype_name(tensor.dtype)
        tensor = tensor.detach()
        if tensor.dtype.is_floating_point and self._spill is None:
            self._memory.setdefault(name, []).append(tensor.to("cpu", copy=True).contiguous())
        offset = 0
        if self._spill is not None:
            host = tensor.to("cpu").contiguous()
            offset = self._spill.seek(0, os.SEEK_END)
            if host.numel():
                self._spill.write(host.reshape(-1).view(torch.uint8).numpy().data)
        self._pieces.setdefault(name, []).append((tuple(tensor.shape), tensor.dtype, offset))
        if frames is not None:
            self._frames[name] = frames

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def _shape(self, name: str) -> tuple[int, ...]:
        pieces = self._pieces[name]
        first, dtype, _ = pieces[0]
        if len(pieces) == 1 and name not in self._frames:
            return first
        if any(shape[1:] != first[1:] or kind != dtype for shape, kind, _ in pieces):
            raise SvdlabError(f"{name}: its parts have shapes {[p[0] for p in pieces]}, which do not join")
        rows = sum(shape[0] for shape, _, _ in pieces)
        frames = self._frames.get(name)
        if frames and rows % frames == 0:
            return (rows // frames, frames, *first[1:])
        return (rows, *first[1:])

    def _joined(self, name: str) -> Tensor:
        parts = self._memory.pop(name)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self._shape(name))

    def header(self) -> dict[str, Any]:
        """What the metadata's JSON says."""
        return {
            "format": FORMAT,
            "implementation": self.implementation,
            "implementation_version": self.implementation_version,
            "dtype": self.dtype,
            "settings": json.loads(self.settings.to_json()),
            "order": sorted(self._pieces, key=execution_key),
        }

    def _assemble(self) -> None:
        """The safetensors file: header length, header, then the data with the widest dtypes first
        (alignment).
        """
        assert self._spill is not None
        names = sorted(self._pieces, key=execution_key)
        names.sort(key=lambda name: -self._pieces[name][0][1].itemsize)
        table: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(self.header())}}
        end = 0
        for name in names:
            shape, dtype = self._shape(name), self._pieces[name][0][1]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            table[name] = {"dtype": _CODE_OF[dtype], "shape": list(shape), "data_offsets": [start, end]}
        head = json.dumps(table).encode()
        head += b" " * (-len(head) % 8)
        with open(self._target, "wb") as file:
            file.write(len(head).to_bytes(8, "little"))
            file.write(head)
            for name in names:
                for shape, dtype, offset in self._pieces[name]:
                    _copy(self._spill, file, offset, math.prod(shape) * dtype.itemsize)


def _copy(source: BinaryIO, target: BinaryIO, offset: int, count: int) -> None:
    source.seek(offset)
    while count:
        block = source.read(min(count, COPY_BYTES))
        target.write(block)
        count -= len(block)


def version_of(package: str) -> str:
    """The installed version of a package, or "unknown"."""
    try:
        return distribution.version(package)
    except distribution.PackageNotFoundError:
        return "unknown"


def replayed(trace: Trace, preprocess: bool = False) -> dict[str, Tensor]:
    """The inputs of ``trace`` that another run replays, by name: the random draws and the preprocessed image.

    With ``preprocess`` the preprocessing is redone from ``input.source`` instead, and only the draws are
    replayed.

    Raises:
        SvdlabError: an input is missing, or the source is no 8-bit image.
    """
    pixels = ["input.image", "input.clip_pixels"]
    draws = ["input.noise", "input.latents"]
    if preprocess:
        trace.require(["input.source"], "to redo the preprocessing")
        source_images(trace["input.source"])
    trace.require(draws if preprocess else pixels + draws, "to replay")
    names = draws if preprocess else pixels + draws
    return {name: trace[name] for name in ["input.source", *names] if name in trace}


def _is_8bit(source: Tensor) -> bool:
    levels = source.double() * 255
    whole = bool(((levels - levels.round()).abs() < 1e-3).all())
    return whole and float(source.min()) >= 0 and float(source.max()) <= 1


def source_images(source: Tensor) -> list[Image]:
    """PIL images of a source (B, 3, H, W) in [0, 1].

    Raises:
        SvdlabError: it is not an 8-bit image, which PIL could not hold without loss.
    """
    from PIL import Image as pil

    if source.ndim != 4 or source.shape[1] != 3 or not _is_8bit(source):
        raise SvdlabError(
            f"image: got a tensor of shape {tuple(source.shape)}, allowed: (batch, 3, height, width) "
            "of 8-bit levels / 255"
        )
    pixels = (source.double() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [pil.fromarray(frame) for frame in pixels]


def replay_images(tensors: Mapping[str, Tensor], settings: GenerationSettings) -> list[Image]:
    """PIL images for a replay: the source, or black ones where the replayed pixels override them anyway."""
    from PIL import Image as pil

    source = tensors.get("input.source")
    if source is not None and _is_8bit(source):
        return source_images(source)
    return [pil.new("RGB", (settings.width or 8, settings.height or 8))] * len(tensors["input.noise"])


def capture(
    pipe: SVDPipeline,
    image: Any = None,
    settings: GenerationSettings | None = None,
    *,
    replay: Trace | None = None,
    preprocess: bool = False,
    taps: Sequence[str] = (),
    until: str | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Trace:
    """Run svdlab and record every probe of design section 5.

    Args:
        pipe: the pipeline; its dtype is the trace's.
        image: a PIL image or a list of them; not needed with ``replay``.
        settings: None means ``replay``'s.
        replay: a trace whose random draws and image are used instead of the seed and ``image``.
        preprocess: redo the preprocessing from the replayed source image instead of replaying its results.
        taps: shell-style patterns of module names (``unet.down_blocks.*``), see ``svdlab.parity.taps``.
        until: stop after this probe.
        path: stream to this file instead of keeping the tensors in memory (see :class:`TraceWriter` for the
            bound).
        progress: show a bar over the denoising steps.

    Raises:
        SvdlabError: no image and nothing to replay, or a replay that lacks an input, or a pattern that names
            no module.
    """
    settings = settings or (replay.settings if replay is not None else GenerationSettings())
    settings = pipe.resolve(settings.replace(dtype=dtype_name(pipe.dtype)))
    if replay is not None:
        inputs = replay_inputs(pipe, settings, replay, preprocess, image)
    elif image is not None:
        inputs = pipe.prepare(image, settings, torch.Generator().manual_seed(settings.seed))
    else:
        raise SvdlabError("image: got none, allowed: an image, or a trace to replay")
    models = {"image_encoder": pipe.image_encoder, "vae": pipe.vae, "unet": pipe.unet}
    chosen = tapping.select(models, taps)
    check_until(until, settings)
    run_settings = settings
    if any(name.startswith("vae.decoder") for name in chosen) and not settings.effective_decode_chunk:
        # Whole clips: the same numbers as the exact decode in chunks, which does not go through the modules'
        # forward.
        run_settings = settings.replace(decode="parity", decode_chunk_size=settings.num_frames)
    writer = TraceWriter(
        settings, "svdlab", implementation_version=version_of("svdlab"), dtype=settings.dtype, path=path
    )
    steps = settings.num_steps
    with writer, ExitStack() as stack, torch.no_grad():
        bar = stack.enter_context(tqdm(total=steps, desc=f"svdlab {settings.dtype}", disable=not progress))
        now = {"step": 0}
        for name, module in chosen.items():
            stack.callback(module.register_forward_hook(_svdlab_tap(writer, name, now, settings)).remove)

        def probe(name: str, tensor: Tensor) -> None:
            base, step = probe_of(name) or (name, None)
            if base == "model_input":
                now["step"] = step or 0
            if base == "latents":
                bar.update()
            writer.put(name, tensor)
            if name == until:
                raise Stop

        with suppress(Stop):
            pipe.run(inputs, run_settings, probe=probe)
    return writer.trace


def check_until(until: str | None, settings: GenerationSettings) -> None:
    """Refuse to stop after a probe that this generation does not have.

    Raises:
        SvdlabError: not a probe's name, or a step that is not run.
    """
    if until is None:
        return
    probe = probe_of(until)
    if probe is None or (probe[1] or 0) >= settings.num_steps:
        raise SvdlabError(f"until: got {until!r}, allowed: a probe such as 'image_latents' or 'noise_pred.000'")


def replay_inputs(
    pipe: SVDPipeline, settings: GenerationSettings, replay: Trace, preprocess: bool = False, image: Any = None
) -> Inputs:
    """What svdlab runs on when it replays a trace.

    Args:
        pipe: whose preprocessing is used where it is redone.
        settings: resolved.
        replay: the trace.
        preprocess: redo the preprocessing from the source image, replay only the draws.
        image: instead of the trace's source image.

    Raises:
        SvdlabError: an input is missing or has another shape.
    """
    tensors = replayed(replay, preprocess)
    inputs = pipe.prepare(replay_images(tensors, settings) if image is None else image, settings)
    values = {}
    for field in fields(inputs):
        tensor = tensors.get(f"input.{field.name}")
        drawn = getattr(inputs, field.name)
        if tensor is None or field.name == "source":
            continue
        if tensor.shape != drawn.shape:
            raise SvdlabError(
                f"{replay.label}: input.{field.name}: shape {tuple(tensor.shape)}, allowed: {tuple(drawn.shape)}"
            )
        values[field.name] = tensor.to(drawn)
    return replace(inputs, **values)


def _svdlab_tap(
    writer: TraceWriter, name: str, now: dict[str, int], settings: GenerationSettings
) -> Callable[..., None]:
    layout = tapping.layout_of(name)
    per_step = tapping.is_per_step(name)

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        tensor = tapping.first_tensor(output)
        full_name = f"{name}.{now['step']:03d}" if per_step else name
        if layout != "activation":
            if layout == "positions" and full_name in writer:
                return  # computed for each half of the batch, and the same
            writer.extend(full_name, tensor)
            return
        frames = settings.num_frames if name.startswith(("unet", "vae.decoder")) else 1
        writer.extend(full_name, tensor.permute(0, 1, 4, 2, 3).flatten(0, 1), frames=frames)

    return hook
