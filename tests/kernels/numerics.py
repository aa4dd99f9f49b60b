"""How far a backend is from float64, kernel by kernel: run in a process of the interpreter, or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from argonne.kernels import Backend, apply_rope, apply_rope_packed, cross_entropy, rms_norm, rope_tables, swiglu
from argonne.models import ArgonneConfig, ArgonneModel, CrossEntropyLoss, Execution
from argonne.parallel import Layout, Objective, ProcessGroups, VocabularyRange, complete_gradients
from benchmarks import interpreter
from tests import dense
from tests.losses import summed_loss
from tests.parallel.test_cross_entropy import dense_losses
from tests.parallel.test_recomputed import has_the_same_bits
from tests.pool import RankPool
from tests.whole import Parts, parts_of


class Interpreter(RankPool):
    """Processes in which Triton's programs are interpreted on CPU tensors."""

    def run(self, layout: Layout, body: Callable[..., Any], *arguments: Any) -> list[Any]:
        """As ``RankPool.run``."""
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            return super().run(layout, body, *arguments)

    def errors(self, body: Callable[..., Any], *arguments: Any) -> Any:
        """``body(*arguments)`` in one of them."""
        return self.run(Layout(), in_interpreter, body.__name__, arguments)[0]


def in_interpreter(groups: ProcessGroups, body: str, arguments: tuple[Any, ...]) -> Any:
    interpreter.mend()
    return globals()[body](*arguments)


def recomputed_bits() -> bool:
    """Whether what Triton computes again has the bits that it had."""
    return has_the_same_bits(torch.float32, "triton")


@dataclass(frozen=True)
class Error:
    """Of a tensor against its float64 reference."""

    ulp: float
    """The largest error, less float32's own of the ``terms``, in units in the last place of the exact value."""
    norm: float
    """The 2-norm of the error over that of the exact values."""
    highest: float
    """The largest error over the largest exact value."""

    @classmethod
    def of(cls, found: Tensor, exact: Tensor, terms: Tensor | None = None) -> Error:
        """``terms`` are what was added to make ``exact`` where these may cancel: an error of their size is none."""
        if not found.numel():
            return cls(0.0, 0.0, 0.0)
        assert found.shape == exact.shape
        error, exact = (found.double() - exact).abs().cpu(), exact.cpu()
        size = exact.abs()
        about = torch.finfo(found.dtype)
        unit = torch.ldexp(torch.tensor(about.eps, device="cpu"), size.clamp(min=about.tiny).log2().floor())
        against = size if terms is None else torch.maximum(size, terms.abs().cpu())
        own = 0.0 if terms is None else 2**-22 * terms.abs().cpu()
        largest, norm = against.max().clamp(min=1e-300), against.norm().clamp(min=1e-300)
        return cls(((error - own) / unit).max().item(), (error.norm() / norm).item(), (error.max() / largest).item())


Errors = dict[str, Error]


