"""Any layout: a checkpoint opens in every other one, and in transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from argonne.checkpoint import load_pieces, moment_pieces, weight_pieces
from argonne.models import ArgonneModel, Execution, from_huggingface
from argonne.parallel import Layout, ProcessGroups
from argonne.training.optimizer import build_optimizer
from tests.integration.runs import metrics, succeed
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of

IDS = torch.tensor([[5, 77, 300, 12, 41, 5, 5, 230, 9, 8]])


def loaded(groups: ProcessGroups, directory: Path) -> tuple[Parts, Parts, torch.Tensor]:
    """Weights, first moments and last logits of a checkpoint as a rank of any layout loads them."""
    model = ArgonneModel(from_huggingface(directory), Execution(groups))
    parameters = model.sharded_parameters()
    optimizer = build_optimizer(parameters, weight_decay=0.0)
    with torch.no_grad():
        load_pieces(directory, [*weight_pieces(parameters), *moment_pieces(optimizer, parameters)])
    moments = parts_of(model, groups, lambda parameter: optimizer.state[parameter]["exp_avg_sq"])
    return parts_of(model, groups, lambda parameter: parameter), moments, model.next_token_logits(IDS)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_checkpoint_of_tensor_2_loads_with_equal_weights_and_moments(
    ranks: RankPool, uninterrupted: Path, size: int
) -> None:
    directory = uninterrupted / "step_00000012"
    results = ranks.run(Layout(tensor=size), loaded, directory)
    weights = assemble(weights for weights, _, _ in results)
    moments = assemble(moments for _, moments, _ in results)
    with safe_open(directory / "model-00001-of-00001.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(weights)
        for name, value in weights.items():
            assert torch.equal(value, stored.get_tensor(name)), name
    with safe_open(directory / "optimizer-00001-of-00001.safetensors", "pt") as stored:
        for name, value in moments.items():
            assert torch.equal(value, stored.get_tensor(f"{name}.exp_avg_sq")), name
            assert value.any(), f"the second moment of {name} is all zero"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        pytest.param(1, {}, marks=pytest.mark.exhaustive),
        (4, {"--data-parallel": 2, "--sequence-parallel": None}),
        (3, {"--uneven-shards": None}),
    ],
    ids=str,
)
def test_a_run_goes_on_in_another_layout_with_the_same_data_and_loss(
    flags: dict[str, Any], uninterrupted: Path, tmp_path: Path, nproc: int, layout: dict[str, Any]
) -> None:
    succeed("pretrain", {**flags, "--output-dir": tmp_path, "--stop-at-step": 8})
    # Twice: what the first start in the new layout records must not get in the way of the second.
    for more in ({"--stop-at-step": 10}, {}):
        succeed("pretrain", {**flags, "--output-dir": tmp_path, **layout, **more}, nproc=nproc)
    found, expected = metrics(tmp_path), metrics(uninterrupted)
    assert found[8]["layout"] != expected[8]["layout"]
    assert [line["batch_hash"] for line in found] == [line["batch_hash"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]


OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "argonne" for name in sys.modules)
with torch.no_grad():
    logits = model(torch.tensor(json.loads(sys.argv[2]))).logits[:, -1]
text = "a text of words"
assert tokenizer.decode(tokenizer.encode(text)) == text
print(json.dumps({"class": type(model).__name__, "logits": logits.tolist()}))
"""


def test_transformers_opens_a_checkpoint_as_llama_with_equal_logits(ranks: RankPool, uninterrupted: Path) -> None:
    directory = uninterrupted / "step_00000012"
    words = [sys.executable, "-c", OPEN, str(directory), json.dumps(IDS.tolist())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["class"] == "LlamaForCausalLM"
    for _, _, logits in ranks.run(Layout(tensor=2), loaded, directory):
        torch.testing.assert_close(logits, torch.tensor(told["logits"]), rtol=0, atol=1e-5)
