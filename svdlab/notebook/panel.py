"""What every panel has: a worker, Run and Stop, progress, and a line that says how things stand or what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape

import ipywidgets

from svdlab.notebook.controls import alert, status
from svdlab.notebook.worker import Worker
from svdlab.parity.lab import Cancelled


class Panel:
    """Widgets over one worker. Whatever is raised in the worker's thread is shown in the status line.

    Args:
        delay: see ``Worker``; default: the worker's own.
    """

    def __init__(self, delay: float | None = None):
        self.worker = Worker() if delay is None else Worker(delay)
        self.run = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self.stop = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress = ipywidgets.FloatProgress(max=1.0, layout={"width": "12em"})
        self.status = ipywidgets.HTML()
        self.stop.on_click(lambda button: self.worker.stop())

    def say(self, text: str) -> None:
        """Put a text into the status line."""
        self.status.value = status(escape(text))

    def say_error(self, error: Exception) -> None:
        """Put an error into the status line."""
        self.status.value = status(alert(error))

    def submit(self, work: Callable[[threading.Event], str]) -> None:
        """Run ``work`` in the worker's thread, and then say what it returns, or that it was stopped, or its error.

        Args:
            work: handed an event that is set once it is to stop; may raise ``Cancelled``.
        """

        def run(stop: threading.Event) -> None:
            self.stop.disabled = False
            try:
                self.say(work(stop))
            except Cancelled:
                self.say("stopped")
            except Exception as error:  # a thread's own traceback would be lost
                self.say_error(error)
            finally:
                self.progress.value = 0.0
                self.stop.disabled = True

        self.worker.submit(run)
