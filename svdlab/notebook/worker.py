"""The thread behind a panel: the newest request runs, and never beside an older one."""

from __future__ import annotations

import threading
from collections.abc import Callable

_DEBOUNCE = 0.25  # seconds without a move before a slider counts as moved

Work = Callable[[threading.Event], None]


class Worker:
    """One thread that runs the newest request. An older one is told to stop, and never runs beside it.

    Args:
        delay: seconds without a newer request before one runs.
    """

    def __init__(self, delay: float = _DEBOUNCE):
        self.delay = delay
        self._changed = threading.Condition()
        self._next: Work | None = None
        self._stop = threading.Event()
        self._busy = False
        self._thread: threading.Thread | None = None

    def submit(self, work: Work) -> None:
        """Run ``work`` soon, unless a newer one comes; it is handed an event that is set once it is to stop."""
        with self._changed:
            self._stop.set()
            self._next = work
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="svdlab widget", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self) -> None:
        """Drop what waits and stop what runs."""
        with self._changed:
            self._next = None
            self._stop.set()
            self._changed.notify_all()

    @property
    def waiting(self) -> bool:
        """Whether a request waits for the thread."""
        with self._changed:
            return self._next is not None

    def join(self) -> None:
        """Wait until nothing runs and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is None and not self._busy)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                newest = None
                while newest is not self._next:
                    newest = self._next
                    self._changed.wait(self.delay)
                if newest is None:
                    continue
                self._next, self._stop, self._busy = None, threading.Event(), True
            try:
                newest(self._stop)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
