"""One point of a sweep: what identifies it, and how a process computes it, on this machine or on another."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdlab.errors import SvdlabError
from svdlab.files import json_value, write_folder
from svdlab.svd.settings import GenerationSettings
from svdlab.sweep.code import Code, code_version
from svdlab.sweep.documents import FORMAT, Metrics, Model, sha256
from svdlab.sweep.plan import Point

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from svdlab.parity.lab import Lab
    from svdlab.svd.pipeline import SVDPipeline

CLIP, THUMBNAIL, FRAMES, METRICS = "clip.mp4", "thumbnail.webp", "frames.mkv", "metrics.json"
_THUMBNAIL_HEIGHT = 96  # pixels
_SAMPLE_S = 0.01  # between two measurements of a process's memory
OnStep = Callable[[int, int], None]


class SweepHalted(SvdlabError):
    """What ends a sweep rather than one of its points: a full disk, a lost scheduler, workers of another version."""


@dataclass(frozen=True)
class Source:
    """All that a process needs beside the point.

    Attributes:
        model: loaded once, and compared with ``fingerprint``.
        device: where points are computed.
        image: what the clips start from, a PNG.
        image_digest: of its pixels, SHA-256.
        code: that is to compute, ``code_version``.
        divergence: measure the distance from diffusers, too.
        points: the folder that points go to, on the driver's machine.
        token: a file in it; a process that finds it shares the driver's disk.
        threads: of torch; None leaves them.
    """

    model: Model
    device: str
    image: bytes = field(repr=False)
    image_digest: str
    code: Code
    divergence: bool
    points: str
    token: str
    threads: int | None = None

    def identity(self, point: Point) -> str:
        """Sixteen hexadecimal digits that name a point: of everything that decides what it is."""
        everything = {
            "format": FORMAT,
            "settings": point.settings.model_dump(mode="json"),
            **point.named(),
            "model": self.model.fingerprint,
            "image": self.image_digest,
            "svdlab": self.code.identity,
            "divergence": self.divergence,
        }
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What came of a point.

    Attributes:
        point: its identity.
        files: what its folder is to hold, where the process that made them does not share the driver's disk.
        error: type, message and traceback, if it failed.
    """

    point: str
    files: Mapping[str, bytes] | None = None
    error: dict[str, str] | None = None


def identify_model(
    name: str, revision: str | None, settings: Sequence[GenerationSettings]
) -> tuple[Model, list[GenerationSettings]]:
    """Identify a checkpoint, and fill in what the settings leave to it; no weight is loaded.

    Raises:
        SvdlabError: a checkpoint that is not there or whose weights do not fit, a size that its VAE cannot make.
    """
    import torch

    from svdlab.svd.checkpoint import checkpoint_path
    from svdlab.svd.pipeline import SVDPipeline

    path = checkpoint_path(name, revision=revision)
    pipe = SVDPipeline.from_pretrained(path, device="meta", dtype=torch.float32)
    resolved = [pipe.resolve(s.replace(dtype="float32")).replace(dtype=s.dtype) for s in settings]
    # A folder or a file is found again from anywhere.
    name = str(given.absolute()) if (given := Path(name).expanduser()).exists() else name
    return _identify(name, path), resolved


def check_points_fit(model: Model, settings: Sequence[GenerationSettings], device: str) -> None:
    """Refuse points of which the largest cannot fit what is free on a device; no weight is loaded.

    Raises:
        SvdlabError: see ``svd.memory.check_fits``.
    """
    from svdlab.svd.checkpoint import load_configs
    from svdlab.svd.memory import check_fits, least_bytes

    configs = load_configs(model.name, model.revision)
    check_fits(configs, max(settings, key=lambda point: least_bytes(configs, point)), device)


def _identify(name: str, path: Path) -> Model:
    from svdlab.svd.checkpoint import checkpoint_files

    folder = path.parent if path.is_file() else path
    digest = hashlib.sha256()
    for file in checkpoint_files(path):
        state = file.stat()
        line = f"{file.relative_to(folder).as_posix()} {_digest(file, state.st_size, state.st_mtime_ns)}\n"
        digest.update(line.encode())
    # The hub's cache calls a folder by its commit.
    revision = folder.name if folder.parent.name == "snapshots" else None
    return Model(name, revision, digest.hexdigest())


@functools.cache
def _digest(file: Path, size: int, modified: int) -> str:
    # The hub's cache calls large files by their SHA-256: gigabytes that need not be read.
    if file.is_symlink() and len(name := Path(os.readlink(file)).name) == 64:
        return name
    with file.open("rb") as opened:
        return sha256(opened)


