"""The teacher of a run: which it is, whether it fits the student, and its part of this rank's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.checkpoint import Piece, load_pieces, resolve, weight_pieces, weights_fingerprint
from argonne.data import load_tokenizer
from argonne.data.tokens.tokenizer import holds_tokenizer
from argonne.inference.opening import is_plain, locate, some_config
from argonne.models import (
    Argonne1Config,
    DistillationLoss,
    Execution,
    LanguageModel,
    LossFunction,
    ModelConfig,
    Teacher,
    from_huggingface,
    teacher_groups,
)
from argonne.parallel import ArgonneError, Distillation, Precision, ProcessGroups
from argonne.parallel.communication.collectives import collectively, gather_objects
from argonne.training.config import RunConfig
from argonne.training.distill_config import DistillConfig
from argonne.training.run.checks import check
from argonne.training.run.job import log
from argonne.training.run.shape import origin_path
from argonne.training.run.workflow import pretrain


def distill(config: DistillConfig) -> int:
    """Begin or continue a distillation; one rank of it, and its status."""
    return pretrain(with_tokens_of_teacher(config), loss=loss_of_run)


def check_distill(config: DistillConfig, world_size: int) -> None:
    """Refuse what can be refused without peers, of the teacher first.

    Raises:
        ArgonneError: in one line, what is wrong.
    """
    config.check()
    shape, flags = some_config(origin_path(config.distill.teacher_path, "teacher_path")), config.distill
    layout = config.parallel.layout(world_size)
    tensor = layout.tensor if flags.teacher_tensor_parallel else 1
    alone = replace(layout, tensor=tensor, pipeline=1, sequence_parallel=False)
    try:
        shape.check_layout(alone)
    except ArgonneError as error:
        raise ArgonneError(f"the teacher of teacher_path={str(flags.teacher_path)!r}: {error}") from None
    if flags.teacher_tensor_parallel and config.parallel.reproducible:
        raise ArgonneError(
            "teacher_tensor_parallel=True is not reproducible: a teacher is not cut into canonical blocks; legal with "
            "--reproducible: a whole one on each rank"
        )
    if config.data.block_size > shape.max_position_embeddings:
        raise ArgonneError(
            f"block_size={config.data.block_size} is more than the teacher can see; legal: 1 to "
            f"{shape.max_position_embeddings}, its max_position_embeddings"
        )
    if config.data.document_mask and isinstance(shape, Argonne1Config):
        raise ArgonneError("document_mask=True is not offered by a teacher of Argonne 1.x; legal: leave it out")
    check(with_tokens_of_teacher(config), world_size)


def with_tokens_of_teacher(config: DistillConfig) -> DistillConfig:
    """``config`` with the teacher's tokenizer and as many tokens, where no flag says another.

    Raises:
        ArgonneError: there is no teacher, or it has no tokenizer.
    """
    data, model = config.data, config.model
    if data.tokenizer_path is not None or model.init_from is not None:
        return config
    path = origin_path(config.distill.teacher_path, "teacher_path")
    directory = path if is_plain(path) else resolve(path)[-1]
    if not holds_tokenizer(directory):
        raise ArgonneError(f"teacher_path={str(path)!r} holds no tokenizer; legal: --tokenizer-path too")
    if model.vocab_size is None and model.model_config is None:
        model = replace(model, vocab_size=some_config(path).vocab_size)
    return replace(config, data=replace(data, tokenizer_path=directory), model=model)


@dataclass(frozen=True)
class DistillationOfRun:
    """What a run with a teacher minimises; a ``LossOfRun``."""

    objective: Distillation
    directory: Path
    """Where the teacher lies: of a run, its newest valid checkpoint."""
    shape: ModelConfig
    fingerprint: str
    config: DistillConfig
    tokens: int = 0
    """Of the tokenizer."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The teacher by its weights, and how much it counts."""
        return {
            "teacher": self.fingerprint,
            "alpha": float(self.objective.alpha),
            "temperature": float(self.objective.temperature),
        }

    def settled(
        self, groups: ProcessGroups, tokenizer: PreTrainedTokenizerFast | None, tokens: int
    ) -> DistillationOfRun:
        """The same, knowing how many tokens there are; refuses a teacher that has others."""

        def compare() -> None:
            if groups.is_first and not self.config.distill.allow_vocabulary_mismatch:
                assert tokenizer is not None
                self._require_same_tokens(tokenizer, tokens)

        collectively(compare, groups.world)
        return replace(self, tokens=tokens)

    def build(
        self, model: LanguageModel, precision: Precision, parts: list[Tensor] | None, *, rehearsed: bool = False
    ) -> LossFunction:
        """The loss, with the teacher on the ranks of the student's last stage."""
        groups, flags = model.groups, self.config.distill
        last = self.config.parallel.plan(groups.layout)
        teacher = None
        if groups.pipeline.rank == last.rank_of(last.stages - 1):
            # What has a head is more than the contract says of a model.
            head = model.head  # type: ignore[attr-defined]
            shared = min(head.range.vocabulary, self.shape.vocab_size, self.tokens)
            own = teacher_groups(groups, sharded=flags.teacher_tensor_parallel)
            held = replace(precision, parameters=precision.compute)
            with groups.device:
                execution = Execution(own, held, self.config.training.kernels)
                teacher = Teacher.build(self.shape, execution, head.range, shared)
        if not rehearsed:
            collectively(lambda: None if teacher is None else self._load(teacher), groups.world)
        return DistillationLoss(parts=parts, distillation=self.objective, teacher=teacher)

    def _load(self, teacher: Teacher) -> None:
        pieces = weight_pieces(teacher.model.sharded_parameters())
        if teacher.region is not None:
            pieces.append(Piece(teacher.region.name, teacher.region, teacher.weight))
        load_pieces(self.directory, pieces, verify=False)

    def _require_same_tokens(self, tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
        """Refuse a teacher that has not every token of ``tokenizer`` under the same id."""
        path = self.config.distill.teacher_path
        legal = "a teacher with the same tokens, or --allow-vocabulary-mismatch to compare them by their ids"
        if not holds_tokenizer(self.directory):
            raise ArgonneError(f"teacher_path={str(path)!r} holds no tokenizer to compare tokens with; legal: {legal}")
        table = load_tokenizer(self.directory, self.config.data.trust_remote_code, compare=False).get_vocab()
        theirs = {number: token for token, number in table.items() if number < tokens}
        ours = {number: token for token, number in tokenizer.get_vocab().items()}
        if differs := sorted(number for number in {*ours, *theirs} if ours.get(number) != theirs.get(number)):
            one, two = (repr(found.get(differs[0], "nothing"))[:40] for found in (theirs, ours))
            raise ArgonneError(
                f"teacher_path={str(path)!r} has other tokens than the run's tokenizer: id {differs[0]} is {one}, not "
                f"{two}; legal: {legal}"
            )
        if self.shape.vocab_size < tokens:
            raise ArgonneError(
                f"teacher_path={str(path)!r} has vocab_size={self.shape.vocab_size}, fewer than the tokenizer's "
                f"{tokens}; legal: {legal}"
            )


def loss_of_run(config: RunConfig, groups: ProcessGroups) -> DistillationOfRun:
    """Which teacher the flags mean (collective); a ``LossBuilder``."""
    assert isinstance(config, DistillConfig)
    directory, reports = locate(config.distill.teacher_path, groups)
    log(groups, *reports)
    shape = collectively(lambda: from_huggingface(directory), groups.world)
    found = collectively(lambda: weights_fingerprint(directory) if groups.is_first else "", groups.world)
    if config.distill.teacher_tensor_parallel and groups.tensor.size == 1:
        log(groups, "note: --teacher-tensor-parallel has no effect: the layout has tensor_parallel=1")
    fingerprint = gather_objects(found, groups.world)[0]
    return DistillationOfRun(config.distillation, directory, shape, fingerprint, config)
