"""Whether a run's blocks are compiled, and that they are alike on all ranks before the first step sends anything."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection
from dataclasses import replace

import torch

from argonne.models import Batch, LanguageModel
from argonne.models.compilation import CompiledForward, Graph
from argonne.models.staged import StagedModel
from argonne.parallel import AXES, Draws, Layout, ProcessGroups
from argonne.parallel.communication.collectives import gather_objects
from argonne.parallel.communication.groups import JOINT_AXES
from argonne.parallel.errors import ArgonneError, CollectiveMismatch
from argonne.training.config import RunConfig, TrainingFlags
from argonne.training.run.job import log

Sent = dict[str, list[str]]
"""For each block of a rank, by its name: the collectives of its graphs, in their order."""


def is_asked(config: RunConfig, device: torch.device) -> bool:
    """Whether blocks are to be compiled: on a GPU unless ``--disable-compile``, on a CPU with ``--compile``."""
    training = config.training
    return not training.disable_compile and (training.compile or device.type == "cuda")


def latest_of_two(training: TrainingFlags, given: Collection[str]) -> TrainingFlags:
    """The flags of a resume, where a command that names ``--compile`` takes back a saved ``--disable-compile``."""
    if "compile" in given and "disable_compile" not in given:
        return replace(training, disable_compile=False)
    taken_back = "disable_compile" in given and "compile" not in given
    return replace(training, compile=False) if taken_back else training


def obstacle(config: RunConfig, layout: Layout, device: torch.device, own_model: bool) -> str | None:
    """What the flags ask besides that no compiled block does, if they do."""
    if layout.context > 1 and device.type == "cuda":
        return f"context_parallel={layout.context} on a GPU: its attention would need a mask in memory"
    parallel = config.parallel
    if parallel.reproducible:
        return "reproducible=True: what is compiled has other bits where another layout cuts"
    if layout.pipeline > 1 and parallel.pipeline_schedule == "zb":
        return "pipeline_schedule='zb': what is compiled makes the gradients of weights at once"
    if config.run.trace is not None:
        return f"trace={config.run.trace!r}: what is compiled has no modules to look into"
    return "a model of one's own, of which no block can be called alone" if own_model else None


def compiles(config: RunConfig, layout: Layout, device: torch.device, own_model: bool) -> bool:
    """Whether the run begins with compiled blocks."""
    return is_asked(config, device) and obstacle(config, layout, device, own_model) is None


def check_compile(config: RunConfig, layout: Layout, device: torch.device, own_model: bool) -> None:
    """Refuse to be told to compile what cannot be; where nobody said so, it is eager (``eager_note``).

    Raises:
        ArgonneError: the flags contradict each other.
    """
    if config.training.compile and config.training.disable_compile:
        raise ArgonneError("compile=True conflicts with disable_compile=True; legal: one of them")
    against = obstacle(config, layout, device, own_model)
    if config.training.compile and is_asked(config, device) and against is not None:
        raise ArgonneError(f"compile=True conflicts with {against}; legal: one of them, or --disable-compile")


def eager_note(config: RunConfig, groups: ProcessGroups, own_model: bool) -> list[str]:
    """Why a run is eager that by default would be compiled."""
    against = obstacle(config, groups.layout, groups.device, own_model)
    if against is None or not is_asked(config, groups.device):
        return []
    return [f"note: not compiled, as this does not go with {against}"]


def prepare_blocks(model: LanguageModel, micro_batch: int, block_size: int, documents: bool, seed: int = 0) -> str:
    """Compile the blocks of ``model`` for its micro-batches, on all ranks or on none (collective).

    Each rank compiles forward and backward on its own, and only then do they tell each other how it went: nothing is
    computed or sent by what is compiled, so that none waits for another that cannot.

    Args:
        model: of an execution that compiles.
        micro_batch: sequences of one.
        block_size: tokens of a sequence.
        documents: they are kept apart.
        seed: of the run.

    Returns:
        Why all compute eagerly after all; empty where they do not.

    Raises:
        CollectiveMismatch: on every rank, where ranks would send different things.
    """
    assert isinstance(model, StagedModel)
    groups, began = model.groups, time.monotonic()
    like = _micro_batch(micro_batch, block_size, documents, seed, groups.device)
    log(groups, f"compiling {_counted(len(model.blocks), 'block')} on each rank")
    graphs: dict[str, Graph] = {}
    problem = ""
    for name, prepare in model.prepare(like):
        try:
            graphs[name] = prepare()
        except Exception as error:  # whatever keeps the compiler from it: the run does without
            problem = f"{name} ({_first_line(error)})"
            break
    problems = gather_objects(problem, groups.world)
    for rank, found in enumerate(problems):
        if found:
            return f"rank {rank} cannot compile {found}: every rank computes eagerly"
    # The single ones last: where one is all that a joint axis has, their group is the same, and its name is clearer.
    every = [getattr(groups, name) for name in ("world", *JOINT_AXES, *AXES)]
    axes = {str(axis.group.group_name): axis.name for axis in every if axis.group is not None}
    _require_alike(gather_objects({name: _named(graph, axes) for name, graph in graphs.items()}, groups.world))
    # FSDP of 2.13 warns of what writing to it would do. Nothing does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in model.blocks:
        assert isinstance(block.forward, CompiledForward)
        block.forward.is_on = True
    made = _counted(len(set(map(id, graphs.values()))), "graph")
    log(groups, f"compiled as {made} in {time.monotonic() - began:.0f} s")
    return ""


def _micro_batch(size: int, block_size: int, documents: bool, seed: int, device: torch.device) -> Batch:
    """One of the shape, and of the place in memory, that training has: a part of ids and documents one longer."""
    ids = torch.zeros(size, block_size + 1, dtype=torch.int64, device=device)
    apart = torch.zeros_like(ids)[:, :-1] if documents else None
    draws = Draws(seed, 0, torch.zeros(size, dtype=torch.int64))
    return Batch(ids[:, :-1], ids[:, 1:], apart, draws=draws)


def _named(graph: Graph, axes: dict[str, str]) -> list[str]:
    """What a graph sends, with the axis in place of the process group, whose name ranks need not share."""
    found = []
    for which, sent in (("forward", graph.forward), ("backward", graph.backward)):
        for each in sent:
            what, _, group = each.rpartition(" over ")
            found.append(f"{what} over {axes.get(group, group)} in {which}")
    return found


def _require_alike(of_ranks: list[Sent]) -> None:
    """Raise ``CollectiveMismatch`` unless all ranks that have a block send the same in it."""
    first: dict[str, tuple[int, list[str]]] = {}
    for rank, blocks in enumerate(of_ranks):
        for name, sent in blocks.items():
            other, expected = first.setdefault(name, (rank, sent))
            if sent == expected:
                continue
            length = max(len(sent), len(expected))
            number = next(n for n in range(length) if sent[n : n + 1] != expected[n : n + 1])
            here, there = (each[number] if number < len(each) else "nothing" for each in (sent, expected))
            raise CollectiveMismatch(
                f"rank {rank} would not send in {name}, compiled, what rank {other} does: as number {number + 1} "
                f"{here}, not {there}; legal: --disable-compile"
            )


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # what the compiler was told, behind its own words for it
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"
