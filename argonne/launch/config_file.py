"""Flags from a file: ``--config`` reads TOML, JSON or a ``run.json``, and ``--print-config`` writes what it reads back.

A key is the name of a flag, with ``_`` or ``-``, at the top of the file or in the table of its group (``[training]``).
``None`` is the text "None", as on a command line. Paths that are relative are so to the current directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from argonne.launch.flags import at_home
from argonne.launch.values import as_now, legal, may_be_none, typed
from argonne.parallel.communication import environment
from argonne.parallel.errors import ArgonneError

Config = TypeVar("Config")

_OF_STARTING = ("nproc", "local_rank", "max_restarts")


@dataclass(frozen=True)
class ConfigFlags:
    """Flags from a file, and as a file."""

    config: Path | None = None
    """A TOML file of flags, or a run.json to take a run's flags from; what is named on the command line, too, counts
    as it is there [the command line alone]."""
    print_config: bool = False
    """Print what all flags are, as a file for --config, and leave."""


@dataclass(frozen=True)
class _Flag:
    """Where a flag is in a configuration."""

    name: str
    group: str
    kind: type
    """Of the group."""
    hint: Any

    def value(self, found: Any, path: Path) -> Any:
        """What a file says, as the flag has it. Raises ``ArgonneError`` naming flag, value and file."""
        found = as_now(self.kind, self.name, found)
        if found == "None" and may_be_none(self.hint):
            return None
        try:
            return typed(self.name, self.hint, found)
        except ArgonneError:
            raise ArgonneError(
                f"{self.name}={found!r} in config={str(path)!r} is not legal; legal: {legal(self.hint)}"
            ) from None


def file_of(config_type: type, arguments: Sequence[str]) -> Path | None:
    """The file that ``arguments`` name, if it is for a configuration that may have one."""
    hints = get_type_hints(config_type)
    words = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    words += [value for word, value in pairwise(arguments) if word == "--config"]
    if ConfigFlags not in hints.values() or not words or words[0].startswith("--"):
        return None
    return at_home(ConfigFlags(Path(words[0]))).config


def said_of(path: Path, name: str) -> Any:
    """What a file says of the flag ``name``, whatever else it says; None where it says nothing of it.

    Raises:
        ArgonneError: the file cannot be read.
    """
    content = _read(path)
    tables = [content, *(found for found in content.values() if isinstance(found, dict))]
    return next((found for table in tables for key, found in table.items() if key.replace("-", "_") == name), None)


def with_file(config_type: type[Config], default: Config | None, path: Path) -> tuple[Config, frozenset[str]]:
    """``default``, or what holds without it, with what the file says; and the flags that the file names.

    A ``run.json`` has every flag of its run: of those it names the ones whose value is not the default.

    Raises:
        ArgonneError: the file cannot be read, or what it says is no flag, or no value of one.
    """
    known = {flag.name: flag for flag in _flags_of(config_type)}
    groups = {flag.group: flag.kind for flag in known.values()}
    content = _read(path)
    of_run = isinstance(content.get("flags"), dict)
    entries = _of_run(content["flags"], known) if of_run else dict(_entries(content, known, set(groups), path))
    values = {name: known[name].value(found, path) for name, found in entries.items()}
    config = _blank(config_type, groups) if default is None else default
    for group in groups:
        own = {name: value for name, value in values.items() if known[name].group == group}
        config = replace(config, **{group: replace(getattr(config, group), **own)})  # type: ignore[type-var]
    named = (name for name, value in values.items() if not of_run or value != _default(known[name]))
    return config, frozenset(named)


def as_toml(config: Any) -> str:
    """``config``, which was parsed, as a file that ``--config`` reads back to it.

    What is not ``given`` is a comment: it holds without the file too.

    Raises:
        ArgonneError: a value is no text of Unicode, and TOML has no way to say it.
    """
    lines, group = ["# What --config reads. Behind a # is what holds without a flag."], ""
    for flag in _flags_of(type(config)):
        if flag.group != group:
            lines += ["", f"[{(group := flag.group)}]"]
        value = getattr(getattr(config, flag.group), flag.name)
        lines.append(f"{'' if flag.name in config.given else '# '}{flag.name} = {_toml(flag.name, value)}")
    return "\n".join(lines)


def _flags_of(config_type: type) -> Iterator[_Flag]:
    """Every flag of a configuration's groups, but for those of the file itself."""
    for group, kind in get_type_hints(config_type).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind is not ConfigFlags:
            hints = get_type_hints(kind)
            yield from (_Flag(each.name, group, kind, hints[each.name]) for each in dataclasses.fields(kind))


