"""Resuming: a named checkpoint, the flags it was saved with, and those that this command changes on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer, resolve, trusted
from argonne.checkpoint.format import TRAINER
from argonne.launch.parse import parse
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.communication.environment import restarts_left
from argonne.parallel.errors import ArgonneError
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.distill_config import DistillConfig
from argonne.training.run.batch import batch_of, batch_of_resume, names_micro_batch, with_micro_batch
from argonne.training.run.checks import check
from argonne.training.run.compilation import latest_of_two
from argonne.training.run.conditions import announced, changed_since
from argonne.training.run.directory import read_run
from argonne.training.run.file import Search
from argonne.training.run.flags_json import saved_flags
from argonne.training.run.identity import RunIdentity, differences
from argonne.training.run.job import joined, log
from argonne.training.run.kept_files import TEMPLATE
from argonne.training.run.loss import cross_entropy
from argonne.training.run.memory import memory_told
from argonne.training.run.model import ModelBuilder
from argonne.training.run.refit import refit
from argonne.training.run.resume_config import newest_flags, resumed
from argonne.training.run.search import search
from argonne.training.run.setup import prepare, with_tokens
from argonne.training.run.teacher import check_distill, loss_of_run
from argonne.training.run.workflow import begin, is_done, restore, train
from argonne.training.schedule import Schedule
from argonne.training.state import TrainingState
from argonne.training.tuning.config import ChatFlags

# Changing these changes what the weights or the lanes mean; resume.py refuses it. The rest it announces.
_FIXED = ("model", "data", "tokenizer", "init_from", "resume_state", "reproducible", "loss")


def parse_resume(arguments: Sequence[str]) -> ResumeConfig:
    """The flags of ``resume.py``: those left out are as the checkpoint's run had them."""
    named = parse(resumed(arguments), arguments)
    batch = named.resume.batch_size
    if batch is not None and "initial_batch_size" in named.given and batch != named.training.initial_batch_size:
        raise ArgonneError(
            f"batch_size={batch} conflicts with initial_batch_size={named.training.initial_batch_size}: both are the "
            "micro-batch; legal: one of them"
        )
    named = replace(named, arguments=tuple(arguments))
    return _as_saved(named, *newest_flags(named.resume.checkpoint_path))


def _as_saved(named: ResumeConfig, checkpoint: Path, saved: RunConfig) -> ResumeConfig:
    """What the command names, and all else as in the flags that ``checkpoint`` was ``saved`` with."""
    data, training = saved.data, saved.training
    if data.tokenizer_path is not None and not data.tokenizer_path.is_dir():
        data = replace(data, tokenizer_path=checkpoint)  # the original is gone; every checkpoint has a copy
    if isinstance(data, ChatFlags) and data.chat_template is not None and not data.chat_template.is_file():
        data = replace(data, chat_template=checkpoint / TEMPLATE)
    if named.resume.batch_size is not None:
        training = replace(training, initial_batch_size=named.resume.batch_size)
    # The layout is that of the processes this command is given; whether it may show in the bits is the run's.
    bits = {name: getattr(saved.parallel, name) for name in ("reproducible", "reproducible_blocks")}
    run = replace(saved.run, output_dir=checkpoint.resolve().parent, stop_at_step=None, wall_time=None)
    parallel = replace(named.parallel, **bits)
    own = {group: replace(getattr(named, group), **vars(getattr(saved, group))) for group in saved.own_groups}
    default = replace(named, model=saved.model, data=data, training=training, parallel=parallel, run=run, **own)
    found = parse(type(named), named.arguments, default)
    return replace(found, training=latest_of_two(found.training, found.given))


def check_resume(config: ResumeConfig, world_size: int, model: ModelBuilder | None = None) -> None:
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
    _check(config, world_size, model)


def _check(config: ResumeConfig, world_size: int, model: ModelBuilder | None) -> None:
    if isinstance(config, DistillConfig):
        check_distill(config, world_size)
    else:
        check(config, world_size, model)


