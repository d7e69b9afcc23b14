"""svdlab: a workbench for Stable Video Diffusion parity."""

import os
from typing import TYPE_CHECKING

from svdlab.lazy import lazy_names

if TYPE_CHECKING:
    from svdlab.parity.trace import Trace
    from svdlab.svd.pipeline import SVDPipeline
    from svdlab.svd.settings import GenerationSettings

# Read by GNU OpenMP when torch loads it. A generation has thousands of short parallel loops. Threads that wait for each
# other by spinning take the cores from whatever else runs, and from the one that they wait for; those that sleep wake
# up late. These spin for some microseconds before they sleep (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["GenerationSettings", "SVDPipeline", "Trace"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GenerationSettings": "svdlab.svd.settings",
        "SVDPipeline": "svdlab.svd.pipeline",
        "Trace": "svdlab.parity.trace",
    },
)
