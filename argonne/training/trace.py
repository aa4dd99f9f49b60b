"""``--trace``: hashes of what every module makes in a step, forward and backward, and of gradients and weights.

They depend on no layout (``parallel/sharding/hashing.py``), so that runs which should be the same can be compared
module by module. What ranks have copies of counts every copy: it is another hash if one of them is not like the others.

While a step is traced, each module that says how its output is held (``PlacesOutput``), and each of the model's blocks,
has a forward hook. What it makes when autograd recomputes a block is left out: it was hashed in the forward pass, and
gradients belong to that. Micro-batches are told apart by how often their stage has begun: a stage takes those of a step
in their order under every schedule. A gradient is hashed by a hook on the very output, which knows its micro-batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from argonne.models import Batch, CrossEntropyLoss, LanguageModel, LossFunction
from argonne.models.contract import Head
from argonne.parallel import ShardedParameter, context_positions
from argonne.parallel.communication.collectives import gather_objects
from argonne.parallel.communication.reduction import sum_over
from argonne.parallel.sharding.hashing import as_copy, hash_of_box, hash_of_part
from argonne.parallel.sharding.placement import HeldPart, Placement, PlacesInput, PlacesOutput
from argonne.parallel.sharding.region import holding_axes
from argonne.training.trace_file import OF_LEAVES, Kind, TraceLine

_Key = tuple[Kind, str, int]
"""What, of which module or weight, and for activations the leaf (else 0)."""


@dataclass
class _Pass:
    """The micro-batch that a stage computes."""

    stage: float
    """Its number, by which stages are in the order of a forward pass."""
    micro_batch: int = -1
    outputs: Counter[str] = field(default_factory=Counter)
    """How often each name has come in it."""

    def begin(self) -> None:
        self.micro_batch += 1
        self.outputs.clear()


class StepTrace(AbstractContextManager["StepTrace"]):
    """The hashes of one step on this rank; a ``StepObserver``. Its hooks are there while it is entered.

    Args:
        model: what computes.
        leaves: the numbers of this replica's micro-batches among all of the step's.
        count: how many the step has on all replicas.
        ids: ``(sequences, positions)`` of a micro-batch.
    """

    def __init__(self, model: LanguageModel, leaves: Sequence[int], count: int, ids: tuple[int, int]) -> None:
        self.model, self.groups, self.leaves, self.count, self.ids = model, model.groups, leaves, count, ids
        self._hashes: dict[_Key, Tensor] = {}
        self._names: dict[float, dict[str, None]] = {}  # by stage, in forward order
        self._rows: dict[tuple[int, bool], Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> StepTrace:
        assert isinstance(self.model, nn.Module)
        names = {module: name for name, module in self.model.named_modules()}
        blocks, seen = set(self.model.blocks), set[nn.Module]()
        stream = Placement(shares_tokens=self.groups.sequence_parallel)
        for number, stage in (self.model.stages or {0: self.model}).items():
            now = _Pass(number)
            for module in stage.modules():
                if module in seen or module not in names:
                    continue
                seen.add(module)
                if isinstance(module, PlacesInput):
                    self._watch_input(module, names[module], module.input_placement(), now)
                if isinstance(module, PlacesOutput):
                    self._watch_output(module, names[module], module.output_placement(), now)
                elif module in blocks:
                    self._watch_output(module, names[module], stream, now)
            begin = stage.register_forward_pre_hook(lambda *_, now=now: None if _recomputing() else now.begin())
            self._hooks.append(begin)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def loss(self, loss: LossFunction) -> LossFunction:
        """``loss``, whose values are hashed; not where context-parallel ranks have parts of them."""
        if self.groups.context.size > 1:
            return loss
        now = _Pass(math.inf)

        def watched(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def traced(of: Tensor, head: Head, batch: Batch) -> Tensor:
                now.begin()
                value = compute(of, head, batch)
                self._record("loss", value.detach().view(1, 1), Placement(), now)
                return value

            return traced

        traced = watched(loss)
        if isinstance(loss, CrossEntropyLoss):  # a model may have logits
            traced.of_logits = watched(loss.of_logits)  # type: ignore[attr-defined]
        return traced

    def gradients(self, parameters: Iterable[ShardedParameter]) -> None:
        """Hash the complete gradients."""
        self._hash_parameters("gradient", ((s, s.parameter.grad) for s in parameters))

    def weights(self, parameters: Iterable[ShardedParameter]) -> None:
        """Hash the weights after the update."""
        self._hash_parameters("weight", ((s, s.parameter.data) for s in parameters))

    def lines(self) -> list[TraceLine]:
        """The hashes of the whole step, the same on every rank (collective)."""
        everyone = gather_objects((self._names, list(self._hashes)), self.groups.world)
        stages = sorted({stage for names, _ in everyone for stage in names})
        forward = list(
            dict.fromkeys(name for stage in stages for names, _ in everyone for name in names.get(stage, ()))
        )
        keys = sorted(set().union(*(found for _, found in everyone)))
        place = {key: number for number, key in enumerate(keys)}
        hashes = torch.zeros(len(keys), dtype=torch.int64, device=self.groups.device)
        if self._hashes:
            hashes[[place[key] for key in self._hashes]] = torch.stack(list(self._hashes.values()))
        found = sum_over(hashes, self.groups.world).tolist()
        total = {key: found[number] % (1 << 64) for key, number in place.items()}
        return list(_in_order(total, forward, self.count))

    def _watch_input(self, module: nn.Module, name: str, placement: Placement, now: _Pass) -> None:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and not _recomputing():
                self._record(f"{name}.input", arguments[0], placement, now)

        self._hooks.append(module.register_forward_pre_hook(hook))

    def _watch_output(self, module: nn.Module, name: str, placement: Placement, now: _Pass) -> None:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if not _recomputing():
                for number, x in enumerate(output if isinstance(output, tuple) else (output,)):
                    if isinstance(x, Tensor) and x.dim():
                        self._record(f"{name}[{number}]" if number else name, x, placement, now)

        self._hooks.append(module.register_forward_hook(hook))

    def _record(self, name: str, x: Tensor, placement: Placement, now: _Pass) -> None:
        """Hash an activation of the micro-batch that is computed, and its gradient once there is one."""
        leaf = self.leaves[now.micro_batch]
        now.outputs[name] += 1
        again = "" if now.outputs[name] == 1 else f"#{now.outputs[name]}"  # a module that is used twice
        stage = now.stage

        def add(kind: Kind, x: Tensor) -> None:
            for part in placement.held(x, self.groups.tensor):
                whole = (_sibling(name, part.name) if part.name else name) + again
                self._names.setdefault(stage, {})[whole] = None
                self._add_activation((kind, whole, leaf), part, placement.shares_tokens)

        add("forward", x)
        if x.requires_grad:
            x.register_hook(lambda gradient: add("backward", gradient))

    def _add_activation(self, key: _Key, part: HeldPart, shares_tokens: bool) -> None:
        if key[0] == "backward" and part.is_shared:
            return  # each holder has what its own query heads make of it, and nothing ever adds that up
        columns = torch.arange(part.first_column, part.first_column + part.values.shape[1])
        rows = self._whole_rows(len(part.values), shares_tokens)
        found = hash_of_part(part.values, (rows, columns), (0, part.features))
        self._add(key, as_copy(found, part.holders.index(self.groups.tensor.rank), len(part.holders)))

    def _whole_rows(self, count: int, shares_tokens: bool) -> Tensor:
        """Where the rows that this rank has are in the whole micro-batch ``[sequences * positions]``."""
        if (count, shares_tokens) not in self._rows:
            axis, context = self.groups.tensor, self.groups.context
            ranks = axis.size if shares_tokens else 1
            start = axis.rank * count if shares_tokens else 0
            rows = torch.arange(count * ranks)
            sequences, positions = self.ids
            if context.size > 1 and len(rows) * context.size == sequences * positions:
                rows = (torch.arange(sequences)[:, None] * positions + context_positions(positions, context)).flatten()
            self._rows[count, shares_tokens] = rows[start : start + count].to(self.groups.device)
        return self._rows[count, shares_tokens]

    def _hash_parameters(self, kind: Kind, values: Iterable[tuple[ShardedParameter, Tensor | None]]) -> None:
        axes = holding_axes(self.groups)
        for sharded, value in values:
            for region in sharded.spec.regions:
                if value is None or 0 in region.shape:
                    continue
                copy, copies = 0, 1
                for holders, rank in ((region.holders_over(axis).ranks, axis.rank) for axis in axes):
                    copy, copies = copy * len(holders) + holders.index(rank), copies * len(holders)
                found = hash_of_box(region.part_of(value), region.start, region.whole_shape)
                self._add((kind, region.name, 0), as_copy(found, copy, copies))

    def _add(self, key: _Key, found: Tensor) -> None:
        self._hashes[key] = self._hashes[key] + found if key in self._hashes else found


def _in_order(hashes: dict[_Key, int], forward: Sequence[str], leaves: int) -> Iterator[TraceLine]:
    """The order of execution: forward, and all else back from the end; a weight is with its module."""
    place = {name: number for number, name in enumerate(forward)}
    weights = sorted(
        {name for kind, name, _ in hashes if kind in ("gradient", "weight")},
        key=lambda name: (place.get(name.rpartition(".")[0], len(forward)), name),  # an output weight comes last
    )
    orders: dict[Kind, Iterable[str]] = {
        "forward": forward,
        "backward": reversed(forward),
        "gradient": reversed(weights),
        "weight": weights,
    }
    for kind, names in orders.items():
        numbers = range(leaves if kind in OF_LEAVES else 1)
        for name in names:
            if any((kind, name, number) in hashes for number in numbers):
                yield TraceLine(kind, name, tuple(hashes.get((kind, name, number), 0) for number in numbers))


def _sibling(name: str, other: str) -> str:
    """``model.qkv_proj`` and ``q_proj`` -> ``model.q_proj``."""
    return f"{name.rpartition('.')[0]}.{other}".removeprefix(".")


def _recomputing() -> bool:
    """Whether a backward pass runs in this thread: what is computed in it was computed before."""
    return bool(torch._C._current_graph_task_id() != -1)
