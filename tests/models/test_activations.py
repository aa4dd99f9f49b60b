"""What blocks keep for backward is what the closed form says, to the byte, whatever is recomputed, and where."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from argonne.kernels import Backend, rms_norm
from argonne.models import Argonne1Config, Argonne1Model, ArgonneConfig, ArgonneModel, Execution, build_replicas
from argonne.models.activations import Micro, kept_by_blocks
from argonne.models.families import decoder_family
from argonne.models.recompute import Recompute
from argonne.models.staged import StagedModel
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.context_parallel import attention
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from benchmarks import interpreter
from tests.kernels.numerics import Interpreter
from tests.models.live import Live
from tests.pool import RankPool

BATCH, SEQUENCE = 3, 16
LLAMA = ArgonneConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
    intermediate_size=88,
    max_position_embeddings=SEQUENCE,
)
QWEN3 = replace(LLAMA, **decoder_family("qwen3").features(True))
ARGONNE1 = Argonne1Config(48, 2, 4, 61, max_position_embeddings=SEQUENCE, attention_dropout=0.0)
CHOICES = [Recompute.of(word) for word in ("none", "selective", "full", "2")]
Found = dict[str, tuple[int, int, list[str]]]


def kept(
    groups: ProcessGroups, config: Any, precision: str, kernels: Backend = "torch", blocks: int | None = None
) -> Found:
    """Of each choice, the bytes that the model's blocks should keep of a micro-batch, those they do, and what of."""
    torch.set_num_threads(1)
    kind: Any = Argonne1Model if isinstance(config, Argonne1Config) else ArgonneModel
    execution = Execution(groups, PRECISIONS[precision], kernels, reproducible=blocks)
    model, replicas = build_replicas(partial(kind, config), execution, "replicate")
    assert isinstance(model, StagedModel)
    model.initialise(0)
    replicas.publish()  # the weights in the compute dtype are no activations
    drops = {} if kind is ArgonneModel else {"samples": torch.arange(BATCH), "key": 7}
    stage = model.stages[0]
    inputs = stage._places[0].inputs(SEQUENCE, **drops)
    copies = [module.working._copy for module in replicas.copies if module.working._copy is not None]
    places = [x for x in vars(inputs).values() if isinstance(x, torch.Tensor)]
    found: Found = {}
    for recompute in CHOICES:
        micro = Micro(replace(model.execution, recompute=recompute), BATCH, SEQUENCE)
        leaf = torch.zeros(micro.between, config.hidden_size, dtype=execution.precision.compute, requires_grad=True)
        known = [*model.parameters(), *model.buffers(), *copies, *places, leaf]
        with patch.object(attention, "_mask", causal), Live(known) as live:
            x = leaf * 1
            for number, block in enumerate(stage.blocks):
                x = micro.execution.run(block, x, inputs, number=number)
        if kernels == "triton":  # whose interpreter has each kernel's last arguments still: these now
            rms_norm(leaf[:1], torch.ones(config.hidden_size), 1e-6, residual=leaf[:1], backend=kernels)
        assert model.widths is not None
        expected = kept_by_blocks(model.widths, micro, range(len(stage.blocks)))
        found[str(recompute)] = (expected, *live.left(x, expected))
    return found


def causal(chunk: range, *_: object) -> torch.Tensor:
    """As torch makes it on a CPU of a ``CausalBias``, which cannot be made where tensors are watched."""
    return torch.ones(len(chunk), chunk.stop, dtype=torch.bool).tril(chunk.start)


def assert_as_said(found: Found) -> None:
    for choice, (expected, measured, what) in found.items():
        assert measured == expected, f"recompute {choice}: {measured} bytes, not {expected}:\n" + "\n".join(what)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [LLAMA, QWEN3, ARGONNE1], ids=["llama", "qwen3", "argonne1"])
def test_one_process_keeps_what_the_closed_form_says(config: Any, precision: str) -> None:
    found = kept(ProcessGroups.single(), config, precision)
    assert_as_said(found)
    none, selective, full, half = (found[str(choice)][1] for choice in CHOICES)
    assert full < selective < 0.7 * none
    assert 2 * half == full + none


def test_a_run_says_what_its_blocks_keep() -> None:
    config = replace(LLAMA, hidden_size=512, num_hidden_layers=4)
    execution = Execution(ProcessGroups.single(), recompute=Recompute.FULL)
    with torch.device("meta"):
        model = ArgonneModel(config, execution)
    kept = 4 * BATCH * SEQUENCE * 512 * 4 / 2**20
    assert model.facts(1, BATCH, SEQUENCE) == [f"recompute full, {kept:.1f} MiB of activations a micro-batch"]


LAYOUTS = [
    (Layout(tensor=2), LLAMA, "bf16"),
    (Layout(tensor=2, sequence_parallel=True), QWEN3, "fp32"),
    (Layout(tensor=2, sequence_parallel=True), ARGONNE1, "bf16"),
    (Layout(context=2), LLAMA, "fp32"),
    (
        Layout(tensor=2, uneven_shards=True),
        replace(LLAMA, num_attention_heads=6, num_key_value_heads=3, head_dim=8),
        "fp32",
    ),
]


@pytest.mark.parametrize(
    ("layout", "config", "precision"), LAYOUTS, ids=lambda x: str(x) if isinstance(x, Layout) else ""
)
def test_a_rank_keeps_its_share_of_it(ranks: RankPool, layout: Layout, config: Any, precision: str) -> None:
    for found in ranks.run(layout, kept, config, precision):
        assert_as_said(found)


def test_a_reproducible_rank_keeps_what_the_closed_form_says(ranks: RankPool) -> None:
    for found in ranks.run(Layout(tensor=2), kept, LLAMA, "fp32", "torch", 4):
        assert_as_said(found)


def in_triton(groups: ProcessGroups, config: Any) -> Found:
    interpreter.mend()
    return kept(groups, config, "fp32", "triton")


@pytest.mark.exhaustive
def test_kernels_of_triton_keep_what_the_closed_form_says() -> None:
    pool = Interpreter()
    try:
        for config in (LLAMA, QWEN3):
            assert_as_said(pool.run(Layout(), in_triton, config)[0])
    finally:
        pool.close()
