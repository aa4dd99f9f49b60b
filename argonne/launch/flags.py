"""The flags of launching, and the rules of all flags: ``--help`` says what happens when one is left out, ``~`` is home.

A help text that ends in brackets says there what happens without the flag.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from tyro.conf import Suppress, arg
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_whole

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class _MayBePath:
    """Marks text that may be a path."""


HomeText = Annotated[str, _MayBePath()]
"""What may be a path but is no ``Path``: a glob, a URL, or a name beside which a folder is legal too."""

Given = Annotated[frozenset[str], Suppress]
"""The names of the flags that a command line has: filled in by ``parse``, and no flag itself."""

# What a docstring says, and in brackets at its end what happens when the flag is left out.
_DESCRIPTION = re.compile(r"(?P<text>.*?)\s*\[(?P<left_out>[^\[\]]*)\]\.?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class LaunchFlags:
    """How many processes run, and where."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run [CUDA when there is one]."""
    nproc: int | None = None
    """Processes to start when not under torchrun [every GPU, or 1 on CPU]."""
    local_rank: Annotated[int | None, arg(name="local_rank")] = None
    """Set by old launchers, and not read [LOCAL_RANK is what counts]."""

    on_cpu: ClassVar[int] = 1
    """Processes to start where there is no GPU."""

    @property
    def restarts(self) -> int:
        """Times to start all processes again when one fails."""
        return 0

    @property
    def gpus(self) -> int:
        """How many there are for the processes."""
        return 0 if self.device == "cpu" else torch.cuda.device_count()

    def check(self) -> None:
        """Raise ``ArgonneError`` for a number that is not legal."""
        if self.nproc is not None:
            require_whole("nproc", self.nproc, 1)
        require_whole("max_restarts", self.restarts, 0)

    def processes(self) -> int:
        """How many processes to start on this machine. Raises ``ArgonneError`` when there are too few GPUs for them."""
        gpus = self.gpus
        if gpus and self.nproc is not None and self.nproc > gpus:
            raise ArgonneError(
                f"nproc={self.nproc} is more than this machine's GPUs; legal: 1 to {gpus}, or --device cpu"
            )
        return self.nproc or gpus or self.on_cpu


@dataclasses.dataclass(frozen=True)
class RestartFlags(LaunchFlags):
    """How many processes run, where, and what happens when one fails."""

    max_restarts: int = 0
    """Times to start all processes again, from the newest checkpoint, when one fails. Under torchrun: its own flag."""

    @property
    def restarts(self) -> int:
        """Times to start all processes again when one fails."""
        return self.max_restarts


def help_rules(left_out: Mapping[str, str]) -> ConstructorRegistry:
    """How ``--help`` is derived from the fields: each flag ends with what happens when it is left out.

    That is what ``left_out`` says of the field, or the brackets at the end of its docstring, or its default.
    """
    registry = ConstructorRegistry()
    within = False

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal within
        if within or not dataclasses.is_dataclass(info.type):
            return None
        within = True  # what follows asks every rule, this one too
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            within = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return dataclasses.replace(spec, fields=tuple(_shown(field, left_out) for field in spec.fields))

    return registry


def _shown(field: StructFieldSpec, left_out: Mapping[str, str]) -> StructFieldSpec:
    def text() -> str:
        found = field.helptext() if callable(field.helptext) else field.helptext
        return " ".join((found or "").split())

    def bare() -> str:
        found = _DESCRIPTION.fullmatch(text())
        return found["text"] if found else text().removesuffix(".")

    def hint(default: str) -> str:
        found = _DESCRIPTION.fullmatch(text())
        without = left_out.get(field.name) or (found["left_out"] if found else default)
        return f"[{'off' if without == 'False' else without}]."

    if dataclasses.is_dataclass(field.type):  # a group of flags
        return field
    shown: Any = Annotated[field.type, arg(help_behavior_hint=hint)]
    return dataclasses.replace(field, type=shown, helptext=bare)


def at_home(config: Config) -> Config:
    """``config``, a dataclass that may hold others, with the ``~`` that begins a path replaced by the home directory.

    Paths are the fields of type ``Path``, and ``HomeText``. Elsewhere a ``~`` stands for
    itself, and so does ``$HOME`` everywhere: variables are the shell's.

    Raises:
        ArgonneError: ``~name`` names no user.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    hints = get_type_hints(type(config), include_extras=True)
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        new = _expanded(field.name, value) if _may_be_path(hints[field.name]) else at_home(value)
        if new is not value:
            changed[field.name] = new
    return dataclasses.replace(config, **changed) if changed else config


def _may_be_path(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, Path):
        return True
    if get_origin(hint) is Annotated and any(isinstance(mark, _MayBePath) for mark in get_args(hint)[1:]):
        return True
    return any(map(_may_be_path, get_args(hint)))


def _expanded(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        words = tuple(_expanded(name, word) for word in value)
        return value if words == value else words
    if value is None or not str(value).startswith("~"):
        return value
    word = os.path.expanduser(value)
    if str(word).startswith("~"):
        raise ArgonneError(
            f"{name}={str(value)!r} begins with the home directory of a user that is not known; "
            f"legal: ~/..., ~USER/..., or ./{value} for a name that begins so"
        )
    kind: Callable[[str], Any] = type(value)
    return kind(word)
