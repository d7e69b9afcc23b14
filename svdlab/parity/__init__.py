"""The parity harness: traces, the diffusers reference, the verdict against truth."""

from svdlab.parity.candidate import capture
from svdlab.parity.trace import Trace
from svdlab.parity.writer import TraceWriter

__all__ = ["Trace", "TraceWriter", "capture"]
