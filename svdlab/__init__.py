"""svdlab: a workbench for Stable Video Diffusion parity."""

from typing import TYPE_CHECKING

from svdlab.lazy import lazy_names

if TYPE_CHECKING:
    from svdlab.parity.trace import Trace
    from svdlab.svd.pipeline import SVDPipeline
    from svdlab.svd.settings import GenerationSettings

__all__ = ["GenerationSettings", "SVDPipeline", "Trace"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GenerationSettings": "svdlab.svd.settings",
        "SVDPipeline": "svdlab.svd.pipeline",
        "Trace": "svdlab.parity.trace",
    },
)
