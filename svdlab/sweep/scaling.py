"""Points per minute with one worker and with several, at one thread each: ``svdlab sweep --scaling``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdlab.svd.settings import GenerationSettings
from svdlab.sweep.cluster import local_cluster
from svdlab.sweep.plan import Changes
from svdlab.sweep.run import run_sweep


@dataclass(frozen=True)
class Scaling:
    """One measurement; the workers had loaded the model and made clips before.

    Attributes:
        workers: processes, at one torch thread each.
        points: that were timed.
        seconds: for all of them.
        points_per_minute: the rate.
        speedup: over one worker.
    """

    workers: int
    points: int
    seconds: float
    points_per_minute: float
    speedup: float

    def __str__(self) -> str:
        name = "worker" if self.workers == 1 else "workers"
        rate = f"{self.points_per_minute:.1f} points/min ({self.points} points in {self.seconds:.1f} s)"
        return f"{self.workers} {name}: {rate}, {self.speedup:.2f} times one worker"


def measure_scaling(
    changes: Changes, settings: GenerationSettings, workers: int, options: Mapping[str, Any]
) -> list[Scaling]:
    """Compute the points with 1 and with ``workers`` workers, each in a folder that is thrown away.

    The workers are warm when the clock starts: each has loaded the model and made a clip.

    Args:
        changes, settings: the points.
        workers: how many processes beside one.
        options: of ``run_sweep``.
    """
    measured: list[Scaling] = []
    for number in sorted({1, workers}):
        with tempfile.TemporaryDirectory() as folder, local_cluster(number, threads=1) as cluster:
            warm = [{"seed": 2**62 + i} for i in range(4 * number)]
            run_sweep(Path(folder) / "warm", warm, settings, threads=1, backend=cluster, **options)
            started = time.perf_counter()
            run_sweep(Path(folder) / "timed", changes, settings, threads=1, backend=cluster, **options)
            seconds = time.perf_counter() - started
        rate = 60 * len(changes) / seconds
        first = measured[0].points_per_minute if measured else rate
        measured.append(Scaling(number, len(changes), seconds, rate, rate / first))
    return measured
