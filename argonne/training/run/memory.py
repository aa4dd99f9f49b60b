"""What to say when memory has run out: the sizes of this run, and what would make them smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from argonne.launch.out_of_memory import told
from argonne.models.recompute import Recompute
from argonne.parallel import ProcessGroups
from argonne.parallel.errors import ArgonneError
from argonne.training.batch_shape import BatchShape
from argonne.training.config import RunConfig
from argonne.training.machine import GIB
from argonne.training.run.rehearsal import Rehearsed

USABLE = 0.9
"""Of a limit on a CPU, what the interpreter and tensors may take: the rest is for what is not counted, such as text
that is being read, an operator's own room, and gaps between blocks of memory."""


@dataclass(frozen=True)
class Room:
    """The memory that a rank may use on a CPU."""

    limit: int
    """Bytes of the process."""
    own: int
    """Those that it has already: the interpreter, and what it has read."""
    kind: str
    """What the limit is."""

    @property
    def for_tensors(self) -> float:
        """Bytes."""
        return USABLE * self.limit - self.own


def memory_told(
    config: RunConfig, shape: BatchShape, groups: ProcessGroups, when: Callable[[], str]
) -> AbstractContextManager[None]:
    """Within, memory that runs out ends this rank with one line: ``when``, with which sizes, and what to change."""

    def what() -> str:
        sizes = f"micro-batch {shape.micro_batch} x block_size={shape.block_size} at {groups.layout}"
        ways = ", ".join(_layouts(config, groups))
        return f"{when()}, with {sizes}; legal: {_smaller(config, shape)}{ways}"

    return told(what)


def nothing_fits(
    tried: Sequence[RunConfig],
    groups: ProcessGroups,
    rank: int,
    found: Rehearsed,
    room: Room | None,
    continued: bool,
) -> ArgonneError:
    """The refusal of a run of which nothing that was ``tried`` fits into the memory of ``rank``.

    Args:
        tried: the flags, of the largest micro-batch first.
        groups: the processes.
        rank: the first on which the last of them does not fit.
        found: what the last needs there.
        room: what there is; None where nothing was counted.
        continued: the run has begun, and is what it is.
    """
    config = tried[-1]
    sizes = [each.training.initial_batch_size for each in (tried[0], config)]
    block_size, least, fixed = config.data.block_size, sizes[1], groups.reproducible and continued
    what = f"micro-batch {least}" if sizes[0] == least else f"no micro-batch from {sizes[0]} down to {least}"
    what += f" of block_size={block_size} {'does not fit' if sizes[0] == least else 'fits'}"
    needs = ""
    if room is not None:
        needs = f"tensors need {found.needs / GIB:.3g}, weights and moments {found.state / GIB:.3g} of them"
        if found.state_alone:
            what = "the weights and moments of the model alone do not fit"
            needs = f"they need {found.state / GIB:.3g}, and a step with micro-batch {least} {found.needs / GIB:.3g}"
        needs = (
            f": of {room.limit / GIB:.3g} GiB ({room.kind}) {1 - USABLE:.0%} are left for what is not counted, the "
            f"process has {room.own / GIB:.3g} itself, and {needs}"
        )
    ways = []
    if not found.state_alone and not fixed:
        ways += ["a smaller --min-batch-size"] if least > 1 else []
    ways += _layouts(config, groups, helps_steps=not found.state_alone)
    if not continued:
        ways += ["a smaller model (--preset)" if found.state_alone else "a smaller --block-size"]
    because = ", as the micro-batch is part of what a reproducible run is" if fixed else ""
    return ArgonneError(f"{what} into the memory of rank {rank}{needs}{because}; legal: {', '.join(ways)}")


def _layouts(config: RunConfig, groups: ProcessGroups, helps_steps: bool = True) -> list[str]:
    """What takes less memory than these flags, with the same micro-batch."""
    ways = ["--recompute full"] if helps_steps and config.recompute != Recompute.FULL else []
    ways += ["--fsdp"] if groups.replicas.size > 1 and not config.parallel.fsdp else []
    return [*ways, "more processes with --tensor-parallel or --pipeline-parallel"]


def _smaller(config: RunConfig, shape: BatchShape) -> str:
    """Half of the micro-batch, with the same global batch; a reproducible run cannot have that."""
    half = shape.micro_batch // 2
    if config.parallel.reproducible or not half or shape.micro_batch % 2:
        return ""
    return (
        f"--initial-batch-size {half} --gradient-accumulation-steps {2 * shape.accumulation} (the same global batch), "
    )