def _blank(config_type: type[Config], groups: Mapping[str, type]) -> Config:
    """A configuration without any flag: what has no default is for the command line to say, or the file."""
    made = {}
    for group, kind in groups.items():
        fields = dataclasses.fields(kind)
        required = [each.name for each in fields if _default_of(each) is dataclasses.MISSING]
        made[group] = kind(**dict.fromkeys(required, tyro.MISSING))
    return config_type(**made)


def _default(flag: _Flag) -> Any:
    (field,) = (each for each in dataclasses.fields(flag.kind) if each.name == flag.name)
    return _default_of(field)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _read(path: Path) -> dict[str, Any]:
    """What a file says. Raises ``ArgonneError`` when it cannot be read."""
    if path.suffix not in (".toml", ".json"):
        raise ArgonneError(f"config={str(path)!r} is not legal; legal: a file whose name ends in .toml or .json")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _toml_reader().loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ArgonneError(f"config={str(path)!r} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise ArgonneError(f"config={str(path)!r} is not legal; legal: a JSON object of flags, or a run.json")
    return content


def _toml_reader() -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ArgonneError("Python 3.10 reads no TOML; legal: a .json file, pip install tomli, or Python 3.11 or newer")


def _of_run(flags: Mapping[str, Any], known: Mapping[str, _Flag]) -> dict[str, Any]:
    """The flags of a ``run.json`` that this version has, in whichever group an earlier one kept them.

    Where a launcher starts the ranks, those by which that run started its own are not for this one.
    """
    by_launcher = environment.this_process().launched and not environment.under_driver()
    left_out = _OF_STARTING if by_launcher else ()
    groups = (entries for entries in flags.values() if isinstance(entries, dict))
    found = {name: value for entries in groups for name, value in entries.items()}
    return {name: value for name, value in found.items() if name in known and name not in left_out}


def _entries(
    content: Mapping[str, Any], known: Mapping[str, _Flag], groups: set[str], path: Path
) -> Iterator[tuple[str, Any]]:
    """Each flag that a file names, with its value as the file has it. Raises ``ArgonneError`` for what is no flag."""
    seen: dict[str, str] = {}
    for top, found in content.items():
        is_table = isinstance(found, dict)
        inner = found.items() if is_table else [(top, found)]
        if is_table and top not in groups:
            raise _unknown(f"the table [{top}]", top, groups, path)
        for key, value in inner:
            name = key.replace("-", "_")
            if name not in known:
                raise _unknown(key, name, known, path)
            if is_table and known[name].group != top:
                raise ArgonneError(f"config={str(path)!r} has {key} in [{top}]; legal: in [{known[name].group}]")
            if name in seen:
                raise ArgonneError(f"config={str(path)!r} has {name} twice, as {seen[name]} and as {key}; legal: once")
            seen[name] = key
            yield name, value


def _unknown(what: str, name: str, legal_names: Mapping[str, Any] | set[str], path: Path) -> ArgonneError:
    (near,) = difflib.get_close_matches(name, sorted(legal_names), n=1, cutoff=0.0)
    return ArgonneError(f"config={str(path)!r} has {what}, which is not known; legal: {near} (--help lists all flags)")


def _toml(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(name, each) for each in value)}]"
    text = str(value)  # None too
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgonneError(f"{name}={text!r} is not legal in a file; legal: text of Unicode characters") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
