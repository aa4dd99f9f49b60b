"""Each form of the original's files becomes a Hugging Face directory with the same numbers, and the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from argonne.checkpoint import load_pieces, weight_pieces
from argonne.convert import ConvertFlags, convert
from argonne.convert.shapes import OldFileFlags
from argonne.models import PRESETS, ArgonneModel, Execution, from_huggingface
from argonne.parallel import ProcessGroups
from tests import dense
from tests.convert import old
from tests.whole import assert_close

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
HEADS = ConvertFlags(old=OldFileFlags(num_attention_heads=6, max_position_embeddings=32))


def compiled(state: old.State) -> old.State:
    return {f"_orig_mod.{name}": tensor for name, tensor in state.items()}


FORMS: dict[str, Callable[[old.State], Any]] = {
    "a checkpoint": old.checkpoint,
    "of a compiled model": lambda state: old.checkpoint(compiled(state)),
    "of compiled stages": lambda state: old.checkpoint(
        {n.replace("pipeline_stages.0.", "pipeline_stages.0._orig_mod."): t for n, t in old.in_stages(state, 2).items()}
    ),
    "of DistributedDataParallel": lambda state: old.checkpoint({f"module.{n}": t for n, t in state.items()}),
    "of FSDP": lambda state: {"model_state": state, "config": old.TOLD, "global_step": 430},
    "a bare state dict with its shape": lambda state: {**state, "config": old.TOLD},
    "tensor-parallel shards": lambda state: old.checkpoint(
        {}, tensor_parallel_shards=old.shards(state, 3), tensor_parallel=True, world_size=3, rank=0
    ),
    "compiled shards": lambda state: old.checkpoint(
        {}, tensor_parallel_shards=[compiled(shard) for shard in old.shards(state, 3)], world_size=3
    ),
    "pipeline stages": lambda state: old.checkpoint(old.in_stages(state, 2), pipeline_parallel=True),
    "stages and blocks": lambda state: old.checkpoint(old.in_stages(state, 2, keep=True)),
    "one rank of one": lambda state: old.checkpoint(state, tensor_parallel=True, world_size=1, rank=0),
    "whole in spite of its ranks": lambda state: old.checkpoint(state, tensor_parallel=True, world_size=4, rank=0),
}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_two_has_the_same_tensors(tmp_path: Path, form: str, tied: bool) -> None:
    state = old.argonne2(old.TIED if tied else old.SHAPE)
    convert(old.saved(tmp_path / "old.pth", FORMS[form](state)), tmp_path / "new", ConvertFlags())
    assert from_huggingface(tmp_path / "new") == (old.TIED if tied else old.SHAPE)
    expected = old.as_llama(state)
    if tied:
        del expected["lm_head.weight"]
    found = weights(tmp_path / "new")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("form", ["a checkpoint", "tensor-parallel shards"])
def test_the_older_serialisation_is_read_too(tmp_path: Path, form: str) -> None:
    state = old.argonne2()
    file = old.saved(tmp_path / "old.pth", FORMS[form](state), _use_new_zipfile_serialization=False)
    convert(file, tmp_path / "new", ConvertFlags())
    assert all(
        torch.equal(weights(tmp_path / "new")[n], t) for n, t in old.as_llama(state).items() if n != "lm_head.weight"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_and_this_model_compute_what_two_did(tmp_path: Path, tied: bool) -> None:
    state = old.argonne2(old.TIED if tied else old.SHAPE)
    file = old.saved(tmp_path / "old.pth", state)  # bare, so that the flags must say the rest
    convert(file, tmp_path / "new", HEADS)
    config = from_huggingface(tmp_path / "new")
    expected = dense.logits({n: t.double() for n, t in old.as_llama(state).items()}, config, IDS)
    model = ArgonneModel(config, Execution(ProcessGroups.single()))
    load_pieces(tmp_path / "new", weight_pieces(model.sharded_parameters()))
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "new")(IDS).logits
    assert_close(model.logits(IDS).detach().double(), expected, 1e-5, "our logits")
    assert_close(theirs.double(), expected, 1e-5, "logits of transformers")


ONE: dict[str, Callable[[old.State], Any]] = {
    "a checkpoint": lambda state: old.checkpoint(state, config={"n_head": 4}),
    "stages and blocks": lambda state: old.checkpoint(old.in_stages(state, 2, keep=True), config={"n_head": 4}),
    "stages": lambda state: old.checkpoint(old.in_stages(state, 1), config={"n_head": 4}),
    "compiled": lambda state: old.checkpoint(compiled(state), config={"n_head": 4}),
    "half": lambda state: old.checkpoint({n: t.bfloat16() for n, t in state.items()}, config={"n_head": 4}),
}


@pytest.mark.parametrize("form", ONE)
def test_one_becomes_a_gpt2_with_the_same_logits(tmp_path: Path, form: str) -> None:
    state = old.argonne1()
    if form == "half":
        state = {name: tensor.bfloat16().float() for name, tensor in state.items()}
    convert(old.saved(tmp_path / "old.pth", ONE[form](state)), tmp_path / "new", ConvertFlags())
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "new", dtype=torch.float64).eval()
    expected = old.argonne1_logits({name: tensor.double() for name, tensor in state.items()}, 4, IDS)
    with torch.no_grad():
        assert_close(model(IDS).logits, expected, 1e-10, "logits of transformers")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["resid_pdrop"], config["tie_word_embeddings"], config["n_inner"]) == (0.1, False, None)
    assert config["dtype"] == ("bfloat16" if form == "half" else "float32")


@pytest.mark.parametrize("version", ["argonne1", "argonne2"])
def test_the_originals_own_directories_open(tmp_path: Path, version: str) -> None:
    state = old.argonne1() if version == "argonne1" else old.argonne2()
    (tmp_path / "old").mkdir()
    old.saved(tmp_path / "old" / "pytorch_model.bin", state)
    kind = {"argonne1": {"model_type": "argonne", "n_head": 4}, "argonne2": {"model_type": "argonne2", **old.TOLD}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(kind[version]))
    (tmp_path / "old" / "generation_config.json").write_text('{"eos_token_id": 3}')
    convert(tmp_path / "old", tmp_path / "new", ConvertFlags())
    assert (tmp_path / "new" / "generation_config.json").read_text() == '{"eos_token_id": 3}'
    convert(old.saved(tmp_path / "a.pth", {**state, "config": kind[version]}), tmp_path / "other", ConvertFlags())
    assert {n: t.tolist() for n, t in weights(tmp_path / "new").items()} == {
        n: t.tolist() for n, t in weights(tmp_path / "other").items()
    }


def test_a_preset_that_fits_says_how_many_heads_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", old.TIED)
    convert(old.saved(tmp_path / "old.pth", old.argonne2()), tmp_path / "new", ConvertFlags())
    assert from_huggingface(tmp_path / "new") == old.TIED


def test_a_config_of_the_original_says_what_tensors_do_not(tmp_path: Path) -> None:
    told = {"model_type": "argonne2", "n_head": 6, "block_size": 64, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(told))
    flags = ConvertFlags(old=OldFileFlags(model_config=tmp_path / "config.json"))
    convert(old.saved(tmp_path / "old.pth", old.argonne2()), tmp_path / "new", flags)
    config = from_huggingface(tmp_path / "new")
    assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (5e5, 1e-5, 64)
