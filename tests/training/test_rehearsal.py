"""A rehearsal that is computed counts what one without numbers does, of every option; and a bound is more than both."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from argonne.models import Execution
from argonne.parallel import Layout, ProcessGroups
from argonne.training.config import RunConfig
from argonne.training.run import rehearsal, rough
from argonne.training.run.rehearsal import Rehearsed, rehearse
from argonne.training.run.reproducible import blocks_of
from argonne.training.run.rough import Rough
from argonne.training.run.setup import prepare
from argonne.training.state import TrainingState
from tests.pool import RankPool
from tests.training.searching import require_alike
from tests.training.small_run import small_run

SIZE = 4
MODELS: dict[str, dict[str, Any]] = {
    "demo": {},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"family": "qwen3", "head_dim": 6},
    "mistral": {"family": "mistral", "num_hidden_layers": 2},
    "biases": {"family": "llama", "attention_bias": True},
    "argonne-1.0": {"preset": "argonne-1.0", "num_hidden_layers": 3, "dropout": 0.1, "num_key_value_heads": None},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing recomputed": {"recompute": "none"},
    "selective": {"recompute": "selective", "precision": "bf16"},
    "every second": {"recompute": "2", "gradient_accumulation_steps": 1},
    "muon": {"optimizer": "muon", "precision": "bf16"},
    "losses": {"z_loss": 0.1, "label_smoothing": 0.1, "precision": "fp64"},
    "documents": {"document_mask": True, "block_size": 40},
    "same bits": {"reproducible": True, "gradient_accumulation_steps": 4},
}
PAIRS = [
    (model, options) for model in MODELS for options in OPTIONS if (model, options) != ("argonne-1.0", "same bits")
]
CASES = [
    pytest.param(*pair, marks=() if number % 3 == 1 else pytest.mark.exhaustive) for number, pair in enumerate(PAIRS)
]
"""Of these every third always: each model and each option at least once."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("rehearsal"))


def with_flags(config: RunConfig, **flags: Any) -> RunConfig:
    """The flags with others, each in the group that has it."""
    for group in ("model", "data", "training", "parallel"):
        of_group = getattr(config, group)
        changed = {name: flags.pop(name) for name in list(flags) if hasattr(of_group, name)}
        config = replace(config, **{group: replace(of_group, **changed)})
    assert not flags, "no group has them"
    return config


@pytest.mark.parametrize(("model", "options"), CASES)
@pytest.mark.filterwarnings("error")
def test_what_is_counted_does_not_depend_on_numbers(small: RunConfig, model: str, options: str) -> None:
    config, groups = with_flags(small, **MODELS[model], **OPTIONS[options]), ProcessGroups.single()
    if config.parallel.reproducible:
        groups = groups.in_blocks(1)
    workload = prepare(config, groups)
    computed = rehearse(config, workload, groups, SIZE, math.inf, computes=True)
    assert computed == rehearse(config, workload, groups, SIZE, math.inf)
    assert 0 < computed.state < computed.needs < Rough.of(config, workload, groups, SIZE).most
    assert not rehearse(config, workload, groups, SIZE, computed.needs - 1, computes=True).fits
    assert rehearse(config, workload, groups, SIZE, computed.needs, computes=True).fits


