"""Flags that contradict each other or would do nothing are refused by every driver; what launch scripts say is not."""

from __future__ import annotations

import pytest

from argonne.launch import drive, named_flags, parse
from argonne.parallel import ArgonneError, Layout
from argonne.parallel.communication.environment import RESTARTS_LEFT
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.run.conflicts import check_meaning, in_vain
from argonne.training.run.resume import parse_resume
from examples import custom_model, demo, generate

WITHOUT_EFFECT = {
    "--eval-sequences 5": "eval_sequences=5 has no effect without --eval; legal: --eval too",
    "--eval-interval 5": "eval_interval=5 has no effect without --eval; legal: --eval too",
    "--validation-sequences 5": "validation_sequences=5 has no effect without --validation-glob",
    "--cache-dir=/x": "cache_dir=/x has no effect without --no-streaming",
    "--cache_dir /x": "cache_dir=/x has no effect without --no-streaming",
    "--initial-loss-scale 2 --precision bf16": "initial_loss_scale=2.0 has no effect without --precision fp16",
    "--pipeline-schedule 1f1b": "pipeline_schedule='1f1b' has no effect without --pipeline-parallel",
    "--pipeline-interleave 4 --pipeline-parallel 2": "pipeline_interleave=4 has no effect without --pipeline-schedule",
    "--muon-momentum 0.9": "muon_momentum=0.9 has no effect without --optimizer muon",
    "--muon-precision bf16 --optimizer adamw": "muon_precision='bf16' has no effect without --optimizer muon",
    "--fsdp": "fsdp=True has no effect without --data-parallel or --context-parallel",
    "--zero1 --tensor-parallel 2": "zero1=True has no effect without --data-parallel or --context-parallel",
    "--no-filters --filter-min-tokens 3": "filter_min_tokens=3 conflicts with filters='none'",
    "--filter-max-digits=0.5 --filters none": "filter_max_digits=0.5 conflicts with filters='none'",
    "--decay-steps 5": "decay_steps=5 has no effect without --schedule wsd",
    "--schedule linear --decay-shape linear": "decay_shape='linear' has no effect without --schedule wsd",
    "--schedule wsd --decay-steps 0 --decay-shape sqrt": "decay_shape='sqrt' has no effect without --decay-steps",
    "--fsdp --zero1": "fsdp=True conflicts with zero1=True",
    "--data-parallel 2 --zero1 --fsdp": "fsdp=True conflicts with zero1=True",
}
MEANT = (
    "",
    "--schedule wsd --decay-shape cosine",
    "--schedule wsd --decay-steps 0",
    "--validation-sequences 5 --validation-glob x",
    "--no-streaming --cache-dir /x",
    "--initial-loss-scale 2 --precision fp16",
    "--pipeline-schedule interleaved --pipeline-interleave 3 --pipeline-parallel auto",
    "--pipeline-parallel 1 --pipeline-schedule zb",
    "--muon-momentum 0.9 --optimizer muon --muon-precision bf16",
    "--fsdp --context-parallel 2",
    "--zero1 --data-parallel 1",
    "--sequence-parallel --uneven-shards",
    # What launch scripts of the first Argonne always say.
    "--num-proc 8 --min-batch-size 4 --initial-batch-size 2 --disable-compile --trust-remote-code --local_rank 0 "
    "--disable-gradient-checkpointing --warmup-steps 2000 --gradient-accumulation-steps 4",
    "--seed 3 --seed=3 --no-streaming --no_streaming --data-glob a b --data_glob a b",
)
RESUMED = {
    "--force-from-scratch --reset-optimizer": "force_from_scratch=True conflicts with reset_optimizer=True",
    "--rewarmup-steps 100": "rewarmup_steps=100 has no effect without --reset-optimizer",
    "--rewarmup-steps 5 --force-from-scratch": "rewarmup_steps=5 has no effect without --reset-optimizer",
    "--fsdp": "fsdp=True has no effect without",
}


