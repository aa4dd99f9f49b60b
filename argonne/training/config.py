"""The configuration of a run: the single source of the flags, their defaults, ``--help`` and ``run.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from argonne.data.corpus.formats import TEXT
from argonne.data.source import Source, Texts
from argonne.data.tokens.filters import FILTERS, NO_FILTERS, Filters
from argonne.launch.config_file import ConfigFlags
from argonne.launch.flags import Given, HomeText, RestartFlags, at_home
from argonne.models.recompute import Recompute
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_whole
from argonne.training.eval_globs import named_globs
from argonne.training.layout_flags import ParallelFlags
from argonne.training.model_flags import ModelFlags
from argonne.training.trace_file import NO_STEPS, TracedSteps
from argonne.training.training_flags import MOST_STEPS, TrainingFlags


@dataclass(frozen=True)
class DataFlags:
    """The data: shards of Parquet or Arrow with a text column, and the tokenizer."""

    data_glob: tuple[HomeText, ...] | None = None
    """Globs of the training shards, GLOB:WEIGHT each to mix several corpora
    [the first that matches of ../data/CC-MAIN-2025-26/*.parquet, data/CC-MAIN-2025-26/*.parquet, ../data/*.arrow and
    data/*.arrow]."""
    validation_glob: tuple[HomeText, ...] | None = None
    """Globs of held-out shards, on which the loss is measured at every save [it is not measured]."""
    validation_sequences: int = 64
    """Sequences of the held-out text that are used, from its beginning."""
    eval: tuple[HomeText, ...] | None = None
    """Named held-out sets, NAME=GLOB each, of which loss and bits per byte are measured every --eval-interval steps
    [none]."""
    eval_sequences: int | None = 64
    """Sequences of each named held-out set that are used, from its beginning; None: all of them."""
    tokenizer_path: Path | None = None
    """Directory of a Hugging Face tokenizer [a byte-level BPE of 12,000 is trained on the data]."""
    trust_remote_code: bool = False
    """Allow a tokenizer that comes with its own code."""
    block_size: int = 4096
    """Tokens of a training sequence."""
    add_document_boundary_tokens: bool = False
    """Put BOS before and EOS after every document."""
    document_mask: bool = False
    """Keep attention within documents: what else is packed into a sequence is not seen."""
    text_column: str = TEXT
    """The column of every shard, held-out ones too, that holds the texts."""
    filters: Literal["default", "none"] = "default"
    """Which texts, of the training and the held-out data, are dropped for their characters or their length: default
    (the thresholds below decide) or none, for which --no-filters stands too."""
    filter_long_characters: int = FILTERS.long_characters
    """Only texts of more characters than this are judged by them."""
    filter_max_digits: float = FILTERS.max_digits
    """Drop a long text of which a larger share of the characters are digits; 1 drops none."""
    filter_min_readable: float = FILTERS.min_readable
    """Drop a long text of which a smaller share of the characters are letters or white space; 0 drops none."""
    filter_min_tokens: int = FILTERS.min_tokens
    """Drop a document of fewer tokens, BOS and EOS not counted; 1 drops none."""
    data_lanes: int | None = None
    """Virtual streams that the data is dealt to, best a multiple of --data-parallel [64; fewer for tiny data]."""
    on_bad_shard: Literal["raise", "skip"] = "raise"
    """What becomes of a shard, or a row group of one, that cannot be read: stop, or pass over it and record that."""
    accept_data_change: bool = False
    """Go on with shards, weights or a tokenizer other than those that the run was saved with."""
    streaming: bool = True
    """--no-streaming: tokenise once, before training, to a cache on disk, shuffled anew in every epoch
    [while training, without a cache, in the order of the shards]."""
    num_proc: int = 8
    """Processes that tokenise with --no-streaming."""
    cache_dir: Path | None = None
    """Where the caches of --no-streaming lie, which several runs may share [token_cache in the output directory]."""
    prefetch_batches: int = 2
    """Batches that are read and tokenised ahead of training."""

    earlier: ClassVar[Mapping[str, Mapping[bool, str]]] = {"filters": {True: "default", False: "none"}}
    """What values of earlier versions are now."""

    @property
    def named_globs(self) -> dict[str, str]:
        """The globs of the named held-out sets. Raises ``ArgonneError`` for what is no NAME=GLOB."""
        return {} if self.eval is None else named_globs(self.eval)

    @property
    def document_filters(self) -> Filters:
        """Which rows become documents, of the held-out text too. Raises ``ArgonneError`` naming a bad threshold."""
        own = Filters(**{f.name: getattr(self, f"filter_{f.name}") for f in fields(Filters)})
        return own if self.filters == "default" else NO_FILTERS

    @property
    def source(self) -> Source:
        """What the rows are, and how sequences are made of them."""
        return Texts(self.text_column, self.document_filters)


@dataclass(frozen=True)
class RunFlags:
    """Where the run lies, and when it saves, logs and stops."""

    output_dir: Path = Path("runs/argonne")
    """Directory of the run. Starting again there continues it from its newest valid checkpoint."""
    save_interval: int = 350
    """Steps between checkpoints; each also generates text and measures the held-out loss."""
    eval_interval: int | None = None
    """Steps between measurements of the named held-out sets [--save-interval]."""
    sample_tokens: int = 100
    """Tokens of the text that is generated at each checkpoint."""
    keep_checkpoints: int = 50
    """Newest checkpoints to keep."""
    log_interval: int = 10
    """Steps between log lines."""
    stop_at_step: int | None = None
    """Save and leave at this step; the schedule of the run stays as it is [at --total-steps]."""
    wall_time: float | None = None
    """Seconds after which to save and leave, with time to spare for the save [no limit]."""
    trace: str | None = None
    """Steps of which what every module makes, forward and backward, is hashed into trace/: 7, or 1-20, or 1-100:10
    (every tenth), or several of these with commas between [none]."""

    @property
    def evaluates(self) -> int:
        """Steps between measurements of the named held-out sets."""
        return self.save_interval if self.eval_interval is None else self.eval_interval

    @property
    def traced_steps(self) -> TracedSteps:
        """Which steps are traced. Raises ``ArgonneError`` when ``trace`` does not say steps."""
        return NO_STEPS if self.trace is None else TracedSteps.of(self.trace)


@dataclass(frozen=True)
class RunConfig:
    """Everything that pretraining can be told."""

    model: ModelFlags = field(default_factory=ModelFlags)
    data: DataFlags = field(default_factory=DataFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)
    parallel: ParallelFlags = field(default_factory=ParallelFlags)
    launch: RestartFlags = field(default_factory=RestartFlags)
    run: RunFlags = field(default_factory=RunFlags)
    file: ConfigFlags = field(default_factory=ConfigFlags)
    given: Given = frozenset()
    """The flags that this command or its file names: what they say counts even where it equals a default."""

    earlier_words: ClassVar[Mapping[str, str]] = {"--no-filters": "--filters=none"}
    """Words of earlier versions, and what they are now."""

    own_groups: ClassVar[tuple[str, ...]] = ()
    """Groups of flags that only this kind of run has, and that are kept with it."""

    @property
    def prints(self) -> bool:
        """Whether it is to be printed, and nothing else done."""
        return self.file.print_config

    def __post_init__(self) -> None:
        for group in ("model", "data", "run"):  # parsed flags are expanded already, those of a program are not
            object.__setattr__(self, group, at_home(getattr(self, group)))

    @property
    def recompute(self) -> Recompute:
        """What backward computes again. Raises ``ArgonneError`` when that is no choice, or two."""
        chosen, switch = Recompute.of(self.training.recompute), "disable_gradient_checkpointing"
        if not self.training.disable_gradient_checkpointing:
            return chosen
        if "recompute" not in self.given:
            return Recompute.NONE
        if switch in self.given and chosen != Recompute.NONE:
            raise ArgonneError(f"recompute={chosen} conflicts with {switch}=True, which says none; legal: one of them")
        return chosen  # over what was saved

    def check(self) -> None:
        """Raise ``ArgonneError`` for the first value that no run could use; needs neither data nor peers."""
        d, r = self.data, self.run
        self.training.check()
        for name in (
            "block_size",
            "num_proc",
            "prefetch_batches",
            "validation_sequences",
            "eval_sequences",
            "data_lanes",
        ):
            if (count := getattr(d, name)) is not None:
                require_whole(name, count, 1)
        require_whole("sample_tokens", r.sample_tokens, 0)
        for name in ("save_interval", "keep_checkpoints", "log_interval", "eval_interval", "stop_at_step"):
            if (count := getattr(r, name)) is not None:
                require_whole(name, count, 1, MOST_STEPS)
        _ = d.named_globs  # refuses what is no name, or no glob
        _ = d.document_filters  # refuses what is no threshold
        _ = self.recompute  # refuses what is no choice
        if not d.text_column:
            raise ArgonneError("text_column='' is not legal; legal: the name of a column, or leave the flag out")
        if r.wall_time is not None:
            require_number("wall_time", r.wall_time)
        _ = r.traced_steps  # refuses what is no steps
        for name, globs in (("data_glob", d.data_glob), ("validation_glob", d.validation_glob)):
            if globs is not None and not all(globs or [""]):
                raise ArgonneError(f"{name}={' '.join(globs)!r} is empty; legal: a glob, or leave the flag out")


def names_of(*groups: type) -> list[str]:
    """The names of all the fields of dataclasses."""
    return [each.name for group in groups for each in fields(group)]


@dataclass(frozen=True)
class ResumeFlags:
    """What to resume from, and what to change."""

    checkpoint_path: Path
    """A run's directory (its newest valid checkpoint), a step directory, or a file in one."""
    batch_size: int | None = None
    """Sequences of a micro-batch on each data-parallel rank [the one saved]."""
    reset_optimizer: bool = False
    """Begin the optimizer's moments anew, and warm the learning rate up again."""
    rewarmup_steps: int = 100
    """Steps of that warm-up."""
    force_from_scratch: bool = False
    """Take the saved configuration but begin again (at step 0, but for --resume-state), in an --output-dir that holds
    no run."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig(RunConfig):
    """Everything that a resume can be told; what is left out is as it was saved."""

    resume: ResumeFlags

    left_out: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(names_of(ModelFlags, DataFlags, TrainingFlags, RunFlags), "as saved"),
        "gradient_accumulation_steps": "what keeps the global batch",
        "output_dir": "the checkpoint's run",
        "stop_at_step": "at --total-steps",
        "wall_time": "no limit",
    }
    """What happens to a field that no flag names, where it is not what ``RunConfig`` says of it."""
    arguments: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """The words of this command: what they name counts whichever checkpoint it turns out to go on from."""

    def check(self) -> None:
        """Refuse what no resume could use, then what no run could."""
        if self.resume.batch_size is not None:
            require_whole("batch_size", self.resume.batch_size, 1)
        require_whole("rewarmup_steps", self.resume.rewarmup_steps, 0, MOST_STEPS)
        super().check()
