"""One step of a run, taken by a rank alone with a model of its own, to see whether there is memory for it.

It is the whole step: every micro-batch, the sums over other ranks in equal memory, the update. On a GPU it is computed;
on a CPU its tensors are counted (``counting``), without numbers where these would take longer. Nothing of the run
exists yet that it could change.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from argonne.launch.out_of_memory import complaint
from argonne.models import Batch, LossFunction
from argonne.parallel import Draws, ProcessGroups
from argonne.parallel.communication.isolation import isolated
from argonne.parallel.data_parallel.leaves import LeafSums
from argonne.training.config import RunConfig
from argonne.training.counting import Count, counted
from argonne.training.loss_parts import LossParts
from argonne.training.loss_scale import LossScale
from argonne.training.run.setup import Workload
from argonne.training.state import TrainingState
from argonne.training.step import NotFinite, train_step


@dataclass(frozen=True)
class Rehearsed:
    """What came of a step."""

    fits: bool
    needs: int = 0
    """Bytes of tensors at the most, where they were counted: all of them, or those up to the limit."""
    state: int = 0
    """Those of the weights and moments."""
    state_alone: bool = False
    """These do not fit, whatever the micro-batch."""


@contextmanager
def random_streams_kept(device: torch.device) -> Iterator[None]:
    """Within, whatever is drawn, of PyTorch's streams, Python's and NumPy's, leaves them as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def rehearse(
    config: RunConfig,
    workload: Workload,
    groups: ProcessGroups,
    size: int,
    limit: float | None = None,
    computes: bool = False,
) -> Rehearsed:
    """Try a step of micro-batches of ``size`` sequences, and free all that it took.

    Args:
        config: the flags.
        workload: what is trained.
        groups: the processes, of which none but this one takes part.
        size: sequences of a micro-batch.
        limit: count the bytes of tensors up to this one; None: find out whether there is memory for them.
        computes: the tensors that are counted have numbers; those that are not have them anyway.
    """
    on_gpu, computes = groups.device.type == "cuda", computes or limit is None
    counting: AbstractContextManager[Count | None] = nullcontext() if limit is None else counted(limit, computes)
    fits, state = True, 0
    with counting as count, _garbage_collected(), isolated():
        try:
            learner = TrainingState.build(config, workload, groups)
            learner.loss_scale = LossScale()  # an overflow would end the step before its update
            state = 0 if count is None else count.live
            if count is None:
                learner.initialise(config.training.seed)  # numbers that stay finite
            else:
                with torch.no_grad():  # such numbers too, sooner
                    for own in learner.parameters:
                        own.parameter.zero_()
                learner.replicas.publish()
            parts = LossParts(workload.loss.objective, groups, torch.float32).found
            loss = workload.loss.build(learner.model, workload.precision, parts, rehearsed=True)
            _step(learner, config, groups, size, loss)
        except NotFinite:
            pass  # sums of this rank's parts alone may be, and the run's own step will say so if it is not the cause
        except (RuntimeError, MemoryError) as error:
            if complaint(error) is None:
                raise
            fits = False
        finally:
            learner = loss = None  # type: ignore[assignment]
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(groups.device)
    return Rehearsed(fits, 0 if count is None else count.peak, state)


@contextmanager
def _garbage_collected() -> Iterator[None]:
    """What is made within, such as a model and its hooks in cycles of references, is freed; older objects are not
    looked at, which would take longer than a small step."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def _step(learner: TrainingState, config: RunConfig, groups: ProcessGroups, size: int, loss: LossFunction) -> None:
    seed, clip, block_size = config.training.seed, config.training.gradient_clip, config.data.block_size
    asked = config.training.gradient_accumulation_steps
    count = micro_batches(config, groups, asked)
    tokens = torch.randint(2, (count, size, block_size + 1), device=groups.device)  # of every vocabulary
    documents = tokens.cumsum(-1)[..., :-1] if config.data.document_mask else None
    draws = Draws(seed, 1, torch.arange(count * size).view(count, size))
    batch = Batch(tokens[..., :-1], tokens[..., 1:], documents, divisor=float(tokens.numel()), draws=draws)
    kept = None
    if learner.replicas.leaves is not None:  # what a tree of more micro-batches keeps besides
        more = LeafSums.most(asked) - LeafSums.most(count)
        kept = torch.empty(more * learner.replicas.leaves.gradient_bytes, dtype=torch.uint8, device=groups.device)
    train_step(learner, batch, loss, 0.0, clip)
    del kept


def micro_batches(config: RunConfig, groups: ProcessGroups, accumulation: int) -> int:
    """The fewest micro-batches of a step that take as much memory as ``accumulation`` do.

    A second one finds the gradients of the first. Those of a pipeline are under way together: all of them (``gpipe``),
    or as many as there are stages, and as many again on their way back.
    """
    plan = config.parallel.plan(groups.layout)
    if plan.ranks > 1:
        return accumulation if plan.schedule == "gpipe" else min(accumulation, 2 * plan.stages)
    return min(accumulation, 2)
