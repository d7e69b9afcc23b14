"""The code that makes what a panel shows, to copy."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import anywidget
import traitlets

from svdlab.parity.lab import Choice, Lab, Stages
from svdlab.svd.settings import GenerationSettings


class Snippet(anywidget.AnyWidget):
    """A button that copies code, and the code to read."""

    _esm = Path(__file__).parent / "snippet.js"
    code = traitlets.Unicode().tag(sync=True)


def case_code(
    lab: Lab, settings: GenerationSettings, bug: str, which: Choice, stages: Stages, image: str | None = None
) -> str:
    """Code that computes a case anew and shows one choice of it.

    Args:
        lab: what computed it. The image that it was given, if one was, is called ``image`` in the code.
        settings: resolved.
        bug: the injected bug.
        which: the choice that is shown.
        stages: the reader's functions, of which the code has the source.
        image: the name of an image file that took the place of the lab's.
    """
    imports = ["from svdlab.notebook import Player, case_clips", "from svdlab.parity.lab import Lab"]
    given = [repr(lab.model), repr(lab.device), repr(str(lab.dtype).removeprefix("torch."))]
    if image is not None:
        imports.append("from svdlab.samples import read_image")
        given.append(f"image=read_image({image!r})")
    elif lab.own_image:
        given.append("image=image")
    if stages:
        imports.insert(0, "import torch\n")
    values = settings.model_dump(exclude_defaults=True, exclude={"dtype"})
    functions = {name: (function.__name__, _source(function)) for name, function in stages.items()}
    own = ", ".join(f"{stage!r}: {name}" for stage, (name, _) in functions.items())
    lines = [
        *imports,
        "",
        f"lab = Lab({', '.join(given)})",
        "settings = lab.settings(",
        *(f"    {name}={value!r}," for name, value in values.items()),
        ")",
        *(f"\n\n{source}\n" for _, source in functions.values()),
        f"case = lab.case(settings, {bug!r}{f', {{{own}}}' if own else ''})",
        f"print(case.{which}.summary())",
        f"Player(case_clips(case, {which!r}), settings.fps)",
    ]
    return "\n".join(lines)


def _source(function: object) -> str:
    """What defines a function, as far as it is known."""
    try:
        return textwrap.dedent(inspect.getsource(function)).strip()  # type: ignore[arg-type]
    except (OSError, TypeError):
        return f"# {getattr(function, '__name__', function)}: as you defined it"
