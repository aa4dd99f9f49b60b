"""What the kernels' benchmark measures: cases, the bytes that each must move at least, and what is aimed at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from argonne.models.config import PRESETS
from argonne.parallel import ArgonneError

Direction = Literal["forward", "backward", "both"]
KERNELS: dict[str, tuple[Direction, ...]] = {
    "rms_norm": ("forward", "backward"),
    "add_rms_norm": ("forward", "backward", "both"),
    "rope": ("forward", "backward"),
    "rope_packed": ("forward", "backward", "both"),
    "swiglu": ("forward", "backward"),
    "cross_entropy": ("forward", "backward", "both"),
    "linear_cross_entropy": ("both",),
}
"""The directions of each that are timed."""
POWERS = {
    "rms_norm": (1024, 4096, 8192),
    "add_rms_norm": (1024, 4096, 8192),
    "rope": ((32, 8, 128), (64, 8, 64)),
    "rope_packed": ((32, 8, 128), (64, 8, 64)),
    "swiglu": (4096, 16384),
    "cross_entropy": (32768, 131072),
    "linear_cross_entropy": ((4096, 131072),),
}
"""Widths beside the presets': hidden, (query heads, key-value heads, head_dim), feed-forward, vocabulary."""


@dataclass(frozen=True)
class Case:
    """A kernel at a shape; the fields that it does not use are 0."""

    kernel: str
    dtype: torch.dtype
    tokens: int
    hidden: int = 0
    feed_forward: int = 0
    vocabulary: int = 0
    heads: int = 0
    """Of the queries."""
    key_value_heads: int = 0
    head_dim: int = 0

    @property
    def shape(self) -> str:
        """As the table shows it."""
        if self.heads:
            return f"{self.tokens} x ({self.heads} + {self.key_value_heads}) x {self.head_dim}"
        widths = (self.tokens, self.hidden, self.feed_forward, self.vocabulary)
        return " x ".join(str(width) for width in widths if width)


def minimum_bytes(case: Case, direction: Direction) -> int:
    """What must cross the memory's pins when each input is read once and each result written once.

    T tokens of e bytes an element: RMSNorm 2THe forward, 3THe backward; with the sum before it 4THe each; RoPE of
    queries and keys 2T(Hq + Hk)De each way; SwiGLU 3TFe and 5TFe; cross-entropy one pass of TVe forward, and two
    backward. Weights, tables and statistics are left out: they are as wide as one token, or as one column. Packed
    RoPE carries the values' gradient to its place in backward: 2T(Hq + 2Hk)De. Linear cross-entropy is bound by its
    products: 0.
    """
    size = case.tokens * case.dtype.itemsize
    turned = size * (case.heads + case.key_value_heads) * case.head_dim
    hidden, feed_forward, vocabulary = (size * w for w in (case.hidden, case.feed_forward, case.vocabulary))
    forward, backward = {
        "rms_norm": (2 * hidden, 3 * hidden),
        "add_rms_norm": (4 * hidden, 4 * hidden),
        "rope": (2 * turned, 2 * turned),
        "rope_packed": (2 * turned, 2 * turned + 2 * size * case.key_value_heads * case.head_dim),
        "swiglu": (3 * feed_forward, 5 * feed_forward),
        "cross_entropy": (vocabulary, 2 * vocabulary),
        "linear_cross_entropy": (0, 0),
    }[case.kernel]
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def products_flops(case: Case) -> int:
    """Operations of linear cross-entropy's three matrix products, 6THV; 0 for the others."""
    return 6 * case.tokens * case.hidden * case.vocabulary if case.kernel == "linear_cross_entropy" else 0


def cases(kernel: str, dtype: torch.dtype, tokens: int) -> list[Case]:
    """The shapes of the presets (but the demo's, which is for laptops), and powers of two."""
    if kernel not in KERNELS:
        raise ArgonneError(f"kernel={kernel!r} is not known; legal: {', '.join(KERNELS)}")
    found: list[dict[str, int]] = []
    for name, config in PRESETS.items():
        if name == "demo":
            continue
        heads = {
            "heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
        }
        found.append(
            {
                "rms_norm": {"hidden": config.hidden_size},
                "rope": heads,
                "swiglu": {"feed_forward": config.intermediate_size},
                "cross_entropy": {"vocabulary": config.vocab_size},
                "linear_cross_entropy": {"hidden": config.hidden_size, "vocabulary": config.vocab_size},
            }[{"add_rms_norm": "rms_norm", "rope_packed": "rope"}.get(kernel, kernel)]
        )
    fields = tuple(found[0])
    for widths in POWERS[kernel]:
        found.append(dict(zip(fields, widths if isinstance(widths, tuple) else (widths,), strict=True)))
    return list(dict.fromkeys(Case(kernel, dtype, tokens, **widths) for widths in found))


