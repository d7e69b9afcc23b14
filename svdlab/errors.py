"""The one error type that svdlab raises for bad input, and what it says where an extra is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# Which extra of the package brings a module. Whatever else svdlab imports comes with svdlab itself.
EXTRA_OF = {
    **dict.fromkeys(["diffusers", "transformers", "accelerate"], "parity"),
    **dict.fromkeys(["pandas", "pyarrow", "filelock"], "sweep"),
    **dict.fromkeys(["dask", "distributed", "cryptography"], "cluster"),
    **dict.fromkeys(["IPython", "altair", "anywidget", "ipywidgets", "traitlets", "vl_convert"], "notebook"),
    **dict.fromkeys(["jinja2", "latex2mathml", "matplotlib"], "notebook"),
    **dict.fromkeys(["bleach", "nbconvert", "nbformat", "papermill"], "notebook"),
}


# Of an error; a name or value in it may be a megabyte.
_MAX_CHARACTERS = 1000


class SvdlabError(ValueError):
    """Bad input: one line that names the field or file, what was got and what is allowed.

    Line breaks become spaces, other control characters, which a terminal would obey, escapes, and the middle of a very
    long line dots.
    """

    def __init__(self, message: object = "") -> None:
        line = printable(" ".join(str(message).splitlines()))
        if len(line) > _MAX_CHARACTERS:
            line = f"{line[: _MAX_CHARACTERS - 303]}...{line[-300:]}"
        super().__init__(line)


def printable(text: str) -> str:
    """A text with escapes in the place of line breaks, other control characters and invisible ones."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(value: object) -> str:
    """``repr``, cut to fit an error's one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def about(what: str) -> Iterator[None]:
    """Say in an error what it is about: ``what`` stands before its line."""
    try:
        yield
    except SvdlabError as error:
        raise SvdlabError(f"{what}: {error}") from None


def requires(*modules: str) -> None:
    """Check that modules which an extra brings are installed, without importing them.

    Raises:
        SvdlabError: one is not; the line names the extra to install.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise not_installed(module)


def not_installed(module: str) -> SvdlabError:
    """The error for a module that cannot be imported, such as a ``ModuleNotFoundError``'s ``name``."""
    extra = EXTRA_OF.get(module.partition(".")[0])
    package = f"svdlab[{extra}]" if extra else "svdlab"
    return SvdlabError(f"{module} is not installed; allowed: pip install '{package}'")
