"""The model of every Llama-type family: one definition, dense in one process and sharded over any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from argonne.models.activations import DecoderWidths
from argonne.models.cache import CacheShape
from argonne.models.config import ArgonneConfig
from argonne.models.contract import SpecialTokens
from argonne.models.decoder import Block, RMSNorm, RotaryTables
from argonne.models.execution import Execution
from argonne.models.families import family_of, to_huggingface
from argonne.models.staged import StagedModel
from argonne.models.stages import Span, Stage, of_vocabulary
from argonne.parallel import VocabParallelEmbedding, VocabParallelHead


class Decoder(nn.Module):
    """What this rank holds of the model but an untied head, under Hugging Face's names; ``Stage`` computes with it."""

    def __init__(self, config: ArgonneConfig, execution: Execution, spans: Sequence[Span]) -> None:
        super().__init__()
        self.embed_tokens = self.norm = None
        if any(span.has_embedding(config.tie_word_embeddings) for span in spans):
            self.embed_tokens = of_vocabulary(VocabParallelEmbedding, config, execution)
        self.layers = nn.ModuleDict({str(n): Block(config, execution) for span in spans for n in span.layers})
        if any(span.is_last for span in spans):
            self.norm = RMSNorm(config, execution)

    def block(self, number: int) -> Block:
        """The block of that number, which this rank holds."""
        block = self.layers[str(number)]
        assert isinstance(block, Block)
        return block


class ArgonneModel(StagedModel):
    """A causal language model of rotary positions and SwiGLU: Argonne 2.x, and every Llama.

    Construct it under ``with torch.device(...)``: the parameters are empty there until ``initialise`` or a
    checkpoint fills them, and cost nothing on ``meta``.

    Raises:
        ArgonneError: the shape is none of its family's, which could not be saved.
        LayoutError: it cannot be shared out as the layout and the plan ask.
    """

    config: ArgonneConfig

    def __init__(self, config: ArgonneConfig, execution: Execution) -> None:
        family_of(config.family).check(config)
        super().__init__(config, execution)
        spans = list(self.spans.values())
        self.model = Decoder(config, execution, spans)
        self.lm_head = None
        if any(span.is_last for span in spans) and not config.tie_word_embeddings:
            self.lm_head = of_vocabulary(VocabParallelHead, config, execution)
        if self.model.embed_tokens is not None and config.tie_word_embeddings and self.groups.reproducible:
            self.model.embed_tokens.separate_lookup()
        self.rotary = RotaryTables(config, execution)
        self._stages = {number: self._stage(span) for number, span in self.spans.items()}

    def _stage(self, span: Span) -> Stage:
        tied = self.config.tie_word_embeddings
        return Stage(
            span,
            self.execution,
            self.rotary,
            self.model.embed_tokens if span.has_embedding(tied) else None,
            [self.model.block(number) for number in span.layers],
            self.model.norm if span.is_last else None,
            self.lm_head if span.is_last else None,
        )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.layers.values())

    @property
    def widths(self) -> DecoderWidths:
        """Of this rank's blocks, which are alike."""
        config, block = self.config, self.model.block(self.layers[0])
        attention = block.self_attn
        query, key, _ = attention.qkv_proj.splits
        copied = 0 if attention.is_grouped else query
        if attention.blocks_of_head > 1:
            copied = attention.axis.own_blocks * config.head_dim
        return DecoderWidths(
            config.hidden_size,
            query,
            key,
            query // config.head_dim,
            attention.key_value_heads,
            block.mlp.down_proj.weight.shape[1],
            copied,
            not attention.is_grouped,
            config.qk_norm,
            block.mlp.is_pinned,
        )

    def cache_shape(self) -> CacheShape:
        """The key-value heads of this rank's blocks."""
        heads = self.model.block(self.layers[0]).self_attn.key_value_heads
        return CacheShape(
            self.layers, heads, self.config.head_dim, self.execution.precision.compute, self.groups.device
        )

    def config_json(self, longest_sequence: int, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
        """The ``config.json`` with which ``transformers`` opens the weights as their family's class."""
        return to_huggingface(replace(self.config, max_position_embeddings=longest_sequence), special_tokens, dtype)
