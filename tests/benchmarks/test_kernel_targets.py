"""The kernels' cases, their least bytes, their targets and the verdicts on them."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.kernel_targets import (
    HOST_MICROSECONDS,
    KERNELS,
    ROPE_CLONE,
    TARGETS,
    Case,
    Target,
    cases,
    minimum_bytes,
    products_flops,
    target,
    verdicts,
)
from tests.benchmarks.kernel_cases import BF16


def test_minimum_bytes_are_those_of_the_design() -> None:
    tokens, element = 8192, 2
    norm = Case("rms_norm", BF16, tokens, hidden=4080)
    assert minimum_bytes(norm, "forward") == 2 * tokens * 4080 * element
    assert minimum_bytes(norm, "backward") == 3 * tokens * 4080 * element
    both = replace(norm, kernel="add_rms_norm")
    assert minimum_bytes(both, "forward") == minimum_bytes(both, "backward") == 4 * tokens * 4080 * element
    assert minimum_bytes(both, "both") == 8 * tokens * 4080 * element
    rope = Case("rope", BF16, tokens, heads=24, key_value_heads=8, head_dim=170)
    assert minimum_bytes(rope, "forward") == minimum_bytes(rope, "backward") == 2 * tokens * (24 + 8) * 170 * element
    packed = replace(rope, kernel="rope_packed")
    assert minimum_bytes(packed, "forward") == minimum_bytes(rope, "forward")
    assert minimum_bytes(packed, "backward") == 2 * tokens * (24 + 2 * 8) * 170 * element
    gated = Case("swiglu", torch.float32, tokens, feed_forward=11_008)
    assert minimum_bytes(gated, "forward") == 3 * tokens * 11_008 * 4
    assert minimum_bytes(gated, "backward") == 5 * tokens * 11_008 * 4
    loss = Case("cross_entropy", BF16, tokens, vocabulary=151_665)
    assert minimum_bytes(loss, "both") == 3 * tokens * 151_665 * element
    fused = Case("linear_cross_entropy", BF16, tokens, hidden=4080, vocabulary=151_665)
    assert (minimum_bytes(fused, "both"), products_flops(fused)) == (0, 6 * tokens * 4080 * 151_665)


def test_targets_are_those_of_the_design() -> None:
    assert {
        ("rms_norm", "forward"): Target(0.97, 1.08, 1.0),
        ("rms_norm", "backward"): Target(0.90, 1.4, 1.2),
        ("add_rms_norm", "both"): Target(0.92, 1.3, 1.1),
        ("rope", "forward"): Target(None, None, 1.0),
        ("rope", "backward"): Target(None, None, 1.0),
        ("rope_packed", "both"): Target(None, 1.8, None),
        ("swiglu", "forward"): Target(0.96, 1.0, 1.0),
        ("swiglu", "backward"): Target(0.95, 1.0, 1.0),
        ("cross_entropy", "both"): Target(0.85, 3.0, 1.3),
        ("linear_cross_entropy", "both"): Target(None, 3.0, None, 1.25, 1.0),
    } == TARGETS
    assert ROPE_CLONE == {128: 0.93, 170: 0.85}
    assert HOST_MICROSECONDS == 40
    assert set(TARGETS) <= {(kernel, direction) for kernel, timed in KERNELS.items() for direction in timed}


def test_targets_are_of_bfloat16_many_tokens_and_widths_in_reach() -> None:
    rope = Case("rope", BF16, 8192, heads=24, key_value_heads=8, head_dim=170)
    assert target(rope, "forward") == Target(clone=0.85, compiled=1.0)
    assert target(replace(rope, head_dim=64), "forward") == Target(compiled=1.0)
    assert target(replace(rope, dtype=torch.float32), "forward") == target(replace(rope, tokens=4096), "forward")
    assert target(replace(rope, tokens=4096), "forward") == Target()
    assert target(Case("rms_norm", BF16, 8192, hidden=16_384), "backward") == Target()


def test_verdicts_compare_rates_and_say_what_was_not_measured() -> None:
    found = verdicts(Case("rms_norm", BF16, 8192, hidden=4080), "forward", {"argonne": 1.0, "torch.clone": 0.96})
    assert [(v["name"], v["target"], v["verdict"]) for v in found] == [
        ("rate / torch.clone", 0.97, "missed"),
        ("rate / liger", 1.08, "not measured"),
        ("rate / torch.compile", 1.0, "not measured"),
    ]
    fused = Case("linear_cross_entropy", BF16, 8192, hidden=4080, vocabulary=151_665)
    seconds = {"argonne": 1.25, "bare products": 1.0, "liger": 3.0, "F.linear_cross_entropy": 1.3}
    outcome = {v["name"]: v["verdict"] for v in verdicts(fused, "both", seconds)}
    assert outcome == {"rate / liger": "missed", "rate / F.linear_cross_entropy": "met", "time / bare products": "met"}


def test_cases_are_the_presets_and_powers_of_two() -> None:
    widths = {case.hidden for case in cases("rms_norm", BF16, 8192)}
    assert widths == {4080, 3072, 2048, 5120, 1024, 4096, 8192}
    assert {case.head_dim for case in cases("rope", BF16, 8192)} == {170, 128, 64}
    assert all(len(set(cases(kernel, BF16, 8192))) == len(cases(kernel, BF16, 8192)) for kernel in KERNELS)
