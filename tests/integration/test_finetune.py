"""Instruction tuning by its command line: killed and continued, in two layouts, and asked what it has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import history, metrics, run, run_until_killed, succeed, weights
from tests.training.test_tuning import flags_by_name, write_home

pytestmark = pytest.mark.slow

# The first differs in nothing but its layout from the second.
TWO = {"data_parallel": 2, "gradient_accumulation_steps": 1}
ONE = {"gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("finetune"))


def asked(home: Path, directory: str, **others: Any) -> dict[str, Any]:
    held_out = {"eval": f"own={home}/chats.parquet", "eval_interval": 5}
    return flags_by_name(
        home, directory, **{"epochs": 8, "save_interval": 7, "reproducible": True, **held_out, **others}
    )


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The undisturbed run of one process."""
    told = succeed("finetune", asked(home, "whole", **ONE), nproc=1)
    assert " conversations of 22 rows (dropped: malformed 1, too_long 1), " in told
    assert " sequences in steps of 4: " in told
    return home / "whole"


def test_a_run_that_is_killed_twice_and_resumed_is_the_undisturbed_one_of_other_layouts(
    home: Path, whole: Path
) -> None:
    run_until_killed("finetune", asked(home, "killed", **TWO), 3)
    run_until_killed("finetune", asked(home, "killed", **TWO), 9)
    told = succeed("resume", {"--checkpoint-path": home / "killed", "--tensor-parallel": 2, "--device": "cpu"})
    assert "continuing from" in told
    assert " sequences in steps of " not in told, "counted once"
    assert weights(home / "killed") == weights(whole)
    layouts = [{name: value for name, value in line.items() if name != "layout"} for line in history(home / "killed")]
    assert layouts == [{name: value for name, value in line.items() if name != "layout"} for line in history(whole)]


def test_it_answers_as_it_was_tuned_to_and_ends_there(home: Path, whole: Path) -> None:
    assert metrics(whole)[-1]["loss"] < metrics(whole)[0]["loss"] / 2
    prompt = {"--checkpoint-path": whole, "--chat": None, "--prompt": "Who is Barin?", "--temperature": 0}
    told = succeed("generate", {**prompt, "--max-new-tokens": 30}, nproc=1)
    assert "A " in told
    assert len(told.strip().splitlines()[-1]) < 30, told


def test_bad_input_ends_in_one_line(home: Path) -> None:
    done = run("finetune", asked(home, "never", chat_template=None), nproc=1)
    assert (done.status, done.output.count("\n")) == (2, 1), done.output
    assert "the tokenizer has no chat template; legal: one, or --chat-template FILE" in done.output
    assert not (home / "never").exists()
