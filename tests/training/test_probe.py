"""What a reproducible run needs of its libraries is tried before it begins, and what does not hold is named."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.kernels import rope
from argonne.parallel import ArgonneError, Layout, ProcessGroups
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.config import ParallelFlags, RunConfig
from argonne.training.run import facts
from argonne.training.run.facts import FACTS, Sizes
from argonne.training.run.probe import require_facts, sizes_of, try_facts
from tests.integration.runs import ROOT, finish, start, words_of
from tests.pool import RankPool
from tests.training.small_run import small_run

SIZES = Sizes()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_every_fact_holds_here(precision: str) -> None:
    @given(
        blocks=st.sampled_from([1, 2, 3, 4, 8]),
        batch=st.integers(1, 3),
        sequence=st.integers(1, 70),
        hidden=st.integers(1, 35).map(lambda half: 2 * half),
        width=st.integers(1, 130),
        heads=st.integers(1, 3),
        key_values=st.integers(1, 4),
        head_dim=st.integers(1, 40).map(lambda half: 2 * half),
    )
    @example(blocks=2, batch=2, sequence=32, hidden=24, width=20, heads=2, key_values=2, head_dim=6)
    @example(blocks=4, batch=2, sequence=64, hidden=64, width=64, heads=1, key_values=4, head_dim=16)
    def claim(**sizes: int) -> None:
        try_facts(Sizes(precision=PRECISIONS[precision], **sizes))

    claim()


def by_width(real: Callable[..., Tensor], dim: int, argument: int = 0) -> Callable[..., Tensor]:
    """``real``, with a result that depends on how much there is of one dimension of an argument."""
    return lambda *args, **options: real(*args, **options) * (1 + 1e-3 * args[argument].shape[dim])


def break_products(patch: pytest.MonkeyPatch) -> None:
    real = facts.product
    patch.setattr(facts, "product", lambda a, b: real(a, b) + 1e-3 * (a.data_ptr() % 64))


def break_repeated_products(patch: pytest.MonkeyPatch) -> None:
    real, calls = facts.product, iter(range(10**6))
    patch.setattr(facts, "product", lambda a, b: real(a, b) + 1e-3 * next(calls))


def break_attention(patch: pytest.MonkeyPatch, dim: int, masked: bool, gradient: bool) -> None:
    real = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        y = real(query, key, value, mask, **options)
        if (mask is not None) == masked:
            error = 1e-3 * query.shape[dim]
            y = y + error * (value.sum() - value.sum().detach()) if gradient else y + error
        return y

    patch.setattr(F, "scaled_dot_product_attention", attend)


def break_exponentials(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "exp", by_width(Tensor.exp, 0))


def break_row_sums(patch: pytest.MonkeyPatch) -> None:
    real = Tensor.sum
    patch.setattr(Tensor, "sum", lambda x, *args: real(x, *args) + 1e-3 * (x.storage_offset() > 0))


def break_optimizer(patch: pytest.MonkeyPatch) -> None:
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        real(self)
        for parameter in self.state:
            parameter.data += 1e-3 * parameter.numel()

    patch.setattr(torch.optim.AdamW, "step", step)


PRODUCTS, ATTENTION, DOCUMENTS, ROTATION, EXPONENTIALS, SWIGLU, NORMS, SUMS, OPTIMIZER, EMBEDDING = FACTS
BREAKS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "products elsewhere": (PRODUCTS, break_products),
    "products repeated": (PRODUCTS, break_repeated_products),
    "heads": (ATTENTION, lambda patch: break_attention(patch, 1, False, False)),
    "sequences": (ATTENTION, lambda patch: break_attention(patch, 0, False, False)),
    "gradients of heads": (ATTENTION, lambda patch: break_attention(patch, 1, False, True)),
    "documents of heads": (DOCUMENTS, lambda patch: break_attention(patch, 1, True, False)),
    "gradients of documents": (DOCUMENTS, lambda patch: break_attention(patch, 1, True, True)),
    "rotation": (ROTATION, lambda patch: patch.setattr(rope, "rotated", by_width(rope.rotated, 2))),
    "exponentials": (EXPONENTIALS, break_exponentials),
    "pinned SwiGLU": (SWIGLU, lambda patch: patch.setattr(torch, "exp", by_width(torch.exp, 1))),
    "norms": (NORMS, lambda patch: patch.setattr(torch, "rsqrt", by_width(torch.rsqrt, 0))),
    "row sums": (SUMS, break_row_sums),
    "optimizer": (OPTIMIZER, break_optimizer),
    "embedding": (EMBEDDING, lambda patch: patch.setattr(F, "embedding", by_width(F.embedding, 0, argument=1))),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_fact_that_does_not_hold_is_named_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, breaks = BREAKS[name]
    breaks(monkeypatch)
    with pytest.raises(ArgonneError) as refused:
        try_facts(SIZES)
    message = str(refused.value)
    assert message.startswith(f"reproducible=True cannot hold on this machine: {text} (torch {torch.__version__}, ")
    assert message.endswith("; legal: leave the flag out")
    assert "\n" not in message


def test_every_fact_is_broken_by_some_test() -> None:
    assert {text for text, _ in BREAKS.values()} == set(FACTS)


def test_swiglu_is_tried_as_the_model_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole vectors by ``F.silu``."""
    monkeypatch.setattr(F, "silu", by_width(F.silu, 1))
    try_facts(SIZES)
    with pytest.raises(ArgonneError, match=re.escape(SWIGLU)):
        try_facts(replace(SIZES, width=128))


