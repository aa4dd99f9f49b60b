"""``--resume-state``: step, tokens and place of each form of the original's files, or one line that says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.checkpoint.resume_state import RESUME_STATE, ResumeState, RowsRead
from argonne.convert import ConvertFlags, convert
from argonne.convert.shapes import OldFileFlags
from argonne.parallel import ArgonneError
from tests.convert import old
from tests.convert.test_old_files import FORMS, ONE

FLAGS = ConvertFlags(resume_state=True)
WITHOUT_PROGRESS = ("a bare state dict with its shape", "of FSDP")


@pytest.mark.parametrize("form", [form for form in FORMS if form not in WITHOUT_PROGRESS])
def test_every_form_of_two_says_where_it_was(tmp_path: Path, form: str) -> None:
    file = old.saved(tmp_path / "old.pth", FORMS[form](old.argonne2()))
    line = convert(file, tmp_path / "new", FLAGS)
    # Its fourth chunk of 32 tokens was the last.
    assert ResumeState.read(tmp_path / "new") == ResumeState(430, 99_000, RowsRead(2, 17, 128, 0, ("a.parquet",)))
    assert line.endswith("; resume_state.json: step 430, 99,000 tokens, at row 17 of shard 2")


@pytest.mark.parametrize("form", ["a checkpoint", "stages and blocks", "stages"])
def test_so_does_one(tmp_path: Path, form: str) -> None:
    convert(old.saved(tmp_path / "old.pth", ONE[form](old.argonne1())), tmp_path / "new", FLAGS)
    assert ResumeState.read(tmp_path / "new") == ResumeState(430, 99_000, RowsRead(2, 17, 64, 0, ("a.parquet",)))


FIRST = {"current_file_idx": 1, "position_in_file": 5, "current_position": 0, "global_step": 9, "files_processed": []}
POSITIONS: dict[str, tuple[Any, RowsRead | None]] = {
    "of the first versions": (FIRST, RowsRead(1, 5)),
    "with chunk_index": ({"current_file_idx": 0, "position_in_file": 3, "chunk_index": 0}, RowsRead(0, 3, 32)),
    "in a later pass": (
        {**FIRST, "streaming": True, "epoch": 2, "files_processed": ["/a/b.arrow", "c\\d.arrow", "b.arrow"]},
        RowsRead(1, 5, epoch=2, files=("b.arrow", "d.arrow")),
    ),
    "of a shuffled run": ({**FIRST, "streaming": False, "current_position": 7}, None),
    "of none": (None, None),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_each_form_of_a_place_is_read(tmp_path: Path, name: str) -> None:
    found, expected = POSITIONS[name]
    convert(old.saved(tmp_path / "old.pth", old.checkpoint(old.argonne2(), data_position=found)), tmp_path / "a", FLAGS)
    assert ResumeState.read(tmp_path / "a").data_position == expected


def test_what_a_file_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    line = convert(old.saved(tmp_path / "old.pth", FORMS["of FSDP"](old.argonne2())), tmp_path / "new", FLAGS)
    assert json.loads((tmp_path / "new" / RESUME_STATE).read_text()) == {
        "step": 430,
        "tokens": None,
        "data_position": None,
    }
    assert line.endswith("step 430, tokens not known, place in the data not known")
    convert(tmp_path / "old.pth", tmp_path / "without", ConvertFlags())
    assert not (tmp_path / "without" / RESUME_STATE).exists()


PLACE = {"current_file_idx": 1, "position_in_file": 5, "chunk_offset": 0}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no step": ({"global_step": None}, "it does not say at which step it was (global_step or step)"),
    "a negative step": ({"global_step": -1}, "global_step=-1 is not legal; legal: 0 or more"),
    "a step that is text": ({"global_step": "430"}, "global_step='430' is not legal; legal: a whole number"),
    "a step that is a truth": ({"global_step": True}, "global_step=True is not legal"),
    "a step past all": ({"global_step": 2**40}, "global_step=1099511627776 is not legal; legal: 0 to 2147483647"),
    "tokens that are no number": ({"tokens_processed": math.nan}, "tokens_processed=nan is not legal"),
    "negative tokens": ({"tokens_processed": -5}, "tokens_processed=-5 is not legal; legal: 0 or more"),
    "a place in words": ({"data_position": "shard 3"}, "its data_position is a str; legal: current_file_idx and"),
    "a place of another form": (
        {"data_position": {"file": 1, "offset": 2}},
        "its data_position lacks current_file_idx and has file, offset; legal: current_file_idx and position_in_file",
    ),
    "half a place": ({"data_position": {"current_file_idx": 1}}, "its data_position lacks position_in_file"),
    "a negative place": ({"data_position": {**PLACE, "position_in_file": -2}}, "position_in_file=-2 is not legal"),
    "a place that is text": (
        {"data_position": {**PLACE, "current_file_idx": "1"}},
        "current_file_idx='1' is not legal",
    ),
    "a chunk that is no number": ({"data_position": {**PLACE, "chunk_offset": 0.5}}, "chunk_offset=0.5 is not legal"),
    "a pass that is none": ({"data_position": {**PLACE, "epoch": -1}}, "epoch=-1 is not legal"),
    "files that are no names": ({"data_position": {**PLACE, "files_processed": [3]}}, "has files_processed=[3]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gone_on_from_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    fields, message = REFUSED[name]
    file = old.saved(tmp_path / "old.pth", old.checkpoint(old.argonne2(), **fields))
    with pytest.raises(ArgonneError) as refusal:
        convert(file, tmp_path / "new", FLAGS)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(f"'{file}'")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old.pth"]
    convert(file, tmp_path / "new", ConvertFlags())  # the weights are good


def test_only_a_file_of_the_original_has_such_a_state_and_only_a_directory_takes_it(tmp_path: Path) -> None:
    bare = old.saved(tmp_path / "bare.pth", old.argonne2())
    heads = OldFileFlags(num_attention_heads=6, max_position_embeddings=32)
    with pytest.raises(ArgonneError, match="does not say at which step"):
        convert(bare, tmp_path / "new", ConvertFlags(resume_state=True, old=heads))
    convert(bare, tmp_path / "new", ConvertFlags(old=heads))
    with pytest.raises(ArgonneError, match="needs a file of the original, and this is a Hugging Face directory"):
        convert(tmp_path / "new", tmp_path / "again", FLAGS)
    for form in ("dcp", "argonne2", "argonne1", "gguf"):
        with pytest.raises(ArgonneError, match=f"no effect with --to {form}; legal: --to huggingface"):
            convert(bare, tmp_path / "again", ConvertFlags(to=form, resume_state=True))  # type: ignore[arg-type]


def test_an_old_file_of_an_old_file_keeps_its_place(tmp_path: Path) -> None:
    file = old.saved(tmp_path / "old.pth", old.checkpoint(old.argonne2()))
    convert(file, tmp_path / "again.pth", ConvertFlags(to="argonne2"))
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "again.pth"))
    assert {name: after[name] for name in ("global_step", "tokens_processed", "data_position")} == {
        name: before[name] for name in ("global_step", "tokens_processed", "data_position")
    }
    convert(tmp_path / "again.pth", tmp_path / "new", FLAGS)
    assert ResumeState.read(tmp_path / "new").step == 430
