"""Pretraining from its flags to its last checkpoint, and what resuming shares with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer, newest_valid
from argonne.parallel import ProcessGroups, check_declarations, choose_device, process_groups
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.communication.environment import place
from argonne.parallel.errors import ArgonneError
from argonne.training.batch_shape import BatchShape
from argonne.training.config import RunConfig
from argonne.training.run.conditions import announced, changed_since, identity_of
from argonne.training.run.conflicts import in_vain
from argonne.training.run.continuation import continue_at
from argonne.training.run.directory import claim, read_run
from argonne.training.run.file import mended_run, write_run
from argonne.training.run.flags_json import flags_to_json
from argonne.training.run.kept_tokenizer import keep
from argonne.training.run.setup import Workload, accumulation_for, prepare, with_tokens
from argonne.training.state import TrainingState, versions
from argonne.training.trainer import Trainer


def pretrain(config: RunConfig) -> int:
    """Begin the run of ``config``, or continue it from its newest valid checkpoint; one rank of it, and its status."""
    directory = config.run.output_dir
    with joined(config) as groups:
        saved = collectively(lambda: read_run(directory), groups.world)
        accumulation = accumulation_for(config, groups.data.size, saved)
        config.parallel.plan(groups.layout).check_micro_batches(accumulation)
        newest = functools.cache(lambda: _newest(directory, groups))
        workload = prepare(config, groups, identity_of(saved) if saved else None, kept_tokenizer=newest)
        checkpoint, became = newest(), []
        if checkpoint is not None:
            if is_done(config, checkpoint, groups):
                return 0
            trainer = load_trainer(checkpoint)
            became = changed_since(trainer, workload.identity, workload.conditions, config)
        workload = with_tokens(config, workload, groups)
        state = TrainingState.build(config, workload, groups)
        if checkpoint is None:
            state.initialise(config.training.seed)
        else:
            restore(state, checkpoint, workload, became)
        return train(config, workload, state, accumulation, checkpoint)


def is_done(config: RunConfig, checkpoint: Path, groups: ProcessGroups) -> bool:
    """Whether ``checkpoint`` is where this run is to stop; the first rank then says so.

    Raises:
        ArgonneError: the run is to stop at a step that it is past.
    """
    step = load_trainer(checkpoint)["step"]
    total, stop = config.training.total_steps, config.run.stop_at_step
    go_on = f"resume.py --checkpoint-path {config.run.output_dir} --total-steps N, with N more than {step}"
    if total < step:
        raise ArgonneError(f"total_steps={total} is before step {step}, where the run is; legal: more than {step}")
    if stop is not None and stop < step:
        legal = f"more than {step}" if step < total else f"none, as the run is finished; to go on: {go_on}"
        raise ArgonneError(f"stop_at_step={stop} is before step {step}, where the run is; legal: {legal}")
    if step == total:
        say(groups, f"the run is finished: {checkpoint} is step {step:,} of {total:,}, and nothing was done.")
        say(groups, f"To go on: {go_on}")
    elif step == stop:
        say(groups, f"the run is at step {step:,} of {total:,}, where --stop-at-step {stop} stops: nothing was done.")
        say(groups, "To go on: the same command with a later --stop-at-step, or without it")
    return step in (total, stop)


def _newest(directory: Path, groups: ProcessGroups) -> Path | None:
    """The newest valid checkpoint of a run (collective); None where it has none, valid or not."""
    found = checkpoints(directory)
    checkpoint, reports = newest_valid(found, groups)
    say(groups, *reports)
    if found and checkpoint is None:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in output_dir={str(directory)!r} is valid ({reports[0]}); "
            "legal: mend them, or another --output-dir"
        )
    return checkpoint


def restore(
    state: TrainingState,
    checkpoint: Path,
    workload: Workload,
    became: Sequence[str],
    reset_optimizer: bool = False,
    rewarmup_steps: int = 0,
) -> None:
    """Become what ``checkpoint`` says but for ``became``, the lines that tell of changes, which are kept.

    Where the data has changed since, each lane finds a place in what it is now.
    """
    state.restore(checkpoint, reset_optimizer, rewarmup_steps)
    trainer = load_trainer(checkpoint)
    saved, now = identity_of(trainer), workload.identity
    state.changes = [*trainer.get("changes", []), *({"step": state.step, "text": line} for line in became)]
    say(state.model.groups, *announced(became))
    same_tokens = all(
        saved[group].get(name) == now[group].get(name)
        for group, name in (("tokenizer", "fingerprint"), ("data", "text_column"), ("data", "filters"))
    )
    if saved["data"].get("shards") != now["data"]["shards"] or not same_tokens:
        state.lanes, line = workload.data.adopted(state.lanes, saved["data"], same_tokens)
        say(state.model.groups, f"the data has changed since {checkpoint.name}: {line}")


def train(
    config: RunConfig, workload: Workload, state: TrainingState, accumulation: int, checkpoint: Path | None
) -> int:
    """Record what the run is, make its directory say what was true at the state's step, and go on from there.

    Returns the status that this process is to end with.
    """
    groups, directory = state.model.groups, config.run.output_dir
    check_declarations(state.parameters, groups, values=True)
    micro_batch = config.training.initial_batch_size
    shape = BatchShape(micro_batch, accumulation, groups.data.size, config.data.block_size)
    trainer = Trainer(config, workload, state, shape)

    def begin() -> None:
        if groups.is_first:
            before = read_run(directory)
            layout = dataclasses.asdict(groups.layout)
            run = {
                "identity": workload.identity,
                "conditions": workload.conditions,
                "changes": state.changes,
                "global_batch": shape.global_batch,
                "layout": layout,
                "first_layout": before["first_layout"] if before else layout,
                "flags": flags_to_json(config),
                "versions": versions(),
            }
            if config.data.tokenizer_path is None:
                assert workload.tokenizer is not None
                if keep(workload.tokenizer, directory / "tokenizer") and before:
                    say(groups, f"{directory / 'tokenizer'} was missing or damaged, and was restored")
            say(groups, *mended_run(directory))
            write_run(directory, run)
            say(groups, *continue_at(directory, state.step, trainer.reports))

    collectively(begin, groups.world)
    count = len(workload.data.shards)
    mixed = f" of {len(workload.data.parts)} corpora" if len(workload.data.parts) > 1 else ""
    shards = f"{count} shard{'s' if count > 1 else ''}{mixed}, {workload.data.lanes} lanes"
    facts = [
        f"{workload.model.parameter_count:,} parameters",
        f"{groups.layout} on {groups.device.type}",
        f"{shape.global_batch} x {config.data.block_size} tokens a step",
        shards,
        *state.model.facts(shape.accumulation, shape.micro_batch, shape.block_size),
        f"continuing from {checkpoint}" if checkpoint else "from scratch",
    ]
    say(groups, " | ".join(facts))
    say(groups, *in_vain(config, groups.layout))
    if workload.model.hidden_size % workload.model.num_attention_heads:
        say(groups, "note: transformers opens no Llama whose hidden_size is not divisible by num_attention_heads")
    total, stop = config.training.total_steps, config.run.stop_at_step
    if stop is not None and stop > total:
        say(groups, f"note: --stop-at-step {stop} lies past the end of the run, which is at step {total}")
    return trainer.run()


@contextmanager
def joined(config: RunConfig) -> Iterator[ProcessGroups]:
    """The processes of the job, which has the run's directory to itself for as long as this lasts."""
    layout = config.parallel.layout(place().world_size)
    with process_groups(layout, choose_device(config.launch.device)) as groups:
        directory = config.run.output_dir
        own = collectively(lambda: claim(directory) if groups.is_first else None, groups.world)
        try:
            yield groups
        except ArgonneError:
            if own is not None:
                own.undo()
            raise
        if own is not None:
            own.release()


def say(groups: ProcessGroups, *lines: str) -> None:
    """Print from the first rank."""
    if groups.is_first:
        for line in lines:
            print(line, flush=True)
