"""The contestants of the kernels' benchmark: Argonne, torch in eager mode, torch.compile and Liger-Kernel.

Each is a function of a case's tensors, so that all of them can be given the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.kernels import (
    Backend,
    apply_rope,
    apply_rope_packed,
    cross_entropy,
    linear_cross_entropy,
    rms_norm,
    rope_tables,
    swiglu,
)
from argonne.parallel import Precision, ProcessGroups, VocabParallelHead
from benchmarks.kernel_targets import Case, Direction

EPS, THETA = 1e-6, 1e4
SEQUENCE = 4096
"""The presets' longest sequence, and so the rows of the tables."""
NOT_INSTALLED = "not installed"
BOTH_ONLY: tuple[Direction, ...] = ("both",)
EVERY: tuple[Direction, ...] = ("forward", "backward", "both")

Inputs = dict[str, Any]
"""The tensors of a case, by name."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a kernel."""

    function: Callable[..., Any]
    """Of the inputs named in ``arguments``; a tensor, or a tuple of them."""
    arguments: tuple[str, ...]
    trained: tuple[str, ...]
    """Those with a gradient."""
    writes: bool = False
    """Whether it writes to its inputs, which it is then given copies of."""
    capturable: bool = True
    """Whether a CUDA graph can hold it: not if it waits for the GPU, as ``.item()`` does."""
    directions: tuple[Direction, ...] = EVERY
    """In which it can be timed: one that makes its gradients in the forward pass has no other pass."""
    by_hand: bool = False
    """Whether it makes its gradients itself, without autograd: its function is the whole of ``both``."""


