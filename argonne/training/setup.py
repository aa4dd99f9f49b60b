"""Everything that is settled before the first step: what the flags, the data and the tokenizer make together."""

from __future__ import annotations

import dataclasses
import os
from collections import ChainMap
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

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
from argonne.parallel.collectives import collectively, gather_objects
from argonne.parallel.data_parallel import check_shard
from argonne.parallel.errors import ArgonneError
from argonne.parallel.layout import require_divisible
from argonne.training.config import RunConfig
from argonne.training.corpora import Corpora
from argonne.training.kept_tokenizer import train_kept_tokenizer
from argonne.training.run_directory import read_run, require_same, schedule_identity
from argonne.training.token_caches import token_caches

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


def check(config: RunConfig, world_size: int) -> None:
    """Refuse what can be refused without peers: flags, layout, shape, data files, tokenizer path.

    Raises:
        ArgonneError: in one line, what is wrong.
    """
    config.check()
    layout = config.parallel.layout(world_size)
    check_kernels(config.training.kernels, choose_device(config.parallel.device), config.training.precision)
    model = config.model.resolve(config.data.block_size)
    model.check_layout(layout)
    plan = config.parallel.plan(layout)
    plan.check_layers(model.num_hidden_layers)
    check_kind(config.parallel.kind, plan.schedule if layout.pipeline > 1 else "")
    check_shard(config.parallel.kind, config.parallel.fsdp_shard, layout.data * layout.context)
    if not (config.run.output_dir / "run.json").exists():  # a run that is continued keeps its global batch
        plan.check_micro_batches(config.training.gradient_accumulation_steps)
    check_sequence(config.data.block_size, layout)
    path = config.data.tokenizer_path
    if path is not None and not path.is_dir():
        raise DataError(
            f"tokenizer_path={str(path)!r} does not exist; legal: the directory of a Hugging Face tokenizer"
        )
    saved = read_run(config.run.output_dir)
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
    kept_tokenizer: Path | None = None,
) -> Workload:
    """Settle the workload (collective).

    Args:
        config: the flags.
        groups: the processes.
        saved: the identity of the run that is continued, if one is; anything else is refused.
        fixed: the parts of it in which anything else is refused; all of them when left out.
        kept_tokenizer: the tokenizer that the run already has, used when the flags name none.

    Raises:
        ArgonneError: on every rank, what is wrong.
    """
    directory = config.run.output_dir
    data = open_corpora(config, groups, saved)
    identity: dict[str, Any] = {
        "data": data.identity,
        "seed": config.training.seed,
        "schedule": schedule_identity(config),
    }

    def compare() -> list[str]:
        if saved is None:
            return []
        names = [name for name in identity if fixed is None or name in fixed]
        wanted = {name: identity[name] for name in names}
        return require_same({n: saved.get(n) for n in names}, wanted, directory, config.data.accept_data_change)

    compare()  # before a tokenizer is trained into another run's directory

    def find_tokenizer() -> Path:
        if config.data.tokenizer_path is not None:
            return config.data.tokenizer_path
        if kept_tokenizer is not None:
            return kept_tokenizer
        if groups.is_first:
            train_kept_tokenizer(data.shards, directory / "tokenizer", config.data.on_bad_shard)
        return directory / "tokenizer"

    source = collectively(find_tokenizer, groups.world)
    reads_data = groups.model.rank == 0
    tokenizer = collectively(
        lambda: load_tokenizer(source, config.data.trust_remote_code) if reads_data else None, groups.world
    )
    boundary = None
    if config.data.add_document_boundary_tokens:
        boundary = collectively(lambda: boundary_tokens(tokenizer) if tokenizer else None, groups.world)

    if not config.data.streaming:
        data = data.with_caches(token_caches(data, tokenizer, boundary, directory / "token_cache", groups))

    def enough() -> None:
        if groups.is_first:
            assert tokenizer is not None
            data.check_block_size(tokenizer, boundary)

    collectively(enough, groups.world)
    told = ("", 0)
    if groups.is_first:
        assert tokenizer is not None
        told = (tokenizer_fingerprint(tokenizer), _token_count(tokenizer))
    tokenizer_hash, tokenizer_size = gather_objects(told, groups.world)[0]
    model = _model(config, tokenizer_size)
    identity |= {
        "model": dataclasses.asdict(model),
        "tokenizer": {"fingerprint": tokenizer_hash, "size": tokenizer_size},
    }
    accepted = compare()
    if groups.is_first:
        for line in accepted:
            print(f"accepted from here on: {line}")
        sharing = ranks_per_lane(data.lanes, groups.data.size)
        if sharing > 1 and config.data.streaming:
            print(
                f"data_parallel={groups.data.size} does not divide the {data.lanes} lanes: each is tokenised by "
                f"{sharing} ranks, which take its samples in turn"
            )
    precision = resolve_precision(config.training.precision, groups.device)
    return Workload(model, precision, data, tokenizer, boundary, identity)


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
    if kept not in (micro * asked * data_parallel, micro * asked * saved["first_layout"]["data"]):
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
