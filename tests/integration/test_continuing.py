"""What a run may become by being continued: nothing unsaid; and what is refused has written nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.checkpoint.format import MANIFEST, TRAINER, read_manifest, record_file
from argonne.data import load_tokenizer, train_tokenizer
from argonne.files import seal, write_json
from argonne.launch import parse
from argonne.parallel import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.run.checks import check
from argonne.training.run.resume import check_resume, parse_resume, resume
from argonne.training.run.workflow import pretrain
from tests.integration.runs import MODEL, SCHEDULE, metrics, run, succeed, words_of, write_corpus
from tests.integration.test_refusals import assert_refused

pytestmark = pytest.mark.slow


def attempt(driver: str, flags: dict[str, Any]) -> str:
    """Why a driver refuses ``flags``, in this process."""
    words = words_of(flags)
    with pytest.raises(ArgonneError) as refusal:
        run_here(driver, words)
    return str(refusal.value)


def run_here(driver: str, words: list[str]) -> None:
    if driver == "resume":
        resumed = parse_resume(words)
        check_resume(resumed, 1)
        resume(resumed)
    else:
        config = parse(RunConfig, words)
        check(config, 1)
        pretrain(config)


def content(directory: Path) -> dict[str, str]:
    """A hash of every file, and the directories."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
    }


def as_an_older_version_left_it(directory: Path) -> None:
    """Take out of a run what this version records and older ones did not."""
    for path in (directory / "run.json", *directory.glob(f"step_*/{TRAINER}")):
        told = json.loads(path.read_text())
        for name in ("conditions", "changes"):
            del told[name]
        for name in ("precision", "initial_loss_scale"):
            told["identity"].pop(name, None)
        told["identity"]["tokenizer"].pop("boundary", None)
        told["flags"]["parallel"] |= told["flags"].pop("launch")
        write_json(path, told)
        if path.name == TRAINER:
            listed = dataclasses.asdict(read_manifest(path.parent))
            listed["files"][TRAINER] = dataclasses.asdict(record_file(path))
            write_json(path.parent / MANIFEST, {"format": 1, "sha256": seal(listed), **listed})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of its own, held-out text that is too short, and tokenizers of other kinds."""
    home = tmp_path_factory.mktemp("continuing")
    write_corpus(home / "corpus")
    pq.write_table(pa.table({"text": ["a few words of text, and no more"]}), home / "short.parquet")
    small = train_tokenizer(["other words, and so another tokenizer"] * 9)
    small.save_pretrained(home / "small")
    small.bos_token = small.eos_token = None
    small.save_pretrained(home / "unbounded")
    return home


@pytest.fixture(scope="module")
def own(home: Path) -> dict[str, Any]:
    """Flags without a tokenizer."""
    return {"--data-glob": home / "corpus/*.parquet", **MODEL, **SCHEDULE}


@pytest.fixture(scope="module")
def begun(own: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in float64 with a tokenizer of its own, four of its twelve steps done."""
    directory = tmp_path_factory.mktemp("begun") / "run"
    succeed("pretrain", {**own, "--precision": "fp64", "--stop-at-step": 4, "--output-dir": directory}, nproc=1)
    return directory


OTHER_RUN = {
    "seed": ({"--seed": 3}, "seed: 0 -> 3"),
    "schedule": ({"--weight-decay": 0.3}, "schedule.weight_decay: 0.1 -> 0.3"),
    "optimizer": ({"--optimizer": "muon"}, "schedule.optimizer: adamw -> muon"),
    "shards": ({"--data-glob": "{home}/corpus/part-[01].parquet"}, "shard part-2.parquet was removed"),
    "batch": ({"--initial-batch-size": 3}, "global batch 6"),
    "shape": ({"--num-hidden-layers": 3}, "model.num_hidden_layers: 2 -> 3"),
    "tokens made": ({"--no-streaming": None}, "data.streaming: true -> false"),
    "tokenizer": ({"--tokenizer-path": "{home}/small"}, "tokenizer.fingerprint"),
    "accepted": ({"--tokenizer-path": "{home}/small", "--accept-data-change": None, "--vocab-size": 999}, "vocab_size"),
    "held out": ({"--validation-glob": "{home}/short.parquet"}, "fewer than block_size+1=33 tokens"),
    "documents": ({"--document-mask": None}, "data.document_mask: false -> true"),
    "precision": (
        {"--precision": "auto"},
        "(precision.state: float64 -> float32); legal: the run's own flags (--precision",
    ),
}
FRESH = {
    "block": ({"--block-size": 1_000_000}, "block_size=1000000 needs"),
    "block, tokens made": ({"--block-size": 1_000_000, "--no-streaming": None}, "block_size=1000000 needs"),
    "vocabulary": ({"--vocab-size": 300}, "vocab_size=300 is less than the tokenizer's"),
    "held out": ({"--validation-glob": "{home}/short.parquet", "--no-streaming": None}, "fewer than block_size+1"),
    "boundary": (
        {"--tokenizer-path": "{home}/unbounded", "--add-document-boundary-tokens": None, "--no-streaming": None},
        "has no BOS and no EOS token",
    ),
}