def draw(*shape: int, seed: int, dtype: torch.dtype, strided: bool = False, scale: float = 1.0) -> Tensor:
    """Values on the current device; ``strided``: rows lie apart, and begin in the middle of a 16-byte word."""
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], shape[-1] + 5) if strided else shape
    values = (scale * torch.randn(*wide, generator=generator, device="cpu")).to(dtype).to(torch.get_default_device())
    return values[..., 3 : 3 + shape[-1]] if strided else values


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def rms_norm_errors(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool, strided: bool, backend: Backend = "triton"
) -> Errors:
    x = draw(*shape, seed=1, dtype=dtype, strided=strided, scale=3)
    added = draw(*shape, seed=2, dtype=dtype, strided=strided) if residual else None
    weight = draw(shape[-1], 1 + strided, seed=3, dtype=torch.float32)[:, 0]
    dy, dtotal = (draw(*shape, seed=seed, dtype=dtype, strided=strided) for seed in (4, 5))
    x, weight, *others = leaves(x, weight, *([] if added is None else [added]))
    before = x.detach().clone()
    if residual:
        y, total = rms_norm(x, weight, 1e-6, residual=others[0], backend=backend)
        torch.autograd.backward([y, total], [dy, dtotal])
    else:
        y, total = rms_norm(x, weight, 1e-6, backend=backend), x
        y.backward(dy)
    assert torch.equal(x, before), "the input was written to"
    assert y.dtype == dtype
    exact, exact_weight = leaves(total.double(), weight.double())
    expected = dense.norm(exact, exact_weight, 1e-6)
    expected.backward(dy.double())
    dx = exact.grad + dtotal.double() if residual else exact.grad
    inverse = (total.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    terms = dy.double() * exact_weight.detach() * inverse
    products = (dy.double() * total.double() * inverse).abs().reshape(-1, shape[-1]).sum(0)
    errors = {
        "y": Error.of(y, expected),
        "dx": Error.of(x.grad, dx, terms.detach()),
        "dw": Error.of(weight.grad, exact_weight.grad, products.detach()),
    }
    if residual:
        errors["s"] = Error.of(total, before.double() + others[0].double())
        assert torch.equal(others[0].grad, x.grad)
    return errors


def weight_gradient_twice(rows: int, columns: int) -> bool:
    """Whether the weight's gradient has the same bits when it is computed again."""
    found = []
    for _ in range(2):
        (x, weight), dy = leaves(*(draw(*s, seed=1, dtype=torch.bfloat16) for s in ((rows, columns), (columns,)))), None
        dy = draw(rows, columns, seed=2, dtype=torch.bfloat16)
        rms_norm(x, weight, 1e-6, backend="triton").backward(dy)
        found.append(weight.grad)
    return torch.equal(*found)


def rope_errors(
    shape: tuple[int, int, int, int], rotated: int, dtype: torch.dtype, strided: bool, positions: bool, packed: int
) -> Errors:
    """Of each pair over the pair's norm (in ``highest``); ``packed`` key-value heads, or 0 for ``apply_rope``."""
    batch, length, heads, width = shape
    apart = 2 * strided  # rows between one sequence and the next
    x = draw(batch, length + apart, heads + 2 * packed, width, seed=1, dtype=dtype, strided=strided)
    (x,) = leaves(x[:, apart:])
    tables = rope_tables(length + 7, rotated, 100.0)
    generator = torch.Generator().manual_seed(2)
    where = torch.randint(0, length + 7, (batch, length), generator=generator, device="cpu") if positions else None
    if where is not None:
        where = where.to(x.device)
    tables = tuple(table.to(x.device) for table in tables)
    if packed:
        parts = apply_rope_packed(x, *tables, packed, positions=where, backend="triton")
        assert [part.shape[2] for part in parts] == [heads, packed, packed]
        found = torch.cat(parts, 2)
    else:
        found = apply_rope(x, *tables, positions=where, backend="triton")
    gradient = draw(*found.shape, seed=3, dtype=dtype)
    found.backward(gradient)
    turned = heads + packed
    exact = torch.cat((turn(x.detach(), tables, where, 1, turned), x.detach()[:, :, turned:].double()), 2)
    back = torch.cat((turn(gradient, tables, where, -1, turned), gradient[:, :, turned:].double()), 2)
    return {"out": of_pairs(found, exact, rotated), "dx": of_pairs(x.grad, back, rotated)}


def turn(x: Tensor, tables: tuple[Tensor, ...], where: Tensor | None, sign: int, heads: int) -> Tensor:
    """Pairs as complex numbers in float64."""
    rotated = 2 * tables[0].shape[1]
    rows = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if where is None else where
    angle = torch.complex(tables[0].double()[rows], sign * tables[1].double()[rows])[:, :, None]
    first, second, rest = x[:, :, :heads].double().split([rotated // 2, rotated // 2, x.shape[-1] - rotated], -1)
    pair = torch.complex(first, second) * angle
    return torch.cat((pair.real, pair.imag, rest), -1)


def of_pairs(found: Tensor, exact: Tensor, rotated: int) -> Error:
    half = rotated // 2
    sizes = exact[..., :half].hypot(exact[..., half:rotated])
    sizes = torch.cat((sizes, sizes, exact[..., rotated:].abs()), -1).clamp(min=1e-300)
    error = (found.double() - exact).abs() / sizes
    return Error(0.0, 0.0, error.max().item() if error.numel() else 0.0)


def swiglu_errors(shape: tuple[int, ...], dtype: torch.dtype, strided: bool, packed: bool) -> Errors:
    columns = shape[-1]
    whole = draw(*shape[:-1], 2 * columns, seed=1, dtype=dtype, strided=strided, scale=4)
    gradient = draw(*shape, seed=2, dtype=dtype, strided=strided)
    exact_gate, exact_up = leaves(*(half.double() for half in whole.split(columns, -1)))
    expected = exact_gate / (1 + torch.exp(-exact_gate)) * exact_up
    expected.backward(gradient.double())
    if packed:
        (x,) = leaves(whole)
        out = swiglu(x, backend="triton")
        out.backward(gradient)
        dgate, dup = x.grad.split(columns, -1)
    else:
        gate, up = leaves(*whole.split(columns, -1))
        out = swiglu(gate, up, backend="triton")
        out.backward(gradient)
        dgate, dup = gate.grad, up.grad
    terms = (gradient.double() * exact_up * exact_gate.sigmoid() * (1 + exact_gate.abs())).detach()
    return {
        "out": Error.of(out, expected),
        # The largest value does not come of terms that cancel.
        "dgate": replace(Error.of(dgate, exact_gate.grad), ulp=Error.of(dgate, exact_gate.grad, terms).ulp),
        "dup": Error.of(dup, exact_up.grad),
    }


def of_columns(backend: Backend) -> list[Tensor]:
    """Results and gradients of every kernel, of tensors whose last stride is not 1."""
    x, gate, gradient = (draw(6, 4, seed=seed, dtype=torch.float32).t() for seed in (1, 2, 3))
    heads = draw(6, 2, 3, 2, seed=4, dtype=torch.float32).movedim(0, -1)
    weight, targets = torch.linspace(1, 2, 6), torch.tensor([0, 5, 2, 2])
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x, w: rms_norm(x, w, 1e-6, backend=backend), (x, weight)),
        (lambda x, r, w: rms_norm(x, w, 1e-6, residual=r, backend=backend)[0], (x, gate, weight)),
        (lambda gate, up: swiglu(gate, up, backend=backend), (gate, x)),
        (lambda z: cross_entropy(z, targets, backend=backend)[:, None].expand(4, 6), (x,)),
        (lambda h: apply_rope(h, *rope_tables(3, 6, 9.0), backend=backend).flatten()[:24].view(4, 6), (heads,)),
    ]
    found = []
    for call, arguments in calls:
        given = leaves(*arguments)
        out = call(*given)
        out.backward(gradient)
        found += [out.detach(), *(tensor.grad for tensor in given)]
    return found


def swiglu_at_the_ends(backend: Backend = "triton") -> tuple[Tensor, Tensor, Tensor]:
    """The result and gradients at gates whose exponentials are infinite, or none."""
    gate, up = leaves(torch.tensor([1e4, 100.0, 0.0, -88.0, -100.0, -1e4]), torch.full((6,), 2.0))
    out = swiglu(gate, up, backend=backend)
    out.backward(torch.ones_like(out))
    return out.detach(), gate.grad, up.grad


def cross_entropy_errors(
    rows: int, columns: int, dtype: torch.dtype, strided: bool, objective: Objective, ranks: int, shift: float = 0.0
) -> tuple[float, Error]:
    """The largest error of a loss over max(1, loss), and that of the gradient, with the vocabulary in ``ranks``."""
    from argonne.kernels.gpu.cross_entropy import TritonSoftmax

    logits = draw(rows, columns, seed=1, dtype=dtype, strided=strided, scale=4)
    if shift:
        logits = (logits * 8).round() / 8 + shift
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, columns, (rows,), generator=generator, device="cpu").to(logits.device)
    targets[::3] = objective.ignore_index
    if strided:
        targets = torch.stack((targets, targets + 1), 1)[:, 0]
    scale = draw(rows, seed=3, dtype=torch.float32)
    exact = logits.detach().double().requires_grad_()
    expected = dense_losses(exact, targets, objective)
    expected.backward(scale.double())
    if ranks == 1:
        (x,) = leaves(logits)
        losses = cross_entropy(x, targets, objective, backend="triton")
        losses *= 1  # what is returned may be written to
        losses.backward(scale)
        gradient = x.grad
    else:
        parts = [VocabularyRange.of_rank(columns, ranks, rank) for rank in range(ranks)]
        local = [TritonSoftmax(targets, part, objective) for part in parts]
        values = [logits[:, part.start : part.stop] for part in parts]
        statistics = torch.stack([one.statistics(x)[0] for one, x in zip(local, values, strict=True)])
        losses, sums = local[0].losses(statistics)
        made = [
            one.gradient(one.save(x, sums), sums, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))
            for one, x in zip(local, values, strict=True)
        ]
        gradient = torch.cat(made, 1)
    assert losses.dtype == torch.float32
    error = (losses.double() - expected).abs() / expected.abs().clamp(min=1)
    # Of a few columns the target may have nearly all of the softmax: the two cancel.
    terms = scale.double()[:, None] * exact.detach().softmax(-1) if columns < 20 else None
    if terms is not None:
        terms[::3] = 0
    return error.max().item() if rows else 0.0, Error.of(gradient, exact.grad, terms)


SMALL = ArgonneConfig(24, 2, 4, 2, 37, 20, max_position_embeddings=8)


def trained_model(groups: ProcessGroups, backend: Backend) -> tuple[Tensor, Parts]:
    """The loss of a model and the gradients of its parameters, after forward and backward with that backend."""
    if backend == "triton":
        interpreter.mend()
    model = ArgonneModel(SMALL, Execution(groups, kernels=backend))
    model.initialise(seed=3)
    ids = torch.randint(0, SMALL.vocab_size, (2, 5), generator=torch.Generator().manual_seed(4))
    loss = summed_loss(model, ids[:, :-1], ids[:, 1:], loss=CrossEntropyLoss(kernels=backend))
    loss.backward()
    complete_gradients(model.sharded_parameters(), groups)
    return loss.detach(), parts_of(model, groups, lambda parameter: parameter.grad)
