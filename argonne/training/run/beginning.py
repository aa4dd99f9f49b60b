"""What a run begins with that is given weights (``--init-from``): which they are, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.checkpoint import is_small, require_intact, resolve, tensor_files, weights_fingerprint
from argonne.checkpoint.resume_state import ResumeState
from argonne.data.tokens.tokenizer import holds_tokenizer
from argonne.inference.opening import is_plain, locate
from argonne.models import end_tokens
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import collectively, from_first, gather_objects
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.run.conflicts import without_effect
from argonne.training.run.identity import RunIdentity
from argonne.training.run.job import log
from argonne.training.run.shape import origin_path, own_checkpoints


@dataclass(frozen=True)
class Beginning:
    """The weights that a run begins with, or began with; those that the seed draws, where nothing is said."""

    fingerprint: str | None = None
    """Their ``weights_fingerprint``."""
    directory: Path | None = None
    """Where they are read from; None too for a run that goes on from its own checkpoints."""
    state: ResumeState | None = None
    """Where it begins with them (``--resume-state``), if not at step 0; None as ``directory`` is."""
    identity: Mapping[str, Any] | None = None
    """The identity of that, of a run that goes on too."""


def beginning(config: RunConfig, saved: RunIdentity | None, groups: ProcessGroups) -> Beginning:
    """What ``--init-from`` means, on every rank (collective).

    ``saved`` is the identity of the run that is continued, if one is. One that has a checkpoint of what it began with
    does not look at that again, whatever has become of it.

    Raises:
        ArgonneError: on every rank, why the directory cannot be opened.
    """
    path = config.model.init_from
    if path is None:
        return Beginning()
    own = collectively(lambda: own_checkpoints(config), groups.world)
    if saved is not None and gather_objects(own is not None, groups.world)[0]:
        identity = saved.resume_state or {} if config.model.resume_state else None
        return Beginning(saved.init_from, identity=identity)
    directory, reports = locate(collectively(lambda: origin_path(path), groups.world), groups)
    log(groups, *reports)

    def read() -> tuple[str, ResumeState | None]:
        return weights_fingerprint(directory), ResumeState.read(directory) if config.model.resume_state else None

    fingerprint, state = from_first(read, groups.world)
    return Beginning(fingerprint, directory, state, None if state is None else state.identity)


def check_beginning(config: RunConfig) -> ResumeState | None:
    """Refuse a directory that a run cannot begin with, as far as its small files show. Needs no peers.

    Returns where the run is to begin with it, if that is not step 0.
    """
    path = config.model.init_from
    if path is None and "resume_state" in config.given:
        raise without_effect(config.model, "resume_state", "--init-from")
    if path is None or own_checkpoints(config) is not None:
        return None
    directory = path if is_plain(path) else resolve(path)[-1]
    if config.data.tokenizer_path is None and not holds_tokenizer(directory):
        raise ArgonneError(f"init_from={str(path)!r} holds no tokenizer; legal: --tokenizer-path too")
    if directory == path:  # of a run, one that is damaged may be passed over
        require_intact(path, is_small)
        end_tokens(path)  # refuses what is no JSON
        tensor_files(path)  # refuses what is no safetensors
    return ResumeState.read(directory) if config.model.resume_state else None
