"""The traces of a reproducible run are the same files at every layout, and where they are not, what did it is named."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.compare.traces import Parting, first_difference
from argonne.models import Batch, CrossEntropyLoss, Execution
from argonne.models.config import PRESETS
from argonne.models.recompute import Recompute
from argonne.parallel import Layout, ProcessGroups, initialise
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.config import TrainingFlags
from argonne.training.trace import StepTrace
from argonne.training.trace_file import TraceLine, read_trace, trace_path
from tests.models.own import VOCABULARY, Small
from tests.pool import RankPool
from tests.training.traced import (
    LAYERS,
    LEAVES,
    Fault,
    input_gradient_fault,
    reduction_fault,
    trace,
    update_fault,
    weight_fault,
)

STEPS = 7
LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "tp2": (Layout(tensor=2), {}),
    "tp2 sp": (Layout(tensor=2, sequence_parallel=True), {}),
    "pp2": (Layout(pipeline=2), {}),
    "pp2 interleaved": (Layout(pipeline=2), {"schedule": "interleaved"}),
    "pp2 zb": (Layout(pipeline=2), {"schedule": "zb"}),
    "dp2": (Layout(data=2), {}),
    "dp2 zero1": (Layout(data=2), {"kind": "zero1"}),
    "dp2 fsdp": (Layout(data=2), {"kind": "fsdp"}),
    "recomputed": (Layout(), {"recompute": Recompute.FULL}),
    "tp2 pp2 sp, recomputed": (Layout(tensor=2, pipeline=2, sequence_parallel=True), {"recompute": Recompute.FULL}),
}


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    ranks.run(Layout(), trace, path, STEPS, {})
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_trace_of_a_reproducible_run_is_the_same_file_at_every_layout(
    ranks: RankPool, alone: Path, tmp_path: Path, name: str
) -> None:
    layout, options = LAYOUTS[name]
    ranks.run(layout, trace, tmp_path / "run", 2, options)
    assert first_difference(alone, tmp_path / "run") is None
    for step in (1, 2):
        assert trace_path(tmp_path / "run", step).read_bytes() == trace_path(alone, step).read_bytes()


def test_an_untied_head_and_half_precision_are_traced_alike(ranks: RankPool, tmp_path: Path) -> None:
    options = {"tied": False, "precision": "bf16"}
    for name, layout in (("one", Layout()), ("two", Layout(tensor=2))):
        ranks.run(layout, trace, tmp_path / name, 1, options)
    one, two = (trace_path(tmp_path / name, 1).read_bytes() for name in ("one", "two"))
    assert one == two
    _, lines = read_trace(trace_path(tmp_path / "one", 1))
    weights = [line.name for line in lines if line.kind == "weight"]
    assert (weights[0], weights[-1]) == ("model.embed_tokens.weight", "lm_head.weight")
    assert [line.name for line in lines if line.kind == "gradient"] == weights[::-1]


TP2, PP2 = Layout(tensor=2), Layout(pipeline=2)
FAULTS: dict[str, tuple[Layout, Fault, Parting]] = {
    "a weight": (
        TP2,
        partial(weight_fault, "model.layers.2.mlp.gate_up_proj.weight", 7),
        Parting(7, 0, "forward", "model.layers.2.mlp.gate_proj"),
    ),
    "a copy of a weight": (
        TP2,
        partial(weight_fault, "model.layers.1.post_attention_layernorm.weight", 2),
        Parting(2, 0, "forward", "model.layers.1.post_attention_layernorm"),
    ),
    "a gradient": (
        TP2,
        partial(input_gradient_fault, 2, 3, 1),
        Parting(3, 1, "backward", "model.layers.1"),
    ),
    "a gradient within a pipeline": (
        PP2,
        partial(input_gradient_fault, 3, 2, 2),
        Parting(2, 2, "backward", "model.layers.2"),
    ),
    "a sum of gradients": (
        TP2,
        partial(reduction_fault, "model.layers.1.mlp.down_proj.weight", 2),
        Parting(2, None, "gradient", "model.layers.1.mlp.down_proj.weight"),
    ),
    "an update": (
        TP2,
        partial(update_fault, "model.layers.0.self_attn.o_proj.weight", 2),
        Parting(2, None, "weight", "model.layers.0.self_attn.o_proj.weight"),
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_an_ulp_on_one_rank_is_named_with_its_step_micro_batch_and_module(
    ranks: RankPool, alone: Path, tmp_path: Path, what: str
) -> None:
    layout, fault, expected = FAULTS[what]
    ranks.run(layout, trace, tmp_path / "run", expected.step, {}, fault)
    assert first_difference(alone, tmp_path / "run") == expected


def names_of(lines: list[TraceLine], kind: str) -> list[str]:
    return [line.name for line in lines if line.kind == kind]


def modules(layers: int) -> list[str]:
    """What is hashed of an Argonne model in a forward pass."""
    block = (
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj.input"),
        *("self_attn.o_proj", "post_attention_layernorm", "post_attention_layernorm[1]", "mlp.gate_proj"),
        *("mlp.up_proj", "mlp.down_proj.input", "mlp.down_proj"),
    )
    blocks = [f"model.layers.{n}{part}" for n in range(layers) for part in (*(f".{name}" for name in block), "")]
    return ["model.embed_tokens", *blocks, "model.norm", "loss"]


def weights(layers: int) -> list[str]:
    """Those of one with tied embeddings, in the order of its modules."""
    apart = (".input", "[1]", "loss", *(f"layers.{n}" for n in range(layers)))
    return [f"{name}.weight" for name in modules(layers) if not name.endswith(apart)]


def bytes_of_a_step(layers: int, leaves: int) -> int:
    """Of its trace but for the first line, with tied embeddings: each hash takes 20, and the rest of a line 37."""
    forward, parameters = modules(layers), weights(layers)
    kinds = {"forward": forward, "backward": forward[:-1], "gradient": parameters, "weight": parameters}
    return sum(
        len(names) * (37 + len(kind) + 20 * (1 if kind in ("gradient", "weight") else leaves)) + sum(map(len, names))
        for kind, names in kinds.items()
    )


def test_each_module_is_there_once_in_the_order_of_execution(alone: Path) -> None:
    leaves, lines = read_trace(trace_path(alone, 1))
    expected = modules(LAYERS)
    assert (leaves, names_of(lines, "forward")) == (LEAVES, expected)
    assert names_of(lines, "backward") == expected[-2::-1]
    assert names_of(lines, "weight") == weights(LAYERS) == names_of(lines, "gradient")[::-1]
    hashes = [line.hashes for line in lines if line.kind == "forward"]
    assert len({each for hashes_of in hashes for each in hashes_of}) == len(expected) * LEAVES


def test_a_trace_of_a_hundred_steps_of_the_2b_preset_is_small(alone: Path) -> None:
    """At the default accumulation on one replica; and it may have 64 micro-batches."""
    path = trace_path(alone, 1)
    assert bytes_of_a_step(LAYERS, LEAVES) == path.stat().st_size - len(path.read_text().splitlines()[0]) - 1
    layers, accumulation = PRESETS["argonne-2.0-2b"].num_hidden_layers, TrainingFlags().gradient_accumulation_steps
    assert (layers, accumulation) == (20, 4)
    assert 100 * bytes_of_a_step(layers, accumulation) < 15e6
    assert 100 * bytes_of_a_step(layers, 64) < 80e6


@pytest.mark.parametrize("layout", [Layout(context=2), Layout(tensor=4), Layout(tensor=2, context=2)], ids=str)
def test_what_fast_mode_computes_before_any_sum_is_traced_alike(
    ranks: RankPool, alone: Path, tmp_path: Path, layout: Layout
) -> None:
    """Sequences that ranks share, and key and value heads of which each has two holders."""
    ranks.run(layout, trace, tmp_path / "run", 1, {"blocks": None})
    (_, expected), (_, lines) = (read_trace(trace_path(run, 1)) for run in (alone, tmp_path / "run"))
    assert lines[:2] == expected[:2]
    assert [line.name for line in lines[:2]] == ["model.embed_tokens", "model.layers.0.input_layernorm"]
    gone = {*(["loss"] if layout.context > 1 else [])}
    assert names_of(lines, "forward") == [name for name in modules(LAYERS) if name not in gone]
    unsummed = ("k_proj", "v_proj") if layout.tensor == 4 else ()
    backward = [name for name in reversed(modules(LAYERS)) if not name.endswith(("loss", *unsummed))]
    assert names_of(lines, "backward") == backward


def trace_of_own(groups: ProcessGroups) -> list[TraceLine]:
    """A model that is not ours, in float64 and fast mode."""
    model = Small(Execution(groups, PRECISIONS["fp64"], recompute=Recompute.FULL))
    initialise(model.sharded_parameters(), 0)
    ids = torch.randint(VOCABULARY, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    hashes = StepTrace(model, range(2), 2, (2, 8))
    with hashes:
        model.forward_backward(Batch(ids[..., :-1], ids[..., 1:], divisor=32.0), hashes.loss(CrossEntropyLoss()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return hashes.lines()


def test_a_model_of_ones_own_has_its_parallel_layers_and_blocks_traced(ranks: RankPool) -> None:
    for layout in (Layout(), Layout(tensor=2), Layout(tensor=2, sequence_parallel=True)):
        one, *others = ranks.run(layout, trace_of_own)
        assert all(lines == one for lines in others)
        expected = ["embed", "blocks.0.up", "blocks.0.down.input", "blocks.0.down", "blocks.0", "loss"]
        assert names_of(one, "forward") == expected
        assert names_of(one, "backward") == expected[-2::-1]
        if layout == Layout():
            first = one
        else:  # what is before any sum over ranks has the same bits in fast mode too
            assert one[0] == first[0]
