"""Every notebook, run headless by papermill in a process of its own: ``svdlab report``."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from tqdm import tqdm

from svdlab.errors import SvdlabError
from svdlab.files import write_json, write_text
from svdlab.reading import Document, parse, parse_as, read_as
from svdlab.report.pages import index_page, junit, notebook_page
from svdlab.report.process import end_with_children
from svdlab.report.provenance import versions
from svdlab.report.results import NotebookResult, RecordedVerdict
from svdlab.report.verdict import VERDICT

# glibc gives the memory of every large tensor back and asks for it again, page by page: here it keeps up to 1 GiB.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
_UNFINISHED = "not finished when this report was written"
_END_S = 5  # for the output of a process that was killed
_NOTEBOOK_BYTES = 2**30  # with its outputs, clips among them


def run_report(
    notebooks: Sequence[Path],
    out: Path,
    parameters: Mapping[str, Any] | None = None,
    workers: int = 2,
    timeout: float | None = None,
    previous: Mapping[str, Any] | None = None,
    made_with: Mapping[str, str] | None = None,
) -> list[NotebookResult]:
    """Run notebooks with papermill and write a page for each, ``index.html``, ``results.json`` and ``report.xml``.

    Every file is self-contained; the index links to the pages beside it.

    Args:
        notebooks: the files.
        out: folder for the pages, made if needed.
        parameters: papermill parameters; each notebook gets those that its parameters cell has.
        workers: how many run at once; the cores are divided among them.
        timeout: seconds that one notebook may take.
        previous: an earlier report's ``results.json``, to show what changed.
        made_with: what the index names besides versions, such as ``provenance.made_with``.

    Returns:
        One result per notebook, in the given order. A failing notebook does not stop the others. The report is written
        after every notebook, so that an interruption (Ctrl-C, SIGTERM, SIGKILL) leaves what is finished, and the
        notebooks under way end with this process.

    Raises:
        SvdlabError: a file that is no notebook; nothing is written.
    """
    # Read before anything runs.
    titles = {path: title_of(path) for path in notebooks}
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Spinning OpenMP teams that share cores are tens of times slower: every process gets its own share.
    environment = {**_KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    results = {path: NotebookResult(path.stem, "error", 0.0, [], _UNFINISHED, title=titles[path]) for path in notebooks}
    given, started = dict(parameters or {}), time.perf_counter()
    about = {"parameters": given, "made_with": dict(made_with or {}), "versions": versions()}
    pages = [(f"{path.stem}.html", titles[path]) for path in notebooks]
    running = _Processes()
    with (
        _ended_by(signal.SIGTERM),
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(notebooks), desc="notebooks", unit="notebook") as bar,
    ):
        # Side by side the last ones, which are about all fixes and take the longest, are not to be left to run alone.
        order = notebooks if workers == 1 else [*reversed(notebooks)]
        futures = {
            pool.submit(_run_one, path, titles[path], out, pages, given, environment, timeout, running): path
            for path in order
        }
        left = len(notebooks)
        try:
            for future in as_completed(futures):
                result = results[futures[future]] = future.result()
                left -= 1
                # With notebooks missing, what they found before would look lost.
                since = None if left else previous
                _write(out, list(results.values()), about, time.perf_counter() - started, since)
                bar.set_postfix_str(f"{result.name} {result.status}")
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            running.end()
    return list(results.values())


class _TookTooLong(Exception):  # noqa: N818 - it is caught beside its cause
    """A process that was ended; its argument is what it had printed."""


class _Processes:
    """The processes of the notebooks under way."""

    def __init__(self) -> None:
        self._lock, self.ended, self._running = threading.Lock(), False, set[subprocess.Popen[bytes]]()

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], timeout: float | None
    ) -> tuple[int, str, str]:
        """Exit code, output and errors of a command; after ``end`` it is as if killed.

        Raises:
            _TookTooLong: with the output so far.
        """
        reader, writer = os.pipe()
        try:
            with self._lock:
                if self.ended:
                    return -signal.SIGTERM, "", ""
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=reader,  # its other end closes with this process, however that ends: see ``end_with_parent``
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for this process, which ends the others
                )
                self._running.add(process)
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as expired:
                end_with_children(process.pid)
                with suppress(subprocess.TimeoutExpired):  # what is no child of it any more may hold its output
                    process.communicate(timeout=_END_S)
                raise _TookTooLong((expired.stdout or b"").decode(errors="replace")) from None
            return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
        finally:
            os.close(reader)
            os.close(writer)
            with self._lock:
                self._running = {process for process in self._running if process.poll() is None}

    def end(self) -> None:
        """Kill all of them, with their kernels; no further one starts."""
        with self._lock:
            self.ended = True
            for process in self._running:
                end_with_children(process.pid)


@contextmanager
def _ended_by(number: signal.Signals) -> Iterator[None]:
    """Leave the block with ``SystemExit`` at a signal that would end the process on the spot."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) != signal.SIG_DFL:
        yield
        return

    def leave(*_: object) -> None:
        sys.exit(128 + number)

    signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def _write(
    out: Path,
    results: Sequence[NotebookResult],
    about: Mapping[str, Any],
    seconds: float,
    previous: Mapping[str, Any] | None,
) -> None:
    about = {"made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC", "seconds": seconds, **about}
    # All are made before one is written: what fails here leaves an earlier report as it is.
    xml, index = junit(results), index_page(results, about, previous)
    write_json(out / "results.json", {**about, "notebooks": [r.to_dict() for r in results]})
    write_text(out / "report.xml", xml)
    write_text(out / "index.html", index)


