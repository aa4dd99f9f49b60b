"""The value of a flag as a file has it, by the type of the flag: in a ``run.json``, and in what ``--config`` names."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from argonne.parallel.errors import ArgonneError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", NoneType: "None"}


def typed(name: str, hint: Any, value: Any) -> Any:
    """A value of JSON or TOML as the flag ``name`` of type ``hint`` has it.

    Raises:
        ArgonneError: it is of another type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in inner:
            try:
                return typed(name, each, value)
            except ArgonneError:
                continue
    elif origin is Literal:
        if value in inner:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(typed(name, inner[0], each) for each in value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _as_float(value)
    elif type(value) is hint:  # a truth is no number here
        return value
    raise ArgonneError(f"{name}={value!r} is of another type than the flag")


def as_now(kind: type, name: str, value: Any) -> Any:
    """``value``; or what is now in the place of a truth that an earlier version had, as ``kind.earlier`` says."""
    changed = getattr(kind, "earlier", {}).get(name, {})
    return changed.get(value, value) if isinstance(value, bool) else value


def legal(hint: Any) -> str:
    """What a value of that type may be, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(legal(each) for each in inner))
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin is tuple:
        return f"a list of {legal(inner[0])}s"
    return _WORDS.get(hint, str(hint))


def may_be_none(hint: Any) -> bool:
    """Whether ``None`` is such a value: on a command line and in TOML, which has no word for it, the text ``None``."""
    return NoneType in get_args(hint)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")  # which no flag takes
