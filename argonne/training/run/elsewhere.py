"""A run that goes on where a run elsewhere was (``--resume-state``): at its step, with its tokens, at its place."""

from __future__ import annotations

import functools

from argonne.checkpoint.resume_state import RESUME_STATE, ResumeState, RowsRead
from argonne.data import DataError, Shard
from argonne.data.lanes.in_order import document_length, lanes_from
from argonne.parallel.communication.collectives import from_first
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.run.corpora import Corpora
from argonne.training.run.job import log
from argonne.training.run.setup import Workload
from argonne.training.state import TrainingState


def check_elsewhere(config: RunConfig, began: ResumeState, data: Corpora) -> None:
    """Refuse a step or a place that this run cannot go on from. Needs no peers."""
    step, total, stop = began.step, config.training.total_steps, config.run.stop_at_step
    if total <= step:
        raise ArgonneError(f"total_steps={total} is not past step {step}, of {RESUME_STATE}; legal: more than {step}")
    if stop is not None and stop <= step:
        raise ArgonneError(f"stop_at_step={stop} is not past step {step}, of {RESUME_STATE}; legal: more than {step}")
    if began.data_position is not None:
        _check_place(began.data_position, data)


def _check_place(place: RowsRead, data: Corpora) -> None:
    if len(data.parts) > 1:
        raise _refused(f"has a place in one corpus, and data_glob names {len(data.parts)}", "one")
    if not data.flags.streaming:
        raise _refused("has a place in the order of the rows, which streaming=False shuffles", "no --no-streaming")
    shards = data.parts[0].shards
    if place.shard >= len(shards):
        raise _refused(f"has data_position.shard={place.shard}, past the {len(shards)} shards of data_glob")
    shard = shards[place.shard]
    if shard.unreadable:
        raise _refused(f"has its place in {shard.path}, which {shard.unreadable}", "mend it")
    if place.row >= sum(shard.rows):
        raise _refused(f"has data_position.row={place.row}, past the {sum(shard.rows)} rows of {shard.path}")
    _check_names(place, shards)


def _check_names(place: RowsRead, shards: tuple[Shard, ...]) -> None:
    """Refuse shards among which the index means another than it did."""
    begun = [index for index, shard in enumerate(shards) if shard.path.name in place.files]
    if not place.files or (place.shard in begun and (place.epoch or begun[-1] == place.shard)):
        return  # in later passes every one has been begun
    what = "is none of those that it names"
    if place.shard in begun:
        what = f"is before {shards[begun[-1]].path.name}, which the run had begun too"
    raise _refused(f"has data_position.shard={place.shard}, here {shards[place.shard].path.name}, which {what}")


def _refused(what: str, legal: str = "the shards of the run before") -> DataError:
    anew = "or the file without its data_position, and the data begins with its first row"
    return DataError(f"{RESUME_STATE} {what}; legal: {legal}, {anew}")


def go_on(state: TrainingState, config: RunConfig, workload: Workload, began: ResumeState, global_batch: int) -> None:
    """Stand where the run before stood, with its weights already read and moments that begin anew (collective)."""
    groups = state.model.groups
    state.step, state.tokens = began.step, began.tokens or 0
    # As a run of this batch has it at this step: samples are dealt to lanes and ranks by their numbers.
    state.next_sample = began.step * global_batch
    tokens = "tokens counted from here" if began.tokens is None else f"{began.tokens:,} tokens"
    lines = [f"going on at step {began.step:,} of {config.training.total_steps:,}: {tokens}, moments that begin anew"]
    place = began.data_position
    if place is None:
        lines.append(f"data: from the first row on, as {RESUME_STATE} has no place in it")
    else:
        token, line = from_first(functools.partial(_token, place, workload), groups.world)
        shards, lanes = workload.data.parts[0].shards, workload.data.lanes
        states = lanes_from(shards, lanes, place.epoch, place.shard, place.row, token)
        state.lanes = dict(enumerate(states))
        lines.append(line)
    log(groups, *lines)


def _token(place: RowsRead, workload: Workload) -> tuple[int, str]:
    """From which token on the document of the row is to come, and the line that tells of it; on the first rank."""
    assert workload.tokenizer is not None
    flags, shards = workload.data.flags, workload.data.parts[0].shards
    length = document_length(
        *(shards, place.shard, place.row, workload.tokenizer, workload.boundary),
        *(flags.on_bad_shard, flags.document_filters),
    )
    read, token = place.row_tokens, 0
    if not length:
        what = "which is no document here"
    elif read is None:
        what = f"read again (all {length:,} tokens), as {RESUME_STATE} does not say how much of it was read"
    elif read >= length:
        what = f"read again (all {length:,} tokens), as the {read:,} of {RESUME_STATE} are more than it has"
    else:
        token, what = read, f"which goes on at token {read:,} of {length:,}"
    rows = [sum(shard.rows) for shard in shards]
    before = sum(rows[: place.shard]) + place.row
    return token, (
        f"data: pass {place.epoch + 1}, {before:,} rows count as read; then row {place.row:,} of "
        f"{shards[place.shard].path.name}, {what}; then the {sum(rows) - before - 1:,} rows behind it"
    )
