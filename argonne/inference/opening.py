"""Opening a trained model at a layout: a run's directory, one of its checkpoints, or any Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from argonne.checkpoint import (
    CheckpointError,
    is_checkpoint,
    load_pieces,
    require_intact,
    resolve,
    trusted,
    weight_pieces,
)
from argonne.data import load_tokenizer
from argonne.models import Execution, LanguageModel, ModelConfig, build_model, from_huggingface
from argonne.parallel import ArgonneError, PipelinePlan, Precision, ProcessGroups
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.communication.layout import Layout
from argonne.parallel.communication.shared_memory import sharing_memory
from argonne.parallel.tensor_parallel.gemm import lay_out_for_rows


@dataclass(frozen=True)
class Opened:
    """A model with its weights, as this rank holds it."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerFast
    directory: Path
    """Where both lie: of a run, its newest valid checkpoint."""
    reports: tuple[str, ...] = ()
    """Why newer checkpoints were passed over, a line each."""


def open_model(path: Path, groups: ProcessGroups, precision: Precision, *, generating: bool = False) -> Opened:
    """The model and the tokenizer at ``path`` (collective); as ``model_at``.

    Raises:
        ArgonneError: on every rank, what cannot be opened, and why.
    """
    directory, reports = locate(path, groups)
    model = model_at(directory, groups, precision, generating=generating)
    tokenizer = collectively(lambda: load_tokenizer(directory), groups.world)
    return Opened(model, tokenizer, directory, tuple(reports))


def model_at(
    directory: Path, groups: ProcessGroups, precision: Precision, *, generating: bool = False
) -> LanguageModel:
    """The model of a directory that has been located (collective): each rank reads the slices that it holds, no more.

    With ``generating`` it is made ready to write: weights are in the dtype of what is computed, and memory is laid out
    and shared as is best for one token at a time.

    Raises:
        ArgonneError: on every rank, what cannot be opened, and why.
    """
    shape = collectively(lambda: from_huggingface(directory), groups.world)
    if generating:
        groups, precision = sharing_memory(groups), replace(precision, parameters=precision.compute)
    with groups.device:
        model = build_model(shape, Execution(groups, precision))
    pieces = weight_pieces(model.sharded_parameters())
    collectively(lambda: load_pieces(directory, pieces, verify=False), groups.world)
    for parameter in model.parameters() if generating else ():
        lay_out_for_rows(parameter)
    return model


def locate(path: Path, groups: ProcessGroups) -> tuple[Path, list[str]]:
    """The directory that ``path`` means: itself, or the newest valid checkpoint there, and why newer ones are not it.

    Collective: the ranks share the reading of a checkpoint.

    Raises:
        CheckpointError: on every rank, that there is none.
    """
    if collectively(lambda: is_plain(path), groups.world):
        return path, []
    return trusted(path, groups)


def is_plain(path: Path) -> bool:
    """Whether this is a Hugging Face directory that has no manifest to go by."""
    return (path / "config.json").exists() and not is_checkpoint(path)


def some_config(path: Path) -> ModelConfig:
    """The model's shape, from the newest checkpoint whose config.json is as it was written. Needs no peers.

    Raises:
        ArgonneError: there is nothing there that opens.
    """
    problem: ArgonneError | None = None
    for directory in [path] if is_plain(path) else reversed(resolve(path)):
        try:
            require_intact(directory, lambda name: name == "config.json")
            return from_huggingface(directory)
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def check_opening(path: Path, layout: Layout) -> ModelConfig:
    """The shape of the model at ``path``. Raises ``ArgonneError`` unless it can be shared out as ``layout`` asks."""
    shape = some_config(path)
    shape.check_layout(layout)
    PipelinePlan.of("1f1b", layout.pipeline).check_layers(shape.num_hidden_layers)
    return shape
