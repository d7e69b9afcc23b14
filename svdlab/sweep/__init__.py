"""Parameter sweeps: a grid or a list of generations in a folder that survives whatever happens to the process.

``run_sweep`` makes one, ``resume_sweep`` resumes it, ``Sweep.open`` reads it, ``compare_sweeps`` compares two.
"""

from svdlab.sweep.compare import compare_sweeps
from svdlab.sweep.folder import Sweep
from svdlab.sweep.plan import grid, parse_axis
from svdlab.sweep.run import resume_sweep, run_sweep

__all__ = ["Sweep", "compare_sweeps", "grid", "parse_axis", "resume_sweep", "run_sweep"]
