"""From the words of a command line to a configuration, or to one line that says what is wrong with them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from argonne.launch.config_file import file_of, with_file
from argonne.launch.flags import at_home, help_rules
from argonne.parallel.errors import ArgonneError

Parsed = TypeVar("Parsed")

_MARKERS = (tyro.conf.OmitArgPrefixes,)


def parse(
    config_type: type[Parsed], arguments: Sequence[str], default: Parsed | None = None, program: str | None = None
) -> Parsed:
    """The configuration that ``arguments`` describe, with the ``~`` of every path expanded.

    Where ``config_type.left_out`` says what happens to a field that no flag names, ``--help`` says so too. A
    configuration with a field ``given`` is told there which flags the arguments name, or the file of ``--config``.
    What ``config_type.earlier_words`` has as words of an earlier version is taken as what they are now.

    Args:
        config_type: a dataclass; of its fields those that are dataclasses are groups of flags.
        default: what holds where no flag says otherwise, in place of the fields' own defaults.
        program: what ``--help`` calls the command, in place of the script's name.

    Raises:
        ArgonneError: an unknown flag, an unusable value, or a flag with two values, in one line.
    """
    earlier = getattr(config_type, "earlier_words", {})
    arguments = [earlier.get(word.replace("_", "-"), word) for word in arguments]
    given = named_flags(arguments)
    if (path := file_of(config_type, arguments)) is not None:
        default, told = with_file(config_type, default, path)
        given |= told
    report = io.StringIO()
    rules = help_rules(getattr(config_type, "left_out", {}))
    # What turns a switch off is a flag where it may be on already, and so is what leaves it on.
    markers = _MARKERS if default is not None else (*_MARKERS, tyro.conf.FlagCreatePairsOff)
    begin: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(report):
            config = tyro.cli(config_type, prog=program, args=arguments, config=markers, registry=rules, **begin)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ArgonneError(_one_line(report.getvalue())) from None
    config = at_home(config)
    return dataclasses.replace(config, given=given) if hasattr(config, "given") else config


def named_flags(arguments: Sequence[str]) -> frozenset[str]:
    """The fields that a command line names: ``--no-streaming`` and ``--save-interval=5`` as their fields.

    Raises:
        ArgonneError: a flag is named twice, with two values.
    """
    named: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            named.append((flag[2:].replace("_", "-"), [value] if equals else []))
        elif named:
            named[-1][1].append(word)
    first: dict[str, list[str]] = {}
    for flag, values in named:
        if first.setdefault(flag, values) != values:
            one, two = (" ".join(each) for each in (first[flag], values))
            raise ArgonneError(f"--{flag} is given twice, as {one!r} and as {two!r}; legal: once")
    return frozenset(flag.removeprefix("no-").replace("-", "_") for flag in first)


def _one_line(report: str) -> str:
    """The parser's framed report as one line, without the pointer to ``--help``."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", report)
    lines = [line.strip(" │|") for line in text.splitlines()]
    kept = []
    for line in lines:
        if re.match(r"^[─-]{3,}$", line):
            break
        if line and not re.match(r"^[╭╰]", line):
            kept.append(line)
    return (" ".join(kept) or "unusable arguments") + " (--help lists the flags)"
