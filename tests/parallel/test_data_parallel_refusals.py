"""What data parallelism would do wrong in silence is refused, on every rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argonne.parallel import Layout, Precision, ProcessGroups, data_parallel
from argonne.parallel.errors import ArgonneError
from tests.parallel.replicas import Used
from tests.pool import RankPool


def refused(groups: ProcessGroups, what: str) -> str:
    """The message of what must not be done."""
    model = Used([((3,), torch.float64)])
    used: list[Tensor | None] = [torch.ones(3, dtype=torch.float64)]
    try:
        if what == "kind":
            data_parallel(model, groups, "ddp")
        elif what == "precision":
            data_parallel(
                model, groups, "fsdp", precision=Precision(compute=torch.bfloat16, accumulate_in_product=True)
            )
        elif what.startswith("scalar"):
            model.parts.append(torch.zeros(()))
            data_parallel(model, groups, what.split()[1])
        else:
            strategy = data_parallel(model, groups, what.split()[1])
            if "unbegun" not in what:
                strategy.begin(2 if "few" in what else 1, deferred="deferred" in what)
            for _ in range(2 if "many" in what else 1):
                model(used).backward()
            if "twice" in what:
                strategy.begin(1)
            strategy.complete()
    except (ArgonneError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("kind", "ArgonneError: data parallel kind='ddp' is not known; legal: replicate, zero1, fsdp"),
        ("precision", "ArgonneError: accumulate_in_product with compute=torch.bfloat16 makes gradients of two dtypes"),
        ("scalar zero1", "ArgonneError: parts.1 of shape [] and strides [] cannot be cut into rows"),
        ("scalar fsdp", "ArgonneError: parts.1 is a scalar"),
        ("many replicate", "LateGradient: a gradient was added to after its bucket was sent"),
        ("many zero1", "LateGradient: a gradient was added to after its bucket was sent"),
        ("deferred fsdp", "ArgonneError: kind='fsdp' cannot wait for deferred gradients; legal: replicate, zero1"),
        ("twice replicate", "RuntimeError: begin() was called twice without complete() between"),
        ("unbegun zero1", "RuntimeError: complete() was called without begin()"),
    ],
)
def test_what_would_go_wrong_silently_is_refused(ranks: RankPool, what: str, message: str) -> None:
    for found in ranks.run(Layout(data=2), refused, what):
        assert found.startswith(message)
