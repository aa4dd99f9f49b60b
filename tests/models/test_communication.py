"""What a training step sends, in closed form: every collective, its bytes, its module, and nothing left over."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings

from argonne.parallel import Precision
from argonne.parallel.communication.layout import Layout
from argonne.parallel.communication.recording import Collective
from tests.models.closed_form import Step, column_weights, counted, run, steps, tiny
from tests.parallel.recorded import ProductStarts
from tests.pool import RankPool


@pytest.mark.parametrize("size", [2, 4], scope="module")
def test_a_block_sends_two_all_reduces_of_its_activation_forward_and_two_backward(ranks: RankPool, size: int) -> None:
    @given(steps(Layout(tensor=size)))
    @settings(max_examples=10)
    def claim(step: Step) -> None:
        n = step.batch * step.sequence * step.config.hidden_size * step.precision.compute.itemsize
        for rank, (log, *_) in enumerate(ranks.run(step.layout, run, step)):
            for layer in range(step.config.num_hidden_layers):
                block = f"model.layers.{layer}"
                where = f"rank {rank}, {block}"
                again = int(step.recompute.is_full(layer))  # the second all-reduce is not needed to go backward
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
        for rank, (log, *_) in enumerate(ranks.run(step.layout, run, step)):
            for layer in range(step.config.num_hidden_layers):
                block = f"model.layers.{layer}"
                again = int(step.recompute.is_full(layer))  # the second reduce-scatter is not needed to go backward
                expected = {
                    ("forward", "all_gather", False): 2 + 2 * again,
                    ("forward", "reduce_scatter", False): 2 + again,
                    ("backward", "all_gather", False): 2,  # the duals of the reduce-scatters
                    ("backward", "reduce_scatter", True): 2,  # the duals of the all-gathers
                    ("backward", "all_gather", True): 2,  # the inputs again
                }
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


def beside(products: ProductStarts, entry: Collective) -> list[tuple[int, ...]]:
    """The sorted shapes of the products that began meanwhile: a weight's gradient may be made transposed."""
    return [tuple(sorted(shape)) for shape in products.within(entry)]


def either_way_round(weights: dict[str, tuple[int, int]]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(sorted(weight))) for name, weight in weights.items()}


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
        assert {(c.module, *beside(products, c)) for c in in_flight} == either_way_round(column_weights(step))


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
        assert {(c.module, *beside(products, c)) for c in scatters} == either_way_round(weights)
