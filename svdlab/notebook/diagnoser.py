"""A reader's own port in a notebook: its reference is written, what it wrote is read, and its bugs are named."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets

import svdlab
from svdlab.files import check_outputs
from svdlab.notebook.charts import plot_divergence
from svdlab.notebook.controls import WIDE, is_live, small
from svdlab.notebook.inspector import Inspector
from svdlab.notebook.panel import Panel
from svdlab.notebook.tables import diagnosis_table, verdict_html
from svdlab.parity.bugs import BUGS
from svdlab.parity.candidate import capture
from svdlab.parity.compare import compare
from svdlab.parity.demo import SIX, play
from svdlab.parity.lab import Cancelled
from svdlab.parity.trace import Trace
from svdlab.svd.pipeline import SVDPipeline
from svdlab.svd.video import data_url

# For sets of several bugs.
_SECONDS = 40.0
_LANGUAGES = {"Rust": "writer.rs", "C++": "writer.cpp", "JavaScript": "writer.mjs", "Swift": "Writer.swift"}


class Diagnoser(Panel):
    """Names the bugs in a reader's own port: writes the reference for it, reads what the port wrote.

    Args:
        pipe: svdlab with the checkpoint that the port runs.
        reference: diffusers' trace, whose inputs the port is to replay.
        truth: the same in float64.
    """

    def __init__(self, pipe: SVDPipeline, reference: Trace, truth: Trace):
        super().__init__(delay=0.0)
        self.pipe, self.reference, self.truth = pipe, reference, truth
        self._uploads = tempfile.TemporaryDirectory(prefix="svdlab-")
        wide: dict[str, Any] = {"style": WIDE, "layout": {"width": "34em"}}
        self.target = ipywidgets.Text(value="reference.safetensors", description="the reference goes to", **wide)
        self.write = ipywidgets.Button(description="Write reference")
        self.language = ipywidgets.Dropdown(options=list(_LANGUAGES), description="a writer in", **wide)
        self.writer = ipywidgets.HTML()
        self.upload = ipywidgets.FileUpload(accept=".safetensors", description="Upload the port's trace")
        self.upload.layout.width = "16em"
        self.source = ipywidgets.Text(placeholder="port.safetensors", description="the port's trace", **wide)
        self.diagnose = ipywidgets.Button(description="Diagnose", button_style="primary")
        examples = {"choose one": None, "six bugs at once": SIX, "no bug": (), **{name: (name,) for name in BUGS}}
        self.example = ipywidgets.Dropdown(options=examples, description="or an example port", **wide)
        self.found = ipywidgets.VBox()
        self.write.on_click(lambda button: self._write())
        self.language.observe(lambda change: self._link(), "value")
        self.upload.observe(self._uploaded, "value")
        self.diagnose.on_click(lambda button: self._start(self.source.value, lambda: Trace.open(self.source.value)))
        self.example.observe(self._chosen, "value")
        self._link()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if is_live():
            return self.show()._repr_mimebundle_()
        text = "With a kernel behind this page a port's trace can be given here, and an example chosen."
        return {"text/html": f"<p><i>{escape(text)}</i></p>", "text/plain": text}

    def show(self) -> ipywidgets.Widget:
        """All of it as one widget."""
        large = ipywidgets.HTML(small("An upload of more than 10 MB breaks the connection: give its path instead."))
        rows = (
            [self.target, self.write],
            [self.language, self.writer],
            [self.source, self.diagnose, self.upload],
            [self.example, self.stop],
        )
        return ipywidgets.VBox([*map(ipywidgets.HBox, rows), large, self.status, self.found])

    def _write(self) -> None:
        def work(stop: threading.Event) -> str:
            check_outputs(self.target.value)
            return f"wrote {self.reference.save(self.target.value).label}"

        self.submit(work)

    def _link(self) -> None:
        """The writer in the port's language, to save from the browser."""
        path = writers() / _LANGUAGES[self.language.value]
        href = data_url("text/plain", path.read_bytes())
        self.writer.value = f"<a download='{path.name}' href='{href}'>{path.name}</a>"

    def _uploaded(self, change: dict[str, Any]) -> None:
        if not change["new"]:
            return
        (file,) = change["new"]
        path = Path(self._uploads.name) / Path(file["name"]).name
        path.write_bytes(file["content"])
        self.source.value = str(path)
        self.upload.value = ()
        self._start(path.name, lambda: Trace.open(path))

    def _chosen(self, change: dict[str, Any]) -> None:
        names: Sequence[str] | None = change["new"]
        if names is not None:
            self._start(
                f"an example with {' + '.join(names) or 'no bug'}",
                lambda: play(self.pipe, self.reference, self.truth, *names)[0],
            )

    def _start(self, name: str, port: Callable[[], Trace]) -> None:
        self.submit(lambda stop: self._diagnose(name, port, stop))

    def _diagnose(self, name: str, port: Callable[[], Trace], stop: threading.Event) -> str:
        from svdlab.parity.diagnose import diagnose

        def replayed(count: int) -> None:
            if stop.is_set():
                raise Cancelled
            self.say(f"{name}: replay {count} ...")

        self.found.children = ()
        self.say(f"{name}: running ...")
        trace = port()
        diagnosis = diagnose(self.reference, trace, self.truth, pipe=self.pipe, seconds=_SECONDS, on_replay=replayed)
        own = compare(self.reference, capture(self.pipe, replay=self.reference, preprocess=True), self.truth)
        plot = plot_divergence(own, diagnosis.comparison, "the port")
        said = f"<details><summary>in full</summary>{diagnosis._repr_html_()}</details>"
        parts = (verdict_html(diagnosis, ".ipynb"), diagnosis_table(diagnosis).to_html(), plot._repr_html_(), said)
        self.found.children = (*(ipywidgets.HTML(part) for part in parts), Inspector(diagnosis.comparison))
        return f"{name}: done"


def writers() -> Path:
    """The folder of the trace writers in other languages, in the package or, in a clone, beside it."""
    package = Path(svdlab.__file__).parent
    return next(folder for folder in (package / "writers", package.parent / "docs/writers") if folder.is_dir())
