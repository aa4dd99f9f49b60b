"""A checkpoint opens in any layout, and its bytes tell nothing of it; plain Hugging Face directories load too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from argonne.checkpoint import faults, load_trainer, read_manifest
from argonne.checkpoint.format import record_tensor
from argonne.files import write_json
from argonne.parallel import Layout, ProcessGroups
from tests.checkpoint.saved import (
    CONFIG,
    LAYOUTS,
    assert_equal_tensors,
    bytes_of,
    expected_values,
    load,
    load_and_save,
    load_weights,
    pieces_of,
    save,
)
from tests.pool import RankPool
from tests.whole import assemble


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
@pytest.mark.parametrize("file_bytes", [None, 2000])
def test_weights_and_moments_saved_at_tensor_2_load_at_any_layout(
    ranks: RankPool, tmp_path: Path, layout: Layout, file_bytes: int | None
) -> None:
    directory = ranks.run(Layout(tensor=2), save, tmp_path, 7, 3, file_bytes)[0]
    assert directory == tmp_path / "step_00000007"
    assert_equal_tensors(assemble(ranks.run(layout, load, directory)), expected_values(3))


@pytest.mark.parametrize("through", [Layout(), Layout(tensor=4)], ids=str)
def test_a_checkpoint_carried_to_another_layout_and_back_is_the_same_bytes(
    ranks: RankPool, tmp_path: Path, through: Layout
) -> None:
    first = ranks.run(Layout(tensor=2), save, tmp_path / "a", 5, 1)[0]
    second = ranks.run(through, load_and_save, first, tmp_path / "b", 5)[0]
    third = ranks.run(Layout(tensor=2), load_and_save, second, tmp_path / "c", 5)[0]
    assert bytes_of(first) == bytes_of(second) == bytes_of(third)


@pytest.mark.parametrize("file_bytes", [None, 2000, 1])
def test_equal_values_make_byte_identical_files_whatever_the_layout(
    ranks: RankPool, tmp_path: Path, file_bytes: int | None
) -> None:
    alone, *others = (
        bytes_of(ranks.run(layout, save, tmp_path / str(layout), 2, 4, file_bytes)[0]) for layout in LAYOUTS
    )
    weights = len(pieces_of(ProcessGroups.single())[0])
    files = sum(name.startswith("model-") for name in alone)
    assert files == {None: 1, 1: weights}.get(file_bytes, files)
    if file_bytes == 2000:
        assert 4 < files < weights
    for layout, other in zip(LAYOUTS[1:], others, strict=True):
        assert list(other) == list(alone)
        for name, content in alone.items():
            assert other[name] == content, f"{name} of {layout}"


def test_the_manifest_and_the_index_tell_every_tensor_and_file(tmp_path: Path) -> None:
    directory = save(ProcessGroups.single(), tmp_path, 12, 0, 2000)
    manifest = read_manifest(directory)
    expected = expected_values(0)
    assert manifest.step == 12
    assert set(manifest.files) == set(bytes_of(directory)) - {"manifest.json"}
    assert set(manifest.tensors) == set(expected)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    weights = {name for name in expected if not name.endswith(("exp_avg", "exp_avg_sq"))}
    assert set(index["weight_map"]) == weights
    assert index["metadata"]["total_size"] == 4 * CONFIG.parameter_count
    for name, record in manifest.tensors.items():
        stored = load_file(directory / record.file)[name]
        assert record == record_tensor(expected[name], record.file)
        assert torch.equal(stored, expected[name])
        if name in weights:
            assert index["weight_map"][name] == record.file
    assert load_trainer(directory) == {"step": 1}
    assert not list(tmp_path.glob("*.tmp"))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    groups = ProcessGroups.single()
    save(groups, tmp_path, 1, 3, 100)
    again = save(groups, tmp_path, 1, 8)
    assert faults(again) == []
    assert_equal_tensors(assemble([load(groups, again)]), expected_values(8))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 4], scope="module")
def test_a_plain_hugging_face_directory_loads(ranks: RankPool, tmp_path: Path, size: int, files: int) -> None:
    weights = {name: t for name, t in expected_values(5).items() if not name.endswith(("exp_avg", "exp_avg_sq"))}
    names = sorted(weights)
    if files == 1:
        save_file(weights, tmp_path / "model.safetensors")
    else:
        split = {f"model-{i + 1:05d}-of-{files:05d}.safetensors": names[i::files] for i in range(files)}
        for file, held in split.items():
            save_file({name: weights[name] for name in held}, tmp_path / file)
        weight_map = {name: file for file, held in split.items() for name in held}
        write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    assert_equal_tensors(assemble(ranks.run(Layout(tensor=size), load_weights, tmp_path)), weights)


def test_weights_stored_in_another_dtype_are_converted(tmp_path: Path) -> None:
    weights = {name: t.bfloat16() for name, t in expected_values(5).items() if "exp_avg" not in name}
    save_file(weights, tmp_path / "model.safetensors")
    found = assemble([load_weights(ProcessGroups.single(), tmp_path)])
    assert_equal_tensors(found, {name: t.float() for name, t in weights.items()})
