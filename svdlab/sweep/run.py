"""Computing a sweep: in this process, or through whatever offers ``call`` and ``compute`` (see ``sweep.cluster``)."""

from __future__ import annotations

import io
import itertools
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svdlab.errors import SvdlabError, requires
from svdlab.samples import sample_picture
from svdlab.svd.settings import GenerationSettings
from svdlab.sweep.code import code_version
from svdlab.sweep.folder import PLAN, Plan, Sweep
from svdlab.sweep.plan import Changes, Point, axes_of, make_points
from svdlab.sweep.point import (
    OnStep,
    Outcome,
    Source,
    SweepHalted,
    check_points_fit,
    compute_point,
    identify_model,
    image_digest,
)

if TYPE_CHECKING:
    from PIL import Image

# The table is made again no more often than this many seconds, and than this many times as long as it took; what it is
# made from is written at once.
_TABLE_S = 5.0
_TABLE_SHARE = 20


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        total: points that were asked for.
        done: of these finished or failed, those of earlier runs included.
        failed: of these failed.
        points_per_minute: of this run, without what came before its first point; 0 until that is known.
        within: how much of the point under way is done, in [0, 1], where that is known.
        folder: of the sweep.
    """

    total: int
    done: int
    failed: int
    points_per_minute: float = 0.0
    within: float = 0.0
    folder: Path = Path()

    @property
    def fraction(self) -> float:
        """In [0, 1]."""
        return min(1.0, (self.done + self.within) / self.total)

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None until it is known."""
        rate = self.points_per_minute
        return 60 * (self.total - self.done - self.within) / rate if rate else None

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} points"]
        if self.seconds_left is not None:
            left = timedelta(seconds=round(max(0.0, self.seconds_left)))
            parts += [f"{self.points_per_minute:.1f} points/min", *([f"{left} left"] if self.done < self.total else [])]
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts)


OnProgress = Callable[[Progress], None]
ShouldStop = Callable[[], bool]


class Backend(Protocol):
    """Where points are computed."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function's value, computed where points are."""

    def compute(
        self, source: Source, points: Sequence[Point], should_stop: ShouldStop, on_step: OnStep
    ) -> Iterator[Outcome]:
        """What comes of the points, as it comes; ends early once ``should_stop`` says so.

        Raises:
            SweepHalted: no further point can be computed.
        """


class InProcess:
    """Points one after the other in this process."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See ``Backend``."""
        return function(*arguments)

    def compute(
        self, source: Source, points: Sequence[Point], should_stop: ShouldStop, on_step: OnStep
    ) -> Iterator[Outcome]:
        """See ``Backend``; a point under way is given up at its next denoising step."""
        from svdlab.parity.lab import Cancelled

        def step_done(i: int, steps: int) -> None:
            if should_stop():
                raise Cancelled
            on_step(i, steps)

        try:
            for point in points:
                if should_stop():
                    return
                yield compute_point(source, point, step_done)
        except Cancelled:
            return


