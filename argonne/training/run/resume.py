"""Resuming: a named checkpoint, the flags it was saved with, and those that this command changes on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer, resolve, trusted
from argonne.launch.parse import parse
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.communication.environment import restarts_left
from argonne.parallel.errors import ArgonneError
from argonne.training.config import DataFlags, ResumeConfig, RunConfig
from argonne.training.run.conditions import announced, changed_since, identity_of
from argonne.training.run.directory import differences, read_run
from argonne.training.run.flags_json import saved_flags
from argonne.training.run.setup import accumulation_that_keeps, check, prepare, with_tokens
from argonne.training.run.workflow import is_done, joined, restore, say, train
from argonne.training.state import TrainingState

Flags = TypeVar("Flags")

# Changing these changes what the weights or the lanes mean; resume.py refuses it. The rest it announces.
_FIXED = ("model", "data", "tokenizer")


def parse_resume(arguments: Sequence[str]) -> ResumeConfig:
    """The flags of ``resume.py``: those left out are as the checkpoint's run had them."""
    told = parse(ResumeConfig, arguments)
    batch = told.resume.batch_size
    if batch is not None and "initial_batch_size" in told.given and batch != told.training.initial_batch_size:
        raise ArgonneError(
            f"batch_size={batch} conflicts with initial_batch_size={told.training.initial_batch_size}: both are the "
            "micro-batch; legal: one of them"
        )
    return _overlaid(told, told.given, *_newest_flags(told.resume.checkpoint_path))


def _overlaid(told: ResumeConfig, given: frozenset[str], directory: Path, saved: RunConfig) -> ResumeConfig:
    """The flags that checkpoint ``directory`` was ``saved`` with, changed where this command says so."""
    config = ResumeConfig(
        model=_overlay(saved.model, told.model, given),
        data=_data_flags(saved.data, told.data, given, directory),
        training=_overlay(saved.training, told.training, given),
        parallel=told.parallel,  # the layout is that of the processes this command is given
        launch=told.launch,
        run=_overlay(
            replace(saved.run, output_dir=directory.resolve().parent, stop_at_step=None, wall_time=None),
            told.run,
            given,
        ),
        resume=told.resume,
        given=given,
    )
    if told.resume.batch_size is not None:
        config = replace(config, training=replace(config.training, initial_batch_size=told.resume.batch_size))
    return config


def check_resume(config: ResumeConfig, world_size: int) -> None:
    """Refuse what a resume cannot use; needs no peers."""
    flags, output = config.resume, config.run.output_dir
    found = resolve(flags.checkpoint_path)
    elsewhere = output.resolve() != found[-1].resolve().parent
    if (elsewhere or flags.force_from_scratch) and read_run(output) is not None:
        raise ArgonneError(
            f"output_dir={str(output)!r} holds a different run; legal: the checkpoint's own run, or a new directory"
        )
    if restarts_left() or config.launch.max_restarts:
        _check_repeatable(config, elsewhere)
    check(config, world_size)


def resume(config: ResumeConfig) -> int:
    """Continue from a checkpoint; one rank of it, and its status."""
    flags = config.resume
    with joined(config) as groups:
        checkpoint, reports = trusted(flags.checkpoint_path, groups)
        say(groups, *reports)
        if reports:  # what was told so far may be of a checkpoint that is passed over
            config = collectively(
                lambda: _overlaid(config, config.given, checkpoint, saved_flags(checkpoint)), groups.world
            )
            collectively(lambda: check(config, groups.world.size), groups.world)
        saved = collectively(lambda: _saved_run(checkpoint), groups.world)
        accumulation, micro = config.training.gradient_accumulation_steps, config.training.initial_batch_size
        if "gradient_accumulation_steps" not in config.given:
            accumulation = accumulation_that_keeps(saved["global_batch"], micro, groups.data.size)
        config.parallel.plan(groups.layout).check_micro_batches(accumulation)
        if "initial_loss_scale" in config.given and "loss_scale" in saved and not flags.force_from_scratch:
            raise ArgonneError(
                f"initial_loss_scale={config.training.initial_loss_scale} has no effect: the checkpoint has the scale "
                "that it goes on with; legal: leave it out"
            )
        workload = prepare(config, groups, identity_of(saved), _FIXED, lambda: checkpoint)
        became = changed_since(saved, workload.identity, workload.conditions, config)
        batch = micro * accumulation * groups.data.size
        became += differences({"global_batch": saved["global_batch"]}, {"global_batch": batch})
        if flags.reset_optimizer:
            became.append(f"optimizer: begun anew, with {flags.rewarmup_steps} steps of warm-up")

        if not flags.force_from_scratch and is_done(config, checkpoint, groups):
            return 0
        workload = with_tokens(config, workload, groups)
        state = TrainingState.build(config, workload, groups)
        if flags.force_from_scratch:
            say(groups, *announced(became))
            state.initialise(config.training.seed)
            return train(config, workload, state, accumulation, None)
        restore(state, checkpoint, workload, became, flags.reset_optimizer, flags.rewarmup_steps)
        return train(config, workload, state, accumulation, checkpoint)


def _check_repeatable(config: ResumeConfig, elsewhere: bool) -> None:
    """Refuse what a restart, which gives the same command again, would do twice instead of going on."""
    flags = config.resume
    once = {
        "reset_optimizer=True": flags.reset_optimizer,
        "force_from_scratch=True": flags.force_from_scratch,
        f"output_dir={str(config.run.output_dir)!r}, which is not the checkpoint's run,": elsewhere,
        f"checkpoint_path={str(flags.checkpoint_path)!r}, a single step,": not checkpoints(flags.checkpoint_path),
    }
    for what, told in once.items():
        if told:
            raise ArgonneError(
                f"{what} cannot go with restarts, which would begin there again; legal: do it without restarts up to "
                "a first save (--stop-at-step), then resume the run's directory with them"
            )


def _overlay(saved: Flags, told: Flags, given: frozenset[str]) -> Flags:
    named = {f.name: getattr(told, f.name) for f in dataclasses.fields(told) if f.name in given}  # type: ignore[arg-type]
    return replace(saved, **named)  # type: ignore[type-var]


def _data_flags(saved: DataFlags, told: DataFlags, given: frozenset[str], checkpoint: Path) -> DataFlags:
    flags = _overlay(saved, told, given)
    path = flags.tokenizer_path
    if path is not None and "tokenizer_path" not in given and not path.is_dir():
        return replace(flags, tokenizer_path=checkpoint)  # the original is gone; every checkpoint has a copy
    return flags


def _newest_flags(path: Path) -> tuple[Path, RunConfig]:
    """The newest checkpoint at ``path`` that tells its run's flags, and those."""
    problem: CheckpointError | None = None
    for directory in reversed(resolve(path)):
        try:
            return directory, saved_flags(directory)
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _saved_run(checkpoint: Path) -> dict[str, Any]:
    saved = load_trainer(checkpoint)
    missing = {"identity", "global_batch"} - set(saved)
    if missing:
        raise CheckpointError(f"{str(checkpoint / 'trainer.json')!r} lacks {', '.join(sorted(missing))}")
    return saved
