"""Two sweeps, point by point: did this change move anything?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from svdlab.errors import SvdlabError
from svdlab.sweep.folder import Sweep, level_difference
from svdlab.tables import Column, Table

At = tuple[Any, ...]


@dataclass(frozen=True)
class PointChange:
    """One point in both sweeps.

    Attributes:
        at: where it stands on the axes.
        identical: whether its frames are the same to the last bit, before they were rounded to grey levels.
        mean, largest: absolute difference of the frames, in grey levels of 255; None for clips of two sizes.
        motion: before and after, grey levels per frame.
        seconds: before and after.
    """

    at: dict[str, Any]
    identical: bool
    mean: float | None
    largest: int | None
    motion: tuple[float, float]
    seconds: tuple[float, float]

    def moved(self, tolerance: int | None = None) -> bool:
        """Whether it is another clip: by a bit, or by more than ``tolerance`` grey levels at some pixel."""
        if self.identical:
            return False
        return tolerance is None or self.largest is None or self.largest > tolerance


@dataclass(frozen=True)
class SweepComparison:
    """What a change moved.

    Attributes:
        points: those that are finished in both sweeps.
        missing: those that only the first has finished, though the second asks for them.
        differs: what the sweeps were made with, where it is not the same: (before, after).
    """

    points: list[PointChange]
    missing: list[dict[str, Any]]
    differs: dict[str, tuple[str, str]]

    def moved(self, tolerance: int | None = None) -> bool:
        """Whether any point is another clip, or is gone."""
        return bool(self.missing) or any(p.moved(tolerance) for p in self.points)

    def summary(self, tolerance: int | None = None) -> str:
        """One line."""
        moved = sum(p.moved(tolerance) for p in self.points)
        identical = sum(p.identical for p in self.points)
        by = "" if tolerance is None else f" by more than {tolerance} grey level{'s' * (tolerance != 1)}"
        lost = f", {len(self.missing)} are missing in the second" if self.missing else ""
        return f"{moved} of {len(self.points)} points moved{by}, {identical} are the same to the last bit{lost}"

    def table(self, tolerance: int | None = None) -> Table:
        """One row per point; differences and motion in grey levels of 255."""
        heads = [*self.points[0].at, "moved", "mean difference", "largest", "motion before", "motion after"]
        rows = []
        for point in self.points:
            word = "yes" if point.moved(tolerance) else "no" if point.identical else "a little"
            sizes = ["other size", ""] if point.mean is None else [f"{point.mean:.3g}", str(point.largest)]
            rows.append([*map(str, point.at.values()), word, *sizes, *(f"{m:.3g}" for m in point.motion)])
        return Table([Column(head.replace("_", " "), "right") for head in heads], rows, self.summary(tolerance))

    def to_dict(self, tolerance: int | None = None) -> dict[str, Any]:
        """What ``--json`` writes."""
        points = [{**asdict(p), "moved": p.moved(tolerance)} for p in self.points]
        return {"moved": self.moved(tolerance), "points": points, "missing": self.missing, "differs": self.differs}


def compare_sweeps(before: Sweep, after: Sweep) -> SweepComparison:
    """Match the points of two sweeps by their axes, whatever else they were made with, and compare their frames.

    Raises:
        SvdlabError: other axes, or no point that is finished in both.
    """
    axes = list(before.plan.axes)
    if set(axes) != set(after.plan.axes):
        raise SvdlabError(f"axes: got {axes} and {list(after.plan.axes)}, allowed: two sweeps over the same axes")
    old, new = _by_place(before, axes), _by_place(after, axes)
    points, missing = [], []
    for place, identity in old.items():
        if not before.finished(identity) or place not in new:
            continue
        at = dict(zip(axes, place, strict=True))
        if not after.finished(new[place]):
            missing.append(at)
            continue
        was, now = before.metrics(identity), after.metrics(new[place])
        identical = was["frames_sha256"] == now["frames_sha256"]
        mean, largest = (0.0, 0) if identical else level_difference(before.frames(identity), after.frames(new[place]))
        motion, seconds = ((was[name], now[name]) for name in ("motion", "seconds"))
        points.append(PointChange(at, identical, mean, largest, motion, seconds))
    if not points:
        raise SvdlabError(f"points: none is finished both in {before.folder} and in {after.folder}")
    return SweepComparison(points, missing, _differs(before, after))


def _by_place(sweep: Sweep, axes: list[str]) -> dict[At, str]:
    return {tuple(point.value(axis) for axis in axes): identity for identity, point in sweep.plan.points.items()}


def _differs(before: Sweep, after: Sweep) -> dict[str, tuple[str, str]]:
    """What was not the same, beside the axes."""

    def about(sweep: Sweep) -> dict[str, Any]:
        source, first = sweep.plan.source, next(iter(sweep.plan.points.values()))
        settings = {n: v for n, v in first.settings.model_dump().items() if n not in sweep.plan.axes}
        made = {
            "svdlab": str(source.code),
            "torch": source.code.torch,
            "model": f"{source.model.name} {source.model.fingerprint[:12]}",
            "image": source.image_digest[:12],
            "device": source.device,
        }
        return {**made, **settings}

    was, now = about(before), about(after)
    return {name: (str(was[name]), str(now[name])) for name in was if was[name] != now[name]}