def filled(flags: dict[str, Any], home: Path) -> dict[str, Any]:
    return {name: value.format(home=home) if isinstance(value, str) else value for name, value in flags.items()}


def test_what_is_refused_leaves_the_run_as_it_was(own: dict[str, Any], begun: Path, home: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(begun, directory)
    (directory / ".lock").unlink(missing_ok=True)  # a copy of a run may lack it
    before = content(directory)
    same = {**own, "--precision": "fp64", "--output-dir": directory}
    for name, (bad, expected) in OTHER_RUN.items():
        assert expected in attempt("pretrain", {**same, **filled(bad, home)}), name
        assert content(directory) == before, name
    message = attempt("pretrain", {**same, "--precision": "bf16"})
    assert "(--precision fp64), or another --output-dir, or resume.py --precision fp32 to convert" in message
    resumed = {"--checkpoint-path": directory, "--output-dir": tmp_path / "deep" / "branch"}
    not_resumed = (
        ({"--block-size": 16}, "data.block_size"),
        ({"--hidden-size": 48}, "model.hidden_size"),
        (
            {"--optimizer": "muon"},
            "moments of the checkpoint's 'adamw'; legal: --reset-optimizer too, or --optimizer adamw",
        ),
    )
    for bad, expected in not_resumed:
        assert expected in attempt("resume", {**resumed, **bad})
        assert content(directory) == before
        assert not (tmp_path / "deep").exists()
    done = run("pretrain", {**same, "--seed": 9}, nproc=2)  # ranks of a job leave no more behind
    assert_refused(done, "seed: 0 -> 9")
    assert content(directory) == before


def test_a_run_that_is_refused_at_its_start_leaves_no_directory(
    own: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    for name, (bad, expected) in FRESH.items():
        output = tmp_path / name / "run"
        assert expected in attempt("pretrain", {**own, **filled(bad, home), "--output-dir": output}), name
        assert not (tmp_path / name).exists(), name
    (tmp_path / "notes.txt").write_text("mine")
    done = run("pretrain", {**own, "--block-size": 1_000_000, "--output-dir": tmp_path}, nproc=2)
    assert_refused(done, "block_size=1000000")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_tokenizer_of_a_run_is_never_made_again(
    own: dict[str, Any], home: Path, begun: Path, tmp_path: Path
) -> None:
    """A shard comes in front of the others, from which another tokenizer would be made."""
    shutil.copytree(home / "corpus", tmp_path / "corpus")
    shutil.copytree(begun, tmp_path / "run")
    directory, kept = tmp_path / "run", content(begun / "tokenizer")
    new = pa.table({"text": ["zebra quagga okapi " * 40] * 30})
    pq.write_table(new, tmp_path / "corpus" / "part--1.parquet")
    now = {**own, "--data-glob": tmp_path / "corpus/*.parquet", "--precision": "fp64", "--output-dir": directory}
    assert "shard part--1.parquet was added" in attempt("pretrain", now)
    told = succeed("pretrain", {**now, "--accept-data-change": None, "--stop-at-step": 6}, nproc=2)
    assert "training a byte-level BPE" not in told
    assert "accepted from here on: data.shards: " in told
    assert content(directory / "tokenizer") == kept
    changes = json.loads((directory / "run.json").read_text())["changes"]
    assert [change["step"] for change in changes] == [4] * len(changes)
    assert any("part--1.parquet" in change["text"] for change in changes)

    (directory / "tokenizer" / "tokenizer.json").write_text('{"version": ')
    told = succeed("pretrain", {**now, "--stop-at-step": 7}, nproc=1)
    assert "was missing or damaged, and was restored" in told
    own_copy = load_tokenizer(directory / "tokenizer")
    assert own_copy.get_vocab() == load_tokenizer(begun / "tokenizer").get_vocab()
    shutil.rmtree(directory / "tokenizer")
    assert "was restored" in succeed("resume", {"--checkpoint-path": directory, "--stop-at-step": 8}, nproc=1)
    assert (directory / "tokenizer" / "tokenizer.json").read_bytes() == (
        begun / "tokenizer/tokenizer.json"
    ).read_bytes()
    assert [line["step"] for line in metrics(directory)] == list(range(1, 9))


def test_a_run_without_a_checkpoint_keeps_its_tokenizer_too(
    own: dict[str, Any], home: Path, begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "corpus", tmp_path / "corpus")
    directory = tmp_path / "run"
    directory.mkdir()
    shutil.copytree(begun / "tokenizer", directory / "tokenizer")
    shutil.copy(begun / "run.json", directory)
    before = content(directory)
    new = pa.table({"text": ["zebra quagga okapi " * 40] * 30})
    pq.write_table(new, tmp_path / "corpus" / "part--1.parquet")
    now = {**own, "--data-glob": tmp_path / "corpus/*.parquet", "--precision": "fp64", "--output-dir": directory}
    assert "part--1.parquet" in attempt("pretrain", now)
    assert content(directory) == before
    told = succeed("pretrain", {**now, "--accept-data-change": None, "--stop-at-step": 1}, nproc=1)
    assert "training a byte-level BPE" not in told
    assert content(directory / "tokenizer") == content(begun / "tokenizer")


@pytest.mark.parametrize("older", [False, True], ids=["now", "older"])
def test_precision_is_kept_or_converted_on_purpose_and_every_change_is_told_and_recorded(
    own: dict[str, Any], home: Path, begun: Path, tmp_path: Path, older: bool
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(begun, directory)
    if older:
        as_an_older_version_left_it(directory)
    before = content(directory)
    plain = {**own, "--output-dir": directory}
    assert "precision.state: float64 -> float32" in attempt("pretrain", plain)
    assert content(directory) == before

    step = {"--checkpoint-path": directory, "--stop-at-step": 5}
    assert "changed from here on" not in succeed("resume", step, nproc=2)
    assert read_manifest(directory / "step_00000005").tensors["model.norm.weight"].dtype == "float64"
    told = succeed("resume", {**step, "--stop-at-step": 6, "--precision": "fp32"}, nproc=1)
    assert "changed from here on: precision.state: float64 -> float32" in told
    assert {record.dtype for record in read_manifest(directory / "step_00000006").tensors.values()} == {"float32"}
    assert "precision.state: float32 -> float64" in attempt("pretrain", {**plain, "--precision": "fp64"})
    told = succeed("pretrain", {**plain, "--stop-at-step": 7}, nproc=1)
    assert "changed from here on" not in told, "auto is float32 on a CPU"
    measured = {"--validation-glob": home / "corpus/part-1.parquet", "--validation-sequences": 5, "--precision": "bf16"}
    told = succeed("pretrain", {**plain, **measured, "--stop-at-step": 8}, nproc=1)
    assert "changed from here on: precision.compute: float32 -> bfloat16" in told
    assert "changed from here on: held_out: null -> " in told
    told = succeed(
        "resume", {**step, "--stop-at-step": 9, "--batch-size": 4, "--gradient-accumulation-steps": 2}, nproc=1
    )
    assert "changed from here on: global_batch: 4 -> 8" in told

    changes = json.loads((directory / "run.json").read_text())["changes"]
    assert [change["step"] for change in changes] == [5, 5, 7, 7, 8]
    assert changes == json.loads((directory / "step_00000009" / TRAINER).read_text())["changes"]
    for damaged in ("step_00000009", "step_00000008", "step_00000007", "step_00000006"):
        with contextlib.suppress(FileNotFoundError):
            (directory / damaged / "config.json").write_text("{}")
    back = attempt("pretrain", {**plain, "--initial-batch-size": 4})  # the run is in float32, what is intact is not
    assert "would be converted (precision.state: float64 -> float32); legal: --precision fp64" in back
    # Back at a checkpoint in float64, the flags are those of that one too.
    told = succeed("resume", {"--checkpoint-path": directory, "--stop-at-step": 6}, nproc=1)
    assert "precision.state" not in told
    assert {record.dtype for record in read_manifest(directory / "step_00000006").tensors.values()} == {"float64"}
