"""Everything that is settled before the first step: what the flags, the data and the tokenizer make together."""

from __future__ import annotations

import dataclasses
import os
from collections import ChainMap
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.checkpoint import is_small, load_trainer, require_intact
from argonne.checkpoint.format import TRAINER
from argonne.data import (
    DataError,
    boundary_tokens,
    load_tokenizer,
    ranks_per_lane,
    tokenizer_fingerprint,
)
from argonne.kernels.dispatch import Backend, interprets
from argonne.models import ArgonneConfig
from argonne.models.replicas import check_kind
from argonne.parallel import Axis, Layout, Precision, ProcessGroups, choose_device, context_positions
from argonne.parallel.communication.collectives import collectively, gather_objects
from argonne.parallel.communication.layout import require_divisible
from argonne.parallel.data_parallel.kinds import check_shard
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.evaluation import held_out_sequences
from argonne.training.run.conditions import comparable, conditions_of, dtype_name
from argonne.training.run.conflicts import check_meaning
from argonne.training.run.corpora import Corpora
from argonne.training.run.directory import read_run, require_same, schedule_identity
from argonne.training.run.kept_tokenizer import fallback_tokenizer, from_json
from argonne.training.run.token_caches import token_caches

PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp16": Precision(torch.float32, torch.float16),
    "fp64": Precision(torch.float64, torch.float64),
}


@dataclass(frozen=True)
class Workload:
    """What is trained, and on what: the same on every rank but for the tokenizer."""

    model: ArgonneConfig
    precision: Precision
    data: Corpora
    tokenizer: PreTrainedTokenizerFast | None
    """On the ranks that read data; None elsewhere."""
    boundary: tuple[int, int] | None
    identity: dict[str, Any]
    """What makes this run this run, whatever its layout: JSON values."""
    conditions: dict[str, Any]
    """What it is computed and measured under, which may change on the way: JSON values."""
    held_out: Tensor | None
    """``held_out_sequences``; None where there is no held-out text."""


def check(config: RunConfig, world_size: int) -> None:
    """Refuse what can be refused without peers: flags, layout, shape, data files, tokenizer path.

    Raises:
        ArgonneError: in one line, what is wrong.
    """
    config.check()
    saved = read_run(config.run.output_dir)
    check_meaning(config, saved["identity"] if saved else None)
    layout = config.parallel.layout(world_size)
    check_kernels(config.training.kernels, choose_device(config.launch.device), config.training.precision)
    model = config.model.resolve(config.data.block_size)
    model.check_layout(layout)
    plan = config.parallel.plan(layout)
    plan.check_layers(model.num_hidden_layers)
    check_kind(config.parallel.kind, plan.schedule if layout.pipeline > 1 else "")
    check_shard(config.parallel.kind, config.parallel.fsdp_shard, layout.data * layout.context)
    if saved is None:  # a run that is continued keeps its global batch
        plan.check_micro_batches(config.training.gradient_accumulation_steps)
    check_sequence(config.data.block_size, layout)
    path = config.data.tokenizer_path
    if path is not None and not path.is_dir():
        raise DataError(
            f"tokenizer_path={str(path)!r} does not exist; legal: the directory of a Hugging Face tokenizer"
        )
    if path is not None:
        require_intact(path, is_small)
    Corpora.open(config.data, config.training.seed, saved["identity"].get("data") if saved else None)
    _check_output(config.run.output_dir)


def check_kernels(kernels: Backend, device: torch.device, precision: str) -> None:
    """Raise ``ArgonneError`` unless that backend can compute on ``device`` with that ``--precision``."""
    if kernels != "triton":
        return
    if device.type != "cuda" and not interprets():
        raise ArgonneError(f"kernels='triton' needs a GPU, but the device is {device}; legal: auto, torch")
    if precision == "fp64":
        raise ArgonneError("kernels='triton' does not compute in precision='fp64'; legal: auto, torch")


def check_sequence(block_size: int, layout: Layout) -> None:
    """Raise ``LayoutError`` unless a sequence of ``block_size`` can be shared out as ``layout`` asks."""
    context_positions(block_size, Axis("context", layout.context))
    if layout.sequence_parallel:
        local = block_size // layout.context
        name = "block_size / context_parallel" if layout.context > 1 else "block_size"
        require_divisible(name, local, "tensor_parallel", layout.tensor)


