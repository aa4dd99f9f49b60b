"""What is damaged, not all there, mixed up or dangerous ends in one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.convert import ConvertFlags, convert
from argonne.convert.shapes import OldFileFlags
from argonne.parallel import ArgonneError
from tests.convert import old

State = dict[str, Any]


def without(state: State, *patterns: str) -> State:
    return {n: t for n, t in state.items() if not any(re.search(pattern, n) for pattern in patterns)}


def sharded(change: Callable[[list[old.State]], Any], **others: Any) -> State:
    shards = old.shards(old.argonne2(), 3)
    change(shards)
    return old.checkpoint({}, tensor_parallel_shards=shards, tensor_parallel=True, **{"world_size": 3, **others})


def drifted(shards: list[old.State]) -> None:
    shards[2]["blocks.1.input_norm.weight"][5] += 0.25


TWO, ONE = old.argonne2(), old.argonne1()
FAULTS: dict[str, tuple[Any, str]] = {
    "rank 0 alone": (
        old.checkpoint(old.shards(TWO, 3)[0], tensor_parallel=True, world_size=3, rank=0),
        "it has the part of rank 0 of 3 tensor-parallel ranks; the other 2 parts were never saved",
    ),
    "a missing shard": (sharded(lambda s: s.pop()), "2 tensor_parallel_shards and says world_size=3"),
    "a shard that lacks a tensor": (
        sharded(lambda s: s[1].pop("blocks.2.attn.k_proj.weight")),
        "'blocks.2.attn.k_proj.weight' is missing in the shard of rank 1",
    ),
    "shards that do not fit": (
        sharded(lambda s: s[1].update({"blocks.0.attn.o_proj.weight": torch.zeros(7, 8)})),
        "'blocks.0.attn.o_proj.weight' has parts that do not fit together: [24, 8] in torch.float32 and [7, 8]",
    ),
    "a lost part of a shard": (
        sharded(lambda s: s[0].update({"blocks.1.mlp.up_proj.weight": torch.zeros(3, 24)})),
        "'blocks.1.mlp.up_proj.weight' has the shape [29, 24]; legal: [40, 24]",
    ),
    "norms that drifted apart": (
        sharded(drifted),
        "'blocks.1.input_norm.weight' is whole on every rank, and differs by up to 0.25 between rank 0 and rank 2",
    ),
    "shards that are none": (sharded(lambda s: s.__setitem__(slice(0, 3), [3, 4, 5])), "it has a int for a state dict"),
    "a missing tensor": (
        old.checkpoint(without(TWO, "1.mlp.up")),
        "tensor 'blocks.1.mlp.up_proj.weight' is missing",
    ),
    "a missing layer": (
        old.checkpoint(without(TWO, r"^blocks\.1\.")),
        "tensor 'blocks.1.input_norm.weight' is missing, and 8 more",
    ),
    "no first layer": (old.checkpoint(without(TWO, r"blocks\.0")), "'blocks.0.attn.q_proj.weight' is missing"),
    "no layers": (old.checkpoint(without(TWO, "blocks")), "'blocks.0.attn.q_proj.weight' is missing"),
    "no embedding": (old.checkpoint(without(TWO, "embed", "head")), "it has neither 'embed_tokens.weight' and"),
    "a wrong shape": (
        old.checkpoint({**TWO, "blocks.2.attn.o_proj.weight": torch.zeros(24, 23)}),
        "tensor 'blocks.2.attn.o_proj.weight' has the shape [24, 23]; legal: [24, 24]",
    ),
    "a head of another width": (
        old.checkpoint({**TWO, "lm_head.weight": torch.zeros(49, 24)}),
        "tensor 'lm_head.weight' has the shape [49, 24]; legal: [50, 24]",
    ),
    "an unknown tensor": (
        old.checkpoint({**TWO, "blocks.0.attn.q_norm.weight": torch.zeros(4)}),
        "tensor 'blocks.0.attn.q_norm.weight' is none of this model's",
    ),
    "integers": (
        old.checkpoint({**TWO, "norm.weight": torch.zeros(24, dtype=torch.int8)}),
        "tensor 'norm.weight' is of torch.int8; legal: a floating-point dtype",
    ),
    "what is no tensor": (old.checkpoint({**TWO, "norm.weight": 3}), "'norm.weight' is a int; legal: a tensor"),
    "two prefixes": (
        old.checkpoint({**TWO, "_orig_mod.norm.weight": torch.zeros(24)}),
        "it has 'norm.weight' twice, with and without a prefix",
    ),
    "both versions": (old.checkpoint({**ONE, **TWO}), "it has both 'embed_tokens.weight' and 'token_embedding.weight'"),
    "two state dicts": (old.checkpoint(TWO, state_dict=TWO), "tensors under both 'model_state_dict' and 'state_dict'"),
    "stages and other blocks": (
        old.checkpoint({**old.in_stages(TWO, 2), "blocks.1.input_norm.weight": torch.zeros(24)}),
        "'blocks.1.input_norm.weight' and 'pipeline_stages.0.1.input_norm.weight' differ",
    ),
    "a missing stage": (
        old.checkpoint(without(old.in_stages(TWO, 1), r"stages\.1\.")),
        "pipeline stage 1 has 0 blocks and another 1",
    ),
    "a stage that lacks a block": (
        old.checkpoint(without(old.in_stages(old.argonne2(), 2), r"stages\.0\.0\.")),
        "tensor 'blocks.0.attn.q_proj.weight' is missing",
    ),
    "heads that do not divide": (old.checkpoint(TWO, config={"n_head": 7}), "num_attention_heads=7 does not go with"),
    "heads that nobody says": (old.checkpoint(TWO, config={}), "num_attention_heads is not known: queries have 24"),
    "heads that are text": (old.checkpoint(TWO, config={"n_head": "6"}), "num_attention_heads='6' is not legal"),
    "a config of another model": (
        old.checkpoint(TWO, config={**old.TOLD, "hidden_size": 48}),
        "hidden_size=48 is said of the model, and its tensors make it 24",
    ),
    "heads of keys that are others": (
        old.checkpoint(TWO, config={**old.TOLD, "num_key_value_heads": 2}),
        "num_key_value_heads=2 is said of the model, and its tensors make it 3",
    ),
    "one without a query": (
        old.checkpoint(without(ONE, "0.attn.query.bias"), config={"n_head": 4}),
        "tensor 'blocks.0.attn.query.bias' is missing",
    ),
    "one with a short key": (
        old.checkpoint({**ONE, "blocks.1.attn.key.weight": torch.zeros(5, 24)}, config={"n_head": 4}),
        "tensor 'blocks.1.attn.key.weight' has the shape [5, 24]; legal: [24, 24]",
    ),
    "one whose heads nobody says": (
        old.checkpoint(ONE, config={}),
        "num_attention_heads is not known: the model is 24",
    ),
    "positions of another kind": (
        old.checkpoint({**ONE, "position_embedding": torch.zeros(16, 24)}, config={"n_head": 4}),
        "tensor 'position_embedding' is missing, or not [1, positions, hidden]",
    ),
    "a list": ([1, 2], "it holds a list; legal: a state dict"),
    "nothing": ({}, "it holds no tensors"),
}


def refusal(source: Path, flags: ConvertFlags = ConvertFlags()) -> str:
    target = source.parent / "new"
    with pytest.raises(ArgonneError) as error:
        convert(source, target, flags)
    assert not [path for path in target.parent.iterdir() if path.name.startswith("new")]
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_whole_model_is_refused_by_what_is_wrong(tmp_path: Path, fault: str) -> None:
    value, message = FAULTS[fault]
    assert message in refusal(old.saved(tmp_path / "old.pth", value))


def test_ranks_that_drifted_apart_are_taken_for_the_first_when_that_is_asked_for(tmp_path: Path) -> None:
    file = old.saved(tmp_path / "old.pth", sharded(drifted))
    convert(file, tmp_path / "new", ConvertFlags(old=OldFileFlags(take_first_rank=True)))


class RunsCode:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("form", ["zip", "older", "bare", "directory", "distributed"])
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, form: str) -> None:
    evil, source = old.checkpoint(old.argonne2(), extra=RunsCode(tmp_path / "ran")), tmp_path / "old.pth"
    if form == "bare":
        source.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran"), protocol=2))
    elif form in ("zip", "older"):
        old.saved(source, evil, _use_new_zipfile_serialization=form == "zip")
    else:
        source = tmp_path / "old"
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"model_type": "argonne2" if form == "directory" else "llama"}))
        if form == "directory":
            old.saved(source / "pytorch_model.bin", evil)
        else:
            (source / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    line = refusal(source)
    assert "asks for" in line
    assert "system" in line
    assert not (tmp_path / "ran").exists()


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 64]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("is_zip", "damage", "message"),
    [
        (True, cut, "cannot be read: it ends too early"),
        (True, flipped, "has changed since it was written"),
        (False, cut, "cannot be read: "),
        (True, lambda data: b"", "cannot be read: it ends too early"),
        (True, lambda data: b"some words that are no weights", "cannot be read: it is nothing that torch.save wrote"),
        (True, lambda data: bytes(2000), "cannot be read: it is nothing that torch.save wrote"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, is_zip: bool, damage: Callable[[bytes], bytes], message: str
) -> None:
    file = old.saved(tmp_path / "old.pth", old.checkpoint(TWO), _use_new_zipfile_serialization=is_zip)
    file.write_bytes(damage(file.read_bytes()))
    assert message in refusal(file)


def test_what_cannot_be_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    file = old.saved(tmp_path / "old.pth", old.checkpoint(TWO))
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(ArgonneError, match="taken' exists; legal: a path where nothing is"):
        convert(file, taken, ConvertFlags())
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "has no place in a file of argonne1; legal: 'gpt2'" in refusal(file, ConvertFlags(to="argonne1"))
    assert "needs a tokenizer" in refusal(file, ConvertFlags(to="gguf"))
    flags = ConvertFlags(to="argonne2", tokenizer_path=tmp_path)
    assert "tokenizer_path=" in refusal(file, flags)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no weights" in refusal(empty)


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("argonne.convert.directories.save_file", full)
    file = old.saved(tmp_path / "old.pth", old.checkpoint(TWO))
    with pytest.raises(ArgonneError, match="new' could not be written: .*No space left"):
        convert(file, tmp_path / "new", ConvertFlags())
    assert list(tmp_path.iterdir()) == [file]
