"""Any tensor-parallel layout equals plain dense arithmetic: logits, loss and the gradient of every parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution
from argonne.models.recompute import Recompute
from argonne.parallel import (
    Layout,
    Precision,
    ProcessGroups,
    complete_gradients,
    data_parallel,
    global_gradient_norm,
)
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from tests import dense
from tests.losses import losses, summed_loss
from tests.models.closed_form import RECOMPUTATIONS
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

DOUBLE = Precision(torch.float64, torch.float64)


def perturbed(
    config: ArgonneConfig, groups: ProcessGroups, precision: Precision, recompute: Recompute = Recompute.NONE
) -> ArgonneModel:
    """A model away from its initial symmetry: norm weights that differ, larger matrices."""
    model = ArgonneModel(config, Execution(groups, precision, recompute=recompute))
    model.initialise(seed=3)
    with torch.no_grad():
        for sharded in model.sharded_parameters():
            if sharded.parameter.ndim == 1:
                steps = torch.arange(len(sharded.parameter), dtype=sharded.parameter.dtype)
                sharded.parameter.copy_(1 + 0.3 * torch.sin(steps + len(sharded.name)))
            else:
                sharded.parameter.mul_(1.7)
    return model


def forward_backward(
    groups: ProcessGroups, config: ArgonneConfig, ids: torch.Tensor, recompute: Recompute, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, Parts, Parts, float]:
    model = perturbed(config, groups, DOUBLE, recompute)
    local = model.logits(ids[:, :-1]).detach()
    compute = summed_loss if reduction == "sum" else losses
    loss = compute(model, ids[:, :-1], ids[:, 1:]).sum() / ids[:, 1:].numel()
    loss.backward()
    parameters = model.sharded_parameters()
    complete_gradients(parameters, groups)
    norm = global_gradient_norm(parameters, groups)
    weights = parts_of(model, groups, lambda parameter: parameter)
    gradients = parts_of(model, groups, lambda parameter: parameter.grad)
    return local, loss.detach(), weights, gradients, norm.item()


@st.composite
def shapes(draw: st.DrawFn, ranks: int) -> tuple[ArgonneConfig, Layout, torch.Tensor, Recompute, str]:
    uneven, sequence = draw(st.booleans()), draw(st.booleans())
    kv = draw(st.integers(1, 6))
    fits = (lambda g: ranks <= kv * g <= 12) if uneven else (lambda g: kv * g % ranks == 0 and kv * g <= 24)
    group = draw(st.integers(1, 12).filter(fits))
    config = ArgonneConfig(
        hidden_size=draw(st.integers(5, 33)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=kv * group,
        num_key_value_heads=kv,
        head_dim=2 * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(2, 90)),
        intermediate_size=draw(st.integers(ranks, 9 * ranks)) if uneven else ranks * draw(st.integers(1, 9)),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0])),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=16,
    )
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    if sequence and batch * length % ranks:
        batch = ranks  # any number of tokens that divides will do; it need not be the sequence that does
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, config.vocab_size, (batch, length + 1), generator=generator)
    layout = Layout(tensor=ranks, sequence_parallel=sequence, uneven_shards=uneven)
    return config, layout, ids, draw(st.sampled_from(RECOMPUTATIONS)), draw(st.sampled_from(["sum", "none"]))


@pytest.mark.parametrize("size", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_logits_loss_and_every_gradient_equal_dense_float64(ranks: RankPool, size: int) -> None:
    @given(shapes(size))
    @settings(max_examples=40)
    def claim(drawn: tuple[ArgonneConfig, Layout, torch.Tensor, Recompute, str]) -> None:
        config, layout, ids, recompute, reduction = drawn
        results = ranks.run(layout, forward_backward, config, ids, recompute, reduction)
        weights = assemble(parts for _, _, parts, _, _ in results)
        gradients = assemble(parts for _, _, _, parts, _ in results)
        for value in weights.values():
            value.requires_grad_()
        expected_logits = dense.logits(weights, config, ids[:, :-1])
        expected_loss = dense.loss(weights, config, ids[:, :-1], ids[:, 1:])
        expected_loss.backward()

        found_logits = torch.cat([local for local, *_ in results], dim=-1)
        assert_close(found_logits, expected_logits.detach(), 1e-10, "logits")
        for rank, (_, loss, *_) in enumerate(results):
            assert_close(loss, expected_loss.detach(), 1e-10, f"loss on rank {rank}")
        assert set(gradients) == set(weights)
        magnitude = torch.cat([whole.grad.flatten() for whole in weights.values()]).norm().item()
        for name, whole in weights.items():
            # Some gradients are zero but for rounding (a query's, when all its keys are the same token).
            assert_close(gradients[name], whole.grad, 1e-10, f"gradient of {name}", scale=1e-4 * magnitude)
        for *_, norm in results:
            assert norm == pytest.approx(magnitude, rel=1e-10)

    claim()


def train(
    groups: ProcessGroups, config: ArgonneConfig, steps: int, dtype: torch.dtype
) -> tuple[list[float], Parts, Parts]:
    """A plain training loop from the seed alone; returns the losses, the weights and the first moments."""
    model = ArgonneModel(config, Execution(groups, Precision(dtype, dtype)))
    model.initialise(seed=11)
    parameters = model.sharded_parameters()
    optimizer = build_optimizer(parameters, weight_decay=0.1)
    replicas = data_parallel(model, groups, parameters=parameters)
    learner = Learner(model=model, replicas=replicas, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps):
        ids = torch.randint(0, config.vocab_size, (1, 4, 17), generator=generator) // (1 + step % 3)
        batch = Batch(ids[..., :-1], ids[..., 1:], divisor=4 * 16 * groups.replicas.size)
        found.append(train_step(learner, batch, CrossEntropyLoss(), 3e-3, gradient_clip=1.0).loss)
    moments = parts_of(model, groups, lambda parameter: optimizer.state[parameter]["exp_avg"])
    return found, parts_of(model, groups, lambda parameter: parameter), moments


TRAINED = ArgonneConfig(
    hidden_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    vocab_size=101,
    intermediate_size=68,
    max_position_embeddings=16,
)


@pytest.mark.parametrize("size", [2, 4])
def test_replicated_parameters_stay_bit_identical_for_50_steps(ranks: RankPool, size: int) -> None:
    results = ranks.run(Layout(tensor=size), train, TRAINED, 50, torch.float32)
    # At size 4 the two key-value heads have two holders each; `assemble` compares what is held twice.
    weights = assemble(weights for _, weights, _ in results)
    assemble(moments for _, _, moments in results)
    assert weights["model.norm.weight"].shape == (36,)


@pytest.mark.parametrize("size", [2, 4])
def test_fp32_loss_curves_of_50_steps_agree_from_the_seed_alone(ranks: RankPool, size: int) -> None:
    ((alone, _, _),) = ranks.run(Layout(), train, TRAINED, 50, torch.float32)
    results = ranks.run(Layout(tensor=size), train, TRAINED, 50, torch.float32)
    for found, _, _ in results:
        assert found == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0] - 0.5


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(data=2, tensor=2)])
def test_data_parallel_replicas_stay_bit_identical(ranks: RankPool, layout: Layout) -> None:
    results = ranks.run(layout, train, TRAINED, 5, torch.float32)
    assemble(weights for _, weights, _ in results)


def next_token(groups: ProcessGroups, config: ArgonneConfig, ids: torch.Tensor) -> torch.Tensor:
    return perturbed(config, groups, DOUBLE).next_token_logits(ids)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [5, 97])
def test_gathered_next_token_logits_are_those_of_the_last_position(
    ranks: RankPool, size: int, vocabulary: int, sequence: bool
) -> None:
    # As long as the longest sequence, and no number of tokens that 2 or 4 ranks can share out.
    config = ArgonneConfig(36, 1, 4, 2, vocabulary, intermediate_size=8, head_dim=4, max_position_embeddings=5)
    ids = torch.tensor([[1, 4, 2, 3, 0], [0, 1, 1, 2, 4], [2, 2, 3, 1, 0]])
    padded = torch.nn.functional.pad(ids, (0, 1))
    alone = ranks.run(Layout(), forward_backward, config, padded, Recompute.NONE, "none")[0][0][:, -1]
    for logits in ranks.run(Layout(tensor=size, sequence_parallel=sequence), next_token, config, ids):
        assert_close(logits, alone, 1e-12, "next-token logits")
