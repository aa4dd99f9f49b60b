"""The Argonne 2.x model: one definition, dense in one process and sharded over any layout."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from argonne.kernels import Backend, linear_cross_entropy
from argonne.models.config import ArgonneConfig
from argonne.models.decoder import Decoder, Span, initial
from argonne.parallel import (
    Objective,
    Precision,
    ProcessGroups,
    ShardedParameter,
    VocabParallelEmbedding,
    VocabParallelHead,
    column_parallel_linear,
    gather_from_sequence_region,
    initialise,
    shard_sequence,
    sharded_parameters,
    vocab_parallel_logits,
)
from argonne.parallel.communication.collectives import all_gather

Reduction = Literal["sum", "none"]


class ArgonneStage(nn.Module):
    """A run of blocks, with the embedding if it is the first and the head if it is the last.

    Construct it under ``with torch.device(...)``: the parameters are empty there until ``initialise`` or a
    checkpoint fills them, and cost nothing on ``meta``. ``backend`` is that of what lies between the matrix
    products: ``auto`` takes Triton on GPU and torch elsewhere.

    Raises:
        LayoutError: the shape cannot be shared out as the layout asks.
    """

    def __init__(
        self,
        config: ArgonneConfig,
        groups: ProcessGroups,
        precision: Precision,
        span: Span,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        config.check_layout(groups.layout)
        self.config = config
        self.groups = groups
        self.backend = backend
        self.model = Decoder(config, groups, precision, span, backend)
        self.lm_head = None
        if span.is_last and not config.tie_word_embeddings:
            self.lm_head = VocabParallelHead(
                config.vocab_size, config.hidden_size, groups, initialiser=initial(config), precision=precision
            )
        self.sequence = 0
        """Positions of the sequences that ``forward`` is given next; a stage cannot tell it from activations."""
        self.whole = False
        """Whether it is given them whole, not shared out over the context axis."""

    @property
    def head(self) -> VocabParallelEmbedding | VocabParallelHead:
        """The holder of the output weight: the embedding when tied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def embedding_weight(self) -> nn.Parameter | None:
        """That of the embedding, on the stages that hold it."""
        span = self.model.span
        holds = span.is_first or (span.is_last and self.config.tie_word_embeddings)
        return self.model.embed_tokens.weight if holds else None

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """What the stage before returned (ids ``[batch, positions]`` if there is none) -> ``[rows, hidden]``.

        ``documents`` are as for ``ArgonneModel.loss``.
        """
        return self.model(x, self.model.places(self.sequence, self.whole, documents))

    def losses(self, x: Tensor, targets: Tensor, reduction: Reduction, objective: Objective = Objective()) -> Tensor:
        """The loss in nats of each position ``[batch, positions]``, or their sum, from the last stage's output."""
        flat = targets.flatten()
        losses = linear_cross_entropy(x, self.head, flat, objective, reduction, backend=self.backend)
        return losses if reduction == "sum" else losses.view(targets.shape)

    def last_logits(self, x: Tensor, batch: int, position: int) -> Tensor:
        """The logits ``[batch, vocabulary]`` of one position, on every tensor-parallel rank."""
        axis, head = self.groups.tensor, self.head
        if self.groups.sequence_parallel:
            x = gather_from_sequence_region(x, axis)
        chosen = x.unflatten(0, (batch, -1))[:, position]
        local = column_parallel_linear(chosen, head.weight, None, axis, head.precision)
        whole = rearrange(all_gather(local, axis), "rank batch token -> batch (rank token)")
        # Only the last ranks have padding, so that it lies behind every real token.
        return whole[:, : self.config.vocab_size]

    def recompute_blocks(self, enabled: bool) -> None:
        """Keep only the input of each block for backward, and compute the rest again: less memory, more time."""
        self.model.recompute = enabled

    def sharded_parameters(self) -> list[ShardedParameter]:
        """Every parameter with the whole tensors that it holds regions of."""
        return sharded_parameters(self, self.groups)

    def initialise(self, seed: int) -> None:
        """Fill every parameter with values that depend on the seed and the whole tensor's name only."""
        initialise(self.sharded_parameters(), seed)


class ArgonneModel(ArgonneStage):
    """A causal language model over any layout without a pipeline (with one, see ``PipelinedModel``).

    Ids and targets are whole sequences: the model takes its context-parallel share of them itself.
    """

    defers_weight_gradients = False
    """Whether ``forward_backward`` makes gradients later than backward does: see ``DataParallel.begin``."""

    def __init__(
        self,
        config: ArgonneConfig,
        groups: ProcessGroups,
        precision: Precision = Precision(),
        backend: Backend = "auto",
    ) -> None:
        super().__init__(config, groups, precision, Span(range(config.num_hidden_layers)), backend)

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """``[batch, sequence]`` ids -> this rank's logits ``[batch, its positions, its tokens]``.

        ``documents`` are as for ``loss``.
        """
        local = shard_sequence(ids, self.groups.context)
        x = self.model(local, self.model.places(ids.shape[1], documents=documents))
        return vocab_parallel_logits(x, self.head).unflatten(0, local.shape)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        reduction: Reduction = "none",
        objective: Objective = Objective(),
        documents: Tensor | None = None,
    ) -> Tensor:
        """The loss in nats of each of this rank's positions, or (cheaper to train on) their sum.

        The logits never exist whole.

        Args:
            ids: ``[batch, sequence]``.
            targets: ``[batch, sequence]``; positions whose target is ``objective.ignore_index`` have no loss.
            reduction: ``none`` or ``sum``.
            objective: label smoothing, z-loss and the target that is ignored.
            documents: integers ``[batch, sequence]``; positions with different numbers do not see each other.

        Returns:
            ``[batch, sequence / context_parallel]`` in the order of ``context_positions``, or their sum.
        """
        context = self.groups.context
        x = self.model(shard_sequence(ids, context), self.model.places(ids.shape[1], documents=documents))
        return self.losses(x, shard_sequence(targets, context), reduction, objective)

    def forward_backward(self, ids: Tensor, targets: Tensor, divisor: float, documents: Tensor | None = None) -> Tensor:
        """Gradients of the loss summed over this rank's positions and divided; returns that loss, detached.

        ``ids``, ``targets`` and ``documents`` (as for ``loss``) are ``[micro-batches, batch, sequence]``.
        """
        losses = []
        for number, (micro_ids, micro_targets) in enumerate(zip(ids, targets, strict=True)):
            micro_documents = None if documents is None else documents[number]
            loss = self.loss(micro_ids, micro_targets, reduction="sum", documents=micro_documents) / divisor
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def next_token_logits(self, ids: Tensor) -> Tensor:
        """``[batch, sequence]`` ids -> the last position's logits ``[batch, vocabulary]``, on every rank."""
        padded = pad_to_share(ids, self.groups)
        x = self.model(padded, self.model.places(padded.shape[1], whole=True))
        return self.last_logits(x, len(ids), ids.shape[1] - 1)


def pad_to_share(ids: Tensor, groups: ProcessGroups) -> Tensor:
    """Ids whose positions sequence parallelism can share out: what is added comes last, and nothing sees it."""
    return F.pad(ids, (0, -ids.shape[1] % groups.tensor.size if groups.sequence_parallel else 0))