def resume(config: ResumeConfig, model: ModelBuilder | None = None) -> int:
    """Continue from a checkpoint; one rank of it, and its status. ``model`` is as of ``pretrain``."""
    flags = config.resume
    with joined(config) as groups:
        checkpoint, reports = trusted(flags.checkpoint_path, groups)
        log(groups, *reports)
        if reports:  # the flags so far may be of a checkpoint that was skipped
            config = collectively(lambda: _as_saved(config, checkpoint, saved_flags(checkpoint)), groups.world)
            collectively(lambda: _check(config, groups.world.size, model), groups.world)
        saved, identity, global_batch = collectively(lambda: _saved_run(checkpoint), groups.world)
        _check_optimizer(config, identity)
        found = Search.from_json(saved.get("search"))
        anew = flags.force_from_scratch and found is not None and not (groups.reproducible or names_micro_batch(config))
        if anew:
            assert found is not None
            config = with_micro_batch(config, found.initial)
            shape = batch_of(config, groups.data.size, None)
        else:
            shape = batch_of_resume(config, groups.data.size, global_batch, found)
        if groups.reproducible:
            shape.check_reproducible(config.parallel.kind)
        config.parallel.plan(groups.layout).check_micro_batches(shape.accumulation)
        if not flags.force_from_scratch:
            check_decay(config.training.learning_rates, saved)
        if "initial_loss_scale" in config.given and "loss_scale" in saved and not flags.force_from_scratch:
            raise ArgonneError(
                f"initial_loss_scale={config.training.initial_loss_scale} has no effect: the checkpoint has the scale "
                "that it goes on with; legal: leave it out"
            )
        loss = loss_of_run if isinstance(config, DistillConfig) else cross_entropy
        workload = prepare(config, groups, identity, _FIXED, lambda: checkpoint, model, loss)
        became = changed_since(saved, workload.identity, workload.conditions, config)
        if flags.reset_optimizer:
            became.append(f"optimizer: reset, with {flags.rewarmup_steps} steps of warm-up")

        if not flags.force_from_scratch and is_done(config, checkpoint, groups):
            return 0
        if anew:
            config, workload, found = search(config, workload, groups)
            shape = batch_of(config, groups.data.size, None)
        else:
            shape, found = refit(config, workload, groups, shape, saved, found)
        became += differences({"global_batch": global_batch}, {"global_batch": shape.global_batch})
        workload = with_tokens(config, workload, groups)
        with memory_told(config, shape, groups, lambda: "as the model was made"):
            state = TrainingState.build(config, workload, groups)
            state.search = found
            if flags.force_from_scratch:
                log(groups, *announced(became))
                begin(state, config, workload, shape)
            else:
                path = config.data.tokenizer_path
                restore(state, checkpoint, workload, became, path, flags.reset_optimizer, flags.rewarmup_steps)
        return train(config, workload, state, shape, None if flags.force_from_scratch else checkpoint)


def check_decay(schedule: Schedule, saved: Mapping[str, Any]) -> None:
    """Refuse a decay that begins before the checkpoint, unless it is the one in which the checkpoint is."""
    step, before = saved["step"], dict(saved.get("schedule") or {})
    names = ("kind", "total_steps", "decay_steps", "decay_shape")
    goes_on = all(before.get(name) == getattr(schedule, name) for name in names)
    if schedule.kind == "wsd" and schedule.stable_steps < step < schedule.total_steps and not goes_on:
        raise ArgonneError(
            f"decay_steps={schedule.decay_steps} of total_steps={schedule.total_steps} begin after step "
            f"{schedule.stable_steps}, which is before step {step}, where the run is; legal: 0 to "
            f"{schedule.total_steps - step}, or an earlier checkpoint"
        )


def _check_optimizer(config: ResumeConfig, saved: RunIdentity) -> None:
    """Refuse moments of another optimizer."""
    asked, flags = config.training.optimizer, config.resume
    if asked != saved.optimizer and not (flags.reset_optimizer or flags.force_from_scratch):
        raise ArgonneError(
            f"optimizer={asked!r} cannot go on with the moments of the checkpoint's {saved.optimizer!r}; legal: "
            f"--reset-optimizer too, or --optimizer {saved.optimizer}"
        )


def _check_repeatable(config: ResumeConfig, elsewhere: bool) -> None:
    """Refuse what a restart, which gives the same command again, would do twice instead of going on."""
    flags = config.resume
    once = {
        "reset_optimizer=True": flags.reset_optimizer,
        "force_from_scratch=True": flags.force_from_scratch,
        f"output_dir={str(config.run.output_dir)!r}, which is not the checkpoint's run,": elsewhere,
        f"checkpoint_path={str(flags.checkpoint_path)!r}, a single step,": not checkpoints(flags.checkpoint_path),
    }
    for what, is_asked in once.items():
        if is_asked:
            raise ArgonneError(
                f"{what} cannot go with restarts, which would begin there again; legal: do it without restarts up to "
                "a first save (--stop-at-step), then resume the run's directory with them"
            )


def _saved_run(checkpoint: Path) -> tuple[dict[str, Any], RunIdentity, int]:
    """What ``trainer.json`` says: all of it, the run's identity, and its global batch."""
    saved, path = load_trainer(checkpoint), str(checkpoint / TRAINER)
    if missing := {"identity", "global_batch"} - set(saved):
        raise CheckpointError(f"{path!r} lacks {', '.join(sorted(missing))}")
    try:
        return saved, RunIdentity.of_saved(saved), saved["global_batch"]
    except ValueError as error:
        raise CheckpointError(f"{path!r} does not tell what the run is: {error}") from error
