"""Pretraining from its flags to its last checkpoint, and what resuming shares with it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from argonne.checkpoint import CheckpointError, checkpoints, load_trainer, newest_valid
from argonne.checkpoint.resume_state import RESUME_STATE
from argonne.data import Assignment
from argonne.parallel import ProcessGroups, check_declarations
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.errors import ArgonneError
from argonne.training.batch_shape import BatchShape
from argonne.training.config import RunConfig
from argonne.training.machine import return_large_blocks
from argonne.training.named_sets import announced as announced_sets
from argonne.training.run.batch import as_found, batch_of
from argonne.training.run.compilation import eager_note, prepare_blocks
from argonne.training.run.conditions import announced, changed_since
from argonne.training.run.conflicts import in_vain
from argonne.training.run.continuation import continue_at
from argonne.training.run.directory import read_run
from argonne.training.run.elsewhere import go_on
from argonne.training.run.file import mended_run, write_run
from argonne.training.run.identity import RunIdentity
from argonne.training.run.job import joined, log
from argonne.training.run.kept_files import KeptFiles
from argonne.training.run.kept_tokenizer import keep
from argonne.training.run.loss import LossBuilder, cross_entropy
from argonne.training.run.memory import memory_told
from argonne.training.run.model import ModelBuilder
from argonne.training.run.refit import refit
from argonne.training.run.search import in_vain as search_in_vain
from argonne.training.run.search import search
from argonne.training.run.setup import Workload, prepare, with_tokens
from argonne.training.state import TrainingState
from argonne.training.trainer import Trainer
from argonne.training.tuning.epochs import steps_as_saved, with_steps


def pretrain(config: RunConfig, model: ModelBuilder | None = None, loss: LossBuilder = cross_entropy) -> int:
    """Begin the run of ``config``, or continue it from its newest valid checkpoint; one rank of it, and its status.

    ``model`` makes the model that is trained, from an ``Execution`` and the number of tokens of the vocabulary:
    anything that meets ``argonne.models.LanguageModel``. Left out, it is the Argonne model of the flags. ``loss`` says
    what is minimised, pretraining's cross-entropy unless it is another.
    """
    directory = config.run.output_dir
    with joined(config) as groups:
        saved = collectively(lambda: read_run(directory), groups.world)
        config = steps_as_saved(as_found(config, saved), saved)
        shape = batch_of(config, groups.data.size, saved)
        if groups.reproducible:
            shape.check_reproducible(config.parallel.kind)
        config.parallel.plan(groups.layout).check_micro_batches(shape.accumulation)
        newest = functools.cache(lambda: _newest(directory, groups))
        before = saved.identity if saved else None
        workload = prepare(config, groups, before, kept_tokenizer=newest, model=model, loss=loss)
        checkpoint, became = newest(), []
        if checkpoint is not None:
            if is_done(config, checkpoint, groups):
                return 0
            trainer = load_trainer(checkpoint)
            became = changed_since(trainer, workload.identity, workload.conditions, config)
        if saved is None:
            log(groups, *search_in_vain(config, settled=None))
            config, workload, found = search(config, workload, groups)
            shape = batch_of(config, groups.data.size, None)
            config, workload = with_steps(config, workload, groups, shape.global_batch)
        else:
            last = {"layout": saved.layout, "flags": saved.flags}
            shape, found = refit(config, workload, groups, shape, last, saved.search)
        workload = with_tokens(config, workload, groups)
        with memory_told(config, shape, groups, lambda: "as the model was made"):
            state = TrainingState.build(config, workload, groups)
            state.search = found
            if checkpoint is None:
                begin(state, config, workload, shape)
            else:
                restore(state, checkpoint, workload, became, config.data.tokenizer_path)
        return train(config, workload, state, shape, checkpoint)


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
        log(groups, f"the run is finished: {checkpoint} is step {step:,} of {total:,}, and nothing was done.")
        log(groups, f"To go on: {go_on}")
    elif step == stop:
        log(groups, f"the run is at step {step:,} of {total:,}, where --stop-at-step {stop} stops: nothing was done.")
        log(groups, "To go on: the same command with a later --stop-at-step, or without it")
    return step in (total, stop)


def _newest(directory: Path, groups: ProcessGroups) -> Path | None:
    """The newest valid checkpoint of a run (collective); None where it has none, valid or not."""
    found = checkpoints(directory)
    checkpoint, reports = newest_valid(found, groups)
    log(groups, *reports)
    if found and checkpoint is None:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in output_dir={str(directory)!r} is valid ({reports[0]}); "
            "legal: mend them, or another --output-dir"
        )
    return checkpoint


def begin(state: TrainingState, config: RunConfig, workload: Workload, shape: BatchShape) -> None:
    """Begin with the weights that ``--init-from`` names, or those of the seed: at step 0 but for ``--resume-state``."""
    directory, elsewhere = workload.began.directory, workload.began.state
    if directory is None:
        state.initialise(config.training.seed)
        return
    state.begin_with(directory)
    _keep_files(state, directory, workload, config.data.tokenizer_path, begins=True)
    log(state.model.groups, f"beginning with the weights of {directory}")
    if elsewhere is not None:
        go_on(state, config, workload, elsewhere, shape.global_batch)
    elif (directory / RESUME_STATE).exists():
        log(state.model.groups, f"note: {directory / RESUME_STATE} is not read, and this run begins at step 0")


def _keep_files(
    state: TrainingState, directory: Path, workload: Workload, tokenizer_path: Path | None, begins: bool = False
) -> None:
    """Have checkpoints keep what is in ``directory`` beside the weights (collective)."""
    groups = state.model.groups

    def read() -> KeptFiles | None:
        if not groups.is_first:
            return None
        assert workload.tokenizer is not None
        kept = KeptFiles.read(directory, workload.tokenizer, tokenizer_path, begins)
        return kept.with_chat(workload.tokenizer, workload.data.flags.source.template(workload.tokenizer))

    state.kept = collectively(read, groups.world)


def restore(
    state: TrainingState,
    checkpoint: Path,
    workload: Workload,
    became: Sequence[str],
    tokenizer_path: Path | None = None,
    reset_optimizer: bool = False,
    rewarmup_steps: int = 0,
) -> None:
    """Become what ``checkpoint`` says but for ``became``, the lines that tell of changes, which are kept.

    Where the data has changed since, each lane finds a place in what it is now.
    """
    state.restore(checkpoint, reset_optimizer, rewarmup_steps)
    if workload.identity.init_from is not None:
        _keep_files(state, checkpoint, workload, tokenizer_path)
    trainer = load_trainer(checkpoint)
    saved, now = RunIdentity.of_saved(trainer), workload.identity
    state.changes = [*trainer.get("changes", []), *({"step": state.step, "text": line} for line in became)]
    log(state.model.groups, *announced(became))
    same_tokens = saved.tokens == now.tokens
    if saved.shards != now.shards or not same_tokens:
        state.lanes, line = workload.data.adopted(state.lanes, saved, same_tokens)
        log(state.model.groups, f"the data has changed since {checkpoint.name}: {line}")


def train(
    config: RunConfig, workload: Workload, state: TrainingState, shape: BatchShape, checkpoint: Path | None
) -> int:
    """Record what the run is, make its directory say what was true at the state's step, and go on from there.

    Returns the status that this process is to end with.
    """
    groups = state.model.groups
    check_declarations(state.parameters, groups, values=True)
    if groups.device.type == "cpu" and (state.search or config.training.memory_limit is not None):
        return_large_blocks()
    _compile(config, workload, state, shape)
    with memory_told(config, shape, groups, lambda: "as the loss was made"):
        trainer = Trainer(config, workload, state, shape)
    # One rank writes; what it cannot write, all refuse.
    collectively(lambda: _begin(config, workload, state, shape, trainer) if groups.is_first else None, groups.world)
    log(
        groups,
        _summary(workload, state, shape, checkpoint),
        *in_vain(config, groups.layout),
        *eager_note(config, groups, own_model=workload.model.own),
        *_notes(config, workload, trainer.assignment),
    )
    with memory_told(config, shape, groups, lambda: f"after step {state.step}"):
        return trainer.run()


def _compile(config: RunConfig, workload: Workload, state: TrainingState, shape: BatchShape) -> None:
    """Compile the blocks of a run that has it so (collective), or say and keep why they are not."""
    if not workload.conditions["compile"]:
        return
    sizes = (shape.micro_batch, shape.block_size, config.data.document_mask)
    if problem := prepare_blocks(state.model, *sizes, config.training.seed):
        state.changes.append({"step": state.step, "text": problem})
        log(state.model.groups, problem)


def _begin(config: RunConfig, workload: Workload, state: TrainingState, shape: BatchShape, trainer: Trainer) -> None:
    """Write ``run.json``, keep the tokenizer, and tidy the run's directory, all on one rank."""
    groups, directory = state.model.groups, config.run.output_dir
    before, run = read_run(directory), state.of_run(config, workload, shape.global_batch)
    run["first_layout"] = before.first_layout if before else run["layout"]
    if config.data.tokenizer_path is None and config.model.init_from is None:
        assert workload.tokenizer is not None
        if keep(workload.tokenizer, directory / "tokenizer") and before:
            log(groups, f"{directory / 'tokenizer'} was missing or damaged, and was restored")
    log(groups, *mended_run(directory))
    write_run(directory, run)
    log(groups, *continue_at(directory, state.step, trainer.reports))


