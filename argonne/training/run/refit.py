"""The micro-batch of a run that is continued where there is less memory for it: in another layout, or under a limit.

Its global batch is the run's. So sizes that divide it are tried, the largest first, with as many micro-batches as
make it; what fits is kept with the run, for the same layout. What the run began with stays known, and comes back where
it fits again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from argonne.parallel import ProcessGroups
from argonne.parallel.communication.layout import divisors
from argonne.parallel.errors import LayoutError
from argonne.training.batch_shape import BatchShape
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.run.batch import names_micro_batch, with_shape
from argonne.training.run.file import Search
from argonne.training.run.flags_json import flags_to_json
from argonne.training.run.job import log
from argonne.training.run.search import in_vain, largest
from argonne.training.run.setup import Workload

_FOR_MEMORY = {
    "training": "initial_batch_size gradient_accumulation_steps memory_limit recompute precision kernels optimizer",
    "parallel": "fsdp fsdp_shard zero1 pipeline_schedule pipeline_interleave",
    "launch": "device",
}
"""The flags that decide how much memory a step takes, beside the layout, or how much there is."""


def refit(
    config: RunConfig,
    workload: Workload,
    groups: ProcessGroups,
    shape: BatchShape,
    before: Mapping[str, Any],
    found: Search | None,
    computes: bool | None = None,
) -> tuple[BatchShape, Search | None]:
    """The batch of a run that is continued, in micro-batches that fit (collective), and what is kept of the search.

    Nothing is tried where everything is as the run last had it.

    Args:
        config: the flags.
        workload: what is trained.
        groups: the processes.
        shape: the batch as the run began, in this layout.
        before: the ``layout`` and ``flags`` that the run last had, as they are kept.
        found: what searches have come to so far.
        computes: as of ``search``.

    Raises:
        ArgonneError: on every rank alike: nothing fits that keeps the global batch.
    """
    is_named = isinstance(config, ResumeConfig) and names_micro_batch(config)
    now = {"layout": asdict(groups.layout), "flags": flags_to_json(config)}
    if not is_named and _of_memory(before) == _of_memory(now):
        log(groups, *in_vain(config, "the run has found its micro-batch in this layout"))
        here = None if found is None else found.here
        return shape if here is None else _of(shape, here), found
    part = "the micro-batch is part of what a reproducible run is"
    log(groups, *in_vain(config, part if groups.reproducible else None))
    tried = [shape] if groups.reproducible else list(_shapes(config, groups, shape))
    fits = largest([with_shape(config, each) for each in tried], workload, groups, computes, continued=True)
    size = shape.micro_batch if fits is None else fits.config.training.initial_batch_size
    if fits is None or size == shape.micro_batch:
        return shape, None if found is None else replace(found, here=None)
    fitting = _of(shape, size)
    log(
        groups,
        f"micro-batch {size} of {shape.micro_batch} fits{fits.takes}: a step has {fitting.accumulation} micro-batches "
        f"on each replica, so that the run's global batch stays {shape.global_batch}",
    )
    return fitting, replace(found or Search(shape.micro_batch, shape.micro_batch), here=size)


def _shapes(config: RunConfig, groups: ProcessGroups, shape: BatchShape) -> Iterator[BatchShape]:
    """Those that are tried, the largest micro-batch first: what divides the batch and the pipeline can order."""
    plan, least = config.parallel.plan(groups.layout), min(config.training.min_batch_size, shape.micro_batch)
    for size in reversed(divisors(shape.global_batch // shape.replicas)):
        if least <= size < shape.micro_batch:
            try:
                plan.check_micro_batches(_of(shape, size).accumulation)
            except LayoutError:
                continue
            yield _of(shape, size)
        elif size == shape.micro_batch:
            yield shape


def _of(shape: BatchShape, micro_batch: int) -> BatchShape:
    return BatchShape.keeping(shape.global_batch, micro_batch, shape.replicas, shape.block_size)


def _of_memory(kept: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Of a layout and flags, what decides how much memory a step takes, and how much there is."""
    flags = kept.get("flags") or {}
    named = [(group, name) for group, names in _FOR_MEMORY.items() for name in names.split()]
    return kept.get("layout"), [(flags.get(group) or {}).get(name) for group, name in named]