@pytest.mark.parametrize("words", WITHOUT_EFFECT)
def test_a_flag_that_would_do_nothing_is_refused(words: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        check_meaning(parse(RunConfig, words.split()))
    assert str(refusal.value).startswith(WITHOUT_EFFECT[words])
    assert "; legal: " in str(refusal.value)


@pytest.mark.parametrize("words", MEANT)
def test_flags_that_go_together_and_those_that_launch_scripts_always_say_are_taken(words: str) -> None:
    check_meaning(parse(RunConfig, words.split()))


IN_VAIN = {
    "--disable-compile --device cpu": "--disable-compile has no effect: on a CPU only --compile compiles anything",
    "--num-proc 8": "--num-proc has no effect: without --no-streaming",
    "--trust-remote-code": "--trust-remote-code has no effect: without --tokenizer-path",
    "--local_rank 0": "--local_rank has no effect: LOCAL_RANK",
    "--sequence-parallel": "--sequence-parallel has no effect: the layout has tensor_parallel=1",
    "--uneven-shards": "--uneven-shards has no effect: the layout has tensor_parallel=1",
    "--pipeline-schedule zb": "--pipeline-schedule has no effect: the layout has pipeline_parallel=1",
    "--pipeline-interleave 3": "--pipeline-interleave has no effect: the layout has pipeline_parallel=1",
    "--fsdp": "--fsdp has no effect: there is one replica",
    "--zero1": "--zero1 has no effect: there is one replica",
    "--trace 4000001-4000009": "--trace has no effect: the run ends at step 4,000,000",
}


@pytest.mark.parametrize("words", IN_VAIN)
def test_a_flag_that_is_taken_and_does_nothing_is_said_to(words: str) -> None:
    """Where it is given, and nowhere else: its default says nothing."""
    (line,) = in_vain(parse(RunConfig, words.split()), Layout())
    assert line.startswith(f"note: {IN_VAIN[words]}")
    assert "\n" not in line
    assert in_vain(parse(RunConfig, []), Layout()) == []
    resumed = parse(ResumeConfig, ["--checkpoint-path", "x", *words.split()])
    assert in_vain(resumed, Layout()) == [line]


def test_a_flag_that_does_what_it_says_is_not_said_to_do_nothing() -> None:
    words = "--no-streaming --num-proc 8 --tokenizer-path x --trust-remote-code --sequence-parallel --uneven-shards"
    assert in_vain(parse(RunConfig, words.split()), Layout(tensor=2)) == []
    words = "--pipeline-schedule interleaved --pipeline-interleave 3 --fsdp --trace 4000009,7"
    assert in_vain(parse(RunConfig, words.split()), Layout(pipeline=2, context=2)) == []


@pytest.mark.parametrize("words", RESUMED)
def test_a_resume_refuses_what_contradicts_itself(words: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        check_meaning(parse(ResumeConfig, ["--checkpoint-path", "x", *words.split()]))
    assert str(refusal.value).startswith(RESUMED[words])


def test_a_reset_with_its_warm_up_is_taken() -> None:
    check_meaning(parse(ResumeConfig, ["--checkpoint-path", "x", "--reset-optimizer", "--rewarmup-steps", "0"]))


def test_two_micro_batches_of_a_resume_are_refused() -> None:
    words = ["--checkpoint-path", "x", "--batch-size", "4", "--initial-batch-size", "2"]
    with pytest.raises(ArgonneError, match="batch_size=4 conflicts with initial_batch_size=2"):
        parse_resume(words)


@pytest.mark.parametrize(
    ("config_type", "words"),
    [
        (RunConfig, ["--seed", "1", "--seed", "2"]),
        (RunConfig, ["--seed=1", "--total-steps", "9", "--seed", "2"]),
        (RunConfig, ["--data-glob", "a", "b", "--data-glob", "a"]),
        (RunConfig, ["--data-glob", "a", "--data_glob", "b"]),
        (ResumeConfig, ["--checkpoint-path", "a", "--checkpoint-path", "b"]),
        (generate.GenerateConfig, ["--checkpoint-path", "a", "--prompt", "a", "--prompt", "b"]),
        (demo.Demo, ["--corpus", "a", "--output-dir", "b", "--steps", "1", "--steps", "2"]),
        (custom_model.Config, ["--steps", "1", "--steps", "2"]),
    ],
    ids=str,
)
def test_a_flag_that_says_two_things_is_refused_by_every_driver(config_type: type, words: list[str]) -> None:
    with pytest.raises(ArgonneError, match=r"^--[a-z-]+ is given twice, as '.*' and as '.*'; legal: once$"):
        parse(config_type, words)


@pytest.mark.parametrize(
    "word", ["--fsdp", "--zero1", "--data-parallel=2", "--max-restarts=1", "--pipeline-schedule=zb", "--reproducible"]
)
def test_generation_has_no_flags_of_training(word: str) -> None:
    with pytest.raises(ArgonneError, match=f"Unrecognized options: {word.partition('=')[0]}"):
        parse(generate.GenerateConfig, ["--checkpoint-path", "x", word])


@pytest.mark.parametrize("flag", ["--top-k", "--top-p"])
def test_generation_refuses_what_means_nothing_where_nothing_is_drawn(flag: str) -> None:
    words = ["--checkpoint-path", "x", "--temperature", "0", "--seed", "4"]
    config = parse(generate.GenerateConfig, [*words, flag, "1"])
    with pytest.raises(ArgonneError, match="has no effect without a --temperature above 0"):
        generate.check(config, 1)


def test_a_number_of_processes_that_the_launcher_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int | None] = []

    def started(nproc: str, **variables: str) -> None:
        for name in ("LOCAL_WORLD_SIZE", RESTARTS_LEFT, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RANK", "0")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        drive(lambda c: ran.append(c.launch.nproc), lambda c, n: None, parse(RunConfig, ["--nproc", nproc]))

    with pytest.raises(ArgonneError, match="nproc=4 is for ranks that this command starts itself"):
        started("4", WORLD_SIZE="2")
    started("4", WORLD_SIZE="4")
    started("8", WORLD_SIZE="16", LOCAL_WORLD_SIZE="8")
    started("2", WORLD_SIZE="3", **{RESTARTS_LEFT: "0"})
    assert ran == [4, 8, 2]


def test_the_names_of_flags_are_those_of_their_fields() -> None:
    words = ["--no-streaming", "--save-interval=5", "--local_rank", "0", "--wall-time", "-1", "--data-glob", "a", "b"]
    expected = {"streaming", "save_interval", "local_rank", "wall_time", "data_glob"}
    assert named_flags(words) == expected
    assert parse(RunConfig, words).given == expected
