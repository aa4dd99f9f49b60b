"""Cross-entropy and the divergence from a teacher in one, of logits that no rank has whole, neither's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from argonne.parallel.legal import require_number, require_share
from argonne.parallel.tensor_parallel.cross_entropy import Objective, SavedLogits, ShardedSoftmax
from argonne.parallel.tensor_parallel.embedding import VocabularyRange
from argonne.parallel.tensor_parallel.gemm import product


@dataclass(frozen=True)
class Distillation:
    """What is minimised of a position: alpha * CE + (1 - alpha) * T ** 2 * KL(teacher || student).

    CE is the cross-entropy of the next token. KL is between the two distributions over the tokens that both have, each
    of its logits over T (Hinton et al. 2015, arXiv 1503.02531).
    """

    alpha: float = 0.5
    """The weight of CE, 0 to 1."""
    temperature: float = 1.0
    """T, more than 0."""

    parts: ClassVar[tuple[str, ...]] = ("cross_entropy", "kl_divergence")
    """What is told apart of the loss: CE and KL themselves, without their weights."""

    def __post_init__(self) -> None:
        require_share("alpha", self.alpha)
        require_number("temperature", self.temperature)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each of ``parts`` in the loss."""
        return self.alpha, (1 - self.alpha) * self.temperature**2


@dataclass(frozen=True)
class TeacherRows:
    """What a rank needs of a teacher to have its logits of the rank's own tokens of the vocabulary."""

    hidden: Tensor
    """``[tokens, the teacher's hidden]``: its last hidden values."""
    weight: Tensor
    """``[shared tokens of the rank's range, the teacher's hidden]``: those rows of its output weight."""
    first: int
    """The token of the first row: where the rank's range begins."""
    shared: int
    """The tokens ``0 <= id < shared`` are those that both models have."""

    def tokens_of(self, block: VocabularyRange) -> int:
        """How many of a block's tokens, its first, are shared."""
        return max(0, min(block.stop, self.shared) - block.start)

    def logits(self, block: VocabularyRange, dtype: torch.dtype) -> Tensor:
        """``[tokens, shared tokens of block]``."""
        start = block.start - self.first
        return product(self.hidden, self.weight[start : start + self.tokens_of(block)]).to(dtype)


@dataclass(frozen=True)
class _SavedBoth(SavedLogits):
    """The student's logits, and the exponentials of the teacher's of the tokens that are shared."""

    teacher: Tensor | None = None
    teacher_shift: Tensor | None = None


