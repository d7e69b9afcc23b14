"""Sweeps on Dask: the same bits wherever a point is computed, and what happens when processes die."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed
import pytest
from distributed import WorkerPlugin
from test_sweep import AXES, PICTURE, SMALL, hashes

from svdlab.errors import SvdlabError
from svdlab.sweep import Sweep, grid, resume_sweep, run_sweep
from svdlab.sweep import point as point_module
from svdlab.sweep.cluster import Cluster, _replace_dead, local_cluster, remote_cluster
from svdlab.sweep.point import SweepHalted
from svdlab.sweep.run import Progress

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def plugin(before: Callable[[str, Any], None]) -> WorkerPlugin:
    """Put in a worker, it does something before each point: called with the point's identity and the point."""

    class Before(WorkerPlugin):
        def setup(self, worker: Any) -> None:
            make = point_module.make_point

            def made(lab: Any, source: Any, point: Any, step: Any) -> dict[str, bytes]:
                before(source.identity(point), point)
                return make(lab, source, point, step)

            point_module.make_point = made

    return Before()


def slow(said: Path, seconds: float) -> WorkerPlugin:
    """A worker that says when a point begins, and takes its time."""
    said.mkdir()

    def before(identity: str, point: Any) -> None:
        (said / f"{identity}-{os.getpid()}").touch()
        time.sleep(seconds)

    return plugin(before)


def began(said: Path, since: float = 0.0) -> list[tuple[str, int]]:
    """The identity and the process of every point that began, the last one first."""
    times = {path: path.stat().st_mtime for path in said.iterdir()}
    names = [path.name.split("-") for path in sorted(times, key=times.__getitem__, reverse=True) if times[path] > since]
    return [(identity, int(process)) for identity, process in names]


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The points in one process, at one thread."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return run_sweep(out, grid(AXES), SMALL, model=str(tiny), image=PICTURE, threads=1)


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    with local_cluster(2, threads=1) as cluster:
        yield cluster


def test_two_local_workers_give_the_same_bits(alone: Sweep, tiny: Path, tmp_path: Path, two: Cluster) -> None:
    sweep = run_sweep(tmp_path, grid(AXES), SMALL, model=str(tiny), image=PICTURE, backend=two)
    assert hashes(sweep) == hashes(alone)
    processes = {sweep.metrics(identity)["process"] for identity in sweep.plan.points}
    assert processes <= set(two.client.run(os.getpid).values()), "computed by the workers, in whichever share"
    assert set(sweep.table()["threads"]) == {1}


@pytest.mark.slow
def test_a_worker_killed_in_mid_point(tiny: Path, tmp_path: Path) -> None:
    said, killed = tmp_path / "said", list[tuple[str, int]]()
    changes = grid({"fps": [7, 14, 21, 28], "seed": list(range(3))})

    def on_progress(progress: Progress) -> None:
        if progress.done < 3 or killed:
            return
        while not killed:  # until a point has only just begun
            killed.extend(began(said, since=time.time() - 0.1))
        os.kill(killed[0][1], signal.SIGKILL)

    with local_cluster(2, threads=1) as cluster:
        cluster.client.register_plugin(slow(said, 0.2))
        sweep = run_sweep(
            tmp_path / "out", changes, SMALL, model=str(tiny), image=PICTURE, backend=cluster, on_progress=on_progress
        )
    identity, process = killed[0]
    tries = [p for i, p in began(said) if i == identity]
    assert len(tries) == 2 and process in tries, "another worker began the point again"
    table = sweep.table()
    assert len(table) == 12 and table["point"].is_unique and set(table["status"]) == {"finished"}
    assert sorted(zip(table["fps"], table["seed"], strict=True)) == sorted((c["fps"], c["seed"]) for c in changes)
    own = run_sweep(tmp_path / "own", changes[::3], SMALL, model=str(tiny), image=PICTURE, threads=1)
    assert hashes(own).items() <= hashes(sweep).items()
    again = resume_sweep(tmp_path / "own")
    assert hashes(again) == hashes(own)
    assert not [p for p in (tmp_path / "out/points").iterdir() if p.name.startswith(".")]