def prepare(
    config: RunConfig,
    groups: ProcessGroups,
    saved: dict[str, Any] | None = None,
    fixed: Collection[str] | None = None,
    kept_tokenizer: Callable[[], Path | None] = lambda: None,
) -> Workload:
    """Settle the workload (collective), writing nothing: all that can be refused is refused here.

    Args:
        config: the flags.
        groups: the processes.
        saved: the identity of the run that is continued, if one is; anything else is refused.
        fixed: the parts of it in which anything else is refused; all of them when left out.
        kept_tokenizer: finds the tokenizer that trained weights depend on (collective), if there are such; asked for
            once the flags are known to mean the run, and only when they name none.

    Raises:
        ArgonneError: on every rank, what is wrong.
    """
    directory = config.run.output_dir
    data = open_corpora(config, groups, saved)
    precision = resolve_precision(config.training.precision, groups.device)
    identity: dict[str, Any] = {
        "data": data.identity,
        "seed": config.training.seed,
        "schedule": schedule_identity(config),
        "precision": {"state": dtype_name(precision.parameters)},
    }
    if precision.compute is torch.float16:
        identity["initial_loss_scale"] = config.training.initial_loss_scale

    def compare(wanted: dict[str, Any]) -> list[str]:
        if saved is None:
            return []
        names = [name for name in wanted if fixed is None or name in fixed]
        before, now = comparable({n: saved.get(n) for n in names}, {n: wanted[n] for n in names})
        return require_same(before, now, directory, config.data.accept_data_change)

    # Before anything that takes long; of the vocabulary, the tokenizer has yet to tell.
    kept_model = saved.get("model") if saved else None
    shape = dataclasses.asdict(config.model.resolve(config.data.block_size))
    early = {"model": shape | {"vocab_size": kept_model.get("vocab_size")}} if kept_model else {}
    compare(identity | early)

    reads_data = groups.model.rank == 0
    path, text = config.data.tokenizer_path or kept_tokenizer(), ""
    if path is None:

        def find() -> str:
            kept = saved.get("tokenizer", {}).get("fingerprint") if saved else None
            return fallback_tokenizer(directory / "tokenizer", kept, data.shards, config.data.on_bad_shard)

        told = gather_objects(collectively(lambda: find() if groups.is_first else "", groups.world), groups.world)
        text = told[0]

    def load() -> PreTrainedTokenizerFast | None:
        if not reads_data:
            return None
        return from_json(text) if path is None else _tokenizer(path, config.data.trust_remote_code, saved is None)

    tokenizer = collectively(load, groups.world)
    boundary = None
    if config.data.add_document_boundary_tokens:
        boundary = collectively(lambda: boundary_tokens(tokenizer) if tokenizer else None, groups.world)

    facts: dict[str, Any] = {}
    if groups.is_first:
        assert tokenizer is not None
        facts = {"fingerprint": tokenizer_fingerprint(tokenizer), "size": _token_count(tokenizer)}
        facts |= {"boundary": list(boundary)} if boundary else {}
    facts = gather_objects(facts, groups.world)[0]
    model = _model(config, facts["size"])
    identity |= {"model": dataclasses.asdict(model), "tokenizer": facts}
    accepted = compare(identity)

    def enough() -> None:
        if groups.is_first:
            assert tokenizer is not None
            data.check_block_size(tokenizer, boundary)

    collectively(enough, groups.world)
    held_out = None
    if data.validation:
        held_out = held_out_sequences(
            data.validation,
            tokenizer if groups.is_first else None,
            config.data.block_size,
            boundary,
            config.data.validation_sequences,
            groups,
            config.data.validation_glob,
            config.data.document_filters,
        )
    if groups.is_first:
        for line in accepted:
            print(f"accepted from here on: {line}")
        sharing = ranks_per_lane(data.lanes, groups.data.size)
        if sharing > 1 and config.data.streaming:
            print(
                f"data_parallel={groups.data.size} does not divide the {data.lanes} lanes: each is tokenised by "
                f"{sharing} ranks, which take its samples in turn"
            )
    conditions = conditions_of(config, precision, groups.device, data.validation)
    return Workload(model, precision, data, tokenizer, boundary, identity, conditions, held_out)


