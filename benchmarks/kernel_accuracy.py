"""Each kernel's error against float64, beside that of plain torch in the same dtype and beside the contract.

``python -m benchmarks.kernels --accuracy`` prints it. Inputs are drawn so that bfloat16 holds them exactly: what is
measured is the kernel's own error and the rounding of its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.kernels import Backend, apply_rope, apply_rope_packed, cross_entropy, rms_norm, rope_tables, swiglu

EPS = 1e-6
SHIFT = 1000.0
"""Added to all logits. Drawn as multiples of 4 below 24, they stay exact in bfloat16 (spacing 4 from 512 to 1024)."""
VOCABULARY = 151_665
HIDDEN, FEED_FORWARD, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4080, 11_008, 24, 8, 170
"""Of the preset argonne-2.0-4.9b: none of them a power of two."""

CONTRACT = {
    "ulp": 0.51,
    "dx": 1.7e-3,
    "dW": 1e-6,
    "repeat": 0.0,
    "rope": 4e-3,
    "loss": 2e-6,
    "fp32": 3e-7,
}
"""The most that is allowed: bfloat16 results in units in the last place; RMSNorm's dx in bfloat16 and dW in float32 as
relative L2, and elements of dW that a second run changes; RoPE in bfloat16 over the pair's norm; cross-entropy of
bfloat16 logits over max(1, |loss|); float32 in and out over the largest value."""

Error = Callable[[Tensor, Tensor], float]
Call = Callable[..., "Tensor | tuple[Tensor, ...]"]


def ulp_distance(found: Tensor, exact: Tensor) -> float:
    """The largest distance from ``exact`` (float64), in units in the last place that ``found``'s dtype has there.

    Rounding once from the exact value gives up to 0.5. The unit at a value of [2^k, 2^(k+1)) is 2^(k - p), with p
    bits behind the point; among subnormals it is that of the smallest normal number. What is not finite is
    infinitely far off.
    """
    limits = torch.finfo(found.dtype)
    lowest = math.frexp(limits.smallest_normal)[1]
    exponent = torch.frexp(exact.double())[1].clamp(min=lowest) - 1
    distance = (found.double() - exact).abs() / torch.ldexp(torch.full_like(exact, limits.eps), exponent)
    return _worst(distance)


def relative_l2(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of ``exact``."""
    return _worst((found.double() - exact).norm() / exact.norm())


def relative_max(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest value of ``exact``."""
    return _worst((found.double() - exact).abs()) / exact.abs().max().item()


def pair_error(found: Tensor, exact: Tensor) -> float:
    """The largest length of a pair's difference over the pair's; ``[..., head_dim]``, pairs (i, i + head_dim / 2)."""
    first, second = (found.double() - exact).chunk(2, -1)
    return _worst(torch.hypot(first, second) / torch.hypot(*exact.chunk(2, -1)))


def loss_error(found: Tensor, exact: Tensor) -> float:
    """The largest difference over max(1, |loss|)."""
    return _worst((found.double() - exact).abs() / exact.abs().clamp(min=1))


def changed(found: Tensor, again: Tensor) -> float:
    """How many elements differ in any bit."""
    return float((found.view(torch.uint8) != again.view(torch.uint8)).view(*found.shape, -1).any(-1).sum())


def _worst(errors: Tensor) -> float:
    return torch.nan_to_num(errors, nan=torch.inf, posinf=torch.inf).max().item()


@dataclass(frozen=True)
class Line:
    """One claim of the contract."""

    kernel: str
    what: str
    unit: str
    observed: float
    plain: float | None
    """Of torch in the same dtype."""
    contract: float

    @property
    def held(self) -> bool:
        return self.observed <= self.contract


@dataclass(frozen=True)
class Sizes:
    """Rows of the trials; their widths are a preset's."""

    norm: int
    wide: int
    """Rows of SwiGLU and of the logits."""
    positions: int


SIZES = {"torch": Sizes(128, 16, 64), "interpreter": Sizes(6, 2, 2), "cuda": Sizes(4096, 512, 2048)}


@dataclass(frozen=True)
class Trial:
    """A kernel, the same in plain torch and in float64, and how each of its results is judged."""

    kernel: str
    ours: Call
    plain: Call
    exact: Call
    inputs: Sequence[Tensor]
    judged: Sequence[tuple[str, str, Error, float]]
    """Name, unit, error and contract of each output, then of each input's gradient."""

    def lines(self) -> Iterator[Line]:
        """Run all three."""
        generator = torch.Generator().manual_seed(1)
        exact = results([x.double() for x in self.inputs], self.exact, generator, self.inputs[0].dtype)
        found, beside = (
            results(self.inputs, call, generator.manual_seed(1), self.inputs[0].dtype)
            for call in (self.ours, self.plain)
        )
        for (what, unit, error, contract), ours, plain, right in zip(self.judged, found, beside, exact, strict=True):
            yield Line(self.kernel, what, unit, error(ours, right), error(plain, right), contract)


def results(inputs: Sequence[Tensor], call: Call, generator: torch.Generator, drawn_in: torch.dtype) -> list[Tensor]:
    """The outputs of ``call`` and the gradients of ``inputs``, for random gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [torch.randn(y.shape, generator=generator).to(drawn_in).to(y) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, given))


def sections(backend: Backend, device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], list[Line]]]]:
    """The contract for ``backend`` on ``device``, in parts that can be measured on their own."""
    trials = {"norms": _norms, "SwiGLU": _swiglus, "RoPE": _ropes}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for kernel, made in trials.items():

            def lines(made: Any = made, dtype: torch.dtype = dtype) -> list[Line]:
                return [line for trial in made(backend, _Draw(device), sizes, dtype) for line in trial.lines()]

            yield f"{kernel}, {name}", lines
        yield f"losses, {name}", lambda dtype=dtype: list(_losses(backend, _Draw(device), sizes, dtype))
    yield "norms once more", lambda: [_repeats(backend, _Draw(device), sizes)]


class _Draw:
    """Values that bfloat16 holds, in any dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=self.generator)
        return values.to(torch.bfloat16).to(self.device, dtype)