def inputs_of(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Normal values of a case's dtype; weights in float32, as Argonne keeps them, and in the case's dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = {"device": device, "dtype": case.dtype}

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, **like).normal_(generator=generator)

    tokens = case.tokens
    if case.kernel in ("rms_norm", "add_rms_norm"):
        weight = torch.ones(case.hidden, device=device)
        return {
            "x": draw(tokens, case.hidden),
            "residual": draw(tokens, case.hidden),
            "weight": weight,
            "narrow": weight.to(case.dtype),
        }
    if case.kernel in ("rope", "rope_packed"):
        length = min(SEQUENCE, tokens)
        cos, sin = (t.to(device) for t in rope_tables(length, case.head_dim, THETA))
        rows = (tokens // length, length)
        found = {"cos": cos, "sin": sin}
        # Liger-Kernel's are of whole heads, with a batch in front.
        found |= {f"{name}_whole": torch.cat((t, t), -1)[None] for name, t in (("cos", cos), ("sin", sin))}
        turned = case.heads + case.key_value_heads
        if case.kernel == "rope_packed":
            return found | {"qkv": draw(*rows, turned + case.key_value_heads, case.head_dim)}
        both = draw(*rows, turned, case.head_dim)
        query, key = (part.contiguous() for part in both.split([case.heads, case.key_value_heads], 2))
        return found | {"heads": both, "query": query, "key": key}
    if case.kernel == "swiglu":
        return {"gate": draw(tokens, case.feed_forward), "up": draw(tokens, case.feed_forward)}
    targets = torch.randint(0, case.vocabulary, (tokens,), device=device, generator=generator)
    if case.kernel == "cross_entropy":
        return {"logits": draw(tokens, case.vocabulary), "targets": targets}
    with torch.device(device):
        precision = Precision(compute=case.dtype)
        holder = VocabParallelHead(case.vocabulary, case.hidden, ProcessGroups.single(device), precision=precision)
    holder.weight.data.normal_(generator=generator).mul_(case.hidden**-0.5)
    narrow = holder.weight.detach()[: case.vocabulary].to(case.dtype)
    return {"x": draw(tokens, case.hidden), "holder": holder, "weight": holder.weight, "narrow": narrow} | {
        "targets": targets
    }


def contestants(case: Case, backend: Backend = "triton", compiler: str = "inductor") -> dict[str, Contestant | str]:
    """Who is timed, by name; where one is not there, why."""
    own, plain, formula = _OURS[case.kernel](case, backend)
    found: dict[str, Contestant | str] = {"argonne": own, "torch": plain}
    found["torch.compile"] = replace(formula, function=torch.compile(formula.function, dynamic=False, backend=compiler))
    found["liger"] = _liger(case)
    if case.kernel == "linear_cross_entropy":
        found["F.linear_cross_entropy"] = _library()
        names = ("x", "narrow", "targets")
        found["bare products"] = Contestant(bare_products, names, names[:2], directions=BOTH_ONLY, by_hand=True)
    return found


def bare_products(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The three matrix products of linear cross-entropy: the logits, and from them in place of their gradient the
    gradients of ``x`` and of the weight."""
    with torch.no_grad():
        logits = x @ weight.t()
        return logits @ weight, logits.t() @ x


def _norm(case: Case, backend: Backend) -> tuple[Contestant, Contestant, Contestant]:
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    names, narrow = ("x", "weight"), ("x", "narrow")
    return (
        Contestant(lambda x, w: rms_norm(x, w, EPS, backend=backend), names, names),
        Contestant(plain, narrow, narrow),
        Contestant(lambda x, w: rms_norm(x, w, EPS, backend="torch"), names, names),
    )


def _add_norm(case: Case, backend: Backend) -> tuple[Contestant, Contestant, Contestant]:
    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, EPS), total

    names, narrow = ("x", "residual", "weight"), ("x", "residual", "narrow")
    return (
        Contestant(lambda x, r, w: rms_norm(x, w, EPS, residual=r, backend=backend), names, names),
        Contestant(plain, narrow, narrow),
        Contestant(lambda x, r, w: rms_norm(x, w, EPS, residual=r, backend="torch"), names, names),
    )


def _textbook_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in the reference models: half-width tables, whole heads."""
    cos, sin = (t[0].unsqueeze(-2).to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _rope(case: Case, backend: Backend) -> tuple[Contestant, Contestant, Contestant]:
    names = ("heads", "cos", "sin")
    return (
        Contestant(lambda x, c, s: apply_rope(x, c, s, backend=backend), names, names[:1]),
        Contestant(_textbook_rope, ("heads", "cos_whole", "sin_whole"), names[:1]),
        Contestant(lambda x, c, s: apply_rope(x, c, s, backend="torch"), names, names[:1]),
    )


def _rope_packed(case: Case, backend: Backend) -> tuple[Contestant, Contestant, Contestant]:
    groups = [case.heads, case.key_value_heads, case.key_value_heads]

    def plain(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        query, key, value = qkv.split(groups, dim=-2)
        return _textbook_rope(query, cos, sin), _textbook_rope(key, cos, sin), value

    names = ("qkv", "cos", "sin")
    return (
        Contestant(lambda x, c, s: apply_rope_packed(x, c, s, groups[1], backend=backend), names, names[:1]),
        Contestant(plain, ("qkv", "cos_whole", "sin_whole"), names[:1]),
        Contestant(lambda x, c, s: apply_rope_packed(x, c, s, groups[1], backend="torch"), names, names[:1]),
    )


def _swiglu(case: Case, backend: Backend) -> tuple[Contestant, Contestant, Contestant]:
    names = ("gate", "up")
    return (
        Contestant(lambda g, u: swiglu(g, u, backend=backend), names, names),
        Contestant(lambda g, u: F.silu(g) * u, names, names),
        Contestant(lambda g, u: swiglu(g, u, backend="torch"), names, names),
    )


def _cross_entropy(case: Case, backend: Backend) -> tuple[Contestant, Contestant, Contestant]:
    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, reduction="none")  # in bfloat16 the loss has three digits

    names = ("logits", "targets")
    other = Contestant(plain, names, names[:1])
    return Contestant(lambda z, t: cross_entropy(z, t, backend=backend), names, names[:1]), other, other


def _linear_cross_entropy(case: Case, backend: Backend) -> tuple[Contestant, Contestant, Contestant]:
    def own(x: Tensor, holder: VocabParallelHead, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, holder, targets, backend=backend)

    def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    names = ("x", "narrow", "targets")
    other = Contestant(plain, names, names[:2], directions=BOTH_ONLY)
    argonne = Contestant(own, ("x", "holder", "weight", "targets"), ("x", "weight"), directions=BOTH_ONLY)
    return argonne, other, other


_OURS = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "rope": _rope,
    "rope_packed": _rope_packed,
    "swiglu": _swiglu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
"""Argonne, torch in eager mode, and the formula to be compiled."""


def _library() -> Contestant | str:
    """PyTorch's own (2.13), in chunks."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None or not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"

    def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=options())

    names = ("x", "narrow", "targets")
    # Whether a graph can hold it is not documented; calls of tens of milliseconds lose nothing without one.
    return Contestant(chunked, names, names[:2], capturable=False, directions=BOTH_ONLY)


def _liger(case: Case) -> Contestant | str:
    """Liger-Kernel's, by the functional interface (0.6); with weights in the case's dtype, as its users have them."""
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        return NOT_INSTALLED
    needed = {
        "rms_norm": "liger_rms_norm",
        "add_rms_norm": "liger_fused_add_rms_norm",
        "rope": "liger_rope",
        "rope_packed": "liger_rope",
        "swiglu": "liger_swiglu",
        "cross_entropy": "liger_cross_entropy",
        "linear_cross_entropy": "liger_fused_linear_cross_entropy",
    }[case.kernel]
    if not hasattr(liger, needed):
        return f"{needed} is not in the installed Liger-Kernel"
    call = getattr(liger, needed)

    def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return call(query.transpose(1, 2), key.transpose(1, 2), cos, sin)[:2]

    def packed(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        query, key, value = qkv.split([case.heads, case.key_value_heads, case.key_value_heads], dim=-2)
        return *rope(query, key, cos, sin), value

    tables = ("cos_whole", "sin_whole")
    narrow = ("x", "narrow", "targets")
    return {
        "rms_norm": Contestant(lambda x, w: call(x, w, EPS, in_place=False), narrow[:2], narrow[:2]),
        "add_rms_norm": Contestant(
            lambda x, r, w: call(x, r, w, EPS, in_place=False), ("x", "residual", "narrow"), ("x", "residual", "narrow")
        ),
        "rope": Contestant(rope, ("query", "key", *tables), ("query", "key"), writes=True),
        "rope_packed": Contestant(packed, ("qkv", *tables), ("qkv",), writes=True),
        "swiglu": Contestant(call, ("gate", "up"), ("gate", "up"), writes=True),
        # It counts the targets on the host, and leaves the gradient where the logits were.
        "cross_entropy": Contestant(
            lambda z, t: call(z, t, reduction="sum"),
            ("logits", "targets"),
            ("logits",),
            writes=True,
            capturable=False,
            directions=BOTH_ONLY,
        ),
        "linear_cross_entropy": Contestant(
            lambda x, w, t: call(x, w, t, reduction="sum"),
            narrow,
            narrow[:2],
            capturable=False,
            directions=BOTH_ONLY,
        ),
    }[case.kernel]
