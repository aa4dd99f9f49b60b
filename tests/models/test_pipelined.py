"""How the model is cut into stages."""

from __future__ import annotations

import pytest

from argonne.models import preset
from argonne.models.stages import cut


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_the_costs_of_stages_are_those_of_their_blocks_the_embedding_and_the_head(stages: int) -> None:
    config = preset("argonne-2.0-2b")
    costs, spans = cut(config, stages)
    attention = config.hidden_size * config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    block = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    head, embedding = config.vocab_size * config.hidden_size / block, 12 * config.hidden_size / block
    for cost, span in zip(costs, spans, strict=True):
        assert cost == pytest.approx(len(span.layers) + head * span.is_last + embedding * span.is_first)
    assert [layer for span in spans for layer in span.layers] == list(range(config.num_hidden_layers))
    assert [span.is_first for span in spans] == [True] + [False] * (stages - 1)
    assert [span.is_last for span in spans] == [False] * (stages - 1) + [True]
    # No stage without the head has more to do than the last: a block moved there would not have helped.
    assert max(costs) <= max(costs[-1], (config.num_hidden_layers + embedding + head) / stages + 1)
