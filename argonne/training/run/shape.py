"""The whole shape of a run's model, from its flags or from the directory whose weights it begins with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from argonne.checkpoint import CheckpointError, checkpoints, is_checkpoint, load_trainer, resolve
from argonne.inference.opening import some_config
from argonne.models import ModelConfig
from argonne.parallel.errors import ArgonneError
from argonne.training.config import ModelFlags, ResumeConfig, RunConfig

# Flags that name a shape, and no field of one.
_OTHER_SHAPES = ("preset", "model_config", "init_from", "resume_state")
# What a model sees at once is no part of what its weights are: a preset may say more or less of it.
_NOT_COMPARED = ("max_position_embeddings",)


def shape_of(config: RunConfig) -> ModelConfig:
    """The shape of the flags' model.

    Raises:
        ArgonneError: it is not legal, or flags say another than that of ``--init-from``.
    """
    flags, block_size = config.model, config.data.block_size
    if flags.init_from is None:
        return flags.resolve(block_size)
    shape = some_config(own_checkpoints(config) or origin_path(flags.init_from))
    _require_no_other(flags, shape, block_size)
    if block_size > shape.max_position_embeddings:
        raise ArgonneError(
            f"block_size={block_size} is more than the model of init_from={str(flags.init_from)!r} can see; legal: 1 "
            f"to {shape.max_position_embeddings}, its max_position_embeddings"
        )
    return shape


def origin_path(path: Path, name: str = "init_from") -> Path:
    """``path``, if it is a directory with a model in it. Raises ``ArgonneError`` if it is not."""
    if (path / "config.json").exists() or is_checkpoint(path) or checkpoints(path):
        return path
    what = "holds no model" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise ArgonneError(
        f"{name}={str(path)!r} {what}; legal: a Hugging Face directory, a run's or one of its checkpoints"
    )


def own_checkpoints(config: RunConfig) -> Path | None:
    """Where a run that has begun with ``--init-from`` goes on without it; None where it is still to begin.

    What it began with has then come into its checkpoints, and may be changed or gone.
    """
    if isinstance(config, ResumeConfig) and not config.resume.force_from_scratch:
        path = config.resume.checkpoint_path
        found = resolve(path)
    else:
        path = config.run.output_dir
        found = checkpoints(path)
    asked = config.model.init_from
    return path if asked is not None and _began_with(found) == os.path.abspath(asked) else None


def _began_with(found: list[Path]) -> str | None:
    """The ``--init-from`` of the run of these checkpoints, as the newest tells it that can be read."""
    for checkpoint in reversed(found):
        try:
            return load_trainer(checkpoint)["flags"]["model"].get("init_from")
        except (CheckpointError, KeyError, TypeError, AttributeError):
            continue
    return None


def _require_no_other(flags: ModelFlags, shape: ModelConfig, block_size: int) -> None:
    """Refuse flags that say another shape."""
    origin = str(flags.init_from)
    for name, value in vars(flags).items():
        kept = getattr(shape, name, None)
        if value is not None and name not in _OTHER_SHAPES and value != kept:
            raise ArgonneError(
                f"{name}={value} contradicts init_from={origin!r}, which has {kept}; legal: leave it out"
            )
    if flags.preset is None and flags.model_config is None:
        return
    name = "preset" if flags.model_config is None else "model_config"
    asked = dataclasses.asdict(flags.resolve(block_size))
    for field, value in dataclasses.asdict(shape).items():
        other = asked.get(field)
        if field not in _NOT_COMPARED and other != value:
            raise ArgonneError(
                f"{name}={str(getattr(flags, name))!r} contradicts init_from={origin!r} ({field}: {other}, not "
                f"{value}); legal: leave it out"
            )