def small_cases(kernel: str, dtype: torch.dtype, tokens: int) -> list[Case]:
    """One that Triton's interpreter can compute in a moment: the first of ``cases``, cut down."""
    case = cases(kernel, dtype, tokens)[0]
    most = {"tokens": 8, "hidden": 48, "feed_forward": 40, "vocabulary": 50, "heads": 4, "key_value_heads": 2}
    return [replace(case, **{name: min(getattr(case, name), size) for name, size in {**most, "head_dim": 16}.items()})]


@dataclass(frozen=True)
class Target:
    """Ratios of rates: to ``torch.clone``'s at as many bytes, and to the other contestants'. None: nothing aimed at."""

    clone: float | None = None
    liger: float | None = None
    compiled: float | None = None
    products: float | None = None
    """At most so many times the time of the bare matrix products."""
    library: float | None = None
    """Of ``F.linear_cross_entropy``'s rate."""


TARGETS: dict[tuple[str, Direction], Target] = {
    ("rms_norm", "forward"): Target(clone=0.97, liger=1.08, compiled=1.0),
    ("rms_norm", "backward"): Target(clone=0.90, liger=1.4, compiled=1.2),
    ("add_rms_norm", "both"): Target(clone=0.92, liger=1.3, compiled=1.1),
    ("rope", "forward"): Target(compiled=1.0),
    ("rope", "backward"): Target(compiled=1.0),
    ("rope_packed", "both"): Target(liger=1.8),
    ("swiglu", "forward"): Target(clone=0.96, liger=1.0, compiled=1.0),
    ("swiglu", "backward"): Target(clone=0.95, liger=1.0, compiled=1.0),
    ("cross_entropy", "both"): Target(clone=0.85, liger=3.0, compiled=1.3),
    ("linear_cross_entropy", "both"): Target(liger=3.0, products=1.25, library=1.0),
}
"""Of an H200 in bfloat16, at 8192 tokens or more."""
ROPE_CLONE = {128: 0.93, 170: 0.85}
"""``Target.clone`` of RoPE, by head_dim."""
BACKWARD_WIDEST = 8192
"""Hidden size up to which something is aimed at in RMSNorm's backward."""
HOST_MICROSECONDS = 40.0
"""Of an eager call on the host, at most."""
FEWEST_TOKENS = 8192


def target(case: Case, direction: Direction) -> Target:
    """What is aimed at there; an empty target for another dtype, fewer tokens or another direction."""
    if case.dtype != torch.bfloat16 or case.tokens < FEWEST_TOKENS:
        return Target()
    if case.kernel == "rms_norm" and direction == "backward" and case.hidden > BACKWARD_WIDEST:
        return Target()
    found = TARGETS.get((case.kernel, direction), Target())
    return Target(clone=ROPE_CLONE.get(case.head_dim), compiled=found.compiled) if case.kernel == "rope" else found


def verdicts(case: Case, direction: Direction, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Each target of a case: its value, what was measured, and ``met``, ``missed`` or ``not measured``.

    ``seconds`` are a call's, by contestant; who was not measured is left out.
    """
    aimed, own = target(case, direction), seconds.get("argonne")
    rivals = (
        ("torch.clone", aimed.clone),
        ("liger", aimed.liger),
        ("torch.compile", aimed.compiled),
        ("F.linear_cross_entropy", aimed.library),
    )
    found = []
    for name, least in rivals:
        if least is not None:
            ratio = None if own is None or name not in seconds else seconds[name] / own
            found.append(_verdict(f"rate / {name}", ratio, least, ratio is not None and ratio >= least))
    if aimed.products is not None:
        bare = seconds.get("bare products")
        ratio = None if own is None or bare is None else own / bare
        met = ratio is not None and ratio <= aimed.products
        found.append(_verdict("time / bare products", ratio, aimed.products, met))
    return found


def _verdict(name: str, value: float | None, limit: float, met: bool) -> dict[str, Any]:
    outcome = "not measured" if value is None else "met" if met else "missed"
    return {"name": name, "target": limit, "value": value, "verdict": outcome}
