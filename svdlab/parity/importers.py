"""A port's own dump into a trace: files under any names and in any layout, read through a small map.

The map is TOML (``docs/importing.md``). Its axes are letters: N batch, F frames, C channels, H height, W width,
T tokens, S steps (of a schedule, or of tensors of all steps in one), and 1 for an axis of size one. A layout is the
file's axes in their order, so that ``NFHWC`` is channels-last video. Settings come from the reference; the files need
to hold none.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from svdlab.errors import SvdlabError, about, short
from svdlab.parity import taps
from svdlab.parity.foreign import Source, expand, listed
from svdlab.parity.probes import EVERY_SHAPE, PER_STEP, check_shapes, execution_key, probe_of
from svdlab.parity.trace import CODES, Trace
from svdlab.parity.writer import TraceWriter
from svdlab.reading import first_problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AXES = "NFCHWTS1"

# Values of a file's range -> (scale, offset) that bring them to [-1, 1].
RANGES = {"-1..1": (1.0, 0.0), "0..1": (2.0, -1.0), "0..255": (2 / 255, -1.0)}
# What holds pixels, and the range that a trace has them in.
PIXELS = {"input.source": "0..1", "input.image": "-1..1", "frames": "-1..1"}

# Probes whose two halves of the batch a port may hold in one tensor, and which half a trace wants.
HALVES = {
    "noise_pred_uncond": "uncond",
    "noise_pred_cond": "cond",
    "image_embeddings": "cond",
    "image_latents": "cond",
    "added_time_ids": "cond",
}
_STEP_FIELD = re.compile(r"\{step(?::0?(\d+)d?)?\}")


def _axes(layout: str) -> str:
    if not layout or set(layout) - set(AXES):
        raise ValueError(f"got {short(layout)}, allowed: axes out of {AXES}, such as NFHWC")
    return layout


class Part(BaseModel):
    """Where a tensor lies.

    Attributes:
        file: the end of a given file's path; not needed where one file is given. ``{step}`` and ``{step:03}`` stand for
            the step's number.
        tensor: its name in a ``.npz`` or ``.safetensors`` file; the same.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    file: str | None = Field(None, min_length=1)
    tensor: str = ""


class Entry(Part):
    """One probe or tap of the map.

    Attributes:
        layout: the file's axes, letters of ``AXES``; None: as in a trace.
        frames_in_batch: the batch axis is (batch * frame), a video's frames next to each other.
        guidance: which halves the batch holds: "both" (unconditional first), "cond_first", or "separate"
            (``uncond`` and ``cond`` say where each lies).
        scale, offset: trace = file * scale + offset.
        range: of pixels, instead of scale and offset.
        dtype, shape: of a ``.bin`` file.
        first_step: the number that the port gives to step 0.
    """

    layout: Annotated[str, AfterValidator(_axes)] | None = None
    frames_in_batch: bool = False
    guidance: Literal["both", "cond_first", "separate"] | None = None
    uncond: Part | None = None
    cond: Part | None = None
    scale: float | None = Field(None, allow_inf_nan=False)
    offset: float | None = Field(None, allow_inf_nan=False)
    range: Literal["-1..1", "0..1", "0..255"] | None = None
    dtype: Literal["float64", "float32", "float16", "bfloat16", "uint8", "int32", "int64"] | None = None
    shape: list[int] | None = None
    first_step: int = Field(0, ge=0)