# Runs in a process of its own: the parameters that the notebook has, printed, then the notebook.
_PAPERMILL = """
import json, sys
from svdlab.lazy import left_out
with left_out("rfc3987_syntax"):  # see ``notebook.charts``
    import papermill
from svdlab.report.process import end_with_parent
end_with_parent()
source, executed, given, folder = sys.argv[1:]
known = papermill.inspect_notebook(source)
given = {k: v for k, v in json.loads(given).items() if k in known}
print(json.dumps({k: [v["default"], *([given[k]] if k in given else [])] for k, v in known.items()}), flush=True)
papermill.execute_notebook(
    source, executed, parameters=given, kernel_name="python3", cwd=folder, progress_bar=False, start_timeout=600
)
"""


def _run_one(
    path: Path,
    title: str,
    out: Path,
    pages: Sequence[tuple[str, str]],
    parameters: Mapping[str, Any],
    environment: Mapping[str, str],
    timeout: float | None,
    running: _Processes,
) -> NotebookResult:
    """One notebook in a process of its own, then its page; whatever goes wrong is the result's error."""
    started = time.perf_counter()
    result = NotebookResult(path.stem, "error", 0.0, [], title=title)

    def failed(problem: str) -> None:
        result.status, result.error = "error", result.error or problem

    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / path.name
        command = [sys.executable, "-c", _PAPERMILL, str(path), str(executed), json.dumps(parameters), str(path.parent)]
        try:
            code, printed, errors = running.run(command, environment, timeout)
            if running.ended:
                return result
            if code:
                failed(_printable((errors.strip().splitlines() or ["no message"])[-1]))
        except _TookTooLong as late:
            printed = str(late)
            failed(f"stopped after {timeout:g} s (--timeout)")
        # A notebook may hold anything, and is not to cost the others their report.
        try:
            result.parameters = _effective(printed)
            if not executed.exists():
                raise SvdlabError("no notebook was written")
            result.verdicts, result.thumbnail = read_verdicts(executed), first_picture(executed, title)
        except Exception as problem:
            failed(_said(problem))
        if not result.error:
            result.status = "passed" if all(v["passed"] for v in result.verdicts) else "failed"
        result.seconds = time.perf_counter() - started
        if executed.exists():
            result.page = f"{path.stem}.html"
            try:
                write_text(out / result.page, notebook_page(executed, result, pages))
            except Exception as problem:
                failed(f"its page cannot be made: {_said(problem)}")
                result.page = ""
    return result


def _said(problem: Exception) -> str:
    """An exception in one line; its type where that says more than the text."""
    text = _printable((str(problem).splitlines() or [""])[0])
    return text if isinstance(problem, SvdlabError) else f"{type(problem).__name__}: {text}"


