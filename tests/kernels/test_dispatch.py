"""Which backend computes, what is refused, and how the ops behave under the compiler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.kernels import (
    KernelError,
    apply_rope,
    apply_rope_packed,
    cross_entropy,
    dispatch,
    linear_cross_entropy,
    rms_norm,
    rope_tables,
    swiglu,
)
from argonne.kernels.gpu import rms_norm as gpu_rms_norm
from argonne.kernels.gpu import rope as gpu_rope
from argonne.kernels.gpu import swiglu as gpu_swiglu
from argonne.models import ArgonneConfig
from argonne.models.decoder import AttentionInputs, Block
from argonne.models.execution import Execution
from argonne.parallel import ProcessGroups, VocabParallelHead, initialise, sharded_parameters
from argonne.parallel.communication.groups import Axis

X, WEIGHT = torch.ones(2, 3, 4), torch.ones(4)
TABLES = rope_tables(3, 4, 100.0)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


REFUSED = {
    "backend": (lambda: swiglu(X, X, backend="cuda"), "backend='cuda' is not known; legal: auto, torch, triton"),
    "device": (lambda: swiglu(X, X, backend="triton"), "gate is on cpu; backend='triton' accepts cuda"),
    "norm device": (lambda: rms_norm(X, WEIGHT, 1e-6, backend="triton"), "x is on cpu; backend='triton' accepts"),
    "weight": (lambda: rms_norm(X, WEIGHT[:3], 1e-6), "weight=[3] is not supported; legal: [4] as in x"),
    "no dimension": (lambda: rms_norm(torch.tensor(1.0), WEIGHT, 1e-6), "weight=[4] is not supported; legal: []"),
    "residual": (
        lambda: rms_norm(X, WEIGHT, 1e-6, residual=X.half()),
        "residual=[2, 3, 4] torch.float16 is not supported; legal: [2, 3, 4] torch.float32 as x",
    ),
    "odd": (lambda: swiglu(X[..., :3]), "gate=[2, 3, 3] is not supported; legal: an even last size, without up"),
    "up": (lambda: swiglu(X, X[:1]), "up=[1, 3, 4] torch.float32 is not supported; legal: [2, 3, 4] torch.float32"),
    "heads": (lambda: apply_rope(X[0], *TABLES), "x=[3, 4] is not supported; legal: [..., sequence, heads, head_dim]"),
    "tables": (lambda: apply_rope(X[..., :2], *TABLES), "cos=[3, 2] is not supported; legal: [2 or more positions"),
    "short tables": (lambda: apply_rope(torch.ones(5, 1, 4), *TABLES), "cos=[3, 2] is not supported; legal: [5 or"),
    "sin": (lambda: apply_rope(X, TABLES[0], TABLES[1][:2]), "sin=[2, 2] is not supported; legal: [3, 2] as cos"),
    "positions": (
        lambda: apply_rope(X, *TABLES, positions=torch.zeros(3)),
        "positions=[3] torch.float32 is not supported; legal: integers [2]",
    ),
    "packed": (lambda: apply_rope_packed(X, *TABLES, 2), "key_value_heads=2 is not supported; legal: 1 to 1"),
    "targets": (lambda: cross_entropy(X, torch.zeros(2)), "targets=[2] is not supported; legal: [2, 3] as the logits'"),
    "range": (
        lambda: cross_entropy(X, torch.zeros(2, 3), axis=Axis("tensor", 2, 1)),
        "vocabulary=None is not supported; legal: the range of this rank, one of 2",
    ),
    "head": (
        lambda: linear_cross_entropy(
            X[0], VocabParallelHead(5, 4, ProcessGroups.single()), torch.zeros(3).long(), backend="triton"
        ),
        "x is on cpu; backend='triton' accepts cuda",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_kernel_does_not_support_is_refused_naming_it(name: str) -> None:
    call, expected = REFUSED[name]
    with pytest.raises(KernelError) as refused:
        call()
    assert str(refused.value).startswith(expected)


def test_triton_refuses_float64_and_auto_takes_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interprets", lambda: True)
    with pytest.raises(KernelError, match="x is torch.float64; backend='triton' accepts torch.float32, torch.bfloat16"):
        rms_norm(X.double(), WEIGHT, 1e-6, backend="triton")
    assert rms_norm(X.double(), WEIGHT, 1e-6).dtype == torch.float64


def test_without_triton_installed_torch_computes_and_triton_is_refused() -> None:
    program = (
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'triton' else found(name, *more)\n"
        "import sys, torch, os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "from argonne.kernels import swiglu\n"
        "x = torch.ones(2, 4); print(swiglu(x).shape, 'triton' in sys.modules)\n"
        "try: swiglu(x, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert told[0] == "torch.Size([2, 2]) False"
    assert told[1] == "backend='triton' needs the package triton, which is not installed; legal here: auto, torch"


def case(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def op_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    half = torch.bfloat16
    x, residual, weight = case(normal(2, 3, 10, seed=1), normal(2, 3, 10, seed=2), normal(10, seed=3))
    row, bias = case(normal(10, seed=4, dtype=half), normal(10, seed=5))
    heads = normal(2, 3, 4, 6, seed=6).requires_grad_()
    tables, where = rope_tables(9, 4, 100.0), torch.tensor([0, 8, 3, 3, 1, 5])
    gate, up = case(normal(3, 8, seed=7), normal(3, 8, seed=8))
    scale = torch.rand(6)
    return {
        "rms_norm": (gpu_rms_norm.op, (x, None, weight, 1e-6)),
        "rms_norm of a sum": (gpu_rms_norm.op, (x, residual, weight, 1e-6)),
        "rms_norm of a row": (gpu_rms_norm.op, (row, None, bias, 1e-6)),
        "rms_norm backward": (gpu_rms_norm.backward_op, (x.detach(), None, residual.detach(), weight.detach(), scale)),
        "rope": (gpu_rope.op, (heads, *tables, None, 1.0)),
        "rope at positions": (gpu_rope.op, (heads, *tables, where, 1.0)),
        "swiglu": (gpu_swiglu.op, (gate, up)),
        "swiglu packed": (gpu_swiglu.op, (gate, None)),
        "swiglu backward": (gpu_swiglu.backward_op, (gate.detach()[:, :4], up.detach(), None)),
    }


@pytest.mark.parametrize("name", op_calls())
def test_op_is_registered_as_torch_wants_it(name: str) -> None:
    op, arguments = op_calls()[name]
    torch.library.opcheck(op, arguments)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "rms_norm": lambda x, residual, weight, eps: rms_norm(x, weight, eps),
    "rms_norm of a sum": lambda x, residual, weight, eps: rms_norm(x, weight, eps, residual=residual)[0],
    "rope": lambda x, cos, sin, where, sign: apply_rope(x, cos, sin),
    "rope at positions": lambda x, cos, sin, where, sign: apply_rope(x, cos, sin, positions=where.view(2, 3)),
    "swiglu": lambda gate, up: swiglu(gate, up),
    "swiglu packed": lambda gate, up: swiglu(gate),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_op_on_cpu_has_the_values_and_gradients_of_the_reference(name: str) -> None:
    op, arguments = op_calls()[name]
    results = []
    for call in (op, REFERENCES[name]):
        out = call(*arguments)
        out = out[0] if isinstance(out, tuple) else out
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        gradients = torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), leaves)
        results.append((out, *gradients))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ops", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["reference", "ops"])
def test_a_block_compiles_as_one_graph_with_equal_gradients(monkeypatch: pytest.MonkeyPatch, ops: bool) -> None:
    config = ArgonneConfig(24, 1, 6, 3, 56, 40, max_position_embeddings=16)
    groups = ProcessGroups.single()
    block = Block(config, Execution(groups))
    initialise(sharded_parameters(block, groups), seed=1)
    inputs = AttentionInputs(*rope_tables(8, config.head_dim, 1e4), Axis("context"))
    found = {}
    for compiled in (False, True):
        if compiled and ops:
            # As on a GPU, up to the body of each op, which is of torch here.
            monkeypatch.setattr(dispatch, "interprets", lambda: True)
            for module in block.modules():
                if hasattr(module, "backend"):
                    module.backend = "triton"
        run = torch.compile(block, fullgraph=True) if compiled else block
        for batch in (2, 3):  # the second shape: dynamic
            x = normal(batch * 8, 24, seed=2).requires_grad_()
            block.zero_grad()
            run(x, inputs).square().sum().backward()
            found[compiled, batch] = [x.grad, *(p.grad.clone() for p in block.parameters())]
    for batch in (2, 3):
        for ours, theirs in zip(found[True, batch], found[False, batch], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