@dataclass
class DistillationSoftmax(ShardedSoftmax):
    """The arithmetic of ``Distillation``: a ``ShardedSoftmax`` that has the teacher's logits of its tokens too.

    Its statistics are those of the cross-entropy, then the maximum and the sum of exponentials of the shared tokens of
    the student and those of the teacher, then the sum of the teacher's exponentials times the difference of the two.
    """

    distillation: Distillation
    teacher: TeacherRows

    sums_of_a_token: ClassVar[int] = 6
    room: ClassVar[int] = 2

    @classmethod
    def beside(
        cls, distillation: Distillation, teacher: TeacherRows
    ) -> Callable[[Tensor, VocabularyRange, Objective], ShardedSoftmax]:
        """How a rank's logits are computed with beside those of ``teacher``."""
        return lambda ids, vocabulary, objective: cls(ids, vocabulary, objective, distillation, teacher)

    @property
    def names(self) -> tuple[str, ...]:
        """Of what ``parts`` tells."""
        return self.distillation.parts

    def __getitem__(self, chunk: slice) -> ShardedSoftmax:
        teacher = replace(self.teacher, hidden=self.teacher.hidden[chunk])
        return replace(self, ids=self.ids[chunk], teacher=teacher)

    def statistics(self, logits: Tensor) -> tuple[Tensor, SavedLogits]:
        """As of the class, ``[8, tokens]``; all maxima are finite, of tokens that are not there the lowest number."""
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = values.new_zeros(8, len(values))
        found[[3, 5]] = torch.finfo(values.dtype).min
        found[:3] = super().statistics(values)[0]
        shared, temperature = self.teacher.tokens_of(self.vocabulary), self.distillation.temperature
        if not shared:
            return found, _SavedBoth(values, None, values[:, :0], found[5])
        own = values[:, :shared]
        if shared == self.vocabulary.tokens and temperature == 1:
            found[3:5] = found[:2]
        else:
            found[3] = own.amax(1) / temperature
            found[4] = torch.div(own, temperature).sub_(found[3][:, None]).exp_().sum(1)
        teacher = self.teacher.logits(self.vocabulary, values.dtype).div_(temperature)
        found[5] = teacher.amax(1)
        teacher.sub_(found[5][:, None])
        apart = torch.sub(teacher, own, alpha=1 / temperature).add_(found[3][:, None])
        exponentials = teacher.exp_()
        found[6] = exponentials.sum(1)
        found[7] = apart.mul_(exponentials).sum(1)
        return found, _SavedBoth(values, None, exponentials, found[5])

    def losses(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each position, and ``[6, tokens]``: top and log-sum of the three softmaxes."""
        losses, sums = super().losses(statistics[:, :3])
        student, teacher = (_combined(statistics[:, first : first + 2]) for first in (3, 5))
        sums = torch.cat((sums, student, teacher))
        alpha, temperature = self.distillation.alpha, self.distillation.temperature
        losses = alpha * losses + (1 - alpha) * temperature**2 * self._divergence(statistics, sums)
        return torch.where(self.counted, losses, 0.0), sums

    def parts(self, statistics: Tensor, sums: Tensor) -> Tensor:
        """The cross-entropy and the divergence of each position ``[2, tokens]``."""
        cross_entropy = super().losses(statistics[:, :3])[0]
        divergence = torch.where(self.counted, self._divergence(statistics, sums), 0.0)
        return torch.stack((cross_entropy, divergence))

    def save(self, logits: Tensor, sums: Tensor) -> SavedLogits:
        """As ``statistics`` saves it, when the ``sums`` are known."""
        values = logits.to(sums.dtype)
        teacher = self.teacher.logits(self.vocabulary, sums.dtype).div_(self.distillation.temperature)
        return _SavedBoth(values, None, teacher.sub_(sums[4][:, None]).exp_(), sums[4])

    def gradient(self, saved: SavedLogits, sums: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        """The gradient of the logits: scale * (alpha * (softmax - target) + (1 - alpha) * T * (student - teacher))."""
        assert isinstance(saved, _SavedBoth)
        assert saved.teacher is not None
        assert saved.teacher_shift is not None
        alpha, temperature = self.distillation.alpha, self.distillation.temperature
        scale, _ = self.factors(sums, scale)
        of_entropy, of_divergence = alpha * scale, (1 - alpha) * temperature * scale
        values, shared = saved.values, saved.teacher.shape[1]
        alike = (
            shared == self.vocabulary.tokens and temperature == 1 and self.vocabulary.vocabulary <= self.teacher.shared
        )
        result = (values - sums[0, :, None]).exp_()
        result.mul_((((of_entropy + of_divergence) if alike else of_entropy) * (-sums[1]).exp())[:, None])
        if self.vocabulary.tokens:
            column, mine = self.vocabulary.localise(self.ids)
            result.scatter_add_(1, column[:, None], torch.where(mine, -of_entropy, 0.0)[:, None])
        own = result[:, :shared]
        if not alike:
            student = torch.div(values[:, :shared], temperature).sub_(sums[2][:, None]).exp_()
            own.add_(student.mul_((of_divergence * (-sums[3]).exp())[:, None]))
        factor = of_divergence * (saved.teacher_shift - sums[4] - sums[5]).exp()
        own.sub_(saved.teacher.mul_(factor[:, None]))
        return result if out is None else out.copy_(result)

    def _divergence(self, statistics: Tensor, sums: Tensor) -> Tensor:
        """KL of each position, from the statistics of all parts of the vocabulary."""
        student, teacher, total, apart = (statistics[:, index] for index in (3, 5, 6, 7))
        (student_top, student_log), (teacher_top, teacher_log) = sums[2:4], sums[4:6]
        # Each part's difference is between what is left above its own maxima.
        shifted = apart + total * ((teacher - teacher_top) - (student - student_top))
        mean = ((teacher - teacher_top).exp() * shifted).sum(0) / teacher_log.exp()
        return mean - teacher_log + student_log


def _combined(statistics: Tensor) -> Tensor:
    """``[parts, 2, tokens]`` of maxima and sums of exponentials -> ``[2, tokens]``: the top, and the log of the sum."""
    top = statistics[:, 0].amax(0)
    return torch.stack((top, ((statistics[:, 0] - top).exp() * statistics[:, 1]).sum(0).log()))
