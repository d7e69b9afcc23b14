"""A reader's own port in a notebook: its reference is written, what it wrote is read, and its bugs are named."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets

from svdlab.files import check_outputs
from svdlab.notebook.charts import plot_divergence
from svdlab.notebook.controls import WIDE, is_live
from svdlab.notebook.panel import Panel
from svdlab.parity.candidate import capture
from svdlab.parity.compare import compare
from svdlab.parity.trace import Trace
from svdlab.svd.pipeline import SVDPipeline

# For sets of several bugs.
_SECONDS = 40.0


class Diagnoser(Panel):
    """Names the bug in a reader's own port: writes the reference for it, reads what the port wrote.

    Args:
        pipe: svdlab with the checkpoint that the port runs.
        reference: diffusers' trace, whose inputs the port is to replay.
        truth: the same in float64.
    """

    def __init__(self, pipe: SVDPipeline, reference: Trace, truth: Trace):
        super().__init__(delay=0.0)
        self.pipe, self.reference, self.truth = pipe, reference, truth
        wide: dict[str, Any] = {"style": WIDE, "layout": {"width": "36em"}}
        self.target = ipywidgets.Text(value="reference.safetensors", description="the reference goes to", **wide)
        self.write = ipywidgets.Button(description="Write reference")
        self.source = ipywidgets.Text(placeholder="port.safetensors", description="the port's trace", **wide)
        self.diagnose = ipywidgets.Button(description="Diagnose", button_style="primary")
        self.found = ipywidgets.HTML()
        self.write.on_click(lambda button: self._start(self._write))
        self.diagnose.on_click(lambda button: self._start(self._diagnose))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if is_live():
            return self.show()._repr_mimebundle_()
        text = "With a kernel behind this page, two fields stand here: where the reference goes, and your port's file."
        return {"text/html": f"<p><i>{escape(text)}</i></p>", "text/plain": text}

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget."""
        rows = ([self.target, self.write], [self.source, self.diagnose])
        return ipywidgets.VBox([*map(ipywidgets.HBox, rows), self.status, self.found])

    def _start(self, work: Callable[[], str]) -> None:
        self.say("running ...")
        self.submit(lambda stop: work())

    def _write(self) -> str:
        check_outputs(self.target.value)
        return f"wrote {self.reference.save(self.target.value).label}"

    def _diagnose(self) -> str:
        from svdlab.parity.diagnose import diagnose

        self.found.value = ""
        diagnosis = diagnose(
            self.reference, Trace.open(self.source.value), self.truth, pipe=self.pipe, seconds=_SECONDS
        )
        own = compare(self.reference, capture(self.pipe, replay=self.reference, preprocess=True), self.truth)
        plot = plot_divergence(own, diagnosis.comparison, "the port")
        self.found.value = plot._repr_html_() + diagnosis._repr_html_()
        return "done"