def with_tokens(config: RunConfig, workload: Workload, groups: ProcessGroups) -> Workload:
    """The workload with the tokens of ``--no-streaming`` made or found (collective).

    Raises:
        ArgonneError: on every rank, why they cannot be made.
    """
    if config.data.streaming:
        return workload
    directory, tokenizer, boundary = config.run.output_dir / "token_cache", workload.tokenizer, workload.boundary
    data = workload.data.with_caches(token_caches(workload.data, tokenizer, boundary, directory, groups))

    def enough() -> None:
        if groups.is_first:
            assert tokenizer is not None
            data.check_block_size(tokenizer, boundary)

    collectively(enough, groups.world)
    return replace(workload, data=data)


def open_corpora(config: RunConfig, groups: ProcessGroups, saved: dict[str, Any] | None) -> Corpora:
    """The data of a run, the same on every rank (collective): what one cannot open, none reads."""
    kept = saved.get("data") if saved else None

    data = collectively(lambda: Corpora.open(config.data, config.training.seed, kept), groups.world)
    told = gather_objects(data.quarantined, groups.world)
    # The first rank's reason stands where several have one.
    reasons = [dict(ChainMap(*of_ranks)) for of_ranks in zip(*told, strict=True)]
    for part, away in zip(data.parts, reasons, strict=True) if groups.is_first else ():
        for index, reason in sorted(away.items()):
            print(f"shard {part.shards[index].path} {reason}; it is passed over (--on-bad-shard skip)", flush=True)
    return collectively(lambda: data.without(reasons), groups.world)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The dtypes that ``--precision`` means on ``device``."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return PRECISIONS[name]


def accumulation_for(config: RunConfig, data_parallel: int, saved: dict[str, Any] | None) -> int:
    """Micro-batches per step: the flag's, or what keeps the saved run's global batch in a new layout.

    The flags mean the same run when their product with this layout, or with the run's first, is its batch.

    Raises:
        ArgonneError: the global batch cannot be kept, or is asked to be another.
    """
    micro, asked = config.training.initial_batch_size, config.training.gradient_accumulation_steps
    if saved is None:
        return asked
    kept = saved["global_batch"]
    if kept not in (micro * asked * data_parallel, micro * asked * saved["first_layout"].get("data", 1)):
        raise ArgonneError(
            f"global batch {micro * asked * data_parallel} (initial_batch_size={micro} x gradient_accumulation_steps="
            f"{asked} x data_parallel={data_parallel}) is not the run's {kept}; legal: a product of {kept}"
        )
    return accumulation_that_keeps(kept, micro, data_parallel)


def accumulation_that_keeps(global_batch: int, micro: int, data_parallel: int) -> int:
    """Micro-batches per step that make ``global_batch``. Raises ``ArgonneError`` when none do."""
    if global_batch % (micro * data_parallel):
        raise ArgonneError(
            f"micro-batch {micro} x data_parallel={data_parallel} does not divide the run's global batch of "
            f"{global_batch}; legal: a product that does (resume.py may change the batch: say "
            "--gradient-accumulation-steps too)"
        )
    return global_batch // (micro * data_parallel)


def _model(config: RunConfig, tokenizer_size: int) -> ArgonneConfig:
    model = config.model.resolve(config.data.block_size)
    if config.data.tokenizer_path is None and config.model.vocab_size is None:
        return replace(model, vocab_size=tokenizer_size)
    if model.vocab_size < tokenizer_size:
        raise ArgonneError(
            f"vocab_size={model.vocab_size} is less than the tokenizer's {tokenizer_size}; "
            f"legal: --vocab-size {tokenizer_size} or more"
        )
    return model


def _tokenizer(source: Path, trust_remote_code: bool, compare: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory. A checkpoint's is what it was before the run's boundary tokens were its own."""
    own = load_trainer(source).get("special_tokens") if (source / TRAINER).exists() else None
    return load_tokenizer(source, trust_remote_code, own, compare)


def _token_count(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id: some tokenizers leave ids out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def _check_output(path: Path) -> None:
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ArgonneError(f"output_dir={str(path)!r} cannot be made: {str(existing)!r} is not a directory")
    if not os.access(existing, os.W_OK):
        raise ArgonneError(f"output_dir={str(path)!r} cannot be written; legal: a directory that this user may write")
