"""What a reproducible run relies on, fact by fact: that what is computed of a part is what is computed of the whole.

Some heads, rows or features of a whole are what a rank has. That each has the same bits there is more than that an
operation repeats itself, and is so, or not, with each release of PyTorch and each processor. The products of a layer
are tried by their shapes where they are made (``parallel/tensor_parallel/blocks.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from argonne.kernels import apply_rope_packed, rms_norm, rope_tables, swiglu
from argonne.kernels.dispatch import Backend
from argonne.kernels.swiglu import VECTOR
from argonne.parallel import (
    Axis,
    Layout,
    Precision,
    ProcessGroups,
    ShardedParameter,
    ShardSpec,
    VocabParallelEmbedding,
    context_parallel_attention,
)
from argonne.parallel.context_parallel.variable_length import can_vary_length, document_bounds
from argonne.parallel.tensor_parallel.gemm import product
from argonne.parallel.tensor_parallel.token_blocks import scale_tokens
from argonne.training.optimizer import build_optimizer, set_learning_rate


@dataclass(frozen=True)
class Sizes:
    """What the facts are tried with; by default a little of everything."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009 - frozen
    precision: Precision = Precision()  # noqa: RUF009 - frozen
    kernels: Backend = "auto"
    blocks: int = 4
    """Canonical blocks that are computed together."""
    batch: int = 2
    sequence: int = 48
    hidden: int = 96
    width: int = 56
    """Features of one block of the feed-forward layer."""
    heads: int = 2
    """Query heads of each key-value head."""
    key_values: int = 4
    head_dim: int = 32
    documents: bool = True
    """Whether documents are kept apart."""

    @property
    def rows(self) -> int:
        """Tokens, in equal runs for the blocks."""
        most = 8192 if self.device.type == "cuda" else 128
        return max(1, min(self.batch * self.sequence, most) // self.blocks) * self.blocks

    def draw(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers from a stream of their own."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, dtype or self.precision.compute)


def _same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _traced(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The result of ``function``, and the gradients of its inputs."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def _runs(count: int) -> list[slice]:
    """Parts of ``count`` things as ranks have them: the first, the last, each half."""
    half = count // 2
    return [slice(0, 1), slice(count - 1, count), *([slice(0, half), slice(half, 2 * half)] if half > 1 else [])]


def _products(sizes: Sizes) -> bool:
    def elsewhere(x: Tensor, offset: int) -> Tensor:
        if not x.is_contiguous():
            return elsewhere(x.t(), offset).t()
        return x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)

    x, weight = sizes.draw(sizes.rows, sizes.hidden, seed=1), sizes.draw(sizes.width, sizes.hidden, seed=2)
    gradient = sizes.draw(sizes.rows, sizes.width, seed=3)
    vector = 16 // x.element_size()
    return all(
        torch.equal(product(a, b), product(elsewhere(a, one), elsewhere(b, other)))
        for a, b in ((x, weight), (gradient, weight.t()), (gradient.t(), x.t()))
        for one, other in ((0, 0), (sizes.hidden, 0), (0, sizes.hidden), (vector, 3 * vector))
    )


def _heads(sizes: Sizes, packed: Tensor, run: slice) -> Tensor:
    """Of ``[batch, sequence, queries + keys + values, dim]`` what belongs to some key-value heads."""
    queries = slice(run.start * sizes.heads, run.stop * sizes.heads)
    parts = packed.split([sizes.heads * sizes.key_values, sizes.key_values, sizes.key_values], 2)
    return torch.cat([part[:, :, own] for part, own in zip(parts, (queries, run, run), strict=True)], 2)


def _attention(sizes: Sizes, masked: bool) -> bool:
    count, group = sizes.key_values, sizes.heads
    packed = sizes.draw(sizes.batch, sizes.sequence, (group + 2) * count, sizes.head_dim, seed=4)
    gradient = sizes.draw(sizes.batch, sizes.sequence, group * count, sizes.head_dim, seed=5)
    positions = torch.arange(sizes.batch * sizes.sequence, device=sizes.device).view(sizes.batch, -1)
    ranges = masked and can_vary_length(sizes.device, sizes.precision.compute, sizes.head_dim)

    def of(batch: slice, run: slice) -> list[Tensor]:
        documents = positions[batch] // 7 if masked else None
        bounds = document_bounds(documents) if ranges and documents is not None else None
        own = run.stop - run.start

        def attend(qkv: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in qkv.split([group * own, own, own], 2))
            found = context_parallel_attention(query, key, value, Axis("context"), documents, bounds, pinned=True)
            return found.transpose(1, 2)

        of_queries = gradient[batch, :, run.start * group : run.stop * group]
        return _traced(attend, [_heads(sizes, packed[batch], run)], of_queries)

    every = slice(0, sizes.batch), slice(0, count)
    y, of_packed = of(*every)
    return all(
        _same(
            of(batch, run),
            [y[batch, :, run.start * group : run.stop * group], _heads(sizes, of_packed[batch], run)],
        )
        for batch, run in [(every[0], run) for run in _runs(count)] + [(slice(0, 1), every[1])]
    )


def _rotation(sizes: Sizes) -> bool:
    shape = (1, sizes.sequence, (sizes.heads + 2) * sizes.key_values, sizes.head_dim)
    packed, gradient = sizes.draw(*shape, seed=6), sizes.draw(*shape, seed=7)
    dtype = torch.promote_types(sizes.precision.compute, torch.float32)
    cos, sin = (x.to(sizes.device) for x in rope_tables(sizes.sequence, sizes.head_dim, 1e4, dtype))

    def of(run: slice) -> list[Tensor]:
        def rotate(x: Tensor) -> Tensor:
            return torch.cat(apply_rope_packed(x, cos, sin, run.stop - run.start, backend=sizes.kernels), 2)

        return _traced(rotate, [_heads(sizes, packed, run)], _heads(sizes, gradient, run))

    whole = of(slice(0, sizes.key_values))
    return all(_same(of(run), [_heads(sizes, x, run) for x in whole]) for run in _runs(sizes.key_values))


def _exponentials(sizes: Sizes) -> bool:
    dtype = torch.promote_types(sizes.precision.compute, torch.float32)
    x = sizes.draw(1009, seed=8, dtype=dtype) * 9
    whole, lengths = x.exp(), (1, 5, 8, 15, 17, 31, 64, 100)
    return all(
        torch.equal(x[begin : begin + length].clone().exp(), whole[begin : begin + length])
        for begin in (0, 1, 6, 16, 99, 1009 - 100)
        for length in lengths
    )


def _swiglu(sizes: Sizes) -> bool:
    rows, width, blocks = min(sizes.rows, 32), sizes.width, sizes.blocks
    x, gradient = sizes.draw(rows, 2, blocks * width, seed=9), sizes.draw(rows, blocks * width, seed=10)

    def of(run: slice) -> list[Tensor]:
        columns = slice(run.start * width, run.stop * width)
        kernel = functools.partial(swiglu, pinned=width % VECTOR != 0, backend=sizes.kernels)
        y, of_x = _traced(kernel, [x[..., columns].flatten(1)], gradient[:, columns].contiguous())
        return [y, of_x.unflatten(1, (2, -1))]

    whole = of(slice(0, blocks))
    return all(_same(of(run), [y[..., run.start * width : run.stop * width] for y in whole]) for run in _runs(blocks))


def _norms(sizes: Sizes) -> bool:
    x, other, gradient = (sizes.draw(sizes.rows, sizes.hidden, seed=seed) for seed in (11, 12, 13))
    weight = sizes.draw(sizes.hidden, seed=14, dtype=sizes.precision.parameters)

    def norm(x: Tensor, other: Tensor) -> Tensor:
        return torch.cat(rms_norm(x, weight, 1e-6, residual=other, backend=sizes.kernels))

    def of(run: slice) -> list[Tensor]:
        twice = torch.cat([gradient[run], other[run]])
        y, *gradients = _traced(norm, [x[run].contiguous(), other[run].contiguous()], twice)
        return [*y.chunk(2), *gradients]

    each = sizes.rows // sizes.blocks
    runs = [slice(run.start * each, run.stop * each) for run in _runs(sizes.blocks)]
    whole = of(slice(0, sizes.rows))
    return all(_same(of(run), [y[run] for y in whole]) for run in runs)


def _row_sums(sizes: Sizes) -> bool:
    dtype = torch.promote_types(sizes.precision.compute, torch.float32)
    x, gradient = (sizes.draw(sizes.rows, sizes.hidden, seed=seed, dtype=dtype) for seed in (15, 16))
    weights = [torch.ones(sizes.hidden, dtype=dtype, device=sizes.device)] * sizes.blocks

    def of(blocks: slice) -> list[Tensor]:
        rows = slice(*(bound * (sizes.rows // sizes.blocks) for bound in (blocks.start, blocks.stop)))
        found = _traced(lambda *own: scale_tokens(x[rows], own), weights[blocks], gradient[rows])
        return found[1:]

    whole = of(slice(0, sizes.blocks))
    return all(_same(of(run), whole[run]) for run in _runs(sizes.blocks))


def _optimizer(sizes: Sizes) -> bool:
    dtype, count = sizes.precision.parameters, 8 * sizes.hidden + 5
    weight, *gradients = (sizes.draw(count, seed=seed, dtype=dtype) for seed in range(17, 21))

    def of(run: slice) -> list[Tensor]:
        parameter = nn.Parameter(weight[run].clone())
        optimizer = build_optimizer([ShardedParameter("", parameter, ShardSpec(()))], 0.1, pinned=True)
        for number, gradient in enumerate(gradients, 1):
            parameter.grad = gradient[run].clone()
            set_learning_rate(optimizer, 0.01 * number)
            optimizer.step()
        return [parameter.detach(), *(optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))]

    whole, half = of(slice(0, count)), count // 2
    runs = [slice(0, half), slice(half, count), slice(3, 10), slice(1, sizes.hidden), slice(count - 9, count)]
    return all(_same(of(run), [x[run] for x in whole]) for run in runs)


def _embedding(sizes: Sizes) -> bool:
    vocabulary = 53
    ids = torch.randint(0, vocabulary, (sizes.rows,), generator=torch.Generator().manual_seed(21)).to(sizes.device)
    weight = sizes.draw(vocabulary, sizes.hidden, seed=22, dtype=sizes.precision.parameters)
    gradient = sizes.draw(sizes.rows, sizes.hidden, seed=23)

    def of(ranks: int, rank: int) -> tuple[range, Tensor]:
        """A rank's tokens, and the gradient of their rows."""
        groups = ProcessGroups.of_rank(Layout(tensor=ranks), rank, sizes.device).in_blocks(2)
        with sizes.device:
            layer = VocabParallelEmbedding(vocabulary, sizes.hidden, groups, precision=sizes.precision)
        own = layer.range
        layer.weight.data[: own.tokens] = weight[own.start : own.stop]
        with torch.enable_grad():
            layer(ids).backward(gradient)
        assert layer.weight.grad is not None
        return range(own.start, own.stop), layer.weight.grad[: own.tokens]

    _, whole = of(1, 0)
    return all(torch.equal(found, whole[own.start : own.stop]) for own, found in (of(2, 0), of(2, 1)))


FACTS: Mapping[str, Callable[[Sizes], bool]] = {
    "products differ when repeated or when their factors lie elsewhere": _products,
    "attention of some heads or sequences is not that of all": functools.partial(_attention, masked=False),
    "attention within documents of some heads or sequences is not that of all": lambda sizes: (
        not sizes.documents or _attention(sizes, masked=True)
    ),
    "rotary positions of some heads are not those of all": _rotation,
    "an exponential depends on its place in a tensor": _exponentials,
    "SwiGLU of some features is not that of all": _swiglu,
    "RMSNorm of some rows is not that of all": _norms,
    "a sum over some rows depends on where they lie": _row_sums,
    "AdamW of a part of a tensor is not that of the whole": _optimizer,
    "the gradient of some rows of an embedding is not that of all": _embedding,
}
"""What is said where one does not hold, and the trial."""
