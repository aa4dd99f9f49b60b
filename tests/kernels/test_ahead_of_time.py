"""The gate before any GPU: every shipped configuration compiles for compute capability 80 and 90, and how well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.kernels.gpu import cross_entropy, rms_norm, rope, swiglu
from argonne.models.config import PRESETS, ArgonneConfig
from argonne.parallel import Objective, VocabularyRange
from tests.kernels.compiled import Launch, launches

TOKENS = 4096
FLOAT, HALF = torch.float32, torch.bfloat16

REGISTERS = {
    "rms_norm.forward_kernel": 64,
    "rms_norm.wide_forward_kernel": 48,
    "rms_norm.backward_kernel": 112,
    "rms_norm.wide_dx_kernel": 64,
    "rms_norm.wide_dweight_kernel": 56,
    "rope.rotate_kernel": 56,
    "swiglu.forward_kernel": 40,
    "swiglu.backward_kernel": 48,
    "cross_entropy.statistics_kernel": 72,
    "cross_entropy.losses_kernel": 40,
    "cross_entropy.gradient_kernel": 64,
}
"""The most that a thread of a kernel may take, over all configurations. Measured with Triton 3.9, and one step of 8
above; 65,536 registers and 2,048 threads in a multiprocessor leave 32 for each of them at full occupancy."""


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Shipped:
    """A call, and what it launches."""

    name: str
    module: Any
    call: Callable[[], Any]
    aligned: bool = True
    """Every row begins at a multiple of 16 bytes."""

    def __str__(self) -> str:
        return self.name

    def launches(self) -> list[Launch]:
        return launches(self.module, self.call)


def norms(hidden: int, dtype: torch.dtype) -> list[Shipped]:
    x, weight, scale = empty(TOKENS, hidden, dtype=dtype), empty(hidden, dtype=FLOAT), empty(TOKENS, dtype=FLOAT)
    calls = {
        "forward": lambda: rms_norm.forward(x, None, weight, 1e-6),
        "sum forward": lambda: rms_norm.forward(x, x, weight, 1e-6),
        "backward": lambda: rms_norm.backward(x, None, x, weight, scale),
        "sum backward": lambda: rms_norm.backward(x, x, x, weight, scale),
    }
    aligned = hidden % 16 == 0
    return [Shipped(f"rms_norm {hidden} {dtype} {name}", rms_norm, call, aligned) for name, call in calls.items()]


def turns(heads: int, key_value_heads: int, width: int, dtype: torch.dtype) -> list[Shipped]:
    turned = heads + key_value_heads
    x = empty(1, TOKENS, turned + key_value_heads, width, dtype=dtype)
    tables = empty(TOKENS, width // 2, dtype=FLOAT), empty(TOKENS, width // 2, dtype=FLOAT)
    name = f"rope {heads}+{key_value_heads} heads of {width} {dtype}"
    aligned = turned * width % 16 == key_value_heads * width % 16 == 0
    return [
        Shipped(f"{name} forward", rope, lambda: rope.rotate(x[:, :, :turned], *tables, None, 1.0), aligned),
        Shipped(f"{name} backward", rope, lambda: rope.rotate(x[:, :, :turned], *tables, None, -1.0, x), aligned),
    ]


def gates(columns: int, dtype: torch.dtype) -> list[Shipped]:
    packed, gradient = empty(TOKENS, 2 * columns, dtype=dtype), empty(TOKENS, columns, dtype=dtype)
    aligned = columns % 16 == 0
    return [
        Shipped(f"swiglu {columns} {dtype} forward", swiglu, lambda: swiglu.forward(packed, None), aligned),
        Shipped(f"swiglu {columns} {dtype} backward", swiglu, lambda: swiglu.backward(gradient, packed, None), aligned),
    ]


def losses(vocabulary: int, ranks: int, dtype: torch.dtype, objective: Objective) -> list[Shipped]:
    part = VocabularyRange.of_rank(vocabulary, ranks, 0)
    targets = cross_entropy.TritonSoftmax(empty(TOKENS, dtype=torch.int64), part, objective)
    width = -(-part.tokens // 16) * 16  # as the head makes them on a GPU: rows begin at multiples of 16 elements
    logits = empty(TOKENS, width, dtype=dtype)[:, : part.tokens]

    def all_three() -> None:
        statistics, saved = targets.statistics(logits)
        _, sums = targets.losses(statistics.expand(ranks, -1, -1))
        targets.gradient(saved, sums, None)

    return [Shipped(f"cross_entropy {vocabulary}/{ranks} {dtype}", cross_entropy, all_three)]


def of_preset(config: ArgonneConfig, dtype: torch.dtype) -> list[Shipped]:
    return [
        *norms(config.hidden_size, dtype),
        *turns(config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype),
        *gates(config.intermediate_size, dtype),
        *losses(config.vocab_size, 1, dtype, Objective()),
        *losses(config.vocab_size, 8, dtype, Objective(0.1, 1e-4)),
    ]


def shipped() -> list[Shipped]:
    """The presets in bfloat16, the largest in float32 too, and the ends of every plan."""
    cases = [case for config in PRESETS.values() for case in of_preset(config, HALF)]
    cases += of_preset(PRESETS["argonne-2.0-4.9b"], FLOAT)
    for hidden in (64, 170, 1024, 8192, 16384, 20480):
        cases += norms(hidden, HALF)
    cases += norms(8192, FLOAT) + norms(16384, FLOAT) + turns(9, 3, 64, HALF) + gates(81, HALF)
    return list({case.name: case for case in cases}.values())


@pytest.mark.parametrize("case", shipped(), ids=str)
def test_configuration_compiles_without_spills_or_float64_and_within_its_registers(case: Shipped) -> None:
    found = case.launches()
    assert found, "nothing was launched"
    for launch in found:
        name = f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"
        for capability in (80, 90):
            made, where = launch.compile(capability), f"{name} {launch.options} for {capability}"
            assert made.spilled == 0, f"{where}: {made.spilled} bytes spilled"
            assert ".f64" not in made.ptx, where
            assert made.registers <= REGISTERS[name], f"{where}: {made.registers} registers"
            if not case.aligned:
                continue
            assert 128 in made.accesses("ld"), f"{where} loads {sorted(made.accesses('ld'))} bits"
            if "statistics" not in name:  # that stores a few numbers a row
                assert 128 in made.accesses("st"), f"{where} stores {sorted(made.accesses('st'))} bits"
            if "cross_entropy" not in name:  # whose last block ends where the vocabulary does
                assert min(made.accesses("st")) >= 32, f"{where} stores {sorted(made.accesses('st'))} bits"


def test_every_kernel_is_in_the_table_and_shipped() -> None:
    kernels = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (rms_norm, rope, swiglu, cross_entropy)
        for name in vars(module)
        if name.endswith("_kernel")
    }
    launched = {
        f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"
        for case in shipped()
        for launch in case.launches()
    }
    assert kernels == launched == set(REGISTERS)
