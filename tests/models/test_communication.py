"""What a training step sends, in closed form: every collective, its bytes, its module, and nothing left over."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution
from argonne.parallel import (
    Log,
    Objective,
    Precision,
    ProcessGroups,
    complete_gradients,
    global_gradient_norm,
    record,
    vocab_parallel_cross_entropy,
)
from argonne.parallel.communication.layout import Layout
from argonne.parallel.tensor_parallel.embedding import VocabularyRange
from tests.parallel.recorded import ProductStarts
from tests.pool import RankPool

Sent = Counter[tuple[str, str, str, str, bool, int]]
"""How often: module, phase, op, axis, whether other work may run beside it, bytes."""


@dataclass(frozen=True)
class Step:
    """One training step of one shape."""

    config: ArgonneConfig
    layout: Layout
    batch: int
    sequence: int
    precision: Precision
    reduction: Literal["sum", "none", "logits"] = "sum"
    """Of the fused loss; ``logits``: the head and the loss apart, with all the logits between them."""
    label_smoothing: float = 0.0
    recompute: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def activation(self) -> int:
        """Bytes of one tensor ``[batch, sequence, hidden]``."""
        return self.tokens * self.config.hidden_size * self.precision.compute.itemsize

    def sent_by_block(self, name: str) -> Sent:
        """Those of one transformer block: its attention and its feed-forward are one column, one row layer each."""
        column = [f"{name}.self_attn.qkv_proj", f"{name}.mlp.gate_up_proj"]
        row = [f"{name}.self_attn.o_proj", f"{name}.mlp.down_proj"]
        n, axis = self.activation, "tensor"
        sent: Sent = Counter()
        for entry, leaving in zip(column, row, strict=True):
            if self.layout.sequence_parallel:
                sent[entry, "forward", "all_gather", axis, False, n] += 1
                sent[leaving, "forward", "reduce_scatter", axis, False, n] += 1
                sent[leaving, "backward", "all_gather", axis, False, n] += 1
                sent[entry, "backward", "all_gather", axis, True, n] += 1  # only a share was kept
                sent[entry, "backward", "reduce_scatter", axis, True, n] += 1
            else:
                sent[leaving, "forward", "all_reduce", axis, False, n] += 1
                sent[entry, "backward", "all_reduce", axis, True, n] += 1
        if self.recompute:  # all of the forward again but for the last: its result is saved by no one
            again = {key: count for key, count in sent.items() if key[1] == "forward" and key[0] != row[-1]}
            sent.update(again)
        return sent

    def sent_by_embedding(self) -> Sent:
        name, n = "model.embed_tokens", self.activation
        if not self.layout.sequence_parallel:
            return Counter({(name, "forward", "all_reduce", "tensor", False, n): 1})
        return Counter(
            {
                (name, "forward", "reduce_scatter", "tensor", False, n): 1,
                (name, "backward", "all_gather", "tensor", False, n): 1,
            }
        )

    def sent_by_head_and_loss(self) -> Sent:
        """The head's input and its gradient, and 3 statistics of each token (4 with label smoothing) from each rank.

        They belong to no module: logits and loss are functions of what the model's call returns.
        """
        apart, n = self.reduction == "logits", self.activation
        sent: Sent = Counter()
        if self.layout.sequence_parallel:
            sent["", "outside", "all_gather", "tensor", False, n] += 1
            sent["", "backward", "reduce_scatter", "tensor", apart, n] += 1
            if apart:
                sent["", "backward", "all_gather", "tensor", True, n] += 1
        else:
            sent["", "backward", "all_reduce", "tensor", apart, n] += 1
        ranks = self.layout.tensor
        each = (4 if self.label_smoothing else 3) * max(4, self.precision.compute.itemsize) * ranks
        rows = VocabularyRange.of_rank(self.config.vocab_size, ranks, 0).rows
        chunk = self.tokens if apart else max(128, (1 << 20) // rows)
        for start in range(0, self.tokens, chunk):
            sent["", "outside", "all_gather", "tensor", False, each * min(chunk, self.tokens - start)] += 1
        return sent

    def sent_after_backward(self, local_parameters: list[int]) -> Sent:
        """Gradients over data, one by one; those known in part over tensor, in one; the norm's one float64."""
        config, ranks = self.config, self.layout.tensor
        itemsize = self.precision.parameters.itemsize
        sent: Sent = Counter()
        if self.layout.data > 1:
            sent.update(
                ("", "outside", "all_reduce", "replicas", False, count * itemsize) for count in local_parameters
            )
        partial = 0
        if self.layout.sequence_parallel:  # each rank has seen its share of the tokens
            partial += (2 * config.num_hidden_layers + 1) * config.hidden_size
        if config.num_key_value_heads % ranks:  # a rank has seen some of the queries of a head that it shares
            key_value = config.num_key_value_heads * config.head_dim
            partial += 2 * config.num_hidden_layers * config.hidden_size * key_value
        if partial:
            sent["", "outside", "all_reduce", "tensor", False, partial * itemsize] += 1
        sent["", "outside", "all_reduce", "world", False, 8] += 1
        return sent

    def sent(self, local_parameters: list[int]) -> Sent:
        total = self.sent_by_embedding() + self.sent_by_head_and_loss() + self.sent_after_backward(local_parameters)
        for layer in range(self.config.num_hidden_layers):
            total += self.sent_by_block(f"model.layers.{layer}")
        return total


