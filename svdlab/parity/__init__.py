"""The parity harness: traces, the diffusers reference, the verdict against truth."""

from typing import TYPE_CHECKING

from svdlab.lazy import lazy_names

if TYPE_CHECKING:
    from svdlab.parity.candidate import capture
    from svdlab.parity.trace import Trace
    from svdlab.parity.writer import TraceWriter

__all__ = ["Trace", "TraceWriter", "capture"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Trace": "svdlab.parity.trace",
        "TraceWriter": "svdlab.parity.writer",
        "capture": "svdlab.parity.candidate",
    },
)
