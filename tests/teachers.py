"""Small teachers of any family, as directories that a run opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from argonne.checkpoint import weight_pieces
from argonne.models import ArgonneConfig, Execution, build_model
from argonne.parallel import ProcessGroups


def write_teacher(
    directory: Path, vocabulary: int, tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 5, **shape: Any
) -> Path:
    """A Llama-type model of random weights, large enough to disagree with any student."""
    fields = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
    fields |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.4}
    config = ArgonneConfig(vocab_size=vocabulary, **{**fields, **shape})  # type: ignore[arg-type]
    model = build_model(config, Execution(ProcessGroups.single()))
    model.initialise(seed)
    directory.mkdir(parents=True, exist_ok=True)
    pieces = weight_pieces(model.sharded_parameters())
    save_file({piece.name: piece.part.detach().contiguous() for piece in pieces}, directory / "model.safetensors")
    told = model.config_json(config.max_position_embeddings, {}, str(torch.float32).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(told), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory
