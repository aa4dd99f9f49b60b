"""Pretraining from its flags to its last checkpoint, and what resuming shares with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer, newest_valid
from argonne.parallel import ProcessGroups, choose_device, process_groups
from argonne.parallel.collectives import collectively
from argonne.training.command_line import world_size
from argonne.training.config import RunConfig
from argonne.training.run_directory import claim, continue_at, flags_to_json, read_run
from argonne.training.run_file import mended_run, write_run
from argonne.training.setup import Workload, accumulation_for, prepare
from argonne.training.state import TrainingState, versions
from argonne.training.trainer import Trainer


def pretrain(config: RunConfig) -> None:
    """Begin the run of ``config``, or continue it from its newest valid checkpoint; one rank of it."""
    directory = config.run.output_dir
    with joined(config) as groups:
        saved = collectively(lambda: read_run(directory), groups.world)
        workload = prepare(config, groups, saved and saved["identity"])
        accumulation = accumulation_for(config, groups.data.size, saved)
        found = checkpoints(directory)
        checkpoint, reports = newest_valid(found, groups)
        say(groups, *reports)
        if found and checkpoint is None:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in output_dir={str(directory)!r} is valid ({reports[0]}); "
                "legal: mend them, or another --output-dir"
            )
        state = TrainingState.build(config, workload, groups)
        if checkpoint is None:
            state.initialise(config.training.seed)
        else:
            restore(state, checkpoint, workload)
        train(config, workload, state, accumulation, checkpoint)


def restore(
    state: TrainingState,
    checkpoint: Path,
    workload: Workload,
    reset_optimizer: bool = False,
    rewarmup_steps: int = 0,
) -> None:
    """Become what ``checkpoint`` says; where the data has changed since, each lane finds a place in what it is now."""
    state.restore(checkpoint, reset_optimizer, rewarmup_steps)
    saved = load_trainer(checkpoint)["identity"]
    now = workload.identity
    same_tokens = all(
        saved[group].get(name) == now[group].get(name)
        for group, name in (("tokenizer", "fingerprint"), ("data", "filters"))
    )
    if saved["data"].get("shards") != now["data"]["shards"] or not same_tokens:
        state.lanes, line = workload.data.adopted(state.lanes, saved["data"], same_tokens)
        say(state.model.groups, f"the data has changed since {checkpoint.name}: {line}")


def train(
    config: RunConfig, workload: Workload, state: TrainingState, accumulation: int, checkpoint: Path | None
) -> None:
    """Record what the run is, make its directory say what was true at the state's step, and go on from there."""
    groups, directory = state.model.groups, config.run.output_dir
    config.parallel.plan(groups.layout).check_micro_batches(accumulation)
    trainer = Trainer(config, workload, state, accumulation)

    def begin() -> None:
        if groups.is_first:
            before = read_run(directory)
            layout = dataclasses.asdict(groups.layout)
            run = {
                "identity": workload.identity,
                "global_batch": trainer.global_batch,
                "layout": layout,
                "first_layout": before["first_layout"] if before else layout,
                "flags": flags_to_json(config),
                "versions": versions(),
            }
            say(groups, *mended_run(directory))
            write_run(directory, run)
            say(groups, *continue_at(directory, state.step))

    collectively(begin, groups.world)
    count = len(workload.data.shards)
    mixed = f" of {len(workload.data.parts)} corpora" if len(workload.data.parts) > 1 else ""
    shards = f"{count} shard{'s' if count > 1 else ''}{mixed}, {workload.data.lanes} lanes"
    facts = [
        f"{workload.model.parameter_count:,} parameters",
        f"{groups.layout} on {groups.device.type}",
        f"{trainer.global_batch} x {config.data.block_size} tokens a step",
        shards,
        *trainer.pipeline_facts(),
        f"continuing from {checkpoint}" if checkpoint else "from scratch",
    ]
    say(groups, " | ".join(facts))
    if workload.model.hidden_size % workload.model.num_attention_heads:
        say(groups, "note: transformers opens no Llama whose hidden_size is not divisible by num_attention_heads")
    trainer.run()


@contextmanager
def joined(config: RunConfig) -> Iterator[ProcessGroups]:
    """The processes of the job, which has the run's directory to itself for as long as this lasts."""
    layout = config.parallel.layout(world_size())
    with process_groups(layout, choose_device(config.parallel.device)) as groups:
        directory = config.run.output_dir
        lock = collectively(lambda: claim(directory) if groups.is_first else None, groups.world)
        yield groups
        if lock is not None:
            lock.close()


def say(groups: ProcessGroups, *lines: str) -> None:
    """Print from the first rank."""
    if groups.is_first:
        for line in lines:
            print(line, flush=True)
