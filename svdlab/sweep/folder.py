"""A sweep's folder: the plan, a folder for every finished point, the errors of the others, and the table of it all.

    sweep.json              what was asked for: axes, points, model, versions
    image.png               what the clips start from
    points/IDENTITY/        clip.mp4, thumbnail.webp, frames.mkv (lossless), metrics.json (with digests of them all)
    failures/IDENTITY.json  the error of a point that failed
    table.parquet, .csv     one row per point, finished or failed

A point's folder is renamed into place when it is whole, so that what is there is finished. The table is made from the
folders and can always be made again.
"""

from __future__ import annotations

import functools
import io
import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdlab.errors import SvdlabError, about, short
from svdlab.files import atomic_path, write_json
from svdlab.reading import checked_as, parse, read_as, read_text
from svdlab.svd.settings import GenerationSettings
from svdlab.sweep.code import Code
from svdlab.sweep.documents import FORMAT, FailureFile, Metrics, PlanFile, PlannedPoint, sha256
from svdlab.sweep.plan import NAMED, Point, neighbours
from svdlab.sweep.point import CLIP, FRAMES, METRICS, THUMBNAIL, Outcome, Source, SweepHalted, image_digest, save_point

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

PLAN, IMAGE, LOCK = "sweep.json", "image.png", ".lock"
# Frames of that many points stay in memory while neighbours are compared.
_KEPT_CLIPS = 32
_WHOLE = [name for name, field in GenerationSettings.model_fields.items() if field.annotation in (int, int | None)]


@dataclass(frozen=True)
class Plan:
    """What a sweep was asked for.

    Attributes:
        axes: by name, the values in the order in which they are shown.
        points: by identity, in the order in which they are computed.
        source: what they are computed from.
    """

    axes: dict[str, list[Any]]
    points: dict[str, Point]
    source: Source


