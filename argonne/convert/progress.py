"""How far a file of the original says that its run was, in the words of ``resume_state.json``."""

from __future__ import annotations

import ntpath
from collections.abc import Mapping, Sequence
from typing import Any

from argonne.checkpoint.resume_state import MOST_TOKENS, ResumeState, RowsRead
from argonne.convert.stored import StoredModel
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_whole

STEP = ("global_step", "step")
TOKENS = ("tokens_processed", "total_tokens")
POSITION = "data_position"
_CHUNK = ("chunk_offset", "chunk_index")
_PLACE = ("current_file_idx", "position_in_file")


def resume_state(model: StoredModel) -> ResumeState:
    """What a run has to know that is to go on where the run of an old file was.

    Raises:
        ArgonneError: it is no file of the original, it does not say its step, or says what cannot be.
    """
    said = model.progress.said
    if said is None:
        raise ArgonneError(
            f"--resume-state needs a file of the original, and this is a {model.form}; legal: leave it out"
        )
    step, tokens = _count(said, STEP), _count(said, TOKENS)
    if step is None:
        raise ArgonneError(f"it does not say at which step it was ({' or '.join(STEP)}); legal: no --resume-state")
    return ResumeState(step, tokens, _position(said.get(POSITION), model.shape.max_position_embeddings))


def _position(found: Any, block_size: int) -> RowsRead | None:
    """The place in the data, if there is one that data in its own order can be gone on from.

    A run that shuffled (``streaming`` is False) kept a number in an order that it did not keep.
    """
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ArgonneError(f"its {POSITION} is a {type(found).__name__}; legal: {' and '.join(_PLACE)} by name")
    if found.get("streaming") is False:
        return None
    if missing := [name for name in _PLACE if found.get(name) is None]:
        told = ", ".join(map(str, found)) or "nothing"
        raise ArgonneError(f"its {POSITION} lacks {missing[0]} and has {told}; legal: {' and '.join(_PLACE)}")
    shard, row, epoch, chunk = (_count(found, names) for names in ((_PLACE[0],), (_PLACE[1],), ("epoch",), _CHUNK))
    assert shard is not None
    assert row is not None
    files = found.get("files_processed") or ()
    if not isinstance(files, Sequence | set) or isinstance(files, str) or not all(isinstance(f, str) for f in files):
        raise ArgonneError(f"its {POSITION} has files_processed={files!r}; legal: names of files")
    names = tuple(sorted({ntpath.basename(each) for each in files}))
    # Chunks had block_size + 1 tokens, of which the last was the first of the next.
    return RowsRead(shard, row, None if chunk is None else (chunk + 1) * block_size, epoch or 0, names)


def _count(said: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of these that there is. Raises ``ArgonneError`` unless it is a whole number, 0 or more."""
    name = next((name for name in names if said.get(name) is not None), None)
    if name is None:
        return None
    most = MOST_TOKENS if name in TOKENS else 2**31 - 1
    require_whole(name, said[name], 0, most)
    return int(said[name])
