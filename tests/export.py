"""A checkpoint's directory as a run writes it, without the run: random weights, and the files beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from argonne.checkpoint import save_checkpoint, weight_pieces
from argonne.data import write_tokenizer
from argonne.files import write_json
from argonne.models import ArgonneConfig, ArgonneModel, Execution, to_huggingface
from argonne.parallel import ProcessGroups


def export(
    root: Path, config: ArgonneConfig, tokenizer: PreTrainedTokenizerFast, boundary: tuple[int, int] | None
) -> Path:
    """Write ``root/step_00000001`` and return it."""
    groups = ProcessGroups.single()
    model = ArgonneModel(config, Execution(groups))
    model.initialise(seed=4)
    with torch.no_grad():
        for number, norm in enumerate(parameter for parameter in model.parameters() if parameter.ndim == 1):
            norm.add_(0.2 * torch.sin(torch.arange(len(norm)) + number))

    def write_rest(directory: Path) -> None:
        tokens = write_tokenizer(tokenizer, directory, boundary, config.max_position_embeddings)
        write_json(directory / "config.json", to_huggingface(config, tokens, "float32"))
        write_json(directory / "generation_config.json", tokens)

    return save_checkpoint(root, 1, weight_pieces(model.sharded_parameters()), [], write_rest, groups)
