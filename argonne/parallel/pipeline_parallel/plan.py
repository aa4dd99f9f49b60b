"""Which pipeline stages there are, who holds them, and how long the ranks wait: arithmetic, no communication.

A stage is a run of a model's blocks. Schedules differ in how many stages a rank has and in the order of its
work: ``gpipe`` (arXiv 1811.06965) all forwards, then all backwards; ``1f1b`` (2006.09503) a backward as soon as
there is one, for less memory; ``interleaved`` (2104.04473) several stages a rank, for a smaller bubble; ``zb``
(2401.10241, ZB-V) two stages a rank in the shape of a V, weight gradients computed where a rank would wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from argonne.parallel.errors import LayoutError

ScheduleName = Literal["1f1b", "interleaved", "zb", "gpipe"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

Work = tuple[str, int, int]
"""What a rank does next: F(orward), B(ackward), I(nput's part of a backward) or W(eights' part), the stage, and
the micro-batch."""

_COST = {"F": 1, "B": 2, "I": 1, "W": 1}


@dataclass(frozen=True)
class PipelinePlan:
    """The stages of a pipeline of ``ranks`` processes."""

    ranks: int
    schedule: ScheduleName = "1f1b"
    stages_per_rank: int = 1
    """Of ``interleaved`` 2 or more; of ``zb`` 2; of the others 1."""

    @classmethod
    def of(cls, schedule: ScheduleName, ranks: int, interleave: int = 2) -> PipelinePlan:
        """The plan of ``schedule``; ``interleave`` is the number of stages a rank when it interleaves.

        Raises:
            LayoutError: the schedule is not known, or does not interleave so.
        """
        if schedule not in SCHEDULES:
            raise LayoutError(f"pipeline_schedule={schedule!r} is not known; legal: {', '.join(SCHEDULES)}")
        if ranks == 1:
            return cls(1, schedule, 1)
        if schedule == "interleaved" and interleave < 2:
            raise LayoutError(f"pipeline_interleave={interleave} is not legal with interleaved; legal: 2 or more")
        return cls(ranks, schedule, {"interleaved": interleave, "zb": 2}.get(schedule, 1))

    @property
    def stages(self) -> int:
        return self.ranks * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """Who holds ``stage``: rank after rank, round after round; ``zb`` goes back the way it came."""
        turn, place = divmod(stage, self.ranks)
        return self.ranks - 1 - place if self.schedule == "zb" and turn % 2 else place

    def held(self, rank: int) -> tuple[int, ...]:
        """The stages of ``rank``, in model order."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)

    def check_layers(self, layers: int) -> None:
        """Raise ``LayoutError`` unless there is a block for each stage."""
        if layers < self.stages:
            legal = ", ".join(str(n) for n in range(1, layers // self.stages_per_rank + 1)) or "1"
            raise LayoutError(
                f"num_hidden_layers={layers} is less than the {self.stages} stages of pipeline_parallel={self.ranks} "
                f"with {self.schedule} ({self.stages_per_rank} a rank); legal pipeline_parallel: {legal}"
            )

    def check_micro_batches(self, micro_batches: int) -> None:
        """Raise ``LayoutError`` unless the schedule can order ``micro_batches`` a step."""
        if self.ranks == 1:
            return
        least = {"1f1b": self.ranks, "interleaved": self.ranks, "zb": 1, "gpipe": 1}[self.schedule]
        if micro_batches < least:
            raise LayoutError(
                f"gradient_accumulation_steps={micro_batches} is less than pipeline_parallel={self.ranks}: "
                f"{self.schedule} needs a micro-batch for each rank; legal: {least} or more (or --pipeline-schedule "
                "gpipe or zb)"
            )
        if self.schedule == "interleaved" and micro_batches % (micro_batches // self.ranks):
            below = micro_batches - micro_batches % self.ranks
            raise LayoutError(
                f"gradient_accumulation_steps={micro_batches} cannot be shared out over rounds of pipeline_parallel="
                f"{self.ranks} with interleaved; legal: a multiple of {self.ranks} ({below} or {below + self.ranks})"
            )

    def single_stage_order(self, micro_batches: int) -> dict[int, list[Work]]:
        """What each rank does, in order, when each has one stage (``gpipe`` and ``1f1b``)."""
        orders = {}
        for rank in range(self.ranks):
            ahead = micro_batches if self.schedule == "gpipe" else min(micro_batches, self.ranks - rank)
            work: list[Work] = [("F", rank, m) for m in range(ahead)]
            for m in range(micro_batches):
                work.append(("B", rank, m))
                if m + ahead < micro_batches:
                    work.append(("F", rank, m + ahead))
            orders[rank] = work
        return orders


def balance(costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Cut a chain of blocks into ``stages`` runs so that the dearest stage is as cheap as can be.

    Args:
        stages: how many runs; each has at least one block.
        first: what the first stage has besides its blocks (the embedding).
        last: what the last stage has besides (the head and the loss).

    Returns:
        The blocks of each stage; of equally good cuts the one whose costs are the most even.

    Raises:
        LayoutError: fewer blocks than stages.
    """
    blocks = len(costs)
    if stages > blocks:
        raise LayoutError(f"{blocks} blocks cannot make {stages} stages; legal: 1 to {blocks}")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def stage_cost(stage: int, begin: int, end: int) -> float:
        return sums[end] - sums[begin] + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    # best[end]: of the stages so far up to block ``end``, (dearest, sum of squares) and where each ends.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(stages):
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage + 1, blocks - (stages - stage - 1) + 1):
            following[end] = min(
                (max(dearest, cost), squares + cost**2, (*ends, end))
                for begin, (dearest, squares, ends) in best.items()
                if begin < end and (cost := stage_cost(stage, begin, end)) >= 0
            )
        best = following
    ends = best[blocks][2]
    return [range(begin, end) for begin, end in zip((0, *ends), ends, strict=False)]


def bubble_fraction(orders: Mapping[int, Sequence[Work]], costs: Sequence[float]) -> float:
    """The share of the ranks' time, from 0 to 1, in which they wait for each other.

    Args:
        costs: of a forward of each stage; a backward costs twice as much, and each of its parts once.

    Communication takes no time here. With equal stages this is (p - 1) / (m + p - 1) for ``1f1b`` and ``gpipe``.
    """
    last = len(costs) - 1
    done: dict[Work, float] = {}
    clock = dict.fromkeys(orders, 0.0)
    place = dict.fromkeys(orders, 0)
    busy = sum(_COST[kind] * costs[stage] for order in orders.values() for kind, stage, _ in order)

    def ready_at(work: Work) -> float | None:
        kind, stage, micro_batch = work
        if kind == "F":
            before = [[("F", stage - 1, micro_batch)]] if stage > 0 else []
        elif kind == "W":
            before = [[("I", stage, micro_batch)]]
        else:
            before = [[("F", stage, micro_batch)]]
            if stage < last:
                before.append([("B", stage + 1, micro_batch), ("I", stage + 1, micro_batch)])
        times = [[done[w] for w in either if w in done] for either in before]
        return None if any(not t for t in times) else max((t[0] for t in times), default=0.0)

    waiting = [rank for rank in orders if orders[rank]]
    while waiting:
        moved = False
        for rank in list(waiting):
            while place[rank] < len(orders[rank]):
                work = orders[rank][place[rank]]
                ready = ready_at(work)
                if ready is None:
                    break
                clock[rank] = max(clock[rank], ready) + _COST[work[0]] * costs[work[1]]
                done[work] = clock[rank]
                place[rank] += 1
                moved = True
            if place[rank] == len(orders[rank]):
                waiting.remove(rank)
        if not moved:
            raise LayoutError("the order of a pipeline's work waits for itself")
    return 1 - busy / (len(orders) * max(clock.values()))