class Sweep:
    """A sweep on disk, whole or in part.

    Attributes:
        folder: where it is.
        plan: what it was asked for.
        discarded: what was wrong with finished points that this run found damaged, and computed again.
    """

    def __init__(self, folder: Path, plan: Plan):
        self.folder, self.plan = folder, plan
        self.discarded: list[str] = []
        self._frames = functools.lru_cache(_KEPT_CLIPS)(self._read_frames)

    @classmethod
    def open(cls, folder: str | Path) -> Sweep:
        """Read a sweep.

        Raises:
            SvdlabError: the folder holds none, or its plan is damaged.
        """
        path = Path(folder) / PLAN
        for name in (PLAN, IMAGE):
            if not (path.parent / name).is_file():
                raise SvdlabError(f"{folder}: no sweep ({name} is missing)")
        text = read_text(path)
        values = parse(text, str(path))
        if isinstance(values, dict) and values.get("format") != FORMAT:
            raise SvdlabError(f"{path}: format {short(values.get('format'))}, allowed: {FORMAT}")
        plan = checked_as(PlanFile, text, str(path))
        try:
            image = (path.parent / IMAGE).read_bytes()
        except OSError as error:
            raise SvdlabError(f"{path.parent / IMAGE}: cannot be read ({error.strerror})") from None
        points = {p.point: _point(path, i, p) for i, p in enumerate(plan.points)}
        axes = {name: [tuple(v) if isinstance(v, list) else v for v in values] for name, values in plan.axes.items()}
        _check_axes(path, axes, points.values())
        source = Source(
            plan.model,
            plan.device,
            image,
            plan.image,
            plan.code,
            plan.divergence,
            str(path.parent.absolute() / "points"),
            "",
            plan.threads,
        )
        return cls(path.parent, Plan(axes, points, source))

    def picture(self) -> Image.Image:
        """What the clips start from.

        Raises:
            SvdlabError: it is not what was written.
        """
        from PIL import Image

        path = self.folder / IMAGE
        try:
            with Image.open(io.BytesIO(self.plan.source.image)) as image:
                picture = image.convert("RGB")
        except Exception as error:  # what a broken picture raises depends on where it is broken
            raise SvdlabError(f"{path}: not readable as a picture ({type(error).__name__})") from None
        if image_digest(picture) != self.plan.source.image_digest:
            raise SvdlabError(f"{path}: is not what was written")
        return picture

    def save_plan(self) -> None:
        """Write what was asked for, before anything is computed.

        Raises:
            SweepHalted: the folder cannot be written.
        """
        import torch

        source = self.plan.source
        plan = {
            "format": FORMAT,
            "svdlab": str(source.code),
            "code": asdict(source.code),
            "model": asdict(source.model),
            "image": source.image_digest,
            "device": source.device,
            "threads": source.threads,
            "divergence": source.divergence,
            "environment": {"python": platform.python_version(), "torch": torch.__version__},
            "axes": self.plan.axes,
            "points": [
                {"point": identity, "settings": point.settings.model_dump(mode="json"), **point.named()}
                for identity, point in self.plan.points.items()
            ],
        }
        with self.writing():
            for name in ("points", "failures"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with atomic_path(self.folder / IMAGE) as temporary:
                temporary.write_bytes(source.image)
            write_json(self.folder / PLAN, plan)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What cannot be written within this context halts the sweep.

        Raises:
            SweepHalted: a full disk, a folder that is read only.
        """
        try:
            yield
        except OSError as error:
            raise SweepHalted(f"{self.folder}: cannot be written: {error.strerror or error}") from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go of it when the process dies.

        Raises:
            SvdlabError: another process holds it, or the folder cannot be made.
        """
        from filelock import FileLock, Timeout

        with self.writing():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held = FileLock(self.folder / LOCK, timeout=0)
                held.acquire()
            except Timeout:
                raise SvdlabError(f"{self.folder}: another process is at work on this sweep") from None
        try:
            yield
        finally:
            held.release()

    def finished(self, identity: str) -> bool:
        """Whether a point is there, whole."""
        return self._point(identity).is_dir()

    def failed(self, identity: str) -> bool:
        """Whether a point was tried, and failed."""
        return self._failure(identity).is_file() and not self.finished(identity)

    def _point(self, identity: str) -> Path:
        return self.folder / "points" / identity

    def _failure(self, identity: str) -> Path:
        return self.folder / "failures" / f"{identity}.json"

    def store(self, outcome: Outcome) -> None:
        """Write what came of a point, where the process that computed it has not.

        Raises:
            SweepHalted: it cannot be written.
        """
        if outcome.files is not None:
            save_point(self.folder / "points", outcome.point, outcome.files)
        with self.writing():
            if outcome.error is not None:
                write_json(self._failure(outcome.point), outcome.error)
            else:
                self._failure(outcome.point).unlink(missing_ok=True)

    def metrics(self, identity: str) -> dict[str, Any]:
        """A finished point's ``metrics.json``.

        Raises:
            SvdlabError: it is damaged.
        """
        path = self._point(identity) / METRICS
        values = Metrics.read(path)
        if values["point"] != identity:
            raise SvdlabError(f"{path}: is of point {values['point']}")
        return values

    def error(self, identity: str) -> dict[str, str]:
        """A failed point's type, message and traceback.

        Raises:
            SvdlabError: it is damaged.
        """
        return read_as(FailureFile, self._failure(identity)).model_dump()

    def damage(self, identity: str) -> str:
        """What is wrong with a finished point, in one line; empty where all is as it was written."""
        try:
            for name, digest in self.metrics(identity)["files"].items():
                _check_digest(self._point(identity) / name, digest)
        except SvdlabError as error:
            return str(error)
        return ""

    def discard_damaged(self) -> list[str]:
        """Remove points of the plan that are not as they were written, so that they are computed again.

        Returns:
            what was wrong with each.

        Raises:
            SweepHalted: they cannot be removed.
        """
        found = []
        for identity in self.plan.points:
            if self.finished(identity) and (reason := self.damage(identity)):
                with self.writing():
                    shutil.rmtree(self._point(identity))
                found.append(reason)
            if self.failed(identity):
                try:
                    self.error(identity)
                except SvdlabError:  # it is tried again anyway
                    with self.writing():
                        self._failure(identity).unlink()
        return found

    def clip(self, identity: str) -> Path:
        """A finished point's ``clip.mp4``."""
        return self._point(identity) / CLIP

    def thumbnail(self, identity: str) -> Path:
        """A finished point's ``thumbnail.webp``."""
        return self._point(identity) / THUMBNAIL

    def frames(self, identity: str) -> np.ndarray:
        """A finished point's frames, uint8 (F, H, W, 3), as they were computed.

        Raises:
            SvdlabError: they are damaged.
        """
        return self._frames(identity)

    def _read_frames(self, identity: str) -> np.ndarray:
        from svdlab.svd.video import Clip

        path = self._point(identity) / FRAMES
        _check_digest(path, self.metrics(identity)["files"].get(FRAMES))
        return Clip.from_video(path).to_numpy()

    def at(self, **where: Any) -> str:
        """The identity of the first point at these values of the axes; names as text, such as ``rules="none"``.

        Raises:
            SvdlabError: there is none.
        """
        for identity, point in self.plan.points.items():
            if all(point.value(axis) == value for axis, value in where.items()):
                return identity
        raise SvdlabError(f"point: none at {where}, allowed: {self.plan.axes}")

    def square(self, x: str, y: str | None = None, **where: Any) -> list[list[str | None]]:
        """Identities over two axes: a row for each value of ``y`` (or one), a column for each of ``x``.

        Args:
            x, y: names of axes.
            where: values of the other axes; those left out are at their first value.

        Returns:
            None where the plan has no such point, as can be in a list.
        """
        fixed = {axis: values[0] for axis, values in self.plan.axes.items() if axis not in (x, y)} | where
        place = {self._place(point): identity for identity, point in self.plan.points.items()}

        def find(at: dict[str, Any]) -> str | None:
            return place.get(tuple({**fixed, **at}[axis] for axis in self.plan.axes))

        rows: list[dict[str, Any]] = [{}] if y is None else [{y: value} for value in self.plan.axes[y]]
        return [[find({**row, x: value}) for value in self.plan.axes[x]] for row in rows]

    def _place(self, point: Point) -> tuple[Any, ...]:
        return tuple(point.value(axis) for axis in self.plan.axes)

    def unplanned_points(self) -> dict[str, int]:
        """Finished points in the folder that are not of this plan: how many, by what is different about them.

        The difference completes a sentence that begins with "points": "were made by other code (changed: ...)".
        """
        source, found = self.plan.source, dict[str, int]()
        for path in sorted((self.folder / "points").glob("[0-9a-f]*")):
            if path.name in self.plan.points:
                continue
            reason = _difference(path / METRICS, source)
            found[reason] = found.get(reason, 0) + 1
        return found

    def _measure_neighbours(self, known: dict[str, dict[str, Any]]) -> None:
        """Compare each finished point with those next to it on every axis; ``metrics.json`` keeps what was measured.

        Args:
            known: the finished points' metrics, which are changed too.

        Raises:
            SweepHalted: the result cannot be written.
        """
        identities = {point: identity for identity, point in self.plan.points.items()}
        found: dict[str, list[dict[str, Any]]] = {identity: [] for identity in known}
        before = {i: {n["point"]: n["difference"] for n in metrics["neighbours"]} for i, metrics in known.items()}
        for axis, a, b in neighbours(self.plan.axes, list(identities)):
            one, other = identities[a], identities[b]
            if one not in known or other not in known:
                continue
            if other in before[one]:
                difference = before[one][other]
            else:
                difference = level_difference(self.frames(one), self.frames(other))[0]
            for here, there, point in ((one, other, b), (other, one, a)):
                value = point.value(axis)
                value = list(value) if isinstance(value, tuple) else value
                found[here].append({"axis": axis, "value": value, "point": there, "difference": difference})
        for identity, entries in found.items():
            if known[identity]["neighbours"] != entries:
                known[identity] = Metrics.sealed({**known[identity], "neighbours": entries})
                with self.writing():
                    write_json(self._point(identity) / METRICS, known[identity])

    def table(self) -> pd.DataFrame:
        """One row for each point that is finished or failed, in the plan's order: settings, names and metrics.

        Columns: ``point``, ``status``, every setting (the axes first), ``rules``, ``approximation``, ``motion`` (grey
        levels of 255 a frame), ``motion_per_frame``, ``difference_AXIS`` (mean absolute difference to the neighbours on
        that axis, grey levels), ``divergence_*``, ``seconds``, ``peak_memory_mib``, ``threads``, ``device``, ``host``,
        ``frames_sha256``, ``error``, ``folder``.
        """
        return self._table(self._finished_metrics())

    def _finished_metrics(self) -> dict[str, dict[str, Any]]:
        return {identity: self.metrics(identity) for identity in self.plan.points if self.finished(identity)}

    def _table(self, known: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
        import pandas as pd

        rows = []
        for identity, point in self.plan.points.items():
            if identity in known:
                rows.append(self._row(identity, point, known[identity], ""))
            elif self.failed(identity):
                error = self.error(identity)
                rows.append(self._row(identity, point, {}, f"{error['type']}: {error['message']}"))
        table = pd.DataFrame(rows)
        # A number of frames is whole, also where it is missing.
        return table.astype({name: "Int64" for name in (*_WHOLE, "threads") if name in table})

    def _row(self, identity: str, point: Point, metrics: dict[str, Any], error: str) -> dict[str, Any]:
        settings = {**point.settings.model_dump(), **{axis: point.value(axis) for axis in NAMED}}
        if settings["sigmas"] is not None:
            settings["sigmas"] = list(settings["sigmas"])
        axes = list(self.plan.axes)
        row: dict[str, Any] = {"point": identity, "status": "failed" if error else "finished"}
        row |= {name: settings[name] for name in [*axes, *(n for n in settings if n not in axes)]}
        row |= {name: metrics.get(name) for name in ("motion", "motion_per_frame")}
        for axis in axes:
            differences = [n["difference"] for n in metrics.get("neighbours", []) if n["axis"] == axis]
            known = [d for d in differences if d is not None]
            row[f"difference_{axis}"] = sum(known) / len(known) if known else None
        if self.plan.source.divergence:
            divergence = metrics.get("divergence") or {}
            row |= {f"divergence_{name}": divergence.get(name) for name in ("verdict", "ratio", "probe", "frames_mse")}
        names = ("seconds", "peak_memory_mib", "threads", "device", "host", "frames_sha256")
        row |= {name: metrics.get(name) for name in names}
        return {**row, "error": error, "folder": "" if error else f"points/{identity}"}

    def save_table(self) -> None:
        """Write ``table.parquet`` and ``table.csv``, neighbours compared.

        Raises:
            SweepHalted: they cannot be written.
        """
        known = self._finished_metrics()
        self._measure_neighbours(known)
        table = self._table(known)
        with self.writing():
            with atomic_path(self.folder / "table.parquet") as temporary:
                table.to_parquet(temporary, index=False)
            with atomic_path(self.folder / "table.csv") as temporary:
                table.to_csv(temporary, index=False)


def level_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int] | tuple[None, None]:
    """Mean and largest absolute difference of two clips (F, H, W, 3), in grey levels of 255; None for two sizes."""
    if a.shape != b.shape:
        return None, None
    # Frame by frame: a clip at full size widened at once takes hundreds of megabytes.
    differences = [np.abs(x.astype(np.int16) - y) for x, y in zip(a, b, strict=True)]
    return float(np.mean([d.mean() for d in differences])), int(max(d.max() for d in differences))


def _difference(path: Path, source: Source) -> str:
    """What sets the point with these metrics apart from those of a plan, see ``Sweep.unplanned_points``."""
    try:
        made = Metrics.read(path)
    except SvdlabError:
        return "are in another format or damaged"
    if made["format"] != FORMAT:
        return "are in another format or damaged"
    if (made["divergence"] is not None) is not source.divergence:
        return f"were made with{'out' if source.divergence else ''} the distance from diffusers"
    changed, model = source.code.changes(since=Code(**made["code"])), made["model"]
    reasons = [
        *([f"by other code ({changed})"] if changed else []),
        *([f"with another model ({model['name']})"] if model["fingerprint"] != source.model.fingerprint else []),
        *(["from another image"] if made["image"] != source.image_digest else []),
    ]
    return f"were made {' and '.join(reasons)}" if reasons else "have settings that are no longer asked for"


def _point(path: Path, number: int, planned: PlannedPoint) -> Point:
    with about(f"{path}: points.{number}"):
        settings = GenerationSettings.from_json(json.dumps(planned.settings))
    return Point(settings, tuple(planned.rules), tuple(planned.approximation))


def _check_axes(path: Path, axes: Mapping[str, Sequence[Any]], points: Iterable[Point]) -> None:
    """Raises: SvdlabError where an axis is none, or does not have the value of a point."""
    allowed = {*GenerationSettings.model_fields, *NAMED}
    for axis, values in axes.items():
        if axis not in allowed:
            raise SvdlabError(f"{path}: axes: got {short(axis)}, allowed: a setting, or {', '.join(NAMED)}")
        known = set(values)
        if missing := [point.value(axis) for point in points if point.value(axis) not in known]:
            raise SvdlabError(f"{path}: axes.{axis}: {short(missing[0])}, which a point has, is missing")


def _check_digest(path: Path, digest: str | None) -> None:
    """Raises: SvdlabError where a file is not what was written."""
    try:
        with path.open("rb") as file:
            found = sha256(file)
    except OSError as error:
        raise SvdlabError(f"{path}: cannot be read ({error.strerror})") from None
    if found != digest:
        raise SvdlabError(f"{path}: is not what was written")
