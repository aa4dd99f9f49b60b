"""The facts of the libraries that a reproducible run rests on, tried where it is about to run.

Its design asks more of PyTorch than that an operation repeats itself: what is computed of a part (some heads, rows or
features) is to be what is computed of the whole there. That is so, or not, with each release and processor. Products
are tried by their shapes where they are made (``parallel/tensor_parallel/blocks.py``).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from argonne.kernels import apply_rope_packed, rms_norm, rope_tables, swiglu
from argonne.kernels.dispatch import Backend
from argonne.kernels.swiglu import VECTOR
from argonne.models import ArgonneConfig
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
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.context_parallel.variable_length import can_vary_length, document_bounds
from argonne.parallel.errors import ArgonneError
from argonne.parallel.tensor_parallel.gemm import product
from argonne.parallel.tensor_parallel.token_blocks import scale_tokens
from argonne.training.config import RunConfig
from argonne.training.optimizer import build_optimizer, set_learning_rate
from argonne.training.run.reproducible import blocks_of


@dataclass(frozen=True)
class Sizes:
    """What is tried: a run's own sizes, as far as trying them takes no time that is felt."""

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

    @classmethod
    def of_run(cls, config: RunConfig, device: torch.device, precision: Precision, own_model: bool) -> Sizes:
        """Those of the flags; of a model of one's own, which they do not tell, the defaults."""
        blocks, sequence = blocks_of(config) or 1, config.data.block_size
        flags = cls(
            device,
            precision,
            config.training.kernels,
            blocks,
            config.training.initial_batch_size,
            sequence,
            documents=config.data.document_mask,
        )
        shape = None if own_model else config.model.resolve(sequence)
        found = flags if shape is None else flags._with_shape(shape)
        return found if device.type == "cuda" else found._small()

    def _with_shape(self, shape: ArgonneConfig) -> Sizes:
        return replace(
            self,
            hidden=shape.hidden_size,
            width=shape.intermediate_size // self.blocks,
            heads=shape.num_attention_heads // shape.num_key_value_heads,
            key_values=shape.num_key_value_heads,
            head_dim=shape.head_dim,
        )

    def _small(self) -> Sizes:
        """What a CPU does in a moment. It computes heads, rows and features in the same way however many there are."""
        slow, cost = self.precision.compute == torch.float16, {torch.float16: 1 << 22, torch.float64: 1 << 27}
        heads, key_values = min(self.heads, 2), min(self.key_values, 2)
        least = heads * key_values * self.head_dim
        most = cost.get(self.precision.compute, 1 << 29)
        longest = next(n for n in (768, 256, 64, 16) if n == 16 or least * n * n < most)
        return replace(
            self,
            blocks=min(self.blocks, 4),
            batch=min(self.batch, 2),
            sequence=min(self.sequence, longest),
            hidden=min(self.hidden, 256 if slow else 1024),
            width=self.width if self.width < 256 else 256 + self.width % VECTOR,
            heads=heads,
            key_values=key_values,
        )

    @property
    def rows(self) -> int:
        """Tokens, in equal runs for the blocks."""
        most = 8192 if self.device.type == "cuda" else 128
        return max(1, min(self.batch * self.sequence, most) // self.blocks) * self.blocks

    def draw(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers from a stream of their own."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, dtype or self.precision.compute)


def require_facts(config: RunConfig, groups: ProcessGroups, precision: Precision, own_model: bool) -> None:
    """Refuse a reproducible run where its libraries do not compute as it needs them to (collective).

    Raises:
        ArgonneError: on every rank, all that does not hold.
    """
    if not groups.reproducible:
        return
    sizes = Sizes.of_run(config, groups.device, precision, own_model)
    collectively(functools.partial(try_facts, sizes), groups.world)


def try_facts(sizes: Sizes) -> None:
    """Raise ``ArgonneError`` unless all of ``FACTS`` hold here; random numbers drawn elsewhere stay as they are."""
    broken = [text for text, holds in FACTS.items() if not holds(sizes)]
    if broken:
        raise ArgonneError(
            f"reproducible=True cannot hold on this machine: {'; '.join(broken)} (torch {torch.__version__}, "
            f"{_machine(sizes.device)}); legal: leave the flag out"
        )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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


def _attention(sizes: Sizes, masked: bool) -> bool:
    counts = (sizes.heads * sizes.key_values, sizes.key_values, sizes.key_values)
    shape = (sizes.batch, sizes.sequence, sum(counts), sizes.head_dim)
    packed, gradient = sizes.draw(*shape, seed=4), sizes.draw(*shape, seed=5)[:, :, : counts[0]]
    positions = torch.arange(sizes.batch * sizes.sequence, device=sizes.device).view(sizes.batch, -1)
    documents = positions // 7 if masked else None
    axis = Axis("context")
    ranges = masked and can_vary_length(sizes.device, sizes.precision.compute, sizes.head_dim)

    def of(batch: slice, heads: slice) -> list[Tensor]:
        queries = slice(heads.start * sizes.heads, heads.stop * sizes.heads)
        own = (queries, heads, heads)
        parts = [part[batch, :, run] for part, run in zip(packed.split(counts, 2), own, strict=True)]
        apart = None if documents is None else documents[batch]
        bounds = document_bounds(apart) if apart is not None and ranges else None

        def attend(qkv: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in qkv.split([part.shape[2] for part in parts], 2))
            return context_parallel_attention(query, key, value, axis, apart, bounds, pinned=True).transpose(1, 2)

        y, of_packed = _traced(attend, [torch.cat(parts, 2)], gradient[batch, :, queries])
        return [y, *of_packed.split([part.shape[2] for part in parts], 2)]

    def within(whole: Sequence[Tensor], batch: slice, heads: slice) -> list[Tensor]:
        queries = slice(heads.start * sizes.heads, heads.stop * sizes.heads)
        return [x[batch, :, run] for x, run in zip(whole, (queries, queries, heads, heads), strict=True)]

    every, whole = slice(0, sizes.batch), of(slice(0, sizes.batch), slice(0, sizes.key_values))
    cuts = [(every, run) for run in _runs(sizes.key_values)] + [(slice(0, 1), slice(0, sizes.key_values))]
    return all(_same(of(*cut), within(whole, *cut)) for cut in cuts)


def _rotation(sizes: Sizes) -> bool:
    heads = (sizes.heads + 2) * sizes.key_values
    shape = (1, sizes.sequence, heads, sizes.head_dim)
    packed, gradient = sizes.draw(*shape, seed=6), sizes.draw(*shape, seed=7)
    dtype = torch.promote_types(sizes.precision.compute, torch.float32)
    cos, sin = (x.to(sizes.device) for x in rope_tables(sizes.sequence, sizes.head_dim, 1e4, dtype))

    def rotate(x: Tensor) -> Tensor:
        return torch.cat(apply_rope_packed(x, cos, sin, 1, backend=sizes.kernels), 2)

    # The heads that come last of the whole pass through, and so do those of a part: compare the others.
    whole, run = _traced(rotate, [packed], gradient), slice(heads - 4, heads - 1)
    part = _traced(rotate, [packed[:, :, run.start :].contiguous()], gradient[:, :, run.start :])
    return _same([x[:, :, :3] for x in part], [x[:, :, run] for x in whole])


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


Facts = Mapping[str, Callable[[Sizes], bool]]

FACTS: Facts = {
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
