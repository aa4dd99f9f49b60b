"""``examples/distill.py``: a killed run goes on to the same bits, with the same teacher only; bad input is one line."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.data import train_tokenizer
from argonne.launch import parse
from argonne.parallel import ArgonneError, ProcessGroups
from argonne.training.config import ResumeConfig
from argonne.training.distill_config import DistillConfig
from argonne.training.run.loss import cross_entropy
from argonne.training.run.rehearsal import rehearse
from argonne.training.run.resume import check_resume, parse_resume, resume
from argonne.training.run.setup import prepare
from argonne.training.run.teacher import check_distill, distill, loss_of_run, with_tokens_of_teacher
from argonne.training.run.workflow import pretrain
from tests.integration.runs import (
    MODEL,
    ROOT,
    SCHEDULE,
    finish,
    history,
    metrics,
    run_until_killed,
    start,
    weights,
    words_of,
    write_corpus,
)
from tests.teachers import write_teacher

TEXT = ["some words and more of them", "other words"] * 9


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("distill")
    write_corpus(home / "corpus", documents=30)
    tokenizer = train_tokenizer(TEXT)
    # Two rows more than there are tokens.
    write_teacher(home / "teacher", len(tokenizer) + 2, tokenizer)
    write_teacher(home / "another", len(tokenizer) + 2, tokenizer, seed=6)
    write_teacher(home / "mute", len(tokenizer))
    # What the page takes is longer than the teachers of the other tests see.
    write_teacher(home / "long", len(tokenizer), tokenizer, max_position_embeddings=128)
    write_teacher(home / "foreign", 400, train_tokenizer(["quite a different text"] * 9))
    return home


def flags_of(home: Path, name: str, **more: Any) -> dict[str, Any]:
    flags = {**MODEL, **SCHEDULE, "--data-glob": home / "corpus" / "*.parquet", "--output-dir": home / name}
    flags |= {"--teacher-path": home / "teacher", "--total-steps": 6, "--save-interval": 2, "--device": "cpu"}
    return {**flags, "--validation-glob": home / "corpus" / "part-0.parquet", **more}


def config_of(flags: dict[str, Any]) -> DistillConfig:
    return parse(DistillConfig, [*words_of(flags), "--nproc", "1"])


def resumed(home: Path, *words: str) -> ResumeConfig:
    """What ``resume.py`` makes of these words and of the run that was killed."""
    config = parse_resume(["--checkpoint-path", str(home / "killed"), "--device", "cpu", *words])
    check_resume(config, 1)
    return config


def test_a_killed_distillation_goes_on_to_the_same_bits_and_with_no_other_teacher(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    held_out = {"--eval": f"own={home}/corpus/part-1.parquet", "--eval-interval": 3, "--reproducible": None}
    flags = flags_of(home, "killed", **held_out)
    two = {"--gradient-accumulation-steps": 1, "--data-parallel": 2}
    run_until_killed("distill", {**flags, **two}, 3)
    assert resume(resumed(home, "--stop-at-step", "4")) == 0
    assert distill(config_of(flags)) == 0
    assert distill(config_of(flags_of(home, "whole", **held_out))) == 0
    torch.set_num_threads(threads)
    lines = [[{**line, "layout": None} for line in history(home / name)] for name in ("killed", "whole")]
    assert lines[0] == lines[1]
    assert weights(home / "killed") == weights(home / "whole")
    assert [line["eval"] and [*line["eval"]["own"]] for line in lines[0]] == [None, None, ["loss", "bits_per_byte"]] * 2
    for line in metrics(home / "killed"):
        found = 0.5 * line["cross_entropy"] + 0.5 * line["kl_divergence"]
        assert line["loss"] == pytest.approx(found, rel=1e-5)
        assert line["kl_divergence"] > 0.1
    told = json.loads((home / "killed" / "run.json").read_text())
    assert told["flags"]["distill"]["teacher_path"] == str(home / "teacher")
    assert set(told["identity"]["loss"]) == {"teacher", "alpha", "temperature"}

    for name, value in {"--teacher-path": home / "another", "--alpha": 0.4, "--temperature": 2}.items():
        with pytest.raises(ArgonneError, match=r"holds a different run \(loss\..*: .* -> .*; legal: the run's own"):
            distill(config_of({**flags, name: value}))
    with pytest.raises(ArgonneError, match=r"holds a different run \(loss: .*teacher.* -> null"):
        pretrain(config_of({**flags, "--tokenizer-path": home / "teacher", "--vocab-size": 280}))
    with pytest.raises(ArgonneError, match=r"holds a different run \(loss\.alpha: 0.5 -> 0.4\); legal: the run's own"):
        resume(resumed(home, "--total-steps", "8", "--alpha", "0.4"))
    with pytest.raises(ArgonneError, match=r"alpha=2.0 is not legal"):
        resumed(home, "--alpha", "2")
    capfd.readouterr()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nowhere": ({"--teacher-path": "nowhere"}, "teacher_path='nowhere' does not exist; legal: a Hugging Face"),
    "no model": ({"--teacher-path": "."}, "' holds no model; legal: a Hugging Face directory"),
    "alpha": ({"--alpha": 1.5}, "alpha=1.5 is not legal; legal: a number, 0 to 1"),
    "temperature": ({"--temperature": 0}, "temperature=0.0 is not legal; legal: more than 0"),
    "auto": ({"--teacher-device-map": "auto"}, "teacher_device_map='auto' is not offered; legal: local, and --teacher"),
    "smoothing": ({"--label-smoothing": 0.1}, "label_smoothing=0.1 is not offered with a teacher; legal: 0"),
    "kernels": ({"--kernels": "triton"}, "kernels='triton' does not compute the loss of distillation; legal: auto"),
    "length": ({"--block-size": 128}, "block_size=128 is more than the teacher can see; legal: 1 to 64"),
    "bits": ({"--teacher-tensor-parallel": None, "--reproducible": None}, "teacher_tensor_parallel=True is not repro"),
    "heads": ({"--teacher-tensor-parallel": None, "--tensor-parallel": 3}, "the teacher of teacher_path="),
    "no tokenizer": ({"--teacher-path": "mute"}, "holds no tokenizer; legal: --tokenizer-path too"),
}
LATER: dict[str, tuple[dict[str, Any], str]] = {
    "foreign": ({"--teacher-path": "foreign", "--vocab-size": 400}, r"has other tokens than the run's tokenizer: id "),
    "mute": ({"--teacher-path": "mute", "--vocab-size": 400}, "holds no tokenizer to compare tokens with; legal: a "),
}
"""With the tokenizer of another."""


def refuse(config: DistillConfig, processes: int) -> None:
    check_distill(config, processes)
    distill(config)


def test_bad_input_is_refused_in_one_line(home: Path) -> None:
    for changes, message in (*REFUSED.values(), *LATER.values()):
        flags = {**flags_of(home, "refused"), **changes}
        own = home / str(changes.get("--teacher-path"))
        if own.exists():
            flags["--teacher-path"] = own
        if changes.get("--vocab-size"):
            flags["--tokenizer-path"] = home / "teacher"
        config, processes = config_of(flags), flags.get("--tensor-parallel", 1)
        with pytest.raises(ArgonneError) as refused:
            refuse(config, processes)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not (home / "refused").exists()


def test_a_rehearsal_counts_the_teacher(home: Path) -> None:
    """What ``--memory-limit`` goes by: the teacher's weights, and what is made of them."""
    config, groups = with_tokens_of_teacher(config_of(flags_of(home, "counted"))), ProcessGroups.single()
    needs = []
    for loss in (cross_entropy, loss_of_run):
        workload = prepare(config, groups, loss=loss)
        needs.append(rehearse(config, workload, groups, 2, math.inf).needs)
    assert needs[1] - needs[0] > (home / "teacher" / "model.safetensors").stat().st_size


def test_tokens_are_compared_by_their_ids_where_that_is_asked_for(home: Path) -> None:
    flags = flags_of(home, "mismatch", **{"--teacher-path": home / "mute", "--tokenizer-path": home / "teacher"})
    del flags["--validation-glob"]
    flags |= {"--vocab-size": 400, "--total-steps": 1, "--allow-vocabulary-mismatch": None}
    assert distill(config_of(flags)) == 0


@pytest.mark.exhaustive
def test_the_command_of_the_page_takes_less_than_two_minutes(home: Path) -> None:
    page = (ROOT / "docs" / "after-pretraining.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python examples/(distill\.py .*?)^```", page, re.M | re.S)
    script, *words = shlex.split(command.replace("\\\n", " "))
    ours = {"runs/demo": home / "long", "runs/corpus/train-*.parquet": home / "corpus" / "*.parquet"}
    ours["runs/student"] = home / "student"
    given = [str(ours.get(word, word)) for word in words]
    done = finish(start([sys.executable, str(ROOT / "examples" / script), *given]))
    assert done.status == 0, done.output
    assert done.seconds < 120
