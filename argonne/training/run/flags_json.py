"""The flags of a run as JSON, in ``run.json`` and ``trainer.json``, and back from there by their types."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from argonne.checkpoint import CheckpointError, load_trainer
from argonne.data import is_url, matching_default
from argonne.launch.values import as_now, typed
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.distill_config import DistillConfig
from argonne.training.eval_globs import absolute
from argonne.training.tuning.config import TuneConfig

Flags = TypeVar("Flags")

GROUPS = ("model", "data", "training", "parallel", "launch", "run")
"""The groups of flags that are kept."""


def flags_to_json(config: RunConfig) -> dict[str, Any]:
    """The flags as JSON values; paths and globs are made absolute, so that they hold from any directory."""
    flags = {
        name: {field: _plain(value) for field, value in dataclasses.asdict(getattr(config, name)).items()}
        for name in (*GROUPS, *config.own_groups)
    }
    flags["training"] |= {"recompute": str(config.recompute), "disable_gradient_checkpointing": False}
    if flags["data"]["data_glob"] is None:
        flags["data"]["data_glob"] = matching_default()
    for name in ("data_glob", "validation_glob"):
        if flags["data"][name] is not None:
            globs = flags["data"][name]
            flags["data"][name] = [glob if is_url(glob) else os.path.abspath(glob) for glob in globs]
    if flags["data"]["eval"] is not None:
        flags["data"]["eval"] = absolute(flags["data"]["eval"])
    return flags


def kind_of(saved: Mapping[str, Any]) -> type[RunConfig]:
    """The configuration that ``flags_to_json`` made this of: a run's, that of a tuning or that of a distillation."""
    if "too_long" in saved.get("data", {}):
        return TuneConfig
    return DistillConfig if "distill" in saved else RunConfig


def flags_from_json(saved: Mapping[str, Any]) -> RunConfig:
    """The inverse of ``flags_to_json``; flags that this version does not have are left out.

    Raises:
        ArgonneError: a value is of another type than its flag.
    """
    kind = kind_of(saved)
    groups = get_type_hints(kind)
    # Earlier versions kept the flags of launching with those of the layout.
    saved = {"launch": saved.get("parallel", {}), **saved}
    return kind(**{name: _group(groups[name], saved.get(name, {})) for name in (*GROUPS, *kind.own_groups)})


def saved_flags(checkpoint: Path) -> RunConfig:
    """The flags of the run that wrote ``checkpoint``. Raises ``CheckpointError`` where it does not say them."""
    try:
        return flags_from_json(load_trainer(checkpoint)["flags"])
    except (ArgonneError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(checkpoint / 'trainer.json')!r} does not tell the run's flags: {error}") from error


def _group(kind: type[Flags], saved: Mapping[str, Any]) -> Flags:
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name in saved]  # type: ignore[arg-type]
    return kind(**{name: typed(name, hints[name], as_now(kind, name, saved[name])) for name in names})


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return os.path.abspath(value)
    return list(value) if isinstance(value, tuple) else value
