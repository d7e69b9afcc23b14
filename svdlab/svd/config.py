"""Reading a component's ``config.json`` into a typed, checked dataclass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from svdlab.errors import SvdlabError

Config = TypeVar("Config")


def read_config(cls: type[Config], options: Mapping[str, Any], where: str, *, inert: Sequence[str] = ()) -> Config:
    """Make a config dataclass from a diffusers ``config.json``.

    Args:
        cls: the dataclass; lists in the JSON become tuples.
        options: the parsed JSON. Keys that start with ``_`` are bookkeeping (``_class_name``) and are left out.
        where: the file's name, for error messages.
        inert: option names that may be present and change nothing.

    Raises:
        SvdlabError: an option that svdlab does not implement, by name, or a value the config refuses.
    """
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    given = {k: v for k, v in options.items() if not k.startswith("_") and k not in inert}
    if unknown := sorted(set(given) - known):
        raise SvdlabError(f"{where}: option {unknown[0]!r} is not implemented; known: {', '.join(sorted(known))}")
    try:
        return cls(**{k: _tuples(v) for k, v in given.items()})
    except SvdlabError as error:
        raise SvdlabError(f"{where}: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def per_level(name: str, value: Any, levels: int) -> tuple[Any, ...]:
    """Spread an option that diffusers takes as one value or one value a level.

    Raises:
        SvdlabError: a sequence of another length than ``levels``.
    """
    if not isinstance(value, (tuple, list)):
        return (value,) * levels
    if len(value) != levels:
        raise SvdlabError(f"{name} has {len(value)} entries, block_out_channels has {levels}: they must agree")
    return tuple(value)


def check_groups(name: str, channels: Sequence[int], groups: int = 32) -> None:
    """Every normalised width must be a positive multiple of the number of groups.

    Raises:
        SvdlabError: one is not.
    """
    for width in channels:
        if not isinstance(width, int) or width < 1 or width % groups:
            raise SvdlabError(f"{name}: got {width}, allowed: positive multiples of {groups} (group norm)")
