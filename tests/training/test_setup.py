"""What is settled before the first step: the same on every rank, refused in time, and nothing written."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.parallel import ArgonneError, Layout, ProcessGroups
from argonne.parallel.tensor_parallel.precision import resolve_precision
from argonne.training.config import RunConfig
from argonne.training.run.checks import check, check_kernels, check_sequence
from argonne.training.run.identity import RunIdentity
from argonne.training.run.setup import open_corpora, prepare, with_tokens
from tests.pool import RankPool
from tests.training.small_run import small_run

ALONE = ProcessGroups.single()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_run(tmp_path_factory.mktemp("setup"))
    return replace(config, data=replace(config.data, validation_glob=config.data.data_glob, validation_sequences=3))


def changed(config: RunConfig, group: str, **values: Any) -> RunConfig:
    return replace(config, **{group: replace(getattr(config, group), **values)})


def settled(groups: ProcessGroups, config: RunConfig) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        workload = prepare(config, groups)
    return {
        "identity": workload.identity,
        "vocabulary": workload.model.shape["vocab_size"],
        "held out": workload.held_out,
        "reads": workload.tokenizer is not None,
        "boundary": workload.boundary,
        "printed": printed.getvalue(),
    }


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(data=2), Layout(pipeline=2, data=2)], ids=str)
def test_every_rank_of_every_layout_settles_the_same_run(ranks: RankPool, config: RunConfig, layout: Layout) -> None:
    config = changed(config, "data", add_document_boundary_tokens=True)
    alone = settled(ALONE, config)
    found = ranks.run(layout, settled, config)
    for rank, each in enumerate(found):
        assert each["identity"] == alone["identity"], f"rank {rank}"
        assert each["boundary"] == alone["boundary"] or not each["reads"], f"rank {rank}"
        assert torch.equal(each["held out"], alone["held out"]), f"rank {rank}"
    readers = sum(each["reads"] for each in found)
    assert readers == layout.data, "one rank reads for those that share a batch"
    assert not any(each["printed"] for each in found)


def sees(groups: ProcessGroups, config: RunConfig, damaged: str) -> tuple[list[Any], str]:
    """What a rank makes of the corpus, of which the last rank has a copy with a damaged shard."""
    if groups.world.rank == groups.world.size - 1:
        config = changed(config, "data", data_glob=(damaged,))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        data = open_corpora(config, groups, None)
    return [[(shard.path.name, shard.rows) for shard in part.shards] for part in data.parts], printed.getvalue()


def test_a_shard_that_one_rank_cannot_open_is_skipped_by_all(
    ranks: RankPool, config: RunConfig, tmp_path: Path
) -> None:
    (folder,) = {Path(glob).parent for glob in config.data.data_glob or ()}
    for shard in folder.iterdir():
        (tmp_path / shard.name).write_bytes(shard.read_bytes()[: None if shard.name != "part-1.parquet" else 50])
    flags = changed(config, "data", on_bad_shard="skip", validation_glob=None)
    found = ranks.run(Layout(data=2), sees, flags, f"{tmp_path}/*.parquet")
    assert found[0][0] == found[1][0]
    (part,) = found[0][0]
    assert [name for name, rows in part if not rows] == ["part-1.parquet"]
    assert "part-1.parquet " in found[0][1]
    assert found[0][1].endswith("; it is skipped (--on-bad-shard skip)\n")
    assert found[1][1] == ""


def never() -> Path | None:
    raise AssertionError("asked for the kept tokenizer")


def test_another_run_is_refused_before_anything_that_takes_long(config: RunConfig) -> None:
    saved = prepare(config, ALONE).identity
    plain = changed(config, "data", tokenizer_path=None)
    for other, line in (
        (changed(plain, "training", seed=3), "seed: 0 -> 3"),
        (changed(plain, "model", num_hidden_layers=2), "model.num_hidden_layers: 1 -> 2"),
        (changed(plain, "data", block_size=8), "data.block_size: 16 -> 8"),
    ):
        with pytest.raises(ArgonneError, match=f"holds a different run .*{line}"):
            prepare(other, ALONE, saved, kept_tokenizer=never)


def test_only_the_fixed_parts_must_be_as_they_were(config: RunConfig) -> None:
    saved = prepare(config, ALONE).identity
    other = changed(config, "training", seed=3, learning_rate=0.5)
    assert prepare(other, ALONE, saved, ("model", "data", "tokenizer")).identity.seed == 3
    with pytest.raises(ArgonneError, match="seed: 0 -> 3"):
        prepare(other, ALONE, saved, ("seed",))


def test_other_data_is_accepted_by_name_and_told(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    saved = prepare(config, ALONE).identity
    other = changed(config, "data", tokenizer_path=config.run.output_dir.parent / "another")
    with pytest.raises(ArgonneError, match="tokenizer.fingerprint: .* or --accept-data-change to go on"):
        prepare(other, ALONE, saved)
    now = prepare(changed(other, "data", accept_data_change=True), ALONE, saved).identity
    assert now.fingerprint != saved.fingerprint
    assert "accepted from here on: tokenizer.fingerprint: " in capsys.readouterr().out


def test_without_a_tokenizer_one_is_trained_and_gives_the_vocabulary(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = changed(changed(config, "data", tokenizer_path=None), "model", vocab_size=None)
    workload = prepare(plain, ALONE)
    assert "training a byte-level BPE" in capsys.readouterr().out
    assert workload.model.shape["vocab_size"] == (workload.identity.tokenizer or {})["size"]
    kept = config.run.output_dir.parent / "tokenizer"
    again = prepare(plain, ALONE, kept_tokenizer=lambda: kept)
    assert "training" not in capsys.readouterr().out
    assert again.identity.fingerprint == prepare(config, ALONE).identity.fingerprint
    assert not config.run.output_dir.exists()


def test_a_vocabulary_without_a_row_for_every_token_is_refused(config: RunConfig) -> None:
    with pytest.raises(ArgonneError, match=r"vocab_size=9 is less than the tokenizer's \d+; legal: --vocab-size \d+"):
        prepare(changed(config, "model", vocab_size=9), ALONE)


def test_data_that_fills_no_sequence_is_refused(config: RunConfig) -> None:
    with pytest.raises(ArgonneError, match="block_size=1000000 needs"):
        prepare(changed(config, "data", block_size=1_000_000, validation_glob=None), ALONE)


def caches(groups: ProcessGroups, config: RunConfig) -> list[Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        workload = with_tokens(config, prepare(config, groups), groups)
    return [part.cache and part.cache.path for part in workload.data.parts]


def test_tokens_are_made_once_for_all_ranks_where_they_are_asked_for(
    ranks: RankPool, config: RunConfig, tmp_path: Path
) -> None:
    assert caches(ALONE, config) == [None]
    made = ranks.run(Layout(data=2), caches, changed(config, "data", streaming=False, cache_dir=tmp_path, num_proc=1))
    assert made[0] == made[1]
    assert made[0][0].parent == tmp_path


@pytest.mark.parametrize(
    ("name", "device", "dtypes"),
    [
        ("auto", "cpu", (torch.float32, torch.float32)),
        ("auto", "cuda", (torch.float32, torch.bfloat16)),
        ("bf16", "cpu", (torch.float32, torch.bfloat16)),
        ("fp16", "cuda", (torch.float32, torch.float16)),
        ("fp64", "cuda", (torch.float64, torch.float64)),
    ],
)
def test_a_precision_is_two_dtypes(name: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    found = resolve_precision(name, torch.device(device))
    assert (found.parameters, found.compute) == dtypes


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("training", {"total_steps": 0}, "total_steps=0 is not legal"),
        ("training", {"kernels": "triton"}, "kernels='triton' needs a GPU"),
        ("parallel", {"tensor_parallel": 3}, "num_attention_heads=2 is"),
        ("data", {"tokenizer_path": Path("/nowhere/t")}, "tokenizer_path='/nowhere/t' does not exist; legal:"),
        ("data", {"data_glob": ("/nowhere/*.parquet",)}, "/nowhere"),
        ("run", {"output_dir": Path("/dev/null/run")}, "output_dir='/dev/null/run' cannot be made"),
    ],
)
def test_what_needs_no_peers_is_refused_before_they_are_started(
    config: RunConfig, group: str, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    processes = values.get("tensor_parallel", 1)
    check(config, 1)
    with pytest.raises(ArgonneError) as refusal:
        check(changed(config, group, **values), processes)
    assert message in str(refusal.value)


def test_kernels_and_sequences_are_checked_by_name() -> None:
    check_kernels("auto", torch.device("cpu"), "fp64")
    with pytest.raises(ArgonneError, match="kernels='triton' does not compute in precision='fp64'"):
        check_kernels("triton", torch.device("cuda"), "fp64")
    check_sequence(12, Layout(context=2, tensor=3, sequence_parallel=True))
    with pytest.raises(ArgonneError, match="block_size / context_parallel=6 is not divisible by tensor_parallel=4"):
        check_sequence(24, Layout(context=4, tensor=4, sequence_parallel=True))


def test_a_run_that_nothing_is_known_of_is_another_one(config: RunConfig) -> None:
    with pytest.raises(ArgonneError, match="holds a different run"):
        prepare(config, ALONE, RunIdentity())
