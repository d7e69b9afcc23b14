"""diffusers' own tests of its pipeline, run on svdlab's: ``python docs/run_diffusers_tests.py CHECKOUT [OPTIONS]``.

A checkout of diffusers' repository is needed (its package does not carry the tests), and what its tests import:
``pip install parameterized requests-mock``. Options and exit status are pytest's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from svdlab import SVDPipeline

TESTS = "tests/pipelines/stable_video_diffusion"
NOT_APPLICABLE = {
    "test_save_load_local": "asks for lines in diffusers' own log",
    "test_loading_with_incorrect_variants_raises_error": "asks for diffusers' own sentence, svdlab has another",
}


class OnSvdlab:
    """A plugin of pytest: svdlab's pipeline in the place of diffusers'."""

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        """Exchange the pipeline, and mark what is not applicable."""
        for item in items:
            if item.cls is not None:
                item.cls.pipeline_class = SVDPipeline
            if reason := NOT_APPLICABLE.get(item.name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def main(checkout: str, *options: str) -> int:
    """Run them; the skipped ones need an accelerator or are switched off in diffusers itself."""
    if not (Path(checkout) / TESTS).is_dir():
        print(f"{checkout}: no checkout of diffusers: {TESTS} is missing", file=sys.stderr)
        return 2
    os.chdir(checkout)
    sys.path.insert(0, os.getcwd())
    return int(pytest.main(["-rsx", "-p", "no:cacheprovider", *options, TESTS], plugins=[OnSvdlab()]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else print(__doc__) or 2)
