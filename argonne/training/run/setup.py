"""Everything that is settled before the first step: what the flags, the data and the tokenizer make together."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.checkpoint import load_trainer
from argonne.checkpoint.format import TRAINER
from argonne.data import boundary_tokens, load_tokenizer, tokenizer_fingerprint
from argonne.parallel import Precision, ProcessGroups
from argonne.parallel.communication.collectives import collectively, from_first, gather_objects
from argonne.parallel.tensor_parallel.precision import resolve_precision
from argonne.training.config import RunConfig
from argonne.training.evaluation import held_out_sequences
from argonne.training.named_sets import NamedSet, read_named
from argonne.training.run.beginning import Beginning, beginning
from argonne.training.run.compilation import compiles
from argonne.training.run.conditions import conditions_of
from argonne.training.run.corpora import Corpora
from argonne.training.run.directory import require_same
from argonne.training.run.identity import RunIdentity
from argonne.training.run.job import log
from argonne.training.run.kept_tokenizer import fallback_tokenizer, from_json
from argonne.training.run.line_counts import share_counts
from argonne.training.run.loss import LossBuilder, LossOfRun, cross_entropy
from argonne.training.run.model import ModelBuilder, ModelOfRun, argonne_model, own_model
from argonne.training.run.probe import require_facts
from argonne.training.run.shape import shape_of
from argonne.training.run.token_caches import token_caches


@dataclass(frozen=True)
class Workload:
    """What is trained, and on what: the same on every rank but for the tokenizer."""

    model: ModelOfRun
    precision: Precision
    data: Corpora
    tokenizer: PreTrainedTokenizerFast | None
    """On the ranks that read data; None elsewhere."""
    boundary: tuple[int, int] | None
    identity: RunIdentity
    conditions: dict[str, Any]
    """What it is computed and measured under, which may change on the way: JSON values."""
    held_out: Tensor | None
    """``held_out_sequences``; None where there is no held-out text."""
    began: Beginning
    """With which weights."""
    named: Mapping[str, NamedSet]
    """The named held-out sets."""
    loss: LossOfRun
    """What is minimised."""


def prepare(
    config: RunConfig,
    groups: ProcessGroups,
    saved: RunIdentity | None = None,
    fixed: Collection[str] | None = None,
    kept_tokenizer: Callable[[], Path | None] = lambda: None,
    model: ModelBuilder | None = None,
    loss: LossBuilder = cross_entropy,
) -> Workload:
    """Settle the workload (collective), writing nothing: all that can be refused is refused here.

    Args:
        saved: the identity of the run that is continued, if one is; anything else is refused.
        fixed: the parts of it in which anything else is refused; all of them when left out.
        kept_tokenizer: finds the tokenizer that trained weights depend on (collective), if there are such; asked for
            once the flags are known to mean the run, and only when they name none.
        model: makes the model that is trained in place of the flags'.
        loss: says what is minimised.
    """
    data = open_corpora(config, groups, saved)
    precision = resolve_precision(config.training.precision, groups.device)
    began = beginning(config, saved, groups)
    identity = replace(RunIdentity.of(config, data.identity, precision), init_from=began.fingerprint)
    of_loss = loss(config, groups)
    identity = replace(identity, resume_state=began.identity, loss=of_loss.identity)
    # Before anything that takes long.
    early = identity if model else _with_shape(identity, config, saved)
    _require_run(config, saved, early, fixed)

    tokenizer = _tokenizer(config, groups, data, saved, lambda: kept_tokenizer() or began.directory)
    boundary = None
    if config.data.add_document_boundary_tokens:
        boundary = collectively(lambda: boundary_tokens(tokenizer) if tokenizer else None, groups.world)
    facts = _tokenizer_facts(tokenizer, boundary, groups, data)
    of_loss = of_loss.settled(groups, tokenizer, facts["size"])
    if model is None:
        of_run = argonne_model(config, facts["size"])
    else:
        of_run = collectively(lambda: own_model(model, config, facts["size"], groups, precision), groups.world)
    identity = replace(identity, model=dict(of_run.shape), tokenizer=facts)
    accepted = _require_run(config, saved, identity, fixed)

    require_facts(config, groups, precision, own_model=model is not None)
    _require_text(data, tokenizer, boundary, groups)
    held_out = _held_out(config, groups, data, tokenizer, boundary)
    log(groups, *(f"accepted from here on: {line}" for line in accepted))
    compiled = compiles(config, groups.layout, groups.device, own_model=model is not None)
    conditions = conditions_of(config, precision, groups.device, data.validation, compiled, data.named)
    named = _named(config, groups, data, tokenizer, boundary)
    return Workload(of_run, precision, data, tokenizer, boundary, identity, conditions, held_out, began, named, of_loss)


def with_tokens(config: RunConfig, workload: Workload, groups: ProcessGroups) -> Workload:
    """The workload with the tokens of ``--no-streaming`` made or found (collective)."""
    if config.data.streaming:
        return workload
    directory, tokenizer, boundary = config.run.output_dir / "token_cache", workload.tokenizer, workload.boundary
    data = workload.data.with_caches(token_caches(workload.data, tokenizer, boundary, directory, groups))
    _require_text(data, tokenizer, boundary, groups)
    return replace(workload, data=data)


def open_corpora(config: RunConfig, groups: ProcessGroups, saved: RunIdentity | None) -> Corpora:
    """The data of a run, the same on every rank (collective): what one cannot open, none reads."""
    share_counts(config.data, groups)
    data = collectively(lambda: Corpora.open(config.data, config.training.seed, saved), groups.world)
    found = gather_objects(data.quarantined, groups.world)
    # The first rank's reason stands where several have one.
    reasons = [dict(ChainMap(*of_ranks)) for of_ranks in zip(*found, strict=True)]
    for part, away in zip(data.parts, reasons, strict=True):
        for index, reason in sorted(away.items()):
            log(groups, f"shard {part.shards[index].path} {reason}; it is skipped (--on-bad-shard skip)")
    return collectively(lambda: data.without(reasons), groups.world)


def _require_run(
    config: RunConfig, saved: RunIdentity | None, now: RunIdentity, fixed: Collection[str] | None
) -> list[str]:
    """Refuse another run than the ``saved`` one, as far as ``now`` is settled; the differences that are accepted."""
    if saved is None:
        return []
    # What a run has or has not is settled by the flags, so that having it no more is a difference.
    settled = {*now.to_json(), "init_from", "resume_state", "reproducible", "loss"}
    parts = [name for name in settled if fixed is None or name in fixed]
    return require_same(saved, now, config.run.output_dir, config.data.accept_data_change, parts)


def _with_shape(identity: RunIdentity, config: RunConfig, saved: RunIdentity | None) -> RunIdentity:
    """``identity`` with the model's shape as far as the flags settle it: of the vocabulary, the tokenizer decides."""
    if saved is None or not saved.model:
        return identity
    shape = shape_of(config).as_json()
    return replace(identity, model=shape | {"vocab_size": saved.model.get("vocab_size")})


