"""``python -m argonne TOOL ...``: what looks at runs and checkpoints, beside the drivers that make them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from argonne.compare.diff import DiffFlags, diff
from argonne.compare.verify import VerifyFlags, verify
from argonne.launch import guarded, parse
from argonne.output import show
from argonne.parallel.errors import ArgonneError


@dataclass(frozen=True)
class Tool:
    """One of the tools."""

    summary: str
    """For the list of them."""
    flags: type[Any]
    """What its command line says: a dataclass."""
    main: Callable[[Any], int]
    """Does it, and returns the status that the process is to end with."""


TOOLS = {
    "diff": Tool(
        "where two runs, or two checkpoints, differ: the first step and field, then the tensors", DiffFlags, diff
    ),
    "verify": Tool("whether a checkpoint is as it was written, and the same as another one", VerifyFlags, verify),
}


def main(words: Sequence[str]) -> None:
    """Run the tool that the first of ``words`` names with the others."""
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        show(_help())
    elif name not in TOOLS:
        problem = f"tool {name!r} is not known" if words else "no tool is named"
        raise ArgonneError(f"{problem}; legal: {', '.join(TOOLS)} (--help says what they do)")
    else:
        tool = TOOLS[name]
        flags = parse(tool.flags, words[1:], program=f"python -m argonne {name}")
        try:
            status = tool.main(flags)
        except OSError as error:  # it would end in 1, which says that something was found
            raise ArgonneError(str(error)) from error
        sys.exit(status)


def _help() -> str:
    width = max(map(len, TOOLS))
    tools = "\n".join(f"  {name:{width}}  {tool.summary}" for name, tool in TOOLS.items())
    return f"usage: python -m argonne TOOL ... (TOOL --help says the rest)\n\n{tools}"


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