def image_digest(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


# One point at a time in a process, however many threads a Dask worker has: two models may not fit into memory, torch's
# number of threads is the process's, and a point's seconds and peak memory are to be its own.
_one_at_a_time = threading.Lock()
_loaded: tuple[Any, Lab] | None = None


def compute_point(source: Source, point: Point, on_step: OnStep | None = None) -> Outcome:
    """Compute a point, and write its folder if this process shares the driver's disk.

    Args:
        source: what it is computed from.
        point: which.
        on_step: called with the denoising step and their number; may raise ``lab.Cancelled``.

    Raises:
        SweepHalted: this process has another version or another model, the model does not load, the disk is full.
    """
    from svdlab.parity.lab import Cancelled

    points, identity = Path(source.points), source.identity(point)
    with _one_at_a_time:
        shared = (points / source.token).is_file()
        if shared and (points / identity).is_dir():
            return Outcome(identity)
        lab = _lab(source, point.settings.dtype)
        try:
            files = make_point(lab, source, point, on_step)
        except Cancelled:
            raise
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            return Outcome(identity, error={"type": type(error).__name__, "message": str(error), "traceback": text})
    if not shared:
        return Outcome(identity, files=files)
    save_point(points, identity, files)
    return Outcome(identity)


def save_point(points: Path, identity: str, files: Mapping[str, bytes]) -> None:
    """Write a point's folder, whole or not at all.

    Raises:
        SweepHalted: it cannot be written.
    """
    try:
        write_folder(points / identity, files)
    except OSError as error:
        raise SweepHalted(f"{points / identity}: cannot be written: {error.strerror or error}") from None


def _lab(source: Source, dtype: str) -> Lab:
    """The model, loaded once in a process: another one takes its place."""
    global _loaded
    key = (source.model, source.device, source.image_digest, source.code.identity, dtype)
    if _loaded is not None and _loaded[0] == key:
        return _loaded[1]
    where = f"worker {platform.node()} (process {os.getpid()})"
    if difference := code_version(source.divergence).changes(since=source.code):
        raise SweepHalted(f"{where}: not the driver's code ({difference}); install the same svdlab and torch there")
    from PIL import Image

    from svdlab.parity.lab import Lab
    from svdlab.svd.checkpoint import checkpoint_path

    _loaded = None  # two models at once may not fit
    try:
        path = checkpoint_path(source.model.name, revision=source.model.revision)
        found = _identify(source.model.name, path)
        with Image.open(io.BytesIO(source.image)) as image:
            lab = Lab(str(path), source.device, dtype, image.convert("RGB"))
    except Exception as error:  # whatever it is, it would meet every point
        raise SweepHalted(f"{where}: the model does not load: {error or type(error).__name__}") from error
    if found.fingerprint != source.model.fingerprint:
        raise SweepHalted(
            f"{where}: model {source.model.name} is {found.fingerprint[:12]}, allowed: "
            f"{source.model.fingerprint[:12]}, which the sweep began with"
        )
    _loaded = key, lab
    return lab


def make_point(lab: Lab, source: Source, point: Point, on_step: OnStep | None) -> dict[str, bytes]:
    """The files of a point's folder, by name.

    Raises:
        SvdlabError: NaN or infinity after a step or in the frames, and which weight holds some.
    """
    import torch

    from svdlab.parity.lab import motion_per_frame
    from svdlab.svd.approximations import approximated
    from svdlab.svd.video import Clip

    settings, pipe = point.settings, approximated(lab.pipe.with_bugs(*point.bugs), *point.approximations)
    steps = settings.num_steps

    def after_step(_: Any, i: int, timestep: Any, tensors: Any) -> None:
        pipe.check_finite(f"latents after step {i}", tensors["latents"])
        if on_step is not None:
            on_step(i + 1, steps)

    with _threads(source.threads), torch.no_grad():
        started = time.perf_counter()
        with PeakMemory(pipe.device) as memory:
            inputs = pipe.prepare(lab.image, settings, torch.Generator().manual_seed(settings.seed))
            frames = pipe.run(inputs, settings, callback=after_step)[0].cpu()
        seconds = time.perf_counter() - started
        pipe.check_finite("frames", frames)
        divergence = _divergence(lab, pipe, settings) if source.divergence else None
        threads = torch.get_num_threads()
    clip = Clip.from_tensor(frames, settings.fps, settings)
    motion = motion_per_frame(frames)
    files = {CLIP: clip.to_mp4(), THUMBNAIL: clip.to_webp(_THUMBNAIL_HEIGHT), FRAMES: clip.to_mkv()}
    metrics = Metrics.sealed(
        {
            "format": FORMAT,
            "point": source.identity(point),
            "settings": settings.model_dump(mode="json"),
            **point.named(),
            "model": asdict(source.model),
            "image": source.image_digest,
            "svdlab": str(source.code),
            "code": asdict(source.code),
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            "frames_sha256": hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest(),
            "motion": sum(motion) / len(motion) if motion else 0.0,
            "motion_per_frame": motion,
            "divergence": divergence,
            "neighbours": [],
            "seconds": seconds,
            "peak_memory_mib": memory.mib,
            "device": str(pipe.device),
            "threads": threads,
            "host": platform.node(),
            "process": os.getpid(),
        }
    )
    return {**files, METRICS: (json.dumps(metrics, indent=2) + "\n").encode()}


def _divergence(lab: Lab, pipe: SVDPipeline, settings: GenerationSettings) -> dict[str, Any]:
    """svdlab against diffusers, measured by diffusers in float64."""
    from svdlab.parity.candidate import capture
    from svdlab.parity.compare import compare

    try:
        reference, truth = lab.reference(settings), lab.truth(settings)
    except SvdlabError as error:  # diffusers fails where svdlab does not
        return {"verdict": "no reference", "reason": str(error)}
    found = compare(reference, capture(pipe, lab.image, settings), truth)
    return {
        "verdict": found.verdict,
        "first_divergence": found.first_divergence,
        "ratio": json_value(found.worst.ratio),
        "probe": found.worst.name,
        "frames_mse": json_value(found.frames_mse),
    }


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PeakMemory:
    """The most memory in use within a block: CUDA's allocator's, or this process's, measured every 10 ms.

    Attributes:
        mib: the result, in MiB.
    """

    def __init__(self, device: torch.device):
        self._device, self._done = device, threading.Event()
        self.mib = 0.0

    def __enter__(self) -> PeakMemory:
        import psutil
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        process = psutil.Process()

        def measure() -> None:
            while True:
                self.mib = max(self.mib, process.memory_info().rss / 2**20)
                if self._done.wait(_SAMPLE_S):
                    return

        self._thread = threading.Thread(target=measure, name="svdlab memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        import torch

        if self._device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self._device) / 2**20
        else:
            self._done.set()
            self._thread.join()