def run_sweep(
    out: str | Path,
    changes: Changes,
    settings: GenerationSettings | None = None,
    *,
    model: str = "embedded",
    revision: str | None = None,
    device: str = "cpu",
    image: Image.Image | None = None,
    divergence: bool = False,
    threads: int | None = None,
    force: bool = False,
    separate: bool = False,
    backend: Backend | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> Sweep:
    """Compute every point that the folder does not hold yet.

    Args:
        out: the folder, made if needed; points that are there already are taken over.
        changes: of the settings, one per point; see ``grid``.
        settings: what all points share.
        model: "embedded", a checkpoint's folder or single file, or a name on the hub.
        revision: branch, tag or commit on the hub.
        device: where points are computed.
        image: what the clips start from; default: ``samples.sample_picture``.
        divergence: measure each point against diffusers, too.
        threads: of torch, in every process that computes; None leaves them.
        force: try even points that by an estimate cannot fit into the memory.
        separate: where ``out`` holds a sweep with other points than these, leave it, and take the next free name:
            ``out``-2, ``out``-3, ... By default the points of both are in one folder, and the table is of these.
        backend: where to compute; default: this process.
        on_progress: told of the progress.
        should_stop: asked now and then; once it says so, the sweep ends cleanly.

    Raises:
        SvdlabError: a point that is not allowed or cannot fit, a model that does not load; nothing is written.
        SweepHalted: a full disk, a lost scheduler; what is finished stays so.
    """
    points = make_points(settings or GenerationSettings(), changes)
    backend = backend or InProcess()
    picture = (image or sample_picture(model)).convert("RGB")
    plan = _plan(points, changes, picture, (model, revision), device, divergence, threads, force, backend)
    folder = _separate_folder(Path(out), plan) if separate else Path(out)
    return _execute(folder, plan, backend, on_progress, should_stop)


def resume_sweep(
    folder: str | Path,
    *,
    force: bool = False,
    backend: Backend | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> Sweep:
    """Resume a sweep: what is finished stays, what failed is tried again.

    With other code, or another model under the same name, all points are new; see ``Sweep.unplanned_points``.

    Raises:
        SvdlabError: no sweep, a model that does not load, points that cannot fit, unless ``force`` tries them.
        SweepHalted: a full disk, a lost scheduler.
    """
    old, backend = Sweep.open(folder), backend or InProcess()
    points, source = list(old.plan.points.values()), old.plan.source
    changes = [{axis: None for axis in old.plan.axes}]
    picture = old.picture()
    # A commit stays what it is; without one, the name is looked up anew.
    model = source.model.name, source.model.revision
    plan = _plan(points, changes, picture, model, source.device, source.divergence, source.threads, force, backend)
    return _execute(Path(folder), plan, backend, on_progress, should_stop)


def _separate_folder(folder: Path, plan: Plan) -> Path:
    """The first of ``folder``, ``folder``-2, ... that holds no sweep, or one that this plan resumes or extends."""
    names = itertools.chain([folder], (Path(f"{folder}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not (name / PLAN).exists() or _is_part_of(name, plan))


def _is_part_of(folder: Path, plan: Plan) -> bool:
    try:
        return Sweep.open(folder).plan.points.keys() <= plan.points.keys()
    except SvdlabError:  # what is damaged may be of any sweep
        return False


def _plan(
    points: Sequence[Point],
    changes: Changes,
    image: Image.Image,
    model: tuple[str, str | None],
    device: str,
    divergence: bool,
    threads: int | None,
    force: bool,
    backend: Backend,
) -> Plan:
    # Before anything is computed, and where it is to be.
    requires("pandas", "pyarrow", "filelock")
    if divergence:
        backend.call(requires, "diffusers", "transformers")
    found, resolved = backend.call(identify_model, *model, [p.settings for p in points])
    if not force:
        backend.call(check_points_fit, found, resolved, device)
    points = [replace(point, settings=settings) for point, settings in zip(points, resolved, strict=True)]
    if len(set(points)) < len(points):
        raise SvdlabError(
            "points: two are the same once what the checkpoint decides is filled in (height, width, frames)"
        )
    png = io.BytesIO()
    image.save(png, "PNG")
    source = Source(
        found,
        device,
        png.getvalue(),
        image_digest(image),
        code_version(divergence),
        divergence,
        "",  # where they go is decided later
        f".driver-{uuid.uuid4().hex}",
        threads,
    )
    return Plan(axes_of(changes, points), {source.identity(point): point for point in points}, source)


def _execute(
    folder: Path, plan: Plan, backend: Backend, on_progress: OnProgress | None, should_stop: ShouldStop | None
) -> Sweep:
    source, points = replace(plan.source, points=str(folder.absolute() / "points")), plan.points
    sweep = Sweep(folder, replace(plan, source=source))
    with sweep.lock():
        sweep.save_plan()
        _clear(Path(source.points))
        sweep.discarded = sweep.discard_damaged()
        todo = [point for identity, point in points.items() if not sweep.finished(identity)]
        computed, failed, first, next_table = 0, 0, 0.0, time.monotonic() + _TABLE_S

        def tell(within: float = 0.0) -> None:
            if on_progress is not None:
                done = len(points) - len(todo) + computed
                # Loading the model belongs to the first point, and would spoil the rate.
                rate = 60 * (computed - 1) / (time.monotonic() - first) if computed > 1 else 0.0
                on_progress(Progress(len(points), done, failed, rate, within, folder))

        token = Path(source.points) / source.token
        with sweep.writing():
            token.touch()
        try:
            tell()
            for outcome in backend.compute(
                source, todo, should_stop or (lambda: False), lambda i, steps: tell(i / (steps + 1))
            ):
                sweep.store(outcome)
                computed, failed = computed + 1, failed + (outcome.error is not None)
                first = first or time.monotonic()
                tell()
                if (began := time.monotonic()) > next_table:
                    sweep.save_table()
                    ended = time.monotonic()
                    next_table = ended + max(_TABLE_S, _TABLE_SHARE * (ended - began))
            sweep.save_table()
        except SweepHalted as error:
            with suppress(SvdlabError):  # on a full disk the last table stays
                sweep.save_table()
            finished = sum(map(sweep.finished, points))
            raise SweepHalted(
                f"{error}; {finished} of {len(points)} points are finished and intact; resume with: "
                f"svdlab sweep --resume {sweep.folder}"
            ) from None
        except KeyboardInterrupt:
            sweep.save_table()
            raise
        finally:
            token.unlink(missing_ok=True)
    return sweep


def _clear(points: Path) -> None:
    """Remove what an interrupted run left: folders that were never whole, and its token."""
    for left in points.glob(".*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
