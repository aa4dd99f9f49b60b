"""No damage to a checkpoint goes unnoticed; what a directory lacks or has in another shape is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from argonne.checkpoint import CheckpointError, Piece, faults, load_pieces, load_trainer
from argonne.parallel import ProcessGroups, Region
from tests.checkpoint.saved import DAMAGES, bytes_of, expected_values, load_weights


def test_a_sound_checkpoint_has_no_faults(sound: Path) -> None:
    assert faults(sound) == []
    assert all(faults(sound, part, 3) == [] for part in range(3))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_and_named(sound: Path, copy: Path, damage: str) -> None:
    for name in bytes_of(sound):
        if name == "manifest.json" and damage not in ("removed", "emptied", "first bit flipped", "zeroed"):
            continue  # its last byte is a line end, and the next test changes its values
        DAMAGES[damage](copy / name)
        found = faults(copy)
        assert len(found) == 1, f"{name} {damage}: {found}"
        assert name in found[0]
        # Processes that share the reading find it between them; a bad manifest is found by all.
        assert sum(len(faults(copy, part, 3)) for part in range(3)) == (3 if name == "manifest.json" else 1)
        shutil.copyfile(sound / name, copy / name)
    assert faults(copy) == []


@pytest.mark.parametrize("path", ["tensor's hash", "tensor's file", "tensor's shape", "tensor's name", "step"])
def test_a_manifest_with_another_value_is_found(copy: Path, path: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    record = manifest["tensors"]["model.norm.weight"]
    if path == "tensor's hash":
        record["sha256"] = record["sha256"][::-1]
    elif path == "tensor's file":
        record["file"] = "model-00009-of-00009.safetensors"
    elif path == "tensor's shape":
        record["shape"] = [record["shape"][0] + 1]
    elif path == "tensor's name":
        manifest["tensors"]["model.morn.weight"] = manifest["tensors"].pop("model.norm.weight")
    else:
        manifest["step"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    assert faults(copy), f"another {path} in the manifest goes unnoticed"


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", '{"step": 1, "files": [], "tensors": {}}'])
def test_a_manifest_that_is_none_is_found(copy: Path, content: str) -> None:
    (copy / "manifest.json").write_text(content)
    assert faults(copy)


def test_what_a_checkpoint_lacks_or_has_in_another_shape_is_refused_by_name(sound: Path, tmp_path: Path) -> None:
    region = Region("x", (3,), (0,), (3,), (0,), (0,))
    with pytest.raises(CheckpointError) as refusal:
        load_pieces(sound, [Piece("model.other.weight", region, torch.empty(3))])
    assert str(refusal.value) == f"checkpoint {str(sound)!r} has no tensor 'model.other.weight'"
    with pytest.raises(CheckpointError) as refusal:
        load_pieces(sound, [Piece("model.norm.weight", region, torch.empty(3))])
    assert str(refusal.value) == f"'model.norm.weight' in {str(sound)!r} has shape (20,); this model's is (3,)"
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        load_pieces(tmp_path, [Piece("model.norm.weight", region, torch.empty(3))])
    with pytest.raises(CheckpointError, match="trainer.json' cannot be read"):
        load_trainer(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
)
@pytest.mark.parametrize("damage", ["emptied", "truncated", "first bit flipped"])
def test_a_damaged_plain_directory_is_refused_with_the_file(tmp_path: Path, name: str, damage: str) -> None:
    weights = {n: t for n, t in expected_values(5).items() if "exp_avg" not in n}
    if name == "model.safetensors":
        save_file(weights, tmp_path / name)
    else:
        file = "model-00001-of-00001.safetensors"
        save_file(weights, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, file)}))
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(CheckpointError, match=name):
        load_weights(ProcessGroups.single(), tmp_path)
