"""The parity harness: traces, the diffusers reference, the verdict against truth."""

from typing import TYPE_CHECKING

from svdlab.lazy import lazy_names

if TYPE_CHECKING:
    from svdlab.parity.trace import Trace, TraceWriter, capture

__all__ = ["Trace", "TraceWriter", "capture"]
__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(__all__, "svdlab.parity.trace"))