def run(groups: ProcessGroups, step: Step) -> tuple[Log, list[int], ProductStarts]:
    """The log of one step, the sizes of this rank's parameters, and the matrix products of the backward."""
    model = ArgonneModel(step.config, Execution(groups, step.precision, recompute=step.recompute))
    model.initialise(seed=0)
    parameters = model.sharded_parameters()
    objective = Objective(label_smoothing=step.label_smoothing)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, step.config.vocab_size, (2, step.batch, step.sequence), generator=generator)
    with record(model) as log, ProductStarts() as products:
        if step.reduction == "logits":
            logits = model.logits(ids[0])
            losses = vocab_parallel_cross_entropy(logits, ids[1], model.head.range, groups.tensor, objective)
        else:
            batch = Batch(ids[0], ids[1])
            loss = CrossEntropyLoss(objective)
            compute = loss if step.reduction == "sum" else loss.of_each_position
            losses = compute(model(batch), model.head, batch)
        products.seen.clear()
        losses.sum().backward()
        complete_gradients(parameters, groups)
        global_gradient_norm(parameters, groups)
    return log, [sharded.parameter.numel() for sharded in parameters], products


def counted(log: Log, module: str | None = None, **fields: object) -> Sent:
    return Counter((c.module, c.phase, c.op, c.axis, c.is_async, c.bytes) for c in log.select(module, **fields))


DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PRECISIONS = [Precision(p, c) for p in DTYPES for c in DTYPES]


def tiny(**changes: Any) -> ArgonneConfig:
    config = ArgonneConfig(
        hidden_size=6,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2,
        vocab_size=30,
        intermediate_size=16,
        max_position_embeddings=160,
    )
    return replace(config, **changes)


@st.composite
def steps(draw: st.DrawFn, layout: Layout, tied: bool | None = None) -> Step:
    config = tiny(
        hidden_size=draw(st.integers(3, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=draw(st.sampled_from([4, 8])),
        num_key_value_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=2 * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(2, 90)),
        intermediate_size=4 * draw(st.integers(1, 9)),
        tie_word_embeddings=draw(st.booleans()) if tied is None else tied,
    )
    batch, sequence = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    if layout.sequence_parallel and batch * sequence % layout.tensor:
        batch = layout.tensor
    return Step(
        config,
        layout,
        batch,
        sequence,
        draw(st.sampled_from(PRECISIONS)),
        draw(st.sampled_from(["sum", "none", "logits"])),
        draw(st.sampled_from([0.0, 0.1])),
        draw(st.booleans()),
    )


@pytest.mark.parametrize("size", [2, 4], scope="module")
def test_a_block_sends_two_all_reduces_of_its_activation_forward_and_two_backward(ranks: RankPool, size: int) -> None:
    @given(steps(Layout(tensor=size)))
    @settings(max_examples=10)
    def claim(step: Step) -> None:
        n = step.batch * step.sequence * step.config.hidden_size * step.precision.compute.itemsize
        again = 1 if step.recompute else 0  # the second all-reduce is not needed to go backward
        for rank, (log, *_) in enumerate(ranks.run(step.layout, run, step)):
            for layer in range(step.config.num_hidden_layers):
                block = f"model.layers.{layer}"
                where = f"rank {rank}, {block}"
                assert {c.op for c in log.select(block)} == {"all_reduce"}, where
                for phase, count in {"forward": 2 + again, "backward": 2}.items():
                    assert [c.bytes for c in log.select(block, phase=phase)] == [n] * count, where
                    assert log.bytes(block, phase=phase) == count * n, where

    claim()


@pytest.mark.parametrize("size", [2, 4], scope="module")
def test_under_sequence_parallelism_a_block_sends_the_same_bytes_and_gathers_its_two_inputs_again(
    ranks: RankPool, size: int
) -> None:
    """Each all-reduce is a reduce-scatter and an all-gather of the same bytes. Of the inputs of its column
    layers a rank keeps its share only (arXiv 2205.05198, section 4.2.2)."""

    @given(steps(Layout(tensor=size, sequence_parallel=True)))
    @settings(max_examples=10)
    def claim(step: Step) -> None:
        n = step.batch * step.sequence * step.config.hidden_size * step.precision.compute.itemsize
        again = 1 if step.recompute else 0  # the second reduce-scatter is not needed to go backward
        expected = {
            ("forward", "all_gather", False): 2 + 2 * again,
            ("forward", "reduce_scatter", False): 2 + again,
            ("backward", "all_gather", False): 2,  # the duals of the reduce-scatters
            ("backward", "reduce_scatter", True): 2,  # the duals of the all-gathers
            ("backward", "all_gather", True): 2,  # the inputs again
        }
        for rank, (log, *_) in enumerate(ranks.run(step.layout, run, step)):
            for layer in range(step.config.num_hidden_layers):
                block = f"model.layers.{layer}"
                found = log.select(block)
                where = f"rank {rank}, {block}"
                assert Counter((c.phase, c.op, c.is_async) for c in found) == Counter(expected), where
                assert {c.bytes for c in found} == {n}, where

    claim()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4], scope="module")
