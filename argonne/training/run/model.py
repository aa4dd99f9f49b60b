"""Which model a run trains: the Argonne model of its flags, or one that meets the contract of ``argonne.models``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from argonne.models import Execution, LanguageModel, ModelConfig, build_model, require_contract
from argonne.models.replicas import parameters_of
from argonne.parallel import ArgonneError, LayoutError, Precision, ProcessGroups
from argonne.training.config import ModelFlags, RunConfig, names_of
from argonne.training.optimizer import require_matrices
from argonne.training.run.shape import shape_of

ModelBuilder = Callable[[Execution, int], LanguageModel]
"""Makes this rank's part of a model from how it is computed and the number of tokens of the vocabulary."""


@dataclass(frozen=True)
class ModelOfRun:
    """What is known of a run's model before it is built."""

    build: Callable[[Execution], LanguageModel]
    shape: Mapping[str, Any]
    """``LanguageModel.shape``: the model's part of the identity."""
    own: bool = False
    """It is one's own, and not the flags'."""
    notes: tuple[str, ...] = ()
    """What may surprise whoever asked for this shape, though it is legal."""


def argonne_model(config: RunConfig, tokenizer_size: int) -> ModelOfRun:
    """The model of the flags, with a row for every token.

    Raises:
        ArgonneError: there are more tokens than the flags allow.
    """
    shape, notes = _shape(config, tokenizer_size), []
    if shape.family == "llama" and shape.hidden_size % shape.num_attention_heads:
        notes.append("note: transformers opens no Llama whose hidden_size is not divisible by num_attention_heads")
    if shape.family == "qwen2" and config.data.tokenizer_path is None and config.model.init_from is None:
        notes.append(
            "note: AutoTokenizer of transformers 5 makes Qwen's tokenizer of any that lies beside a Qwen2; this run's "
            "opens there by PreTrainedTokenizerFast.from_pretrained"
        )
    return ModelOfRun(partial(build_model, shape), shape.as_json(), notes=tuple(notes))


def own_model(
    builder: ModelBuilder, config: RunConfig, tokenizer_size: int, groups: ProcessGroups, precision: Precision
) -> ModelOfRun:
    """A model that is not ours, built once on ``meta`` to see what it is.

    Raises:
        ArgonneError: it does not meet the contract, or does not offer what the flags ask of it.
    """
    plan = config.parallel.plan(groups.layout)
    with torch.device("meta"):
        model = builder(Execution(groups, precision, plan=plan), tokenizer_size)
    require_contract(model)
    assert isinstance(model, torch.nn.Module)
    name = type(model).__name__
    model.check_layout(groups.layout)
    if groups.pipeline.size > 1 and not model.stages:
        raise LayoutError(
            f"pipeline_parallel={groups.pipeline.size} needs stages, and model={name} offers none; legal: 1"
        )
    if unsaved := sorted({name for name, _ in model.named_buffers()} & set(model.state_dict())):
        raise ArgonneError(
            f"buffers of model={name} would be in no checkpoint: {', '.join(unsaved)}; legal: register_buffer(..., "
            "persistent=False) for what can be made again, parameters for what is learnt"
        )
    if config.data.block_size > model.longest_sequence:
        raise ArgonneError(
            f"block_size={config.data.block_size} is more than model={name} can see; legal: 1 to "
            f"{model.longest_sequence}"
        )
    if config.data.document_mask and not model.masks_documents:
        raise ArgonneError(
            f"document_mask=True is not offered by model={name}; legal: leave it out (or a model whose attention heeds "
            "batch.documents and whose masks_documents says so)"
        )
    if config.training.optimizer == "muon" and groups.pipeline.size == 1:  # later of a pipeline: a stage may have none
        require_matrices(any(sharded.is_block_matrix for sharded in parameters_of(model)), f"model={name}")
    try:
        shape = json.loads(json.dumps(dict(model.shape), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgonneError(f"shape of model={name} is not made of JSON values: {error}; legal: JSON values") from None
    return ModelOfRun(lambda execution: builder(execution, tokenizer_size), shape, own=True)


def check_own_model(config: RunConfig) -> None:
    """Raise ``ArgonneError`` if the command names a flag of the Argonne model, which another model does not read."""
    for name in names_of(ModelFlags):
        if name in config.given:
            raise ArgonneError(
                f"{name}={getattr(config.model, name)!r} has no effect on a model of one's own; legal: leave it out"
            )


def _shape(config: RunConfig, tokenizer_size: int) -> ModelConfig:
    shape, origin = shape_of(config), config.model.init_from
    if origin is None and config.data.tokenizer_path is None and config.model.vocab_size is None:
        return replace(shape, vocab_size=tokenizer_size)
    if shape.vocab_size < tokenizer_size:
        if origin is not None:
            raise ArgonneError(
                f"the tokenizer has {tokenizer_size} tokens, more than the model of init_from={str(origin)!r}; legal: "
                f"a tokenizer of at most {shape.vocab_size}, its vocab_size"
            )
        raise ArgonneError(
            f"vocab_size={shape.vocab_size} is less than the tokenizer's {tokenizer_size}; "
            f"legal: --vocab-size {tokenizer_size} or more"
        )
    return shape
