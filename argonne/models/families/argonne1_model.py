"""The Argonne 1.x model: dense in one process and sharded over every axis but context, pipelines included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from argonne.models.activations import Argonne1Widths
from argonne.models.cache import CacheShape
from argonne.models.contract import Batch, LossFunction, SpecialTokens
from argonne.models.execution import Execution
from argonne.models.families.argonne1 import ARGONNE1, DROPOUTS, Argonne1Config, require_not_reproducible
from argonne.models.families.argonne1_layers import Block, BlockInputs, LayerNorm, Places, PositionEmbedding
from argonne.models.staged import StagedModel
from argonne.models.stages import Span, Stage, of_vocabulary
from argonne.parallel import ArgonneError, Dropout, VocabParallelEmbedding, VocabParallelHead


class Transformer(nn.Module):
    """What this rank holds of the model but an untied head, under the names of ``GPT2LMHeadModel``."""

    def __init__(self, config: Argonne1Config, execution: Execution, spans: Sequence[Span]) -> None:
        super().__init__()
        self.wte = self.wpe = self.ln_f = None
        if any(span.has_embedding(config.tie_word_embeddings) for span in spans):
            self.wte = of_vocabulary(VocabParallelEmbedding, config, execution)
        if any(span.is_first for span in spans):
            self.wpe = PositionEmbedding(config, execution)
        held = [number for span in spans for number in span.layers]
        self.h = nn.ModuleDict({str(n): Block(config, execution, f"transformer.h.{n}") for n in held})
        if any(span.is_last for span in spans):
            self.ln_f = LayerNorm(config, execution)


class Argonne1Stage(Stage):
    """A stage that may begin with learned positions, as ``Stage`` of the arguments but for the last two."""

    def __init__(self, *arguments: Any, wpe: PositionEmbedding | None, dropout: float) -> None:
        super().__init__(*arguments)
        self.wpe, self.drop = wpe, Dropout(dropout, "transformer.drop")

    def embed(self, ids: Tensor, inputs: BlockInputs) -> Tensor:
        """Vectors of tokens and positions."""
        assert self.wpe is not None
        dropped: Tensor = self.drop(super().embed(ids, inputs) + self.wpe(len(ids), inputs), inputs.rows)
        return dropped


class Argonne1Model(StagedModel):
    """A causal language model of learned positions, LayerNorm, GELU, biases and dropout: Argonne 1.x, and every GPT-2.

    In training it drops what ``Batch.draws`` decide; where nothing is trained, nothing. Construct it as
    ``ArgonneModel``.

    Raises:
        LayoutError: the shape cannot be shared out as the layout and the plan ask.
        ArgonneError: the execution is reproducible, which needs layers that this model does not have.
    """

    config: Argonne1Config

    def __init__(self, config: Argonne1Config, execution: Execution) -> None:
        super().__init__(config, execution)
        if self.groups.reproducible:
            require_not_reproducible()
        spans = list(self.spans.values())
        self.transformer = Transformer(config, execution, spans)
        self.lm_head = None
        if any(span.is_last for span in spans) and not config.tie_word_embeddings:
            self.lm_head = of_vocabulary(VocabParallelHead, config, execution)
        self._stages = {number: self._stage(span) for number, span in self.spans.items()}

    def _stage(self, span: Span) -> Stage:
        transformer, tied = self.transformer, self.config.tie_word_embeddings
        return Argonne1Stage(
            span,
            self.execution,
            Places(self.groups),
            transformer.wte if span.has_embedding(tied) else None,
            [transformer.h[str(number)] for number in span.layers],
            transformer.ln_f if span.is_last else None,
            self.lm_head if span.is_last else None,
            wpe=transformer.wpe if span.is_first else None,
            dropout=self.config.embedding_dropout,
        )

    @property
    def widths(self) -> Argonne1Widths | None:
        """Of this rank's blocks, which are alike; None where attention drops."""
        config, block = self.config, next(iter(self.transformer.h.values()))
        assert isinstance(block, Block)
        if config.attention_dropout:
            return None
        query, feed_forward = block.attn.c_attn.splits[0], block.mlp.c_proj.weight.shape[1]
        return Argonne1Widths(
            config.hidden_size, query, len(block.attn.heads), feed_forward, bool(config.residual_dropout)
        )

    def cache_shape(self) -> CacheShape:
        """The heads of this rank's blocks."""
        block = self.transformer.h[str(self.layers[0])]
        assert isinstance(block, Block)
        heads, compute = len(block.attn.heads), self.execution.precision.compute
        return CacheShape(self.layers, heads, self.config.head_dim, compute, self.groups.device)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.h.values())

    def given(self, batch: Batch) -> dict[str, Any]:
        """With what decides which elements are dropped, where some are."""
        if batch.draws is None or not self.config.drops:
            return super().given(batch)
        return super().given(batch) | {"samples": batch.draws.samples.flatten(), "key": batch.draws.key}

    def forward_backward(self, batch: Batch, loss: LossFunction) -> Tensor:
        """As of ``LanguageModel``. Raises ``ArgonneError`` when it is to drop and is not told what to."""
        if self.config.drops and batch.draws is None:
            told = ", ".join(f"{field}={getattr(self.config, field)}" for field in DROPOUTS)
            raise ArgonneError(f"draws=None of a batch does not say what {told} drop; legal: Draws, or no dropout")
        return super().forward_backward(batch, loss)

    def config_json(self, longest_sequence: int, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
        """The ``config.json`` of GPT-2. Its positions are those that there are weights of, trained or not."""
        return ARGONNE1.write(self.config, special_tokens, dtype)
