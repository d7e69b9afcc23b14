"""Points on a Dask cluster: worker processes of this machine, or a scheduler that is there. Needs ``svdlab[cluster]``.

A Dask scheduler runs whatever code it is sent: docs/clusters.md says whom to let near it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import dask
import distributed
from distributed import Client, Future, KilledWorker, Status, WorkerPlugin

from svdlab.errors import SvdlabError, about, requires, short
from svdlab.reading import read_json
from svdlab.sweep.plan import Point
from svdlab.sweep.point import OnStep, Outcome, Source, SweepHalted, compute_point
from svdlab.sweep.run import ShouldStop

_CONNECT_S = 10  # for a scheduler to answer
_POLL_S = 0.2  # between two questions whether to stop
_CLOSE_S = 30
_ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9A-Fa-f:.%]+\]|[\w.-]+):0*(?P<port>[1-9][0-9]{0,4})")


class Cluster:
    """What computes points through a client of Dask: a ``Backend``.

    Args:
        client: connected.
        name: of the scheduler, for messages.
        keep: called now and then while nothing ends, to replace workers that are gone for good.
    """

    def __init__(self, client: Client, name: str, keep: Callable[[], None] = lambda: None):
        self.client, self.name, self._keep = client, name, keep

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function's value on one of the workers; waits for one to be there.

        Raises:
            SweepHalted: the scheduler went away, or the workers know no svdlab.
        """
        future = self.client.submit(function, *arguments, pure=False)
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        future.add_done_callback(done.put)
        while (ended := self._next(done)) is None:
            pass
        return self._value(ended)

    def compute(
        self, source: Source, points: Sequence[Point], should_stop: ShouldStop, on_step: OnStep
    ) -> Iterator[Outcome]:
        """See ``Backend``; what a worker that died was at is computed again by another one."""
        # A task of its own, so that the image travels once and is not lost with a worker.
        shared = self.client.submit(_same, source, pure=False)
        suspects: list[Point] = []
        for point, future in self._finished(shared, points, should_stop):
            try:
                yield self._value(future)
            except KilledWorker:
                suspects.append(point)
            except SweepHalted:
                raise
            except Exception as error:
                yield Outcome(source.identity(point), error=_described(error))
        # A worker's death is blamed on all that it held. Each gets another try, alone, so that the guilty one shows.
        for suspect in suspects:
            for point, future in self._finished(shared, [suspect], should_stop):
                try:
                    yield self._value(future)
                except KilledWorker as error:
                    yield Outcome(source.identity(point), error=_described(error))

    def _finished(
        self, shared: Future, points: Sequence[Point], should_stop: ShouldStop
    ) -> Iterator[tuple[Point, Future]]:
        """Submit points in their order, so that a crash leaves whole rows, and give back those that end."""
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        futures = self.client.map(compute_point, [shared] * len(points), points, pure=False)
        waiting = dict(zip(futures, points, strict=True))
        for future in futures:
            future.add_done_callback(done.put)
        del futures  # a result is let go of once it is written
        try:
            while waiting and not should_stop():
                if (future := self._next(done)) is None:
                    continue
                if future.status == "lost":  # its worker died with the value, and the scheduler has it computed again
                    time.sleep(_POLL_S)
                    done.put(future)
                    continue
                yield waiting.pop(future), future
        finally:
            # Otherwise the workers would still compute what nobody waits for.
            with suppress(Exception):
                self.client.cancel(list(waiting), force=True)

    def _next(self, done: queue.SimpleQueue[Future]) -> Future | None:
        """What ended, or nothing for a while."""
        try:
            return done.get(timeout=_POLL_S)
        except queue.Empty:
            self._keep()
            return None

    def _value(self, future: Future) -> Any:
        try:
            return future.result()  # waits for a value that is lost to be computed again
        except ModuleNotFoundError as error:
            raise SweepHalted(
                f"{self.name}: a worker has no module {error.name}; install the same svdlab there"
            ) from None
        except (OSError, asyncio.CancelledError, concurrent.futures.CancelledError):
            if future.status == "error":  # the task's own
                raise
            raise SweepHalted(f"{self.name}: the scheduler went away") from None


def _described(error: Exception) -> dict[str, str]:
    lines = str(error).splitlines() or [""]
    return {"type": type(error).__name__, "message": lines[0], "traceback": str(error)}


def _same(source: Source) -> Source:
    return source


