"""How well a model predicts a text: ``python examples/perplexity.py --checkpoint-path runs/demo --text speech.txt``

Any layout opens any checkpoint: add ``--nproc 2`` for tensor parallelism. Any Hugging Face directory of a model that
opens works too.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from argonne.data.corpus.documents import read_documents
from argonne.data.corpus.formats import TEXT
from argonne.inference.opening import check_opening, open_model
from argonne.inference.perplexity import Perplexity, Scoring, perplexity
from argonne.launch import LaunchFlags, drive, guarded, parse, world_size
from argonne.launch.flags import HomeText
from argonne.output import show
from argonne.parallel import ArgonneError, choose_device, process_groups
from argonne.parallel.tensor_parallel.precision import check_precision, resolve_precision
from argonne.training.layout_flags import LayoutFlags


@dataclass(frozen=True)
class PerplexityFlags:
    """What to score, and how."""

    checkpoint_path: Path
    """A run's directory (its newest valid checkpoint), a step directory, or a Hugging Face directory."""
    text: tuple[HomeText, ...]
    """Files, each a document of plain text; or globs of Parquet or Arrow shards, each row of which is a document."""
    text_column: str = TEXT
    """The column of shards that holds the texts."""
    window: int | None = None
    """Tokens that the model sees at once [the longest sequence that it can see]."""
    stride: int | None = None
    """Tokens by which windows of a longer document are apart; fewer give each token more to go by, and take longer
    [the window: they do not overlap]."""
    batch_size: int = 8
    """Windows that are computed together."""
    precision: str = "auto"
    """Compute dtype: auto, fp32, bf16, fp16 or fp64 [bf16 on GPU, fp32 on CPU]."""
    output: Literal["table", "json"] = "table"
    """What is printed: a table, or one line of JSON."""

    def scoring(self, longest: int) -> Scoring:
        """For a model that sees ``longest`` tokens at once. Raises ``ArgonneError`` for what is not legal."""
        window = longest if self.window is None else self.window
        found = Scoring(window, window if self.stride is None else self.stride, self.batch_size)
        found.check(longest)
        return found


@dataclass(frozen=True)
class PerplexityConfig:
    """Everything that scoring can be told."""

    score: PerplexityFlags
    parallel: LayoutFlags = field(default_factory=LayoutFlags)
    launch: LaunchFlags = field(default_factory=LaunchFlags)


def check(config: PerplexityConfig, processes: int) -> None:
    flags = config.score
    check_precision(flags.precision)
    model = check_opening(flags.checkpoint_path, config.parallel.layout(processes))
    flags.scoring(model.max_position_embeddings)
    if not any(True for _ in read_documents(flags.text, flags.text_column)):
        raise ArgonneError(f"text={' '.join(flags.text)!r} has no documents; legal: files that have")


def main(config: PerplexityConfig) -> None:
    flags, device = config.score, choose_device(config.launch.device)
    with process_groups(config.parallel.layout(world_size()), device) as groups:
        opened = open_model(flags.checkpoint_path, groups, resolve_precision(flags.precision, device))
        for report in opened.reports if groups.is_first else ():
            print(report, file=sys.stderr, flush=True)
        scoring = flags.scoring(opened.model.longest_sequence)
        documents = read_documents(flags.text, flags.text_column)
        found = perplexity(opened.model, opened.tokenizer, documents, scoring)
        if groups.is_first:
            told = facts(found) | dataclasses.asdict(scoring) | {"checkpoint": str(opened.directory)}
            show(json.dumps(told) if flags.output == "json" else "\n".join(table(found)))


def facts(found: Perplexity) -> dict[str, float | None]:
    """What was found, as JSON values."""
    derived = {name: getattr(found, name) for name in ("loss", "perplexity", "bits_per_byte")}
    return dataclasses.asdict(found) | {n: v if math.isfinite(v) else None for n, v in derived.items()}


def table(found: Perplexity) -> Iterable[str]:
    """The same for people."""
    skipped = f", and {found.skipped:,} too short to score" if found.skipped else ""
    yield f"documents      {found.documents:,}{skipped}"
    yield f"tokens         {found.tokens:,}"
    yield f"bytes          {found.bytes:,}"
    yield f"loss           {found.loss:.6f} nats a token"
    yield f"perplexity     {found.perplexity:,.4f}"
    yield f"bits per byte  {found.bits_per_byte:.6f}"


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(PerplexityConfig, sys.argv[1:])))
