"""The two workflows: pretrain (begin a run, or go on with it) and resume (go on from a named checkpoint)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer, newest_valid, resolve
from argonne.checkpoint.format import write_json
from argonne.parallel import ProcessGroups, choose_device, process_groups
from argonne.parallel.collectives import collectively
from argonne.parallel.errors import ArgonneError
from argonne.training.command_line import parse, world_size
from argonne.training.config import ResumeConfig, ResumeFlags, RunConfig
from argonne.training.run_directory import (
    claim,
    continue_at,
    differences,
    flags_to_json,
    read_run,
    require_same,
    saved_flags,
)
from argonne.training.setup import Workload, accumulation_for, check, prepare
from argonne.training.state import TrainingState, versions
from argonne.training.trainer import Trainer

# Changing these changes what the weights or the lanes mean; resume.py refuses it. The rest it announces.
_FIXED = ("model", "data", "tokenizer")


def pretrain(config: RunConfig) -> None:
    """Begin the run of ``config``, or continue it from its newest valid checkpoint; one rank of it."""
    with _joined(config) as groups, _claimed(config, groups):
        directory = config.run.output_dir
        saved = collectively(lambda: read_run(directory), groups.world)
        workload = prepare(config, groups)
        if saved is not None:
            require_same(saved["identity"], workload.identity, directory)
        accumulation = accumulation_for(config, groups.data.size, saved)
        checkpoint, reports = newest_valid(checkpoints(directory), groups)
        _say(groups, reports)
        state = TrainingState.build(config, workload, groups)
        if checkpoint is None:
            state.model.initialise(config.training.seed)
        else:
            state.restore(checkpoint)
        _train(config, workload, state, accumulation, checkpoint)


def check_resume(config: ResumeConfig, world_size: int) -> None:
    """Refuse what a resume cannot use; needs no peers."""
    if config.resume.rewarmup_steps < 0:
        raise ArgonneError(f"rewarmup_steps={config.resume.rewarmup_steps} is not legal; legal: 0 or more")
    if config.resume.force_from_scratch and read_run(config.run.output_dir) is not None:
        raise ArgonneError(
            f"output_dir={str(config.run.output_dir)!r} holds a run already; --force-from-scratch needs another one"
        )
    resolve(config.resume.checkpoint_path)
    check(config, world_size)


def resume(config: ResumeConfig) -> None:
    """Continue from a checkpoint with the flags that were saved, but for those that were given; one rank of it."""
    with _joined(config) as groups, _claimed(config, groups):
        flags = config.resume
        checkpoint, reports = newest_valid(resolve(flags.checkpoint_path), groups)
        _say(groups, reports)
        if checkpoint is None:
            raise CheckpointError(
                f"checkpoint path {str(flags.checkpoint_path)!r} holds no valid checkpoint: {reports[0]}"
            )
        workload = prepare(config, groups, kept_tokenizer=checkpoint)
        state = TrainingState.build(config, workload, groups)
        if flags.force_from_scratch:
            state.model.initialise(config.training.seed)
            _train(config, workload, state, config.training.gradient_accumulation_steps, None)
            return
        saved = collectively(lambda: _saved_run(checkpoint), groups.world)
        fixed = {name: workload.identity[name] for name in _FIXED}
        require_same({name: saved["identity"][name] for name in _FIXED}, fixed, checkpoint)
        changed = differences(saved["identity"], workload.identity)
        _say(groups, [f"changed from here on: {line}" for line in changed])
        asked = config.training.gradient_accumulation_steps
        accumulation = asked
        if asked == saved["flags"]["training"]["gradient_accumulation_steps"]:
            accumulation = _keep_global_batch(config, groups, saved["global_batch"])
        state.restore(checkpoint, flags.reset_optimizer, flags.rewarmup_steps)
        _train(config, workload, state, accumulation, checkpoint)


def parse_resume(arguments: list[str]) -> ResumeConfig:
    """The flags of ``resume.py``: those left out are as the checkpoint's run had them."""
    given = parse(ResumeConfig, arguments)
    newest = resolve(given.resume.checkpoint_path)[-1]
    saved = saved_flags(newest)
    default = ResumeConfig(
        model=saved.model,
        data=saved.data,
        training=saved.training,
        # Where it runs is this command's business; how it is laid out follows the processes it is given.
        parallel=replace(given.parallel),
        run=replace(saved.run, output_dir=newest.resolve().parent, stop_at_step=None, wall_time=None),
        resume=ResumeFlags(given.resume.checkpoint_path),
    )
    config = parse(ResumeConfig, arguments, default)
    if config.resume.batch_size is not None:
        config = replace(config, training=replace(config.training, initial_batch_size=config.resume.batch_size))
    return config


def _joined(config: RunConfig) -> AbstractContextManager[ProcessGroups]:
    return process_groups(config.parallel.layout(world_size()), choose_device(config.parallel.device))


@contextmanager
def _claimed(config: RunConfig, groups: ProcessGroups) -> Iterator[None]:
    """The first rank keeps other jobs out of the run's directory for as long as this one lives."""
    directory = config.run.output_dir
    lock = collectively(lambda: claim(directory) if groups.is_first else None, groups.world)
    yield
    if lock is not None:
        lock.close()


def _train(
    config: RunConfig, workload: Workload, state: TrainingState, accumulation: int, checkpoint: Path | None
) -> None:
    groups, directory = state.model.groups, config.run.output_dir
    trainer = Trainer(config, workload, state, accumulation)

    def begin() -> None:
        if groups.is_first:
            directory.mkdir(parents=True, exist_ok=True)
            run = {
                "identity": workload.identity,
                "global_batch": trainer.global_batch,
                "layout": dataclasses.asdict(groups.layout),
                "flags": flags_to_json(config),
                "versions": versions(),
            }
            write_json(directory / "run.json", run)
            _say(groups, continue_at(directory, state.step))

    collectively(begin, groups.world)
    shards = f"{len(workload.shards)} shard{'s' if len(workload.shards) > 1 else ''}, {workload.lanes} lanes"
    facts = [
        f"{workload.model.parameter_count:,} parameters",
        f"{groups.layout} on {groups.device.type}",
        f"{trainer.global_batch} x {config.data.block_size} tokens a step",
        shards,
        f"continuing from {checkpoint}" if checkpoint else "from scratch",
    ]
    _say(groups, [" | ".join(facts)])
    trainer.run()


def _keep_global_batch(config: RunConfig, groups: ProcessGroups, global_batch: int) -> int:
    per_micro_step = config.training.initial_batch_size * groups.data.size
    if global_batch % per_micro_step:
        raise ArgonneError(
            f"batch_size={config.training.initial_batch_size} x data_parallel={groups.data.size} does not divide the "
            f"run's global batch of {global_batch}; legal: a product that does, or --gradient-accumulation-steps too"
        )
    return global_batch // per_micro_step


def _saved_run(checkpoint: Path) -> dict[str, Any]:
    saved = load_trainer(checkpoint)
    missing = {"identity", "flags", "global_batch"} - set(saved)
    if missing:
        raise CheckpointError(f"{str(checkpoint / 'trainer.json')!r} lacks {', '.join(sorted(missing))}")
    return saved


def _say(groups: ProcessGroups, lines: list[str]) -> None:
    if groups.is_first:
        for line in lines:
            print(line, flush=True)
