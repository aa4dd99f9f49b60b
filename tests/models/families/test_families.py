"""Every family computes what ``transformers`` does, at any number of ranks, and is saved as what it was."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoModelForCausalLM

from argonne.checkpoint.format import step_directory
from argonne.models import from_huggingface
from tests.models.families.cases import Case, cases, computed, expected, make
from tests.pool import RankPool
from tests.whole import assemble, assert_close

EXAMPLES = [8, pytest.param(150, marks=pytest.mark.exhaustive)]
OF_THE_LIBRARY = {"transformers_version", "_name_or_path"}


def compare(ranks: RankPool, case: Case) -> None:
    with TemporaryDirectory() as name:
        opened, saved = Path(name) / "opened", Path(name) / "saved"
        make(case, opened)
        logits, weights, gradients, config = expected(opened, case.ids())
        results = ranks.run(case.layout, computed, case, opened, saved)
        found = torch.cat([own for own, *_ in results], dim=-1)
        assert_close(found, logits, 1e-9, f"{case}: logits")
        own_weights, own_gradients = (assemble(each) for each in zip(*(parts for _, *parts in results), strict=True))
        assert own_gradients.keys() == gradients.keys()
        size = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
        for tensor, gradient in gradients.items():
            # Some gradients are zero but for rounding (a key's bias: it is the same for all that a query sees).
            assert_close(own_gradients[tensor], gradient, 1e-9, f"{case}: gradient of {tensor}", 1e-4 * size)
            assert torch.equal(own_weights[tensor], weights[tensor]), f"{case}: {tensor}"
        again = step_directory(saved, 1)
        reopened = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float64)
        assert type(reopened).__name__ == config.architectures[0]
        state = reopened.state_dict()
        for tensor, weight in weights.items():
            assert torch.equal(state[tensor], weight), f"{case}: {tensor} when saved"
        before, after = (
            {k: v for k, v in c.to_dict().items() if k not in OF_THE_LIBRARY} for c in (config, reopened.config)
        )
        assert after == before, f"{case}: config.json"
        assert from_huggingface(again) == from_huggingface(opened)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_logits_and_every_gradient_are_those_of_transformers_and_saving_gives_the_model_back(
    ranks: RankPool, size: int, examples: int
) -> None:
    @given(cases(size))
    @settings(max_examples=examples)
    def claim(case: Case) -> None:
        compare(ranks, case)

    claim()
