"""What a training step of the Argonne model sends, in closed form, and what one is recorded to send."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution
from argonne.models.families import decoder_family
from argonne.models.recompute import Recompute
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
    recompute: Recompute = Recompute.NONE

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def activation(self) -> int:
        """Bytes of one tensor ``[batch, sequence, hidden]``."""
        return self.tokens * self.config.hidden_size * self.precision.compute.itemsize

    def sent_by_block(self, layer: int) -> Sent:
        """Those of one transformer block: its attention and its feed-forward are one column, one row layer each."""
        name = f"model.layers.{layer}"
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
        if self.recompute.is_full(layer):  # all of the forward again but for the last: its result is saved by no one
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
            partial += ((2 + config.output_bias) * config.num_hidden_layers + 1) * config.hidden_size
        if config.qk_norm:  # and of its own heads, with one weight for all
            partial += 2 * config.num_hidden_layers * config.head_dim
        if config.num_key_value_heads % ranks:  # a rank has seen some of the queries of a head that it shares
            key_value = config.num_key_value_heads * config.head_dim
            partial += 2 * config.num_hidden_layers * (config.hidden_size + config.attention_bias) * key_value
        if partial:
            sent["", "outside", "all_reduce", "tensor", False, partial * itemsize] += 1
        sent["", "outside", "all_reduce", "world", False, 8] += 1
        return sent

    def sent(self, local_parameters: list[int]) -> Sent:
        total = self.sent_by_embedding() + self.sent_by_head_and_loss() + self.sent_after_backward(local_parameters)
        for layer in range(self.config.num_hidden_layers):
            total += self.sent_by_block(layer)
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
RECOMPUTATIONS = [Recompute.of(word) for word in ("none", "full", "selective", "2")]
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
    family, biased = draw(st.sampled_from([("llama", False), ("llama", True), ("qwen2", True), ("qwen3", True)]))
    config = replace(config, **decoder_family(family).features(biased))
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
        draw(st.sampled_from(RECOMPUTATIONS)),
    )


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
