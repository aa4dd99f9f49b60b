"""What ``pretrain.py`` asks for by default starts on any machine, or is refused at once, and takes no memory."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from argonne.parallel import ArgonneError, ProcessGroups
from argonne.training.config import RunConfig
from argonne.training.machine import GIB, resident_bytes
from argonne.training.run import search as room
from argonne.training.run.file import Search
from argonne.training.run.search import search
from argonne.training.run.setup import prepare
from argonne.training.run.workflow import pretrain
from tests.training.small_run import small_run


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The flags of a command that names its data alone: 512 sequences of 4,096 tokens, and the model by default."""
    small, config = small_run(tmp_path_factory.mktemp("defaults")), RunConfig()
    data = replace(config.data, data_glob=small.data.data_glob, tokenizer_path=small.data.tokenizer_path)
    return replace(config, data=data, launch=small.launch, run=small.run)


def on_a_machine(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: int(gib * GIB))
    monkeypatch.setattr(room, "resident_bytes", lambda: GIB // 4)


def test_a_laptop_is_told_in_one_line_that_the_model_does_not_fit(
    defaults: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_machine(monkeypatch, 16)
    before, began = resident_bytes(), time.process_time()
    with pytest.raises(ArgonneError) as refusal:
        pretrain(defaults)
    text = str(refusal.value)
    assert text.startswith(
        "the weights and moments of the model alone do not fit into the memory of rank 0: of 16.2 GiB (what is free) "
        "10% are left for what is not counted, the process has 0.25 itself, and they need 55, and a step with "
        "micro-batch 4 "
    )
    assert text.endswith(
        "; legal: more processes with --tensor-parallel or --pipeline-parallel, a smaller model (--preset)"
    )
    assert "\n" not in text
    assert resident_bytes() - before < GIB
    assert time.process_time() - began < 60, "seconds"
    assert not defaults.run.output_dir.exists()


@pytest.mark.parametrize(
    ("preset", "gib", "fits"),
    [("demo", 8, 32), pytest.param("argonne-2.0-4.9b", 192, 16, marks=pytest.mark.exhaustive)],
)
def test_where_there_is_room_for_the_model_a_size_is_found(
    defaults: RunConfig, monkeypatch: pytest.MonkeyPatch, preset: str, gib: float, fits: int
) -> None:
    on_a_machine(monkeypatch, gib)
    config, groups = replace(defaults, model=replace(defaults.model, preset=preset)), ProcessGroups.single()
    workload = prepare(config, groups)
    found_config, _, found = search(config, workload, groups)
    assert found == Search(512, fits)
    assert found_config.training.initial_batch_size == fits