def _judge(dtype: torch.dtype, *named: str) -> list[tuple[str, str, Error, float]]:
    """Rounded once in bfloat16, the largest error in float32."""
    if dtype == torch.bfloat16:
        return [(f"{name}, bf16", "ulp", ulp_distance, CONTRACT["ulp"]) for name in named]
    return [(f"{name}, fp32", "relative max", relative_max, CONTRACT["fp32"]) for name in named]


def _norms(backend: Backend, draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> Iterator[Trial]:
    x, residual = (draw(sizes.norm, HIDDEN, dtype=dtype, scale=s) for s in (3.0, 2.0))
    weight = 1 + draw(HIDDEN, dtype=torch.float32, scale=0.125)
    weight = weight.to(torch.bfloat16).float()  # so that torch, whose weight is as x, has the same values
    gradients = [("dx, bf16", "relative L2", relative_l2, CONTRACT["dx"])]
    if dtype == torch.float32:
        gradients = _judge(dtype, "dx")
    of_residual = [(what.replace("dx", "dresidual"), *rest) for what, *rest in gradients]
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    of_weight = [(f"dW, fp32 of {name}", "relative L2", relative_l2, CONTRACT["dW"])]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), weight.to(x.dtype), EPS)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    def exact_sum(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        rounded = total + (total.to(dtype).double() - total).detach()  # the norm is of the sum that is handed on
        return exact(rounded, weight), total

    def plain_sum(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return plain(total, weight), total

    yield Trial(
        "RMSNorm",
        lambda x, weight: rms_norm(x, weight, EPS, backend=backend),
        plain,
        exact,
        (x, weight),
        [*_judge(dtype, "y"), *gradients, *of_weight],
    )
    yield Trial(
        "add + RMSNorm",
        lambda x, residual, weight: rms_norm(x, weight, EPS, residual=residual, backend=backend),
        plain_sum,
        exact_sum,
        (x, residual, weight),
        [*_judge(dtype, "y", "s"), *gradients, *of_residual, *of_weight],
    )


def _swiglus(backend: Backend, draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> Iterator[Trial]:
    gate, up = (draw(sizes.wide, FEED_FORWARD, dtype=dtype, scale=2.0) for _ in range(2))

    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return gate / (1 + torch.exp(-gate)) * up

    judged = _judge(dtype, "out", "dgate", "dup")
    yield Trial(
        "SwiGLU",
        lambda g, u: swiglu(g, u, backend=backend),
        lambda g, u: F.silu(g) * u,
        exact,
        (gate, up),
        judged,
    )
    yield Trial(
        "SwiGLU, packed",
        lambda both: swiglu(both, backend=backend),
        lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
        lambda both: exact(*both.chunk(2, -1)),
        (torch.cat((gate, up), -1),),
        [judged[0], *_judge(dtype, "d(gate, up)")],
    )


def _ropes(backend: Backend, draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> Iterator[Trial]:
    wide = [t.to(draw.device) for t in rope_tables(sizes.positions, HEAD_DIM, 1e4, torch.float64)]
    tables = [t.float() for t in wide]
    turned = HEADS + KEY_VALUE_HEADS
    qkv = draw(1, sizes.positions, turned + KEY_VALUE_HEADS, HEAD_DIM, dtype=dtype)

    def textbook(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.cat((t, t), -1).unsqueeze(-2).to(x.dtype) for t in (cos, sin))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def textbook_packed(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        query, key, value = x.split([HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS], dim=-2)
        return textbook(query, cos, sin), textbook(key, cos, sin), value

    def judged(*named: str) -> list[tuple[str, str, Error, float]]:
        if dtype == torch.float32:
            return _judge(dtype, *named)
        return [(f"{name}, bf16", "of the pair's norm", pair_error, CONTRACT["rope"]) for name in named]

    yield Trial(
        "RoPE",
        lambda x: apply_rope(x, *tables, backend=backend),
        lambda x: textbook(x, *tables),
        lambda x: textbook(x, *wide),
        (qkv[:, :, :turned],),
        judged("out", "dx"),
    )
    yield Trial(
        "RoPE, packed",
        lambda x: apply_rope_packed(x, *tables, KEY_VALUE_HEADS, backend=backend),
        lambda x: textbook_packed(x, *tables),
        lambda x: textbook_packed(x, *wide),
        (qkv,),
        judged("query", "key", "value", "dqkv"),
    )


def _losses(backend: Backend, draw: _Draw, sizes: Sizes, dtype: torch.dtype) -> Iterator[Line]:
    logits = draw(sizes.wide, VOCABULARY, dtype=dtype, scale=3.0)
    targets = torch.randint(0, VOCABULARY, (sizes.wide,), generator=draw.generator).to(draw.device)
    right = F.cross_entropy(logits.double(), targets, reduction="none")
    found, plain = cross_entropy(logits, targets, backend=backend), F.cross_entropy(logits, targets, reduction="none")
    if dtype == torch.float32:
        ((what, unit, error, contract),) = _judge(dtype, "loss")
        yield Line("cross-entropy", what, unit, error(found, right), error(plain, right), contract)
        return
    unit, contract = "of max(1, |loss|)", CONTRACT["loss"]
    yield Line("cross-entropy", "loss, bf16", unit, loss_error(found, right), loss_error(plain, right), contract)
    logits = (4 * (logits / 4).round()).clamp(-20, 20)
    right = F.cross_entropy(logits.double(), targets, reduction="none")
    for sign, shift in (("+", SHIFT), ("-", -SHIFT)):
        shifted = logits + shift
        found = cross_entropy(shifted, targets, backend=backend)
        plain = F.cross_entropy(shifted, targets, reduction="none")
        errors = loss_error(found, right), loss_error(plain, right)
        yield Line("cross-entropy", f"loss shifted by {sign}1e3, bf16", unit, *errors, contract)


def _repeats(backend: Backend, draw: _Draw, sizes: Sizes) -> Line:
    x = draw(sizes.norm, HIDDEN, dtype=torch.bfloat16)
    weight = torch.ones(HIDDEN, device=draw.device)

    def twice(call: Call) -> float:
        runs = (results((x, weight), call, torch.Generator().manual_seed(1), x.dtype)[-1] for _ in range(2))
        return changed(*runs)

    ours = twice(lambda x, weight: rms_norm(x, weight, EPS, backend=backend))
    plain = twice(lambda x, weight: F.rms_norm(x, (HIDDEN,), weight.to(x.dtype), EPS))
    return Line("RMSNorm", "dW, fp32 of bf16, run again", "changed elements", ours, plain, CONTRACT["repeat"])
