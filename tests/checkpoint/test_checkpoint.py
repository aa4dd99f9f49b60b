"""A checkpoint opens in any layout, its bytes tell nothing of the layout, and no damage goes unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from argonne.checkpoint import (
    CheckpointError,
    Piece,
    checkpoints,
    faults,
    load_pieces,
    load_trainer,
    moment_pieces,
    newest_valid,
    prune,
    read_manifest,
    resolve,
    save_checkpoint,
    step_directory,
    step_of,
    weight_pieces,
)
from argonne.checkpoint import save as module
from argonne.checkpoint.format import record_tensor
from argonne.files import write_json
from argonne.models import ArgonneConfig, ArgonneModel, to_huggingface
from argonne.parallel import ArgonneError, Layout, Normal, ProcessGroups, Region
from argonne.training.optimizer import build_optimizer
from tests.pool import RankPool
from tests.whole import Parts, assemble

# 4 query heads on 2 key-value heads: at tensor=4 these are shared; 29 tokens: uneven, and padded.
CONFIG = ArgonneConfig(20, 2, 4, 2, 29, 12, 6, max_position_embeddings=8, tie_word_embeddings=False)
LAYOUTS = [Layout(), Layout(tensor=2), Layout(tensor=4), Layout(data=2, tensor=2)]


def pieces_of(groups: ProcessGroups) -> tuple[list[Piece], list[Piece]]:
    """The weights and the moments of an empty model on this rank."""
    model = ArgonneModel(CONFIG, groups)
    parameters = model.sharded_parameters()
    return weight_pieces(parameters), moment_pieces(build_optimizer(parameters, 0.1), parameters)


def drawn(groups: ProcessGroups, seed: int) -> tuple[list[Piece], list[Piece]]:
    """The same pieces with values that depend on the seed, the name and the place only."""
    weights, moments = pieces_of(groups)
    for piece in (*weights, *moments):
        Normal(1.0).fill(piece.part, seed, piece.name, piece.region.whole_shape, piece.region.start)
    return weights, moments


def write_rest(directory: Path) -> None:
    write_json(directory / "config.json", to_huggingface(CONFIG, {"eos_token_id": 2}, "float32"))
    write_json(directory / "trainer.json", {"step": 1})
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")


def save(groups: ProcessGroups, root: Path, step: int, seed: int, file_bytes: int | None = None) -> Path:
    usual = module.MAX_FILE_BYTES
    module.MAX_FILE_BYTES = usual if file_bytes is None else file_bytes
    try:
        return save_checkpoint(root, step, *drawn(groups, seed), write_rest, groups)
    finally:
        module.MAX_FILE_BYTES = usual


def load(groups: ProcessGroups, directory: Path) -> Parts:
    weights, moments = pieces_of(groups)
    for piece in (*weights, *moments):
        piece.part.fill_(torch.nan)
    load_pieces(directory, [*weights, *moments])
    return named([*weights, *moments])


def load_and_save(groups: ProcessGroups, directory: Path, root: Path, step: int) -> Path:
    weights, moments = pieces_of(groups)
    load_pieces(directory, [*weights, *moments])
    return save_checkpoint(root, step, weights, moments, write_rest, groups)


def named(pieces: list[Piece]) -> Parts:
    """The parts with the names under which they are saved."""
    return [
        (Region(p.name, *(getattr(p.region, f) for f in ("whole_shape", "start", "shape", "local_start", "holders"))),
         p.part.clone())
        for p in pieces
    ]  # fmt: skip


def expected_values(seed: int) -> dict[str, Tensor]:
    weights, moments = drawn(ProcessGroups.single(), seed)
    return {piece.name: piece.part.clone() for piece in (*weights, *moments)}


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(ProcessGroups.single(), tmp_path_factory.mktemp("sound"), 1, 0, 4000)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def remove(path: Path) -> None:
    path.unlink()


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(position: float) -> Callable[[Path], None]:
    def flip_one_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return flip_one_bit


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "removed": remove,
    "truncated": cut_last_byte,
    "emptied": empty,
    "lengthened": lengthen,
    "first bit flipped": flip(0),
    "a middle bit flipped": flip(0.5),
    "last bit flipped": flip(1),
    "zeroed": zero,
}


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


def find_newest(groups: ProcessGroups, root: Path) -> tuple[Path | None, list[str]]:
    return newest_valid(checkpoints(root), groups)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=str)
def test_newest_valid_passes_over_damaged_checkpoints_and_says_so_on_every_rank(
    ranks: RankPool, sound: Path, tmp_path: Path, layout: Layout
) -> None:
    assert ranks.run(layout, find_newest, tmp_path) == [(None, [])] * layout.world_size
    for step in (3, 20, 100, 1000):
        shutil.copytree(sound, step_directory(tmp_path, step))
    shutil.copytree(sound, tmp_path / "step_00002000.tmp")  # an interrupted save
    newest = step_directory(tmp_path, 1000)
    assert ranks.run(layout, find_newest, tmp_path) == [(newest, [])] * layout.world_size

    last = sorted(p for p in newest.glob("*.safetensors"))[-1]
    cut_last_byte(last)
    remove(step_directory(tmp_path, 100) / "config.json")
    for found, reports in ranks.run(layout, find_newest, tmp_path):
        assert found == step_directory(tmp_path, 20)
        size = last.stat().st_size
        assert reports == [
            "checkpoint step_00001000 is damaged and was passed over: "
            f"{last.name} has {size} bytes instead of {size + 1}",
            "checkpoint step_00000100 is damaged and was passed over: config.json is missing",
        ]
    for step in (3, 20):
        empty(step_directory(tmp_path, step) / "manifest.json")
    for found, reports in ranks.run(layout, find_newest, tmp_path):
        assert found is None
        assert [report.split()[1] for report in reports] == [f"step_{n:08d}" for n in (1000, 100, 20, 3)]


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [9]), (2, [5, 9]), (3, [2, 5, 9]), (50, [2, 5, 9]), (0, [9]), (-4, [9])]
)
def test_prune_keeps_the_newest_and_never_goes_below_one(
    sound: Path, tmp_path: Path, keep: int, left: list[int]
) -> None:
    for step in (9, 2, 5):
        shutil.copytree(sound, step_directory(tmp_path, step))
    (tmp_path / "step_00000011.tmp").mkdir()
    (tmp_path / "step_00000012.tmp").mkdir()
    (tmp_path / "step_00000012.tmp" / "model.safetensors").write_text("half")
    others = [tmp_path / "stats", tmp_path / "step_00000004.set-aside", tmp_path / "step_one"]
    for other in others:
        other.mkdir()
    gone = prune(tmp_path, keep)
    assert gone == [step_directory(tmp_path, step) for step in (2, 5, 9) if step not in left]
    assert checkpoints(tmp_path) == [step_directory(tmp_path, step) for step in left]
    assert all(faults(path) == [] for path in checkpoints(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))
    assert all(other.exists() for other in others)
    assert prune(tmp_path, keep) == []


def test_steps_are_ordered_as_numbers(sound: Path, tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        shutil.copytree(sound, step_directory(tmp_path, step))
    assert [step_of(path) for path in checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]
    assert step_of(Path("step_00000005.tmp")) is None
    assert step_of(Path("step_5")) is None


def save_with_fault(groups: ProcessGroups, root: Path, step: int, bad: int, fault: str) -> str:
    """A save in which rank ``bad`` fails as ``fault`` says; the message that this rank raises."""

    def fail(*args: object, **kwargs: object) -> None:
        if groups.world.rank == bad:
            raise (OSError if fault != "unforeseen" else RuntimeError)("no space left on device")
        real(*args, **kwargs)

    name = {"tensors": "save_file", "commit": "commit"}.get(fault, "save_file")
    real = getattr(module, name)
    rest = write_rest
    if fault in ("tensors", "commit"):
        setattr(module, name, fail)
    else:
        real = write_rest
        rest = fail
    usual, module.MAX_FILE_BYTES = module.MAX_FILE_BYTES, 1000
    try:
        save_checkpoint(root, step, *drawn(groups, 9), rest, groups)
    except CheckpointError as error:
        return str(error)
    finally:
        module.MAX_FILE_BYTES = usual
        if fault in ("tensors", "commit"):
            setattr(module, name, real)
    return "saved"


@pytest.mark.parametrize(
    ("fault", "bad"),
    [("tensors", 0), ("tensors", 1), ("commit", 0), ("the rest", 0), ("unforeseen", 0)],
)
def test_a_save_that_fails_on_one_rank_raises_on_all_and_leaves_earlier_checkpoints(
    ranks: RankPool, tmp_path: Path, fault: str, bad: int
) -> None:
    earlier = ranks.run(Layout(tensor=2), save, tmp_path, 1, 3)[0]
    before = bytes_of(earlier)
    messages = ranks.run(Layout(tensor=2), save_with_fault, tmp_path, 2, bad, fault)
    assert messages[0] == messages[1]
    assert messages[0].startswith("the checkpoint of step 2 could not be written: ")
    assert "no space left on device" in messages[0]
    assert bytes_of(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    # And the next save is a sound one.
    assert faults(ranks.run(Layout(tensor=2), save, tmp_path, 2, 3)[0]) == []


def test_a_failed_save_leaves_the_valid_checkpoint_of_the_same_step(ranks: RankPool, tmp_path: Path) -> None:
    earlier = ranks.run(Layout(), save, tmp_path, 1, 3)[0]
    before = bytes_of(earlier)
    (message,) = ranks.run(Layout(), save_with_fault, tmp_path, 1, 0, "commit")
    assert message.startswith("the checkpoint of step 1 could not be written: ")
    assert earlier.exists(), "the valid checkpoint of step 1 is gone"
    assert bytes_of(earlier) == before


def save_where_nothing_can_be(groups: ProcessGroups, root: Path) -> str:
    try:
        save(groups, root, 1, 0)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_directory_that_cannot_be_made_is_refused_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for message in ranks.run(Layout(tensor=2), save_where_nothing_can_be, tmp_path / "file" / "run"):
        assert message.startswith("the checkpoint of step 1 could not be written: ")


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    groups = ProcessGroups.single()
    save(groups, tmp_path, 1, 3, 100)
    again = save(groups, tmp_path, 1, 8)
    assert faults(again) == []
    assert_equal_tensors(assemble([load(groups, again)]), expected_values(8))


def load_weights(groups: ProcessGroups, directory: Path) -> Parts:
    weights, _ = pieces_of(groups)
    load_pieces(directory, weights)
    return named(weights)


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


def test_a_path_means_a_checkpoint_its_file_or_a_run(sound: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        shutil.copytree(sound, step_directory(tmp_path, step))
    one = step_directory(tmp_path, 2)
    assert resolve(one) == [one]
    assert resolve(one / "model.safetensors.index.json") == [one]
    assert resolve(tmp_path) == [one, step_directory(tmp_path, 10)]


def test_a_path_that_means_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "step_00000003").mkdir()
    for path, problem in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "notes.txt", "is not part of a checkpoint"),
        (tmp_path, "holds no checkpoint"),
        (tmp_path / "step_00000003", "is not a readable manifest"),
    ):
        with pytest.raises(ArgonneError, match=problem):
            resolve(path)
