"""Hugging Face directories, distributed checkpoints and old files: there and back, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from argonne.checkpoint import save
from argonne.convert import ConvertFlags, convert
from argonne.convert.shapes import OldFileFlags
from argonne.data import load_tokenizer, train_tokenizer
from argonne.files import write_json
from argonne.models import ArgonneConfig, from_huggingface
from argonne.parallel import ArgonneError
from tests.convert import old
from tests.convert.test_old_files import weights
from tests.export import export

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

TWO = old.argonne2()
MADE = {"argonne2": (TWO, old.TOLD), "argonne1": (old.argonne1(), {"n_head": 4})}


def bits(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run here, with its tokenizer."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(["some words of a text, and a few more "] * 9, 300)
    config = ArgonneConfig(24, 2, 6, 3, len(tokenizer), 40, max_position_embeddings=32)
    directory = export(root, config, tokenizer, None)
    write_json(directory / "trainer.json", {"step": 1, "tokens": 640})
    return directory


@pytest.mark.parametrize("version", MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_old_file_survives_every_form_on_its_way_back(tmp_path: Path, version: str, dtype: torch.dtype) -> None:
    state, told = MADE[version]
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if version == "argonne2":
        state["lm_head.weight"] = state["embed_tokens.weight"]
    convert(old.saved(tmp_path / "a.pth", old.checkpoint(state, config=told)), tmp_path / "b", ConvertFlags())
    convert(tmp_path / "b", tmp_path / "c", ConvertFlags(to="dcp"))
    convert(tmp_path / "c", tmp_path / "d.pth", ConvertFlags(to=version))  # type: ignore[arg-type]
    found = torch.load(tmp_path / "d.pth", weights_only=True)
    expected = {name: tensor for name, tensor in state.items() if not name.endswith("mask")}
    assert bits(found["model_state_dict"]) == bits(expected)
    if version == "argonne2":
        head, embedding = (found["model_state_dict"][name] for name in ("lm_head.weight", "embed_tokens.weight"))
        assert head.data_ptr() == embedding.data_ptr()
    # With the shape in it: nothing needs to be said again.
    convert(tmp_path / "d.pth", tmp_path / "e", ConvertFlags())
    assert bits(weights(tmp_path / "e")) == bits(weights(tmp_path / "b"))
    assert (tmp_path / "e" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("to", ["huggingface", "dcp", "argonne2", "gguf"])
def test_what_is_made_is_on_the_disk_before_it_has_its_name_and_its_name_is_too(
    step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    """Files are told by their numbers, which stay when they are renamed."""
    synced: list[int] = []
    named: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        if (tmp_path / "out").exists():
            named.append(synced[-1])

    monkeypatch.setattr(os, "fsync", fsync)
    convert(step, tmp_path / "out", ConvertFlags(to=to))
    made = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {path.stat().st_ino for path in made} <= set(synced[: len(synced) - len(named)])
    assert tmp_path.stat().st_ino in named


def test_how_far_the_training_was_goes_with_an_old_file(tmp_path: Path) -> None:
    convert(old.saved(tmp_path / "a.pth", old.checkpoint(TWO)), tmp_path / "b.pth", ConvertFlags(to="argonne2"))
    found, before = torch.load(tmp_path / "b.pth", weights_only=True), old.checkpoint(TWO)
    told = ("global_step", "tokens_processed", "data_position")
    assert {name: found[name] for name in told} == {name: before[name] for name in told}


def test_a_distributed_checkpoint_opens_by_name_with_pytorch_alone(tmp_path: Path, step: Path) -> None:
    convert(step, tmp_path / "dcp", ConvertFlags(to="dcp"))
    expected = weights(step)
    described = FileSystemReader(str(tmp_path / "dcp")).read_metadata().state_dict_metadata
    assert {name: tuple(each.size) for name, each in described.items()} == {
        n: tuple(t.shape) for n, t in expected.items()
    }
    state = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert bits(state) == bits(expected)
    assert from_huggingface(tmp_path / "dcp") == from_huggingface(step)
    assert (tmp_path / "dcp" / "tokenizer.json").read_bytes() == (step / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("nested", [False, True])
def test_a_distributed_checkpoint_of_pytorch_opens(tmp_path: Path, step: Path, nested: bool) -> None:
    expected = weights(step)
    state = {"model": expected, "optim": {"lr": torch.tensor(0.5)}, "step": 3} if nested else expected
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    shutil.copyfile(step / "config.json", tmp_path / "dcp" / "config.json")
    convert(tmp_path / "dcp", tmp_path / "new", ConvertFlags())
    assert bits(weights(tmp_path / "new")) == bits(expected)


def test_a_damaged_distributed_checkpoint_is_refused(tmp_path: Path, step: Path) -> None:
    convert(step, tmp_path / "dcp", ConvertFlags(to="dcp"))
    part = sorted((tmp_path / "dcp").glob("*.distcp"))[3]
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArgonneError, match="tensor 'model.* cannot be read"):
        convert(tmp_path / "dcp", tmp_path / "new", ConvertFlags())
    part.unlink()
    with pytest.raises(ArgonneError, match="tensor 'model.* cannot be read"):
        convert(tmp_path / "dcp", tmp_path / "new", ConvertFlags())
    (tmp_path / "dcp" / ".metadata").write_bytes(b"\x80\x04nothing")
    with pytest.raises(ArgonneError, match=r"\.metadata' cannot be read"):
        convert(tmp_path / "dcp", tmp_path / "new", ConvertFlags())
    assert not list(tmp_path.glob("new*"))


def test_a_run_is_its_newest_valid_checkpoint(tmp_path: Path, step: Path) -> None:
    shutil.copytree(step, tmp_path / "run" / "step_00000001")
    shutil.copytree(step, tmp_path / "run" / "step_00000002")
    damaged = tmp_path / "run" / "step_00000002" / "config.json"
    damaged.write_text(damaged.read_text().replace("3", "4"))
    told = convert(tmp_path / "run", tmp_path / "new", ConvertFlags())
    assert "step_00000002 is damaged and was passed over" in told
    assert bits(weights(tmp_path / "new")) == bits(weights(step))
    assert not (tmp_path / "new" / "manifest.json").exists()
    with pytest.raises(ArgonneError, match="holds no valid checkpoint"):
        convert(tmp_path / "run" / "step_00000002", tmp_path / "other", ConvertFlags())


def test_large_models_are_written_in_several_files_in_the_dtype_that_is_asked_for(
    tmp_path: Path, step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "MAX_FILE_BYTES", 10_000)
    (tmp_path / "new.tmp").mkdir()  # of a conversion that was killed
    (tmp_path / "new.tmp" / "model-00001-of-00009.safetensors").touch()
    convert(step, tmp_path / "new", ConvertFlags(dtype="bfloat16"))
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert {*index.values()} == {file.name for file in (tmp_path / "new").glob("*.safetensors")}
    assert bits(weights(tmp_path / "new")) == bits({name: t.bfloat16() for name, t in weights(step).items()})
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tokenizer_is_put_beside_the_weights_and_its_ids_into_the_config(tmp_path: Path, step: Path) -> None:
    config = ArgonneConfig(24, 1, 6, 3, 300, 40, max_position_embeddings=32)
    told = {"n_head": 6, "block_size": 32}
    file = old.saved(tmp_path / "a.pth", old.checkpoint(old.argonne2(config), config=told))
    convert(file, tmp_path / "new", ConvertFlags(tokenizer_path=step))
    assert load_tokenizer(tmp_path / "new").encode("some words") == load_tokenizer(step).encode("some words")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["eos_token_id"] == 2
    small = old.saved(tmp_path / "b.pth", old.checkpoint(TWO))
    with pytest.raises(ArgonneError, match="has 2.. tokens; legal: 50 at most"):
        convert(small, tmp_path / "other", ConvertFlags(tokenizer_path=step))


def test_what_an_old_file_has_no_place_for_is_refused(tmp_path: Path, step: Path) -> None:
    shutil.copytree(step, tmp_path / "plain", ignore=shutil.ignore_patterns("manifest.json"))
    file = tmp_path / "plain" / "config.json"
    config = json.loads(file.read_text())
    write_json(file, {**config, "head_dim": 2, "num_attention_heads": 12, "num_key_value_heads": 6})
    convert(tmp_path / "plain", tmp_path / "fits.pth", ConvertFlags(to="argonne2"))
    write_json(file, {**config, "num_attention_heads": 3, "head_dim": 8, "num_key_value_heads": 3})
    with pytest.raises(ArgonneError, match="k_proj.weight' has the shape \\[12, 24\\]; legal: \\[24, 24\\]"):
        convert(tmp_path / "plain", tmp_path / "b.pth", ConvertFlags(to="argonne2"))
    with pytest.raises(ArgonneError, match="num_attention_heads='3' has no effect"):
        convert(step, tmp_path / "b", ConvertFlags(old=OldFileFlags(num_attention_heads=3)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation_function": "gelu_new"}, "activation='gelu_new' has no place in the files of 1.x"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_eps=1e-06 has no place"),
        ({"n_head": "4"}, "num_attention_heads='4' is not legal"),
    ],
)
def test_a_gpt2_that_is_not_one_of_ours_becomes_no_file_of_one(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    file = old.saved(tmp_path / "a.pth", old.checkpoint(old.argonne1(), config={"n_head": 4}))
    convert(file, tmp_path / "b", ConvertFlags())
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    write_json(tmp_path / "b" / "config.json", config | changed)
    with pytest.raises(ArgonneError, match=message):
        convert(tmp_path / "b", tmp_path / "c.pth", ConvertFlags(to="argonne1"))
