"""The parity harness: traces, the diffusers reference, the verdict against truth."""

from svdlab.parity.trace import Trace, TraceWriter, capture

__all__ = ["Trace", "TraceWriter", "capture"]