def _summary(workload: Workload, state: TrainingState, shape: BatchShape, checkpoint: Path | None) -> str:
    """The line that training begins with."""
    data, groups = workload.data, state.model.groups
    mixed = f" of {len(data.parts)} corpora" if len(data.parts) > 1 else ""
    begins = f"from step {state.step:,}" if state.kept else "from scratch"
    facts = [
        f"{state.model.parameter_count:,} parameters",
        f"{groups.layout} on {groups.device.type}",
        f"{shape.global_batch} x {shape.block_size} tokens a step",
        f"{len(data.shards)} shard{'s' if len(data.shards) > 1 else ''}{mixed}, {data.lanes} lanes",
        *state.model.facts(shape.accumulation, shape.micro_batch, shape.block_size),
        *state.replicas.facts(shape.accumulation),
        f"continuing from {checkpoint}" if checkpoint else begins,
    ]
    return " | ".join(facts)


def _notes(config: RunConfig, workload: Workload, assignment: Assignment) -> list[str]:
    """What may surprise whoever asked for this run, though it is legal."""
    notes = [*workload.model.notes, *workload.data.trained_on, *announced_sets(workload.named, config.run.evaluates)]
    total, stop = config.training.total_steps, config.run.stop_at_step
    if stop is not None and stop > total:
        notes.append(f"note: --stop-at-step {stop} lies past the end of the run, which is at step {total}")
    return notes + lanes_note(config, workload.data.lanes, assignment)


def lanes_note(config: RunConfig, lanes: int, assignment: Assignment) -> list[str]:
    """What it costs where the lanes cannot be dealt out evenly."""
    readers = assignment.readers(lanes)
    if readers == 1 or not config.data.streaming:
        return []
    reason = f"data_parallel={assignment.replicas} does not divide the {lanes} lanes"
    if assignment.order == "contiguous":
        reason = f"{assignment.leaves} micro-batches of a step do not divide the {lanes} lanes"
    return [f"{reason}: each is tokenised by {readers} ranks, which take its samples in turn"]