def _tokenizer(
    config: RunConfig,
    groups: ProcessGroups,
    data: Corpora,
    saved: RunIdentity | None,
    kept_tokenizer: Callable[[], Path | None],
) -> PreTrainedTokenizerFast | None:
    """The tokenizer on the ranks that read data (collective): the flags', else the kept one, else one trained here."""
    path, text = config.data.tokenizer_path or kept_tokenizer(), ""
    if path is None:
        directory, kept = config.run.output_dir / "tokenizer", saved.fingerprint if saved else None

        def find() -> str:
            return fallback_tokenizer(directory, kept, data.shards, config.data.on_bad_shard)

        text = from_first(find, groups.world)

    def load() -> PreTrainedTokenizerFast | None:
        if groups.model.rank != 0:
            return None
        prepared = data.flags.source.prepared
        if path is None:
            return prepared(from_json(text))
        # A checkpoint's is what it was before the run's boundary tokens were its own.
        own = load_trainer(path).get("special_tokens") if (path / TRAINER).exists() else None
        return prepared(load_tokenizer(path, config.data.trust_remote_code, own, saved is None))

    return collectively(load, groups.world)


def _tokenizer_facts(
    tokenizer: PreTrainedTokenizerFast | None, boundary: tuple[int, int] | None, groups: ProcessGroups, data: Corpora
) -> dict[str, Any]:
    """The tokenizer's part of the identity, on every rank (collective)."""
    facts: dict[str, Any] = {}
    if groups.is_first:
        assert tokenizer is not None
        # One more than the largest id: some tokenizers leave ids out.
        size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        facts = {"fingerprint": tokenizer_fingerprint(tokenizer), "size": size}
        facts |= {"boundary": list(boundary)} if boundary else {}
        if chat := data.flags.source.template(tokenizer):
            facts["chat_template"] = hashlib.sha256(chat[0].encode()).hexdigest()
    return gather_objects(facts, groups.world)[0]


def _require_text(
    data: Corpora,
    tokenizer: PreTrainedTokenizerFast | None,
    boundary: tuple[int, int] | None,
    groups: ProcessGroups,
) -> None:
    """Refuse data that does not fill a sequence (collective)."""

    def check() -> None:
        assert tokenizer is not None
        data.check_block_size(tokenizer, boundary)

    from_first(check, groups.world)


def _held_out(
    config: RunConfig,
    groups: ProcessGroups,
    data: Corpora,
    tokenizer: PreTrainedTokenizerFast | None,
    boundary: tuple[int, int] | None,
) -> Tensor | None:
    """The held-out sequences on every rank, if there is such text (collective)."""
    if not data.validation:
        return None
    flags, own = config.data, tokenizer if groups.is_first else None
    limit, globs = flags.validation_sequences, flags.validation_glob
    return held_out_sequences(data.validation, own, flags.block_size, boundary, limit, groups, globs, flags.source)


def _named(
    config: RunConfig,
    groups: ProcessGroups,
    data: Corpora,
    tokenizer: PreTrainedTokenizerFast | None,
    boundary: tuple[int, int] | None,
) -> dict[str, NamedSet]:
    """The named held-out sets on every rank (collective)."""
    flags, own = config.data, tokenizer if groups.is_first else None
    size, limit, source = flags.block_size, flags.eval_sequences, flags.source
    return read_named(data.named, flags.named_globs, own, size, boundary, limit, groups, source)
