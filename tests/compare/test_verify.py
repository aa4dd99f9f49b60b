"""``verify`` names each fault of a checkpoint, and says in what two of them differ, whatever layouts wrote them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from argonne.checkpoint import faults, read_manifest
from argonne.checkpoint.format import commit, record_file, record_tensor
from argonne.compare.finding import MOST
from argonne.parallel import Layout
from tests.checkpoint.saved import DAMAGES, bytes_of, save
from tests.compare.planted import Tool, one_ulp_up, plant, plant_honestly, rewrite_honestly
from tests.pool import RankPool

NORM = "model.layers.1.input_layernorm.weight"
MOMENT = "model.layers.0.mlp.up_proj.weight.exp_avg_sq"


def test_a_sound_checkpoint_is_one_line(tool: Tool, saved_alone: Path) -> None:
    manifest = read_manifest(saved_alone)
    size = sum(record.size for record in manifest.files.values())
    assert tool("verify", saved_alone) == (
        0,
        [
            f"{saved_alone} is as it was written: {len(manifest.files)} files, {len(manifest.tensors)} tensors, "
            f"{size:,} bytes"
        ],
    )
    assert tool("verify", saved_alone.parent) == tool("verify", saved_alone)  # the newest of a run


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_named(tool: Tool, saved_alone: Path, copy: Path, damage: str) -> None:
    for name in bytes_of(saved_alone):
        if name == "manifest.json" and damage not in ("removed", "emptied", "first bit flipped", "zeroed"):
            continue  # its last byte is a line end, and its values are sealed
        DAMAGES[damage](copy / name)
        status, lines = tool("verify", copy)
        assert status == 1, f"{name} {damage}"
        assert str(copy / name) in lines[0], f"{name} {damage}: {lines}"
        assert all(str(copy / name) in line for line in lines), f"{name} {damage}: {lines}"
        shutil.copyfile(saved_alone / name, copy / name)
    assert tool("verify", copy)[0] == 0


def test_changed_bytes_under_the_old_manifest_are_named_with_their_tensor(tool: Tool, copy: Path) -> None:
    plant(copy, MOMENT, one_ulp_up((3, 2)))
    file = copy / read_manifest(copy).tensors[MOMENT].file
    assert tool("verify", copy) == (
        1,
        [
            f"{file} has changed since it was written (SHA-256 differs)",
            f"tensor {MOMENT} in {file} has changed since it was written (SHA-256 of its value differs)",
        ],
    )


def test_a_manifest_whose_tensors_are_not_in_its_files_is_found(tool: Tool, copy: Path) -> None:
    """The checksum of every file holds, and that of the manifest: only what the files hold tells."""
    before = read_manifest(copy)
    tensors = dict(before.tensors)
    moved = tensors.pop(NORM)
    tensors["model.other.weight"] = moved
    wrong = tensors[MOMENT]
    tensors[MOMENT] = replace(wrong, shape=(1, *wrong.shape))
    lost = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = replace(lost, file="nowhere.safetensors")
    temporary = Path(shutil.copytree(copy, copy.with_name(copy.name + ".tmp")))
    commit(temporary, copy, replace(before, tensors=tensors))
    assert faults(copy) == []
    status, lines = tool("verify", copy)
    assert status == 1
    assert sorted(lines) == sorted(
        [
            f"tensor {NORM} in {copy / moved.file} is not in the manifest",
            f"tensor model.other.weight is missing in {copy / moved.file}",
            f"tensor {MOMENT} in {copy / wrong.file} has shape {wrong.shape} instead of {(1, *wrong.shape)}",
            f"tensor lm_head.weight in {copy / lost.file} is not in the manifest",
            f"tensor lm_head.weight is listed in {copy / 'nowhere.safetensors'}, no file of the manifest",
        ]
    )


def test_files_that_were_written_wrong_are_named(tool: Tool, copy: Path) -> None:
    """Whoever wrote them took their checksums too."""
    before = read_manifest(copy)
    file = before.tensors[NORM].file
    temporary = Path(shutil.copytree(copy, copy.with_name(copy.name + ".tmp")))
    (temporary / file).write_bytes(b"no tensors")
    (temporary / "trainer.json").write_text("[]")
    records = {name: record_file(temporary / name) for name in (file, "trainer.json")}
    commit(temporary, copy, replace(before, files=before.files | records))
    assert faults(copy) == []
    status, lines = tool("verify", copy)
    assert (status, len(lines)) == (1, 2), lines
    assert lines[0].startswith(f"{copy / file} cannot be read: ")
    assert lines[1] == f"{str(copy / 'trainer.json')!r} cannot be read: it is not a JSON object"


def test_files_that_are_missing_or_extra_are_named(tool: Tool, copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "tokenizer" / "more.txt").write_text("")
    (copy / "lost").symlink_to("nowhere")
    assert tool("verify", copy) == (
        1,
        [
            f"{copy / 'config.json'} is missing",
            f"{copy / 'lost'} is not in the manifest",
            f"{copy / 'tokenizer' / 'more.txt'} is not in the manifest",
        ],
    )


def test_checkpoints_of_two_layouts_and_of_other_files_are_equal(
    tool: Tool, saved_alone: Path, saved_by_two: Path
) -> None:
    assert set(read_manifest(saved_alone).files) != set(read_manifest(saved_by_two).files)
    status, lines = tool("verify", saved_alone, saved_by_two)
    count = len(read_manifest(saved_alone).tensors)
    assert status == 0
    assert [line.partition(":")[0].partition(" ")[0] for line in lines[:2]] == [str(saved_alone), str(saved_by_two)]
    assert lines[2:] == [f"equal: {count} tensors, bit for bit; step 1, the same position in the data"]


def test_one_ulp_in_one_tensor_is_found_and_measured(tool: Tool, saved_by_two: Path, copy: Path) -> None:
    plant_honestly(copy, MOMENT, one_ulp_up((3, 2)))
    assert tool("verify", copy)[0] == 0
    file = copy / read_manifest(copy).tensors[MOMENT].file
    now = load_file(file)[MOMENT]
    before = load_file(saved_by_two / read_manifest(saved_by_two).tensors[MOMENT].file)[MOMENT]
    status, lines = tool("verify", copy, saved_by_two)
    assert status == 1
    assert lines[2:] == [
        f"tensor {MOMENT}: 1 of {now.numel()} elements differ, first at [3, 2] "
        f"({now[3, 2].item()} against {before[3, 2].item()}), by at most 1 ulp of float32"
    ]


def test_changed_bytes_are_found_beside_a_copy_whatever_the_manifests_say(
    tool: Tool, saved_alone: Path, copy: Path
) -> None:
    plant(copy, NORM, one_ulp_up((0,)))
    assert read_manifest(copy) == read_manifest(saved_alone)
    status, lines = tool("verify", saved_alone, copy)
    assert status == 1
    assert [line for line in lines if line.startswith(f"tensor {NORM}: 1 of 20 elements differ, first at [0]")]


def test_what_differs_most_comes_first_and_the_rest_is_counted(
    tool: Tool, ranks: RankPool, saved_alone: Path, tmp_path: Path
) -> None:
    other = ranks.run(Layout(tensor=2), save, tmp_path, 1, 5)[0]
    status, lines = tool("verify", saved_alone, other)
    told = lines[2:]
    assert status == 1
    assert len(told) == MOST + 1
    ulps = [int(line.rpartition("by at most ")[2].split()[0].replace(",", "")) for line in told[:-1]]
    assert ulps == sorted(ulps, reverse=True)
    assert told[-1] == f"... and {len(read_manifest(other).tensors) - MOST} more tensors that differ"


def test_tensors_of_another_shape_or_dtype_or_in_one_only_are_named(tool: Tool, saved_alone: Path, copy: Path) -> None:
    before = read_manifest(copy)
    temporary = Path(shutil.copytree(copy, copy.with_name(copy.name + ".tmp")))
    file = before.tensors[NORM].file
    tensors = load_file(temporary / file)
    names = sorted(tensors)
    assert NORM in names
    spare = next(name for name in names if name != NORM)
    tensors[NORM] = tensors[NORM].bfloat16()
    tensors["model.new.weight"] = torch.ones(3)
    tensors[spare] = tensors[spare].flatten()
    save_file(tensors, temporary / file)
    records = before.tensors | {name: record_tensor(tensor, file) for name, tensor in tensors.items()}
    commit(
        temporary, copy, replace(before, files=before.files | {file: record_file(temporary / file)}, tensors=records)
    )
    status, lines = tool("verify", saved_alone, copy)
    assert status == 1
    shape = before.tensors[spare].shape
    assert lines[2:] == [
        f"tensor model.new.weight is in {copy} only",
        *sorted(
            [
                f"tensor {NORM}: dtype float32 against bfloat16",
                f"tensor {spare}: shape {shape} against {records[spare].shape}",
            ]
        ),
    ]


def test_the_trainers_state_must_agree_but_for_what_layouts_change(tool: Tool, saved_alone: Path, copy: Path) -> None:
    def trained(content: dict[str, Any]) -> None:
        content.update(step=1, tokens=64, layout={"tensor": 2}, versions={"torch": "9"})
        content["data"] = {"next_sample": 4, "shards": [], "lanes": {"0": {"tokens": 64}, "1": {"tokens": 0}}}

    other = Path(shutil.copytree(copy, copy.with_name("other")))
    rewrite_honestly(copy, "trainer.json", trained)
    rewrite_honestly(other, "trainer.json", trained)
    rewrite_honestly(other, "trainer.json", lambda content: content.update(layout={"tensor": 1}, versions={}))
    assert tool("verify", copy, other)[0] == 0

    def further(content: dict[str, Any]) -> None:
        content["tokens"] = 65
        content["data"]["lanes"]["1"]["tokens"] = 1

    rewrite_honestly(other, "trainer.json", further)
    status, lines = tool("verify", copy, other)
    assert status == 1
    assert lines[2:] == ["trainer state: data.lanes.1.tokens: 0 -> 1", "trainer state: tokens: 64 -> 65"]
