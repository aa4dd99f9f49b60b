"""Clipping and AdamW are their formulas: which parameters decay, by which constants, and how far a norm may go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from argonne.checkpoint import reset_moments
from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.parallel import (
    Precision,
    ProcessGroups,
    ShardedParameter,
    clip_gradients,
    global_gradient_norm,
)
from argonne.training.optimizer import BETAS, EPSILON, build_optimizer, set_learning_rate
from tests import dense
from tests.whole import assert_close, parts_of

ALONE = ProcessGroups.single()
DOUBLE = Precision(torch.float64, torch.float64)
CONFIG = ArgonneConfig(10, 1, 2, 1, 13, 6, head_dim=4, tie_word_embeddings=False)
CLIPS = st.sampled_from([1e-3, 1.0, 1e6])
"""All gradients, some, none."""


def model_of(seed: int) -> ArgonneModel:
    """A model with norms too, whose weights are no longer 1: what decays them must show."""
    model = ArgonneModel(CONFIG, Execution(ALONE, DOUBLE))
    model.initialise(seed)
    with torch.no_grad():
        for number, sharded in enumerate(model.sharded_parameters()):
            if sharded.parameter.ndim == 1:
                sharded.parameter.mul_(1.5 + 0.25 * number)
    return model


def wholes(model: ArgonneModel, of: str) -> dict[str, Tensor]:
    """The ``data`` or ``grad`` of the model by the names of whole tensors."""
    return {region.name: part for region, part in parts_of(model, ALONE, lambda parameter: getattr(parameter, of))}


def draw_gradients(parameters: list[ShardedParameter], generator: torch.Generator) -> None:
    """Of sizes from step to step and parameter to parameter, so that one is clipped and another not."""
    for sharded in parameters:
        size = 10.0 ** torch.empty(()).uniform_(-2, 0, generator=generator).item()
        values = torch.randn(sharded.parameter.shape, generator=generator, dtype=torch.float64)
        sharded.parameter.grad = size * values


@given(
    st.integers(0, 10**6),
    CLIPS,
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([1.0, 2.0**16]),
    st.sampled_from([(BETAS, EPSILON), ((0.0, 0.6), 1e-2), ((0.8, 0.0), 3e-5), ((0.99, 0.999), 1e-12)]),
)
def test_steps_equal_the_formula_with_clipping_on_and_off(
    seed: int, clip: float, decay: float, scale: float, adam: tuple[tuple[float, float], float]
) -> None:
    """Also from gradients that are a loss scale too large, as in float16; and with other betas and epsilons."""
    model, generator = model_of(seed), torch.Generator().manual_seed(seed)
    parameters = model.sharded_parameters()
    optimizer = build_optimizer(parameters, decay, *adam)
    reference = dense.Run(wholes(model, "data"))
    for rate in (0.0, 3e-2, 1e-2, 4e-2):
        draw_gradients(parameters, generator)
        gradients = wholes(model, "grad")
        true = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        for sharded in parameters:
            sharded.parameter.grad.mul_(scale)
        norm = global_gradient_norm(parameters, ALONE) / scale
        assert norm.item() == pytest.approx(true.item(), rel=1e-12)
        clip_gradients(parameters, norm, clip, scale)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        factor = min(1.0, clip / (true.item() + 1e-6))
        reference.update({name: factor * gradient for name, gradient in gradients.items()}, rate, decay, *adam)
    for name, weight in wholes(model, "data").items():
        assert_close(weight, reference.weights[name], 1e-12, name)
    for moment, expected in (("exp_avg", reference.first), ("exp_avg_sq", reference.second)):
        for region, part in parts_of(model, ALONE, lambda parameter, moment=moment: optimizer.state[parameter][moment]):
            assert_close(part, expected[region.name], 1e-12, f"{region.name}.{moment}")


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_a_clipped_gradient_has_the_norm_of_the_limit_and_its_own_direction(seed: int, clip: float) -> None:
    model, generator = model_of(seed), torch.Generator().manual_seed(seed)
    parameters = model.sharded_parameters()
    draw_gradients(parameters, generator)
    before = torch.cat([gradient.flatten() for gradient in wholes(model, "grad").values()])
    clip_gradients(parameters, global_gradient_norm(parameters, ALONE), clip)
    after = torch.cat([gradient.flatten() for gradient in wholes(model, "grad").values()])
    norm = before.norm().item()
    # Short of the limit by the 1e-6 that torch.nn.utils.clip_grad_norm_ has beside the norm, too.
    assert after.norm().item() == pytest.approx(min(norm, clip * norm / (norm + 1e-6)), rel=1e-12)
    assert_close(after / after.norm(), before / before.norm(), 1e-12, "direction")


def test_without_a_gradient_matrices_alone_decay() -> None:
    """And nothing at all moves what decays nowhere: a norm keeps its bits."""
    model = model_of(3)
    parameters = model.sharded_parameters()
    optimizer = build_optimizer(parameters, weight_decay=0.5)
    before = wholes(model, "data")
    for sharded in parameters:
        sharded.parameter.grad = torch.zeros_like(sharded.parameter)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    after = wholes(model, "data")
    assert {weight.ndim for weight in before.values()} == {1, 2}
    for name, weight in before.items():
        if weight.ndim == 1:
            assert torch.equal(after[name], weight), name
        else:
            assert_close(after[name], 0.95 * weight, 1e-14, name)


def test_moments_begun_anew_are_those_of_an_optimizer_that_has_taken_so_many_steps() -> None:
    """Zero, and the corrections of their bias by the number of steps: 0 after a reset."""
    for taken in (0, 7):
        model, generator = model_of(1), torch.Generator().manual_seed(2)
        parameters = model.sharded_parameters()
        optimizer = build_optimizer(parameters, weight_decay=0.1)
        draw_gradients(parameters, generator)
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        reset_moments(optimizer, parameters, taken)
        reference = dense.Run(wholes(model, "data"), updates=taken)
        draw_gradients(parameters, generator)
        reference.update(wholes(model, "grad"), 0.01, 0.1)
        optimizer.step()
        for name, weight in wholes(model, "data").items():
            assert_close(weight, reference.weights[name], 1e-13, f"{name} after {taken} steps")