@pytest.mark.parametrize("tied", [True, False])
def test_the_closed_form_accounts_for_the_whole_step_with_nothing_left_over(
    ranks: RankPool, size: int, sequence_parallel: bool, tied: bool
) -> None:
    layout = Layout(tensor=size, sequence_parallel=sequence_parallel)
    # A vocabulary so large that the fused loss goes in three chunks, of 128 tokens and fewer.
    large = tiny(hidden_size=4, num_hidden_layers=1, vocab_size=36_000, tie_word_embeddings=tied)

    @given(steps(layout, tied))
    @example(Step(large, layout, 2, 130, Precision()))
    @example(Step(large, layout, 4, 65, Precision(), "none"))
    @settings(max_examples=8)
    def claim(step: Step) -> None:
        for rank, (log, local_parameters, _) in enumerate(ranks.run(step.layout, run, step)):
            found, expected = counted(log), step.sent(local_parameters)
            assert found == expected, f"rank {rank}: {found - expected} too many, {expected - found} too few"

    claim()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_data_parallelism_adds_one_all_reduce_of_each_gradient_and_nothing_else(
    ranks: RankPool, sequence_parallel: bool
) -> None:
    layout = Layout(data=2, tensor=2, sequence_parallel=sequence_parallel)
    step = Step(tiny(), layout, 2, 5, Precision())
    for log, local_parameters, _ in ranks.run(layout, run, step):
        assert counted(log) == step.sent(local_parameters)
        assert log.bytes(axis="replicas") == 4 * sum(local_parameters)
        assert {c.phase for c in log.select(axis="replicas")} == {"outside"}


def test_under_sequence_parallelism_the_norms_gradients_are_reduced_once_a_step(ranks: RankPool) -> None:
    layout = Layout(tensor=2, sequence_parallel=True)
    for layers in (1, 2, 5):
        config = tiny(hidden_size=8, num_hidden_layers=layers)
        for log, *_ in ranks.run(layout, run, Step(config, layout, 2, 4, Precision())):
            norms, scalar = log.select(phase="outside", op="all_reduce")
            assert norms.shape == ((2 * layers + 1) * 8,)
            assert scalar.shape == ()
            assert log.select("model.norm") == []
            for layer in range(layers):
                for name in ("input_layernorm", "post_attention_layernorm"):
                    assert log.select(f"model.layers.{layer}.{name}") == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", [2, 4], scope="module")
def test_every_column_layer_of_the_model_computes_its_weight_gradient_beside_its_all_reduce(
    ranks: RankPool, size: int, accumulate: bool, tied: bool
) -> None:
    precision = Precision(accumulate_in_product=accumulate)
    step = Step(tiny(tie_word_embeddings=tied), Layout(tensor=size), 2, 5, precision, "logits")
    for log, _, products in ranks.run(step.layout, run, step):
        in_flight = log.select(is_async=True)
        assert {c.op for c in in_flight} == {"all_reduce"}
        found = {(c.module, *products.within(c)) for c in in_flight}
        assert found == {(name, weight) for name, weight in column_weights(step).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("size", [2, 4], scope="module")
def test_under_sequence_parallelism_every_column_layer_of_the_model_hides_both_its_collectives(
    ranks: RankPool, size: int, accumulate: bool, tied: bool
) -> None:
    layout, precision = Layout(tensor=size, sequence_parallel=True), Precision(accumulate_in_product=accumulate)
    step = Step(tiny(tie_word_embeddings=tied), layout, 4, 5, precision, "logits")
    for log, _, products in ranks.run(layout, run, step):
        gathers, scatters = log.select(is_async=True, op="all_gather"), log.select(is_async=True, op="reduce_scatter")
        assert len(gathers) + len(scatters) == len(log.select(is_async=True))
        weights = column_weights(step)
        assert {(c.module, *products.within(c)) for c in gathers} == {(name, (20, 6)) for name in weights}
        assert {(c.module, *products.within(c)) for c in scatters} == set(weights.items())


def column_weights(step: Step) -> dict[str, tuple[int, int]]:
    """Every column-parallel layer with the shape of this rank's weight; the head's calls belong to the model."""
    config, ranks = step.config, step.layout.tensor
    key_value_heads = max(1, config.num_key_value_heads // ranks)
    heads = config.num_attention_heads // ranks + 2 * key_value_heads
    found = {"": (VocabularyRange.of_rank(config.vocab_size, ranks, 0).rows, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        found[f"model.layers.{layer}.self_attn.qkv_proj"] = (heads * config.head_dim, config.hidden_size)
        found[f"model.layers.{layer}.mlp.gate_up_proj"] = (2 * config.intermediate_size // ranks, config.hidden_size)
    return found