def test_documents_are_tried_only_where_they_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    break_attention(monkeypatch, 1, True, False)
    try_facts(replace(SIZES, documents=False))


def test_several_that_do_not_hold_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    break_products(monkeypatch)
    break_optimizer(monkeypatch)
    with pytest.raises(ArgonneError, match=f": {re.escape(PRODUCTS)}; {re.escape(OPTIMIZER)} "):
        try_facts(SIZES)


def test_the_streams_of_random_numbers_stay_where_they_were() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    try_facts(SIZES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def reproducible(home: Path) -> RunConfig:
    return replace(small_run(home), parallel=ParallelFlags(reproducible=True))


def test_the_sizes_are_those_of_the_run_and_small_on_a_cpu(tmp_path: Path) -> None:
    config, fp32 = reproducible(tmp_path), PRECISIONS["fp32"]
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    own = Sizes(cpu, fp32, "auto", 1, 2, 16, 16, 24, 2, 1, 8, documents=False)
    assert sizes_of(config, cpu, fp32, own_model=False) == own
    assert sizes_of(config, gpu, fp32, own_model=False) == replace(own, device=gpu)
    generic = replace(SIZES, blocks=1, sequence=16, key_values=2, documents=False)
    assert sizes_of(config, cpu, fp32, own_model=True) == generic
    large = replace(config.model, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    large = replace(large, intermediate_size=8 * 1000)
    config = replace(config, model=large, data=replace(config.data, block_size=4096))
    config = replace(config, training=replace(config.training, initial_batch_size=16))
    found = sizes_of(config, cpu, fp32, own_model=False)
    assert found == replace(own, blocks=4, sequence=768, hidden=1024, width=256 + 1000 % 64, key_values=2, head_dim=128)
    assert found.rows == 128
    found = sizes_of(config, gpu, fp32, own_model=False)
    assert found == Sizes(gpu, fp32, "auto", 8, 16, 4096, 4096, 1000, 4, 8, 128, documents=False)


def refusal(groups: ProcessGroups, config: RunConfig, breaks: bool) -> str:
    """What a rank says whose last one's AdamW is another, if ``breaks``."""
    with pytest.MonkeyPatch.context() as patch:
        if breaks and groups.world.rank == groups.world.size - 1:
            break_optimizer(patch)
        try:
            require_facts(config, groups.in_blocks(1), PRECISIONS["fp32"], own_model=False)
        except ArgonneError as error:
            return str(error)
    return ""


def test_what_does_not_hold_on_one_rank_is_refused_on_all(ranks: RankPool, tmp_path: Path) -> None:
    config = reproducible(tmp_path)
    assert ranks.run(Layout(data=2), refusal, config, False) == ["", ""]
    one, other = ranks.run(Layout(data=2), refusal, config, True)
    assert one == other
    assert OPTIMIZER in one


def test_a_run_that_is_not_reproducible_tries_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_products(monkeypatch)
    require_facts(small_run(tmp_path), ProcessGroups.single(), PRECISIONS["fp32"], own_model=False)


BROKEN = """
import runpy, sys
import torch.nn.functional as F

real = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda query, *rest, **options: real(query, *rest, **options) + query.shape[1]
sys.argv[0] = {pretrain!r}
runpy.run_path({pretrain!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_is_refused_in_one_line_before_anything_is_written(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(pretrain=str(ROOT / "examples" / "pretrain.py")))
    flags = {
        "--data-glob": f"{tmp_path}/corpus/*.parquet",
        "--tokenizer-path": config.data.tokenizer_path,
        "--output-dir": tmp_path / "run",
        "--preset": "demo",
        "--block-size": 32,
        "--device": "cpu",
        "--reproducible": None,
    }
    done = finish(start([sys.executable, str(script), *words_of(flags)]))
    assert done.status == 2, done.output
    errors = [line for line in done.output.splitlines() if line.startswith("argonne: error: ")]
    assert len(errors) == 1, done.output
    assert f"reproducible=True cannot hold on this machine: {ATTENTION} (torch " in errors[0]
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list((tmp_path / "run").glob("step_*"))
