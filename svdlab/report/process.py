"""Ending a notebook's process with all that it started. Importing this is light."""

from __future__ import annotations

import os
import threading
from contextlib import suppress


def end_with_children(pid: int) -> None:
    """Kill a process and all below it. A Jupyter kernel is in a session of its own: no process group reaches it.

    A process that is stopped starts no further one while those that it has are counted.
    """
    import psutil

    with suppress(psutil.Error):
        top = psutil.Process(pid)
        if pid != os.getpid():
            top.suspend()
        for child in top.children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        top.kill()


def end_with_parent() -> None:
    """End this process, with all that it started, once its standard input is closed: the parent holds the other end."""

    def wait() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock this thread would hold when Python ends
        end_with_children(os.getpid())

    threading.Thread(target=wait, name="parent", daemon=True).start()