@contextmanager
def local_cluster(workers: int, threads: int | None = None) -> Iterator[Cluster]:
    """Processes of this machine, which share its cores and its disk, and which no other user of it can reach.

    They talk over TLS with certificates that exist in their memory only.

    Args:
        workers: how many.
        threads: of torch in each; default: the cores, divided.

    Raises:
        SvdlabError: the package that makes certificates is not installed.
    """
    requires("cryptography")
    share = str(threads or max(1, (os.cpu_count() or 1) // workers))
    threads_of = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), share)
    config: dict[str, Any] = {
        # No point waits in a worker's pocket while another worker could take it.
        "distributed.scheduler.worker-saturation": 1.0,
        # A worker that starts slowly again is not given up.
        "distributed.deploy.lost-worker-timeout": "300 s",
        # Its web pages are open to every user of the machine.
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        # Dask would make malloc give every freed tensor back to the system, at the price of as much system time.
        "distributed.nanny.pre-spawn-environ": {
            "MALLOC_TRIM_THRESHOLD_": None,
            **threads_of,
        },
    }
    with dask.config.set(config):  # read when workers start, also when they start again
        cluster = distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # a model may fill the machine; Dask would kill its worker
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            security=distributed.Security.temporary(),
            silence_logs=logging.CRITICAL,
            env=threads_of,
        )
        try:
            keep = functools.partial(_replace_dead, cluster, workers)
            with _client(cluster, f"{workers} local workers", keep) as client:
                client.client.register_plugin(_IgnoreInterrupt())
                yield client
        finally:
            with suppress(Exception):  # what does not end by itself ends with this process
                cluster.close(timeout=_CLOSE_S)


def _replace_dead(cluster: Any, workers: int) -> None:
    """Start new workers for those that Dask has given up: one that dies while it starts, say."""
    for name, nanny in list(cluster.workers.items()):
        if nanny.status in (Status.closed, Status.failed):
            cluster.workers.pop(name, None)
    if len(cluster.workers) < workers:
        cluster.scale(workers)


@contextmanager
def remote_cluster(
    address: str, tls_ca_file: str | None = None, tls_cert: str | None = None, tls_key: str | None = None
) -> Iterator[Cluster]:
    """Whatever workers a scheduler has, or will have.

    Args:
        address: such as ``tcp://host:8786`` or ``tls://host:8786``, or the scheduler file that Dask wrote.
        tls_ca_file, tls_cert, tls_key: PEM files for a ``tls://`` address.

    Raises:
        SvdlabError: an address that is none, nobody answers, a certificate that cannot be read.
    """
    options: dict[str, Any] = {}
    if not _is_address(address):
        address = _address_in(address)
    encrypted = address.startswith("tls://")
    if encrypted and not tls_ca_file and not dask.config.get("distributed.comm.tls.ca-file", None):
        raise SvdlabError(f"--scheduler: {address}: needs --tls-ca-file, --tls-cert and --tls-key")
    if tls_ca_file:
        if not encrypted:
            raise SvdlabError(f"--scheduler: got {address} with certificates, allowed: tls://HOST:PORT")
        for name, path in (("--tls-ca-file", tls_ca_file), ("--tls-cert", tls_cert), ("--tls-key", tls_key)):
            if path is None or not os.access(path, os.R_OK):
                raise SvdlabError(f"{name}: {path}: no file that can be read")
        options["security"] = distributed.Security(
            tls_ca_file=tls_ca_file, tls_client_cert=tls_cert, tls_client_key=tls_key, require_encryption=True
        )
    with _quiet(), _client(address, address, **options) as client:
        yield client


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and int(found["port"]) < 2**16


def _address_in(file: str) -> str:
    """The address in a scheduler file."""
    allowed = "allowed: tcp://HOST:PORT, tls://HOST:PORT, or the file that dask scheduler --scheduler-file wrote"
    if "\0" in file or not os.path.exists(file):
        raise SvdlabError(f"--scheduler: got {short(file)}, {allowed}")
    with about("--scheduler"):
        found = read_json(file)
    address = found.get("address") if isinstance(found, dict) else None
    if not isinstance(address, str) or not _is_address(address):
        raise SvdlabError(f"--scheduler: {file}: no address of a scheduler in it, {allowed}")
    return address


@contextmanager
def _client(where: Any, name: str, keep: Callable[[], None] = lambda: None, **options: Any) -> Iterator[Cluster]:
    try:
        client = distributed.Client(where, timeout=_CONNECT_S, set_as_default=False, **options)
    except (OSError, ValueError, TypeError, RuntimeError, asyncio.TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SvdlabError(f"--scheduler: {name}: no Dask scheduler answers ({reason})") from None
    try:
        yield Cluster(client, name, keep)
    finally:
        with suppress(Exception):  # the scheduler may be gone
            client.close(timeout=_CLOSE_S)


@contextmanager
def _quiet() -> Iterator[None]:
    """What Dask would log of a lost connection is said in one line."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class _IgnoreInterrupt(WorkerPlugin):
    """Ctrl-C reaches every process of a terminal; the driver is the one that ends the sweep."""

    def setup(self, worker: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