def _effective(printed: str) -> dict[str, Any]:
    """The values of a notebook's parameters: what was given, else what its cell says."""
    found = {}
    for name, (default, *given) in parse(printed.partition("\n")[0] or "{}", "parameters").items():
        try:
            found[name] = given[0] if given else ast.literal_eval(default)
        except (ValueError, SyntaxError):
            found[name] = default
    return found


class _Cell(Document):
    """Of a cell, what is read here."""

    model_config = ConfigDict(extra="ignore")

    cell_type: str = ""
    source: str | list[str] = ""
    outputs: list[dict[str, Any]] = []


class _Notebook(Document):
    model_config = ConfigDict(extra="ignore")

    cells: list[_Cell]


def title_of(notebook: Path) -> str:
    """A notebook's first heading, or its file's name.

    Raises:
        SvdlabError: it is no notebook.
    """
    for cell in _cells(notebook):
        text = "".join(cell.source)
        if cell.cell_type == "markdown" and (found := re.search(r"^# (.+)$", text, re.MULTILINE)):
            return found[1].strip()
    return notebook.stem


def parameters_of(notebooks: Sequence[Path]) -> set[str]:
    """The names in the parameters cells of notebooks."""
    import papermill

    found: set[str] = set()
    for path in notebooks:
        with suppress(Exception):  # a broken notebook has its own row in the report
            found |= papermill.inspect_notebook(str(path)).keys()
    return found


def _cells(notebook: Path) -> list[_Cell]:
    return read_as(_Notebook, notebook, limit=_NOTEBOOK_BYTES).cells


def _outputs(executed: Path) -> list[dict[str, Any]]:
    """The displayed data of an executed notebook, in order, by type."""
    found = [output.get("data") for cell in _cells(executed) for output in cell.outputs]
    return [data for data in found if isinstance(data, dict)]


def read_verdicts(executed: Path) -> list[dict[str, Any]]:
    """What ``record`` left in an executed notebook, in order.

    Raises:
        SvdlabError: a verdict that ``record`` does not write.
    """
    texts = [json.dumps(data[VERDICT]) for data in _outputs(executed) if VERDICT in data]
    return [parse_as(RecordedVerdict, text, "verdict").model_dump() for text in texts]


def first_picture(executed: Path, alt: str) -> str:
    """The first player, a first frame, or the first picture that carries its data, as HTML that carries it, too."""
    outputs, text = _outputs(executed), escape(f"from {alt}")
    html = "".join("".join(data.get("text/html", "")) for data in outputs)
    if found := re.search(r'<figure class="svdlab-player".*?</figure>', html, re.DOTALL):
        return found[0]
    if film := re.search(r"--w:(\d+);--h:(\d+);--columns:(\d+)[^>]*><img[^>]* src=\"(data:image/webp;[^\"]+)\"", html):
        width, height, columns, src = film.groups()
        shown = f'<img style="width:{100 * int(columns)}%;max-width:none" alt="{text}" src="{src}">'
        return f'<span class="view" style="display:block;overflow:hidden;aspect-ratio:{width}/{height}">{shown}</span>'
    for kind in ("webp", "png", r"svg\+xml"):  # a clip, a still, a chart
        if found := re.search(rf'src="(data:image/{kind};base64,[A-Za-z0-9+/=]+)"', html):
            return f'<img alt="{text}" src="{found[1]}">'
    for data in outputs:
        if png := re.fullmatch(r"[A-Za-z0-9+/=\s]+", "".join(data.get("image/png", ""))):
            return f'<img alt="{text}" src="data:image/png;base64,{"".join(png[0].split())}">'
    return ""


def _printable(text: str) -> str:
    """XML allows no terminal colours."""
    return "".join(c for c in re.sub(r"\x1b\[[0-9;]*m", "", text) if c.isprintable())


def notebooks_at_a_time(model: str, device: str) -> int:
    """Two notebooks at a time where the memory holds both: diffusers twice (one in float64), and svdlab."""
    import psutil
    import torch

    from svdlab.svd.checkpoint import checkpoint_files, checkpoint_path

    weights = sum(file.stat().st_size for file in checkpoint_files(checkpoint_path(model)))
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    return 2 if 2 * 12 * weights < free else 1
