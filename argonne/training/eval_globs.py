"""The words of ``--eval``, NAME=GLOB: held-out sets by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from argonne.data import is_url
from argonne.parallel.errors import ArgonneError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_LEGAL = "legal: NAME=GLOB, the name of at most 32 letters, digits and _ . -"


def named_globs(words: Sequence[str]) -> dict[str, str]:
    """The glob of each name, in their order.

    Raises:
        ArgonneError: a word is no NAME=GLOB, or two have one name.
    """
    found: dict[str, str] = {}
    for word in words or [""]:
        name, equals, glob = word.partition("=")
        if not (equals and glob.strip() and _NAME.fullmatch(name)):
            raise ArgonneError(f"eval={word!r} is not legal; {_LEGAL}")
        if name in found:
            raise ArgonneError(f"eval={word!r} has the name of {name}={found[name]}; legal: a name of its own each")
        found[name] = os.path.expanduser(glob)
    return found


def absolute(words: Sequence[str]) -> list[str]:
    """The same words, that hold from any directory."""
    globs = named_globs(words)
    return [f"{name}={glob if is_url(glob) else os.path.abspath(glob)}" for name, glob in globs.items()]
