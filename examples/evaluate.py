"""Put questions of multiple choice to a model: ``python examples/evaluate.py --checkpoint-path runs/demo``

Questions are files in MMLU's CSV or Parquet form, or JSON lines; as they come, the few beside this file. Any layout
opens any checkpoint: add ``--nproc 2`` for tensor parallelism. Any Hugging Face directory of a model that opens works.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from argonne.checkpoint.fingerprint import weights_fingerprint
from argonne.data.tokens.tokenizer import tokenizer_fingerprint
from argonne.files import write_json, write_text
from argonne.inference.choices.answers import Answer, KeptAnswers
from argonne.inference.choices.collection import Selection, Subject, collect
from argonne.inference.choices.evaluation import Evaluation, questions_fingerprint
from argonne.inference.choices.prompts import Encoding, Score
from argonne.inference.choices.results import Accuracy, Results
from argonne.inference.choices.scoring import Scorer
from argonne.inference.opening import Opened, check_opening, open_model
from argonne.launch import LaunchFlags, drive, guarded, parse, world_size
from argonne.output import show
from argonne.parallel import LayoutError, choose_device, process_groups
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.legal import require_directory, require_whole
from argonne.parallel.tensor_parallel.precision import check_precision, resolve_precision
from argonne.training.layout_flags import LayoutFlags
from argonne.training.run.conflicts import without_effect

QUESTIONS = Path(__file__).with_name("questions")


@dataclass(frozen=True)
class EvaluateFlags:
    """What to ask, and how."""

    checkpoint_path: Path
    """A run's directory (its newest valid checkpoint), a step directory, or a Hugging Face directory."""
    data: tuple[Path, ...] = ()
    """Files of questions (.csv and .parquet in MMLU's forms, .jsonl), or directories that have them by split
    [the few beside this driver]."""
    split: str = "test"
    """The split of directories that is asked."""
    subjects: tuple[str, ...] = ()
    """The subjects that are asked [all]."""
    limit: int | None = None
    """The most questions that are asked of a subject, its first [all]."""
    shots: int = 0
    """Questions that are shown with their answers before each that is asked."""
    shots_from: Path | None = None
    """A file or directory of the questions that are shown [the dev split of --data]."""
    score: Score = "letter"
    """What of a choice is scored: letter lists the choices and scores the letter of each, text scores their texts,
    and also for their lengths."""
    bos: bool | None = None
    """Begin each text with the tokenizer's BOS, or with none [as the tokenizer has it by itself]."""
    window: int | None = None
    """Tokens that the model sees at once; longer texts lose their first ones [the longest that it can see]."""
    batch_size: int = 8
    """Texts that are computed together."""
    precision: str = "auto"
    """Compute dtype: auto, fp32, bf16, fp16 or fp64 [bf16 on GPU, fp32 on CPU]."""
    title: str = "Multiple-Choice"
    """What the table is called."""
    output: Literal["table", "json"] = "table"
    """What is printed: the table in Markdown, or one line of JSON."""
    output_dir: Path | None = None
    """Where both are written, and each answer as it comes: the same command goes on from there [nowhere]."""

    def questions(self) -> list[Subject]:
        """What is asked. Raises ``ArgonneError`` for what cannot be."""
        selection = Selection(self.split, self.subjects, self.shots, self.limit)
        return collect(self.data or [QUESTIONS], self.shots_from, selection)


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that evaluation can be told."""

    ask: EvaluateFlags
    parallel: LayoutFlags = field(default_factory=LayoutFlags)
    launch: LaunchFlags = field(default_factory=LaunchFlags)


def check(config: EvaluateConfig, processes: int) -> None:
    flags = config.ask
    check_precision(flags.precision)
    require_whole("shots", flags.shots, 0)
    require_whole("batch_size", flags.batch_size, 1)
    if flags.limit is not None:
        require_whole("limit", flags.limit, 1)
    if flags.shots_from is not None and not flags.shots:
        raise without_effect(flags, "shots_from", "--shots above 0")
    if flags.split != "test" and not any(path.is_dir() for path in flags.data or [QUESTIONS]):
        raise without_effect(flags, "split", "a directory among --data")
    if (size := config.parallel.context_parallel) > 1:
        raise LayoutError(f"context_parallel={size} shares out long sequences, which questions are not; legal: 1")
    if flags.output_dir is not None:
        require_directory("output_dir", flags.output_dir)
    model = check_opening(flags.checkpoint_path, config.parallel.layout(processes))
    if flags.window is not None:
        require_whole("window", flags.window, 1, model.max_position_embeddings)
    flags.questions()


def main(config: EvaluateConfig) -> None:
    flags, device = config.ask, choose_device(config.launch.device)
    with process_groups(config.parallel.layout(world_size()), device) as groups, torch.inference_mode():
        subjects = collectively(flags.questions, groups.world)
        opened = open_model(flags.checkpoint_path, groups, resolve_precision(flags.precision, device))
        for report in opened.reports if groups.is_first else ():
            tell(report)
        model = opened.model
        window = model.longest_sequence if flags.window is None else flags.window
        encoding = Encoding(opened.tokenizer, model.shape["vocab_size"], window, flags.bos)
        evaluation = Evaluation(Scorer(model, flags.batch_size), encoding, flags.score)
        kept = collectively(lambda: keep(flags, opened, subjects, window) if groups.is_first else None, groups.world)

        def told(subject: str, answers: list[Answer]) -> None:
            if groups.is_first:
                found = Accuracy.of(answers, lambda answer: answer.is_right)
                tell(f"{subject}: {found.correct} of {found.questions}")

        answers = evaluation.run(subjects, kept, told)
        if groups.is_first:
            report_on(flags, opened, Results(answers, flags.score == "text"))


def keep(flags: EvaluateFlags, opened: Opened, subjects: list[Subject], window: int) -> KeptAnswers | None:
    """Where answers are kept, with those of before."""
    if flags.output_dir is None:
        return None
    identity = {
        "score": flags.score,
        "shots": flags.shots,
        "questions": questions_fingerprint(subjects, flags.score),
        "weights": weights_fingerprint(opened.directory),
        "tokenizer": tokenizer_fingerprint(opened.tokenizer),
        "precision": flags.precision,
        "window": window,
        "bos": flags.bos,
        "batch_size": flags.batch_size,
    }
    return KeptAnswers(flags.output_dir, identity)


def report_on(flags: EvaluateFlags, opened: Opened, results: Results) -> None:
    """Print what was found, and write it where that is asked for."""
    asked: dict[str, Any] = {"checkpoint": str(opened.directory), "score": flags.score, "shots": flags.shots}
    facts = asked | results.as_json()
    table = "\n".join(results.as_markdown(f"{flags.title} ({flags.shots}-Shot)"))
    if facts["truncated"]:
        tell(f"{facts['truncated']} of {facts['questions']} questions were longer than the model can see at once")
    if flags.output_dir is not None:
        write_json(flags.output_dir / "results.json", facts)
        write_text(flags.output_dir / "results.md", table + "\n")
    show(json.dumps(facts) if flags.output == "json" else table)


def tell(line: str) -> None:
    """Beside the result, which stands alone on stdout."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(EvaluateConfig, sys.argv[1:])))
