"""What resuming can be told of each kind of run: what that kind can, beside what ``resume.py`` adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from argonne.checkpoint import CheckpointError, resolve
from argonne.launch.config_file import file_of, said_of
from argonne.parallel.errors import ArgonneError
from argonne.training.config import ResumeConfig, RunConfig, names_of
from argonne.training.distill_config import DistillConfig, DistillFlags
from argonne.training.run.flags_json import saved_flags
from argonne.training.tuning.config import ChatFlags, TuneConfig, TuningFlags


@dataclass(frozen=True, kw_only=True)
class ResumeTuneConfig(TuneConfig, ResumeConfig):
    """Everything that a resume of instruction tuning can be told; what is left out is as it was saved."""

    left_out: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(names_of(ChatFlags, TuningFlags), "as saved"),
        **ResumeConfig.left_out,
        "epochs": "the steps are as saved",
    }

    def check(self) -> None:
        """Refuse what no resume of a tuning could use."""
        if "epochs" in self.given:
            raise ArgonneError(
                f"epochs={self.training.epochs} is not for a run that has its steps; legal: --total-steps, or leave it "
                "out"
            )
        super().check()


@dataclass(frozen=True)
class TeacherAsSaved(DistillFlags):
    """The teacher, and how much it counts."""

    teacher_path: Path = Path()
    """The teacher: a Hugging Face directory of any family, a run (its newest valid checkpoint), or a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ResumeDistillConfig(DistillConfig, ResumeConfig):
    """Everything that a resume of a distillation can be told; what is left out is as it was saved."""

    distill: TeacherAsSaved = field(default_factory=TeacherAsSaved)

    left_out: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(names_of(DistillFlags), "as saved"),
        **ResumeConfig.left_out,
    }


_RESUMED: Mapping[type[RunConfig], type[ResumeConfig]] = {
    RunConfig: ResumeConfig,
    TuneConfig: ResumeTuneConfig,
    DistillConfig: ResumeDistillConfig,
}


def resumed(arguments: Sequence[str]) -> type[ResumeConfig]:
    """What these words of ``resume.py`` can tell, by the run that they name; pretraining's where they name none."""
    with suppress(ArgonneError):  # whatever is wrong is said of the words as a whole
        if (path := _checkpoint(arguments)) is not None:
            return _RESUMED[type(newest_flags(path)[1])]
    return ResumeConfig


def newest_flags(path: Path) -> tuple[Path, RunConfig]:
    """The newest checkpoint at ``path`` that tells its run's flags, and those."""
    problem: CheckpointError | None = None
    for directory in reversed(resolve(path)):
        try:
            return directory, saved_flags(directory)
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _checkpoint(arguments: Sequence[str]) -> Path | None:
    """The ``--checkpoint-path`` that the words, or the file that they name, say."""
    said = [word.partition("=") for word in arguments if "=" in word]
    pairs = [*((name, value) for name, _, value in said), *pairwise(arguments)]
    named = [value for name, value in pairs if name.replace("_", "-") == "--checkpoint-path"]
    if not named and (file := file_of(ResumeConfig, arguments)) is not None:
        found = said_of(file, "checkpoint_path")
        named = [found] if isinstance(found, str) else []
    return Path(named[0]).expanduser() if named else None
