"""The notebooks that come with svdlab."""

from __future__ import annotations

from pathlib import Path

import svdlab
from svdlab.errors import SvdlabError


def shipped_notebooks() -> list[Path]:
    """svdlab's own notebooks, in the order of their numbers, in the package or, in a clone, beside it.

    Raises:
        SvdlabError: there are none.
    """
    package = Path(svdlab.__file__).parent
    for folder in (package / "notebooks", package.parent / "notebooks"):
        if found := sorted(folder.glob("*.ipynb")):
            return found
    raise SvdlabError(f"{package / 'notebooks'}: the notebooks are missing, allowed: a clone or a whole installation")