class Map(BaseModel):
    """How a port's files become a trace.

    Attributes:
        implementation: the port's name; ``implementation_version`` its version.
        dtype: what the port's networks ran in; None: what the reference's did.
        probes: by name, ``latents`` for all steps or ``latents.003`` for one; taps likewise.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    implementation: str = "imported"
    implementation_version: str = ""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    probes: dict[str, Entry]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Map:
        """Read a map.

        Raises:
            SvdlabError: no such file, not TOML, a field that is not known or has a value that is not allowed.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SvdlabError(f"{path}: cannot be read as a map ({_reason(error)}), allowed: a TOML file") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, label: str = "map") -> Map:
        """A map from its text.

        Raises:
            SvdlabError: as for :meth:`open`.
        """
        try:
            found = cls(**tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise SvdlabError(f"{label}: not TOML: {error}") from None
        except ValidationError as error:
            raise SvdlabError(f"{label}: {_one_line(error)}") from None
        for name, entry in found.probes.items():
            problem = _problem(name, entry)
            if problem:
                raise SvdlabError(f"{label}: probes.{name}: {problem}")
        if not found.probes:
            raise SvdlabError(f"{label}: probes is empty, allowed: a table for each probe")
        return found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return first_problem(error)
    fields = {1: Map.model_fields, 3: Entry.model_fields}.get(len(first["loc"]), Part.model_fields)
    return f"{first_problem(error)}, allowed: {', '.join(fields)}"


def _problem(name: str, entry: Entry) -> str | None:
    """What is wrong with an entry by itself, or None."""
    base, per_step, step = _split(name)
    if base is None:
        return "neither a probe nor a tap of docs/trace-format.md"
    layout = entry.layout
    doubled = next((axis for axis in AXES[:-1] if (layout or "").count(axis) > 1), None)
    if doubled:
        return f"layout: got {layout!r}, where {doubled} stands twice, allowed: once"
    if entry.frames_in_batch and layout and ("F" in layout or "N" not in layout):
        return f"frames_in_batch: with layout {layout!r}, allowed: with an N and without an F"
    separate = entry.guidance == "separate"
    if separate != (entry.uncond is not None and entry.cond is not None) or (separate and (entry.file or entry.tensor)):
        return "guidance: 'separate' takes uncond and cond, each with file and tensor, and nothing else does"
    if entry.guidance and not (base in HALVES or has_both_halves(base)) or separate and not has_both_halves(base):
        return f"guidance: got {entry.guidance!r}, allowed: none, this tensor has no such halves"
    if entry.range is not None and (entry.scale is not None or entry.offset is not None):
        return "range: not together with scale and offset, which say the same"
    if entry.range is not None and base not in PIXELS:
        return f"range: allowed for {', '.join(PIXELS)}; for others there are scale and offset"
    if entry.shape is not None and any(size < 1 for size in entry.shape):
        return f"shape: got {entry.shape}, allowed: sizes from 1 on"
    for text in _texts(entry):
        if (step is not None or not per_step) and _STEP_FIELD.search(text):
            return f"{{step}} in {text!r}, allowed: in a probe of every step, named without its number"
    if entry.first_step and not any(_STEP_FIELD.search(text) for text in _texts(entry)):
        return "first_step: allowed where file or tensor has a {step}"
    return None


def _texts(entry: Entry) -> list[str]:
    parts = [part for part in (entry, entry.uncond, entry.cond) if part is not None]
    return [text for part in parts for text in (part.file or "", part.tensor)]


def _split(name: str) -> tuple[str | None, bool, int | None]:
    """(name without step or None where it is none, whether every step has one, the step if named)."""
    if name in PER_STEP or (taps.layout_of(name) and taps.is_per_step(name)):
        return name, True, None
    if (probe := probe_of(name)) is not None:
        return probe[0], probe[1] is not None, probe[1]
    if (tap := taps.split(name)) is not None:
        return tap[0], tap[1] is not None, tap[1]
    return None, False, None


def base_of(name: str) -> str:
    """A probe's or a tap's name without its step."""
    return _split(name)[0] or name


def has_both_halves(base: str) -> bool:
    """Whether a trace has both halves of the guidance in this tensor's batch."""
    return (
        EVERY_SHAPE[base][0] == "G"
        if base in EVERY_SHAPE
        else base.startswith("unet.") and taps.layout_of(base) != "positions"
    )


_LETTERS = {"B": "N", "V": "N", "G": "N", "F": "F", 1: "T", "S": "S", "S+1": "S"}
_LETTERS |= {"H": "H", "H0": "H", "h": "H", "W": "W", "W0": "W", "w": "W"}


def letters_of(base: str, tokens: bool = True) -> str:
    """A trace's axes of a probe or tap, named without its step: ``latents`` -> "NFCHW".

    Args:
        base: the name.
        tokens: whether a tap of the image encoder has an axis of tokens; some have.
    """
    if base in EVERY_SHAPE:
        # A square, the CLIP pixels' P x P, is height and width.
        return "".join(_LETTERS.get(dim, "C") for dim in EVERY_SHAPE[base]).replace("CCC", "CHW")
    layouts = {"activation": "NFCHW", "vector": "NC", "positions": "FC", "tokens": "NTC" if tokens else "NC"}
    return layouts[taps.layout_of(base) or ""]


def expected_shape(name: str, reference: Trace) -> tuple[int | None, ...] | None:
    """What the reference says about a tensor's shape: None where it says nothing about a size, or about all."""
    if name in reference:
        return reference.shape(name)
    base, _, _ = _split(name)
    if base is None:
        return None
    if base not in EVERY_SHAPE:
        return next((reference.shape(tap) for tap in reference.taps if (taps.split(tap) or ("",))[0] == base), None)
    settings = reference.settings
    sizes: dict[str, int] = {"F": settings.num_frames or 0, "H": settings.height or 0, "W": settings.width or 0}
    sizes |= {"S": settings.num_steps, "S+1": settings.num_steps + 1}
    for probe in reference.probes:
        sizes |= zip(map(str, EVERY_SHAPE[(probe_of(probe) or ("",))[0]]), reference.shape(probe), strict=True)
    if "B" in sizes:
        sizes.setdefault("V", sizes["B"] * settings.num_videos_per_prompt)
    if "L" in sizes:
        sizes.setdefault("2L", 2 * sizes["L"])
    return tuple(dim if isinstance(dim, int) else sizes.get(dim) for dim in EVERY_SHAPE[base])


def arrange(tensor: Tensor, entry: Entry, base: str, frames: int, step: int | None = None) -> Tensor:
    """A file's tensor in a trace's layout; values are as in the file.

    Args:
        tensor: as the file has it.
        entry: its map; "separate" halves come here one by one.
        base: probe or tap, without step.
        frames: of a video.
        step: picks one where the layout has an axis S of all steps.

    Raises:
        SvdlabError: another number of axes, a size that the layout does not allow, frames that should be equal but
            are not.
    """
    wanted = letters_of(base, tokens="T" in entry.layout if entry.layout else tensor.ndim > 2)
    layout = entry.layout or (wanted.replace("F", "") if entry.frames_in_batch else wanted)
    if len(layout) != tensor.ndim:
        raise SvdlabError(
            f"shape {tuple(tensor.shape)} has {tensor.ndim} axes, allowed: {len(layout)}, as layout {layout}"
        )
    for axis in reversed(range(tensor.ndim)):
        if layout[axis] == "1":
            if tensor.shape[axis] != 1:
                raise SvdlabError(f"shape {tuple(tensor.shape)}, allowed: a size of 1 where layout {layout} has a 1")
            tensor = tensor.squeeze(axis)
    layout = layout.replace("1", "")
    if "S" in layout and "S" not in wanted:
        axis = layout.index("S")
        if step is None or step >= tensor.shape[axis]:
            raise SvdlabError(f"layout {layout}: no step {step} among the {tensor.shape[axis]} of axis S")
        tensor, layout = tensor.select(axis, step), layout.replace("S", "")
    if entry.frames_in_batch:
        axis = layout.index("N")
        if tensor.shape[axis] % frames:
            raise SvdlabError(f"a batch of {tensor.shape[axis]} holds no whole videos of {frames} frames")
        tensor, layout = tensor.unflatten(axis, (-1, frames)), layout.replace("N", "NF")
    if "F" in layout and "F" not in wanted:  # repeated for every frame
        axis = layout.index("F")
        first = tensor.select(axis, 0)
        if not torch.equal(first.unsqueeze(axis).expand_as(tensor), tensor):
            raise SvdlabError(
                "its frames are not equal, allowed: one repeated for every frame, which a trace holds once"
            )
        tensor, layout = first, layout.replace("F", "")
    surplus = [axis for axis in layout if axis not in wanted]
    if surplus:
        raise SvdlabError(f"layout: axis {surplus[0]}, allowed: axes of {wanted}, and 1")
    tensor = tensor.permute([layout.index(axis) for axis in wanted if axis in layout])
    for axis, letter in enumerate(wanted):
        if letter not in layout:
            tensor = tensor.unsqueeze(axis)
    if entry.guidance in ("both", "cond_first"):
        if tensor.shape[0] % 2:
            raise SvdlabError(f"guidance: a batch of {tensor.shape[0]} has no two halves")
        first, second = tensor.chunk(2)
        uncond, cond = (first, second) if entry.guidance == "both" else (second, first)
        if has_both_halves(base):
            return torch.cat([uncond, cond])
        return uncond if HALVES[base] == "uncond" else cond
    return tensor


def range_of(name: str, base: str) -> tuple[float, float]:
    """Scale and offset from a range, a key of ``RANGES``, to what a trace has of ``base``, a key of ``PIXELS``."""
    scale, offset = RANGES[name]
    return (scale / 2, offset / 2 + 0.5) if PIXELS[base] == "0..1" else (scale, offset)


def valued(tensor: Tensor, entry: Entry, base: str) -> Tensor:
    """The values as a trace has them: scaled, and of a dtype that a trace can hold.

    What is scaled gets a wider dtype, so that scaling rounds nothing that matters.

    Raises:
        SvdlabError: integers that float32 does not hold.
    """
    scale, offset = (1.0, 0.0) if entry.scale is None else (entry.scale, 0.0)
    offset = offset if entry.offset is None else entry.offset
    if entry.range is not None:
        scale, offset = range_of(entry.range, base)
    if (scale, offset) != (1.0, 0.0):
        wider = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float64
        return (tensor.double() * scale + offset).to(wider)
    if tensor.dtype in CODES:
        return tensor
    whole = tensor.float()
    if not torch.equal(whole.to(torch.int64), tensor.to(torch.int64)):
        raise SvdlabError("integers that float32 does not hold, allowed: floats")
    return whole


@dataclass
class Item:
    """One tensor of the trace to come: its name, and where its parts lie (two for separate halves)."""

    name: str
    entry: Entry
    parts: list[tuple[Source, str]]
    step: int | None

    @property
    def base(self) -> str:
        """The name without its step."""
        return base_of(self.name)

    def load(self, frames: int) -> Tensor:
        """In a trace's layout, values as in the file.

        Raises:
            SvdlabError: naming probe, file and tensor.
        """
        tensors = []
        for source, key in self.parts:
            tensor = source.load(key, self.entry.dtype, self.entry.shape)
            with about(f"{source.label(key)}: as {self.name}"):
                tensors.append(arrange(tensor, self.entry, self.base, frames, self.step))
        if len({(t.shape, t.dtype) for t in tensors}) > 1:
            shapes = " and ".join(str(tuple(t.shape)) for t in tensors)
            raise SvdlabError(f"{self.where}: as {self.name}: halves of shapes {shapes}, allowed: equal ones")
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    @property
    def where(self) -> str:
        """File and tensor."""
        return " and ".join(source.label(key) for source, key in self.parts)


@dataclass
class Imported:
    """What an import did.

    Attributes:
        trace: opened from its file.
        unused: tensors of the files that the map does not name, as file and tensor.
        absent: steps that an entry covers and the files do not have, by probe.
    """

    trace: Trace
    unused: list[str] = field(default_factory=list)
    absent: dict[str, list[int]] = field(default_factory=dict)


def import_trace(
    files: Sequence[str | os.PathLike[str]], reference: Trace, mapping: Map, path: str | os.PathLike[str]
) -> Imported:
    """Write a port's files as a trace with the reference's settings.

    Args:
        files: files and folders of them.
        reference: the trace that the port replayed.
        mapping: which tensor is what.
        path: the trace to write, whole or not at all.

    Raises:
        SvdlabError: a file or a tensor that is not there or not as the map says, a shape that is not the reference's;
            nothing is written then.
    """
    sources = [Source(file) for file in expand(files)]
    frames = reference.settings.num_frames or 1
    items, absent = _plan(sources, mapping, reference.settings.num_steps)
    shapes: dict[str, tuple[int, ...]] = {}
    for item in items:
        shape = tuple(item.load(frames).shape)
        wanted = expected_shape(item.name, reference)
        if wanted is not None and not _fits(shape, wanted):
            sizes = ", ".join("any" if size is None else str(size) for size in wanted) + "," * (len(wanted) == 1)
            raise SvdlabError(f"{item.where}: as {item.name}: shape {shape} in a trace's layout, allowed: ({sizes})")
        shapes[item.name] = shape
    dtype = mapping.dtype or reference.dtype
    settings = reference.settings.replace(dtype=dtype)
    check_shapes(shapes, settings)
    with TraceWriter(
        settings,
        mapping.implementation,
        implementation_version=mapping.implementation_version,
        dtype=dtype,
        path=path,
    ) as writer:
        for item in items:
            tensor = item.load(frames)
            with about(f"{item.where}: as {item.name}"):
                writer.put(item.name, valued(tensor, item.entry, item.base))
    used = {(source.path, key) for item in items for source, key in item.parts}
    unused = [s.label(key) for s in sources for key in s.keys if (s.path, key) not in used]
    return Imported(writer.trace, unused, absent)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def _plan(sources: Sequence[Source], mapping: Map, steps: int) -> tuple[list[Item], dict[str, list[int]]]:
    """Every tensor that the map asks for, in execution order, and the steps that patterns do not find."""
    items: dict[str, Item] = {}
    absent: dict[str, list[int]] = {}
    for name, entry in mapping.probes.items():
        _, per_step, step = _split(name)
        for item in (
            _steps(sources, name, entry, steps)
            if per_step and step is None
            else [Item(name, entry, _find(sources, name, entry, step), step)]
        ):
            if not item.parts:
                absent.setdefault(name, []).append(item.step or 0)
            elif item.name in items:
                raise SvdlabError(f"probes.{name}: gives {item.name}, which another entry gives, too; allowed: one")
            else:
                items[item.name] = item
    return sorted(items.values(), key=lambda item: execution_key(item.name)), absent


def _steps(sources: Sequence[Source], name: str, entry: Entry, steps: int) -> Iterator[Item]:
    """An entry for all steps; items without parts are steps that the files do not have."""
    stacked = entry.layout is not None and "S" in entry.layout
    patterned = any(_STEP_FIELD.search(text) for text in _texts(entry))
    if stacked == patterned:
        raise SvdlabError(
            f"probes.{name}: a tensor of every step, allowed: {{step}} in file or tensor, an axis S in its layout, or "
            f"an entry such as {name}.000 for each"
        )
    found, first = 0, None
    for step in range(steps):
        try:
            parts = _find(sources, name, entry, None if stacked else step)
            found += 1
        except SvdlabError as error:
            if stacked:
                raise
            first, parts = first or error, []
        yield Item(f"{name}.{step:03d}", entry, parts, step)
    if not found and first is not None:
        raise first


def _find(sources: Sequence[Source], name: str, entry: Entry, step: int | None) -> list[tuple[Source, str]]:
    """The files and tensors of an entry at a step."""

    def filled(text: str) -> str:
        if step is None:
            return text
        return _STEP_FIELD.sub(lambda m: f"{step + entry.first_step:0{int(m[1] or 0)}d}", text)

    parts: list[tuple[Source, str]] = []
    for part in [p for p in (entry.uncond, entry.cond) if p is not None] or [entry]:
        if part.file is None:
            if len(sources) != 1:
                raise SvdlabError(f"probes.{name}: file is missing, allowed: one of the {len(sources)} files given")
            source = sources[0]
        else:
            wanted = Path(filled(part.file)).parts
            fitting = [s for s in sources if s.path.parts[-len(wanted) :] == wanted]
            if len(fitting) != 1:
                some = [str(s.path) for s in fitting or sources]
                what = "fits several files" if fitting else "is none of the files given"
                raise SvdlabError(f"probes.{name}: file {filled(part.file)!r} {what}, allowed: one of {listed(some)}")
            source = fitting[0]
        key = filled(part.tensor)
        if key not in source.keys:
            if key == "" and len(source.keys) == 1:
                key = source.keys[0]
            else:
                allowed = "none, the file holds one without a name" if source.keys == ("",) else listed(source.keys)
                raise SvdlabError(f"{source.path}: as {name}: tensor {key!r}, allowed: {allowed}")
        parts.append((source, key))
    return parts
