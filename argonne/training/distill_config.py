"""The flags of distillation, beside those of pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from argonne.launch.flags import at_home
from argonne.parallel import Distillation
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig


@dataclass(frozen=True)
class DistillFlags:
    """The teacher, and how much it counts."""

    teacher_path: Path
    """The teacher: a Hugging Face directory of any family, a run (its newest valid checkpoint), or a checkpoint."""
    alpha: float = 0.5
    """The loss is alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), 0 to 1."""
    temperature: float = 1.0
    """T, by which the logits of both are divided in KL."""
    teacher_device_map: Literal["local", "auto"] = "local"
    """Where the teacher is: local (whole on every rank of the student's last pipeline stage); auto is refused, as it
    would not say which rank has what: see --teacher-tensor-parallel."""
    teacher_tensor_parallel: bool = False
    """Share the teacher out over the student's tensor-parallel ranks, in place of a whole one on each."""
    allow_vocabulary_mismatch: bool = False
    """Compare the two models' tokens by their ids, though the tables of the tokenizers differ or the teacher has
    fewer tokens."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """Everything that distillation can be told: what pretraining can, and the teacher."""

    distill: DistillFlags

    own_groups: ClassVar[tuple[str, ...]] = ("distill",)
    left_out: ClassVar[Mapping[str, str]] = {
        "tokenizer_path": "the teacher's, but with --init-from that directory's",
        "vocab_size": "with the teacher's tokenizer, as many as the teacher has",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "distill", at_home(self.distill))

    @property
    def distillation(self) -> Distillation:
        """What is minimised. Raises ``ArgonneError`` when that is not legal."""
        return Distillation(self.distill.alpha, self.distill.temperature)

    def check(self) -> None:
        """Refuse what no distillation could use, then what no run could."""
        _ = self.distillation  # refuses what is no weight or no temperature
        if self.distill.teacher_device_map != "local":
            raise ArgonneError(
                f"teacher_device_map={self.distill.teacher_device_map!r} is not offered; legal: local, and "
                "--teacher-tensor-parallel for a teacher that one rank cannot hold"
            )
        training = self.training
        for name in ("label_smoothing", "z_loss"):
            if value := getattr(training, name):
                raise ArgonneError(f"{name}={value} is not offered with a teacher; legal: 0")
        if training.kernels == "triton":
            raise ArgonneError("kernels='triton' does not compute the loss of distillation; legal: auto, torch")
        super().check()