def test_a_point_that_kills_its_workers_is_a_failure(tiny: Path, tmp_path: Path, two: Cluster) -> None:
    def before(identity: str, point: Any) -> None:
        if point.settings.fps == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    two.client.register_plugin(plugin(before))
    two.client.cluster.scheduler.allowed_failures = 0
    changes = grid({"fps": [7, 14, 21, 28]})
    sweep = run_sweep(tmp_path / "out", changes, SMALL, model=str(tiny), image=PICTURE, backend=two)
    table = sweep.table()
    assert list(table["status"]) == ["failed"] + ["finished"] * 3, "the dead worker's other points are innocent"
    assert table["error"][0].startswith("KilledWorker")


class Remote:
    """A scheduler and one worker, each a process of its own."""

    def __init__(self, folder: Path):
        self.file = folder / "scheduler.json"
        self.processes = [
            self._start(
                "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", self.file
            ),
            self._start(
                "dask_worker", "--scheduler-file", self.file, "--nthreads", "1", "--no-dashboard", "--no-nanny"
            ),
        ]

    def _start(self, program: str, *options: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{program}", *map(str, options)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @property
    def address(self) -> str:
        import json

        deadline = time.monotonic() + 60
        while True:
            try:
                return json.loads(self.file.read_text())["address"]
            except (OSError, ValueError):
                assert time.monotonic() < deadline, "the scheduler does not start"
                time.sleep(0.1)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    made = Remote(tmp_path)
    yield made
    made.stop()


class Elsewhere(Cluster):
    """Workers that do not share the driver's disk."""

    def compute(self, source: Any, points: Sequence[Any], should_stop: Any, on_step: Any) -> Iterator[Any]:
        for outcome in super().compute(replace(source, token="of another disk"), points, should_stop, on_step):
            assert outcome.files, "the point came as bytes"
            yield outcome


def test_a_remote_scheduler(alone: Sweep, tiny: Path, tmp_path: Path, remote: Remote) -> None:
    address = remote.address
    with remote_cluster(str(remote.file)) as cluster:
        for out, backend in (("shared", cluster), ("bytes", Elsewhere(cluster.client, cluster.name))):
            changes = grid(AXES)
            sweep = run_sweep(tmp_path / out, changes, SMALL, model=str(tiny), image=PICTURE, backend=backend)
            assert hashes(sweep) == hashes(alone), "the same bits"
            identity = next(iter(sweep.plan.points))
            assert sweep.frames(identity).tobytes() == alone.frames(identity).tobytes()

        # The same machine: the scheduler goes away in the middle.
        cluster.client.register_plugin(slow(tmp_path / "said", 0.5))

        def on_progress(progress: Progress) -> None:
            if progress.done == 2:
                remote.processes[0].kill()

        changes = grid({"fps": [7, 14, 21, 28, 35, 42]})
        with pytest.raises(SweepHalted) as lost:
            run_sweep(
                tmp_path / "lost",
                changes,
                SMALL,
                model=str(tiny),
                image=PICTURE,
                backend=cluster,
                on_progress=on_progress,
            )
    message = str(lost.value)
    assert f"{address}: the scheduler went away" in message and "points are finished and intact" in message
    left = Sweep.open(tmp_path / "lost")
    finished = sum(map(left.finished, left.plan.points))
    assert 2 <= finished < 6
    assert set(resume_sweep(tmp_path / "lost").table()["status"]) == {"finished"}


class FakeFuture:
    """A future that goes through these states, one each time that its state is asked for; its value is an outcome."""

    def __init__(self, outcome: Any, *states: str):
        self.outcome, self.states = outcome, list(states)

    @property
    def status(self) -> str:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def add_done_callback(self, done: Callable[[FakeFuture], None]) -> None:
        done(self)

    def result(self) -> Any:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class FakeClient:
    """Its futures are given."""

    def __init__(self, *futures: FakeFuture):
        self.futures = futures

    def submit(self, function: Any, source: Any, pure: bool) -> Any:
        return source

    def map(self, function: Any, sources: Any, points: Any, pure: bool) -> list[FakeFuture]:
        return list(self.futures)

    def cancel(self, futures: Any, force: bool) -> None:
        pass


def outcomes(*futures: FakeFuture) -> list[Any]:
    source: Any = type("Source", (), {"identity": lambda self, point: str(point)})()
    cluster = Cluster(FakeClient(*futures), "tcp://x:1")  # type: ignore[arg-type]
    return list(cluster.compute(source, list(range(len(futures))), lambda: False, lambda i, n: None))  # type: ignore[arg-type]


def test_a_value_that_is_lost_with_its_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdlab.sweep.cluster._POLL_S", 0.01)
    lost = FakeFuture("a", "lost", "lost", "finished")
    assert outcomes(lost, FakeFuture("b", "finished")) == ["b", "a"], "the others do not wait for it"


@pytest.mark.parametrize("ended", [asyncio.CancelledError(), concurrent.futures.CancelledError(), OSError("closed")])
def test_a_scheduler_that_goes_away_halts_and_a_point_that_fails_does_not(ended: BaseException) -> None:
    with pytest.raises(SweepHalted, match="tcp://x:1: the scheduler went away"):
        outcomes(FakeFuture(ended, "cancelled"))
    if isinstance(ended, OSError):
        (outcome,) = outcomes(FakeFuture(ended, "error"))
        assert outcome.error["message"] == "closed"


def test_no_other_user_of_the_machine_reaches_the_workers(two: Cluster) -> None:
    """Who has no certificate of this cluster is refused, also by a worker."""
    addresses = [two.client.scheduler.address, *two.client.scheduler_info()["workers"]]
    for address in addresses:
        assert address.startswith("tls://127.0.0.1:")
    for address, options in (
        (addresses[0].replace("tls", "tcp"), {}),
        (addresses[0], {"security": distributed.Security.temporary()}),
    ):
        with pytest.raises(OSError):
            distributed.Client(address, timeout=2, set_as_default=False, **options)
    pages = [two.client.cluster.scheduler.http_server.port]
    for port in pages:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/info/main/workers.html", timeout=5)


def test_a_worker_that_dask_gave_up_is_replaced() -> None:
    class Nanny:
        def __init__(self, status: distributed.Status):
            self.status = status

    class Workers:
        workers = {0: Nanny(distributed.Status.failed), 1: Nanny(distributed.Status.running)}
        asked: list[int] = []

        def scale(self, number: int) -> None:
            self.asked.append(number)

    cluster = Workers()
    _replace_dead(cluster, 2)
    assert list(cluster.workers) == [1] and cluster.asked == [2]
    _replace_dead(cluster, 1)
    assert cluster.asked == [2], "nothing is missing"


def test_workers_need_the_package_that_makes_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cryptography" else find(name))
    with pytest.raises(SvdlabError, match=r"cryptography is not installed.*svdlab\[cluster\]"), local_cluster(1):
        pass


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdlab.sweep.cluster._CONNECT_S", 0.5)
    with (
        pytest.raises(SvdlabError, match="--scheduler: tcp://127.0.0.1:9: no Dask scheduler answers"),
        remote_cluster("tcp://127.0.0.1:9"),
    ):
        pass
    wrong = [
        "localhost",
        "tcp://localhost",
        "tcp://x:",
        "tcp://x:70000",
        "ws://x:1",
        "tcp://x:1/y",
        "",
        "\0",
        "9" * 5000,
    ]
    for address in wrong:
        with pytest.raises(SvdlabError, match="--scheduler: got .*allowed: tcp://HOST:PORT"), remote_cluster(address):
            pass
    (tmp_path / "ca.pem").touch()
    (tmp_path / "file.json").write_text("{}")
    pem = [str(tmp_path / name) for name in ("ca.pem", "none.pem", "k.pem")]
    for arguments, message in (
        (["tls://127.0.0.1:9", *pem], "--tls-cert: .*none.pem: no file"),
        (["tls://127.0.0.1:9"], "needs --tls-ca-file, --tls-cert and --tls-key"),
        (["tcp://127.0.0.1:9", *pem], "with certificates, allowed: tls://HOST:PORT"),
        ([str(tmp_path / "file.json")], "file.json: no address of a scheduler in it"),
    ):
        with pytest.raises(SvdlabError, match=message), remote_cluster(*arguments):
            pass


def test_a_worker_of_another_version_or_model_halts_the_sweep(alone: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    source, point = alone.plan.source, next(iter(alone.plan.points.values()))
    point = replace(point, settings=point.settings.replace(fps=3))
    with pytest.raises(SweepHalted, match=r"not the driver's code \(svdlab 9\.9\.9 -> .*\); install the same svdlab"):
        point_module.compute_point(replace(source, code=replace(source.code, svdlab="9.9.9")), point)
    with pytest.raises(SweepHalted, match="model .* is .*, allowed: fedcba"):
        point_module.compute_point(replace(source, model=replace(source.model, fingerprint="fedcba")), point)
    with pytest.raises(SweepHalted, match="the model does not load: model: 'gone' is no folder"):
        point_module.compute_point(replace(source, model=replace(source.model, name="gone")), point)
