"""The configuration of instruction tuning: pretraining's, but for its data and how its steps are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Suppress

from argonne.data.chat.source import Conversations
from argonne.data.corpus.formats import TEXT
from argonne.data.mixture import parse_globs
from argonne.launch.flags import HomeText
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_whole
from argonne.training.config import DataFlags, RunConfig, RunFlags
from argonne.training.training_flags import TrainingFlags

UNCOUNTED = TrainingFlags.total_steps
"""Of ``total_steps``: not said, and to be counted."""


@dataclass(frozen=True)
class ChatFlags(DataFlags):
    """The data: shards of conversations (``messages``, or ``prompt`` and ``completion``), and how they are written."""

    data_glob: tuple[HomeText, ...] | None = None
    """Globs of the training shards, GLOB:WEIGHT each to mix several corpora [it must be given]."""
    tokenizer_path: Path | None = None
    """Directory of a Hugging Face tokenizer [that of --init-from]."""
    chat_template: Path | None = None
    """A file with the chat template (Jinja) that is trained, and kept with the model [the tokenizer's own]."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of conversations of more than block size + 1 tokens: drop, or truncate (cut off their ends)."""
    block_size: int = 512
    """Tokens of a training sequence, which has as many whole conversations as it has room for."""
    eval: tuple[HomeText, ...] | None = None
    """Named held-out sets of conversations, NAME=GLOB each, of which the loss of what the assistant says is measured
    every --eval-interval steps [none]."""
    eval_sequences: int | None = None
    """Sequences of each named held-out set that are used, from its beginning [all of them]."""

    # Of texts alone. Conversations are always kept apart.
    document_mask: Annotated[bool, Suppress] = True
    validation_glob: Annotated[tuple[HomeText, ...] | None, Suppress] = None
    validation_sequences: Annotated[int, Suppress] = DataFlags.validation_sequences
    add_document_boundary_tokens: Annotated[bool, Suppress] = False
    text_column: Annotated[str, Suppress] = TEXT
    filters: Annotated[Literal["default", "none"], Suppress] = "default"
    filter_long_characters: Annotated[int, Suppress] = DataFlags.filter_long_characters
    filter_max_digits: Annotated[float, Suppress] = DataFlags.filter_max_digits
    filter_min_readable: Annotated[float, Suppress] = DataFlags.filter_min_readable
    filter_min_tokens: Annotated[int, Suppress] = DataFlags.filter_min_tokens
    streaming: Annotated[bool, Suppress] = True
    num_proc: Annotated[int, Suppress] = DataFlags.num_proc
    cache_dir: Annotated[Path | None, Suppress] = None

    of_texts: ClassVar[tuple[str, ...]] = (
        *("document_mask", "validation_glob", "validation_sequences", "add_document_boundary_tokens", "text_column"),
        *("filters", "filter_long_characters", "filter_max_digits", "filter_min_readable", "filter_min_tokens"),
        *("streaming", "num_proc", "cache_dir"),
    )
    """What a configuration file may name, and must not."""

    @property
    def source(self) -> Conversations:
        """Conversations. Raises ``ArgonneError`` where the file of the chat template cannot be read."""
        if self.chat_template is None:
            return Conversations(None, self.too_long)
        try:
            return Conversations(self.chat_template.read_text(encoding="utf-8"), self.too_long)
        except (OSError, ValueError) as error:
            raise ArgonneError(
                f"chat_template={str(self.chat_template)!r} cannot be read: {error}; legal: a Jinja file in UTF-8"
            ) from error

    def check(self) -> None:
        """Refuse what belongs to texts, and a template that cannot be read."""
        defaults = {each.name: each.default for each in fields(self)}
        for name in self.of_texts:
            if (value := getattr(self, name)) != defaults[name]:
                raise ArgonneError(
                    f"{name}={value!r} is not for conversations; legal: {defaults[name]!r}, or leave it out"
                )
        if self.data_glob is None:
            raise ArgonneError("data_glob=None is not legal; legal: globs of shards of conversations")
        _ = self.source


@dataclass(frozen=True)
class TuningFlags(TrainingFlags):
    """The schedule, the batch and the numerics."""

    epochs: int | None = None
    """Passes over the data, from whose conversations the number of steps follows [1, unless --total-steps is given]."""
    total_steps: int = UNCOUNTED
    """Optimizer steps of the whole run; the schedule ends there [as many as --epochs make]."""
    initial_batch_size: int = 4
    """Sequences of a micro-batch on each data-parallel rank."""
    min_batch_size: int = 1
    """The smallest micro-batch that a new run tries, where larger ones do not fit into memory."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Where the warm-up begins and the decay ends."""
    warmup_steps: int = 5
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay, on matrices only."""

    @property
    def passes(self) -> int | None:
        """The passes over the data that the steps are counted by; None where there is a number of steps."""
        return (self.epochs or 1) if self.total_steps == UNCOUNTED else None

    def check(self) -> None:
        """Refuse what no run could use."""
        if self.epochs is not None:
            require_whole("epochs", self.epochs, 1)
            if self.total_steps != UNCOUNTED:
                raise ArgonneError(
                    f"epochs={self.epochs} conflicts with total_steps={self.total_steps}; legal: one of them"
                )
        super().check()


@dataclass(frozen=True)
class TuningRunFlags(RunFlags):
    """Where the run lies, and when it saves, logs and stops."""

    output_dir: Path = Path("runs/tuned")
    """Directory of the run. Starting again there continues it from its newest valid checkpoint."""
    save_interval: int = 100
    """Steps between checkpoints; each also generates text."""
    sample_tokens: int = 20
    """Tokens of the text that is generated at each checkpoint."""


@dataclass(frozen=True)
class TuneConfig(RunConfig):
    """Everything that instruction tuning can be told."""

    data: ChatFlags = field(default_factory=ChatFlags)
    training: TuningFlags = field(default_factory=TuningFlags)
    run: TuningRunFlags = field(default_factory=TuningRunFlags)

    earlier_words: ClassVar[Mapping[str, str]] = {}

    def check(self) -> None:
        """Refuse what no tuning could use, then what no run could."""
        if self.model.init_from is None:
            raise ArgonneError(
                "init_from=None is not legal; legal: the directory of the model that is tuned (a Hugging Face "
                "directory, a run's or one of its checkpoints)"
            )
        if self.model.resume_state:
            raise ArgonneError("resume_state=True is not for tuning, which begins at step 0; legal: leave it out")
        self.data.check()
        super().check()
        if self.training.passes is not None and len(parse_globs(self.data.data_glob or ())) > 1:
            raise ArgonneError(
                f"data_glob={' '.join(self.data.data_glob or ())!r} has weights, with which no number of passes makes "
                "all corpora come to an end; legal: --total-steps"
            )