def test_what_was_rehearsed_is_freed(small: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is in cycles of references; what was there before is collected as ever."""
    made: list[weakref.ref[Any]] = []

    class Remembered(TrainingState):
        @classmethod
        def build(cls, *arguments: Any) -> Any:
            state = TrainingState.build(*arguments)
            made.append(weakref.ref(state.model))
            vars(state.model)["cycle"] = state.model
            return state

    monkeypatch.setattr(rehearsal, "TrainingState", Remembered)
    groups = ProcessGroups.single()
    workload = prepare(small, groups)
    for limit, computes in ((None, True), (math.inf, True), (math.inf, False), (3e5, True)):
        rehearse(small, workload, groups, SIZE, limit, computes)
        assert made.pop()() is None
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("size", [1, 512], ids=["weights", "tokens"])
@pytest.mark.parametrize("options", ["nothing recomputed", "same bits"])
def test_a_bound_is_one_where_nearly_all_is_of_weights_and_where_it_is_of_tokens(
    small: RunConfig, options: str, size: int
) -> None:
    vocabulary = 20_000 if size == 1 else 400
    flags = {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    config, groups = with_flags(small, **flags, **OPTIONS[options]), ProcessGroups.single()
    groups = groups.in_blocks(1) if config.parallel.reproducible else groups
    workload = prepare(config, groups)
    needs = rehearse(config, workload, groups, size, math.inf, computes=True).needs
    assert needs < Rough.of(config, workload, groups, size).most / 1.5


def test_a_step_of_few_operations_is_computed(small: RunConfig) -> None:
    """As many as this process computes while others would be followed without numbers: its own, of two ranks half."""
    groups, config = ProcessGroups.single(), with_flags(small, num_hidden_layers=3)
    workload = prepare(config, groups)

    def is_quick(size: int, groups: ProcessGroups = groups) -> bool:
        return Rough.of(config, workload, groups, size).is_quick

    with torch.device("meta"):
        model = workload.model.build(Execution(groups, workload.precision))
    of_sequence = model.flops_per_token(16) * 16 * 2  # micro-batches
    tensors = len(model.sharded_parameters())
    allowed = torch.get_num_threads() * (rough.WITHOUT_NUMBERS + rough.EACH_WITHOUT_NUMBERS * tensors)
    most = int(allowed // of_sequence)
    assert is_quick(most)
    assert not is_quick(most + 1)
    for layout in (Layout(tensor=2), Layout(context=2)):
        half = ProcessGroups.of_rank(layout, 1)
        assert is_quick(2 * most, half)
        assert not is_quick(2 * most + 2, half)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel": 2},
    "sequence": {"tensor_parallel": 2, "sequence_parallel": True},
    "gpipe": {"pipeline_parallel": 2, "pipeline_schedule": "gpipe"},
    "1f1b": {"pipeline_parallel": 2},
    "interleaved": {"pipeline_parallel": 2, "pipeline_schedule": "interleaved"},
    "zero bubble": {"pipeline_parallel": 2, "pipeline_schedule": "zb"},
    "context": {"context_parallel": 2},
    "fsdp": {"data_parallel": 2, "fsdp": True},
    "zero1": {"data_parallel": 2, "zero1": True},
    "hybrid": {"data_parallel": 4, "fsdp": True, "fsdp_shard": 2},
    "tensor, pipeline": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "tensor, fsdp": {"tensor_parallel": 2, "data_parallel": 2, "fsdp": True},
    "context, fsdp": {"context_parallel": 2, "data_parallel": 2, "fsdp": True},
    "pipeline, zero1": {"pipeline_parallel": 2, "data_parallel": 2, "zero1": True},
}
IN_LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"family": "qwen3", "head_dim": 6},
    "muon": {"optimizer": "muon", "recompute": "selective"},
    "documents": {"document_mask": True, "precision": "bf16", "z_loss": 0.1},
    "same bits": {"reproducible": True, "reproducible_blocks": 2, "family": "qwen2"},
}
REFUSED = {("context", "same bits"), ("context, fsdp", "same bits"), ("hybrid", "same bits")}
OFFERED = [pair for pair in itertools.product(LAYOUTS, IN_LAYOUTS) if pair not in REFUSED]


def both_ways(groups: ProcessGroups, config: RunConfig) -> tuple[Rehearsed, Rehearsed]:
    """What a rank counts with numbers and without."""
    blocks = blocks_of(config)
    groups = groups if blocks is None else groups.in_blocks(blocks)
    workload = prepare(config, groups)
    computed, followed = (rehearse(config, workload, groups, SIZE, math.inf, computes) for computes in (True, False))
    assert computed.needs < Rough.of(config, workload, groups, SIZE).most
    return computed, followed


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layout", "options"), OFFERED)
def test_nor_does_it_in_any_layout(ranks: RankPool, small: RunConfig, layout: str, options: str) -> None:
    flags = {"num_hidden_layers": 4, "num_key_value_heads": 2, "gradient_accumulation_steps": 4}
    config = with_flags(small, **flags, **IN_LAYOUTS[options], **LAYOUTS[layout])
    size = math.prod(
        value for name, value in LAYOUTS[layout].items() if name.endswith("_parallel") and value is not True
    )
    for computed, followed in ranks.run(config.parallel.layout(size), both_ways, config):
        require_alike(computed, followed)
