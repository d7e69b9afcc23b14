"""What panels are made of: a widget for each setting, the line that says how things stand, the alert, what is stale."""

from __future__ import annotations

import sys
import traceback
from html import escape
from typing import Any, Literal, get_args, get_origin

import ipywidgets

from svdlab.errors import SvdlabError
from svdlab.svd.settings import GenerationSettings

WIDE = {"description_width": "11em"}
# Of a control in a column of controls.
NARROW: dict[str, Any] = {"style": {"description_width": "47%"}, "layout": {"width": "auto"}}
_STALE = "svdlab-stale"


def is_live() -> bool:
    """Whether an editor runs this cell, so that there is a hand for the sliders.

    JupyterLab, Notebook and VS Code name the cell that they run; papermill and nbconvert do not.
    """
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent() if kernel is not None else {}
    return "cellId" in request.get("metadata", {}) or "google.colab" in sys.modules


def control(name: str, value: Any, high: float | None = None) -> ipywidgets.ValueWidget:
    """The widget of one setting: bounds and steps of its slider, a choice for a literal, and its help.

    Args:
        name: a field of ``GenerationSettings``.
        value: where it starts.
        high: an upper bound for the slider below the field's own.

    Raises:
        SvdlabError: a field that no slider is made for.
    """
    field = GenerationSettings.model_fields.get(name)
    shared: dict[str, Any] = {"description": name.replace("_", " "), **NARROW}
    if field is not None and get_origin(field.annotation) is Literal:
        return ipywidgets.Dropdown(options=get_args(field.annotation), value=value, **shared)
    extra = field.json_schema_extra if field is not None else None
    if field is None or not isinstance(extra, dict) or "slider" not in extra:
        raise SvdlabError(f"{name}: no slider for it, allowed: settings with bounds")
    bounds: Any = extra["slider"]
    low, own_high, step = bounds
    whole = all(isinstance(v, int) for v in (low, own_high, step))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    shared["tooltip"] = help_of(name)
    # A start outside the usual range widens it.
    top = max(own_high if high is None else min(own_high, high), value)
    return kind(value=value, min=min(low, value), max=top, step=step, **shared)


def help_of(name: str) -> str:
    """A setting's one line of help, with its unit."""
    unit = unit_of(name)
    description = GenerationSettings.model_fields[name].description or ""
    return f"{description} ({unit})" if unit else description


def unit_of(name: str) -> str:
    """A setting's unit, or nothing."""
    extra = GenerationSettings.model_fields[name].json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def small(text: str) -> str:
    """Text in small print: HTML."""
    return f"<small>{escape(text)}</small>"


def status(html: str) -> str:
    """How things stand, for screen readers too: HTML."""
    return f"<span role='status'>{html}</span>"


def alert(error: Exception) -> str:
    """Bad input in its one line; anything else whole, since a thread's traceback would be lost: HTML."""
    if isinstance(error, SvdlabError):
        return f"<b role='alert'>{escape(str(error))}</b>"
    text = escape("".join(traceback.format_exception(error)))
    return f"<details open><summary>{escape(repr(error))}</summary><pre>{text}</pre></details>"


def stale_style() -> ipywidgets.HTML:
    """The style sheet that dims what ``set_stale`` marks; a panel has it once. (A layout has no opacity.)"""
    return ipywidgets.HTML(f"<style>.{_STALE}{{opacity:0.4}}</style>", layout={"display": "none"})


def set_stale(widget: ipywidgets.DOMWidget, stale: bool) -> None:
    """Dim a widget that shows what is no longer asked for, or show it in full again."""
    (widget.add_class if stale else widget.remove_class)(_STALE)
