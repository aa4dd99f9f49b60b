"""Flags at their borders: numbers that no run could use are refused by name, and the ``~`` of a path is home."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch

from argonne.data.tokens.filters import FILTERS, NO_FILTERS, Filters
from argonne.inference import Sampling
from argonne.launch import parse
from argonne.launch.flags import HomeText, at_home
from argonne.parallel import ArgonneError, Objective
from argonne.training.config import DataFlags, ModelFlags, ResumeConfig, RunConfig, RunFlags
from argonne.training.run.flags_json import flags_from_json, flags_to_json
from benchmarks.token_ids import Flags as TokenIds
from examples.demo import Demo
from examples.generate import GenerateConfig

GROUPS = ("model", "data", "training", "run")


def numbers(kind: type) -> list[str]:
    """The fields of a run's configuration that hold an ``int``, or a ``float``."""
    found = []
    for group in GROUPS:
        for name, hint in get_type_hints(get_type_hints(RunConfig)[group]).items():
            if hint is kind or kind in get_args(hint):
                found.append(name)
    return found


def checked(words: list[str]) -> None:
    """What a driver refuses of a command line before it looks at any file."""
    config = parse(RunConfig, words)
    config.check()
    config.model.resolve(config.data.block_size)


@pytest.mark.parametrize("name", numbers(int))
@pytest.mark.parametrize("value", ["-1", str(10**23), "9" * 5000, "1e3", "nan", "٣" * 30])
def test_a_whole_number_out_of_bounds_is_refused_by_its_name(name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ArgonneError) as refusal:
        checked([f"{flag}={value}"])
    assert name in str(refusal.value).replace("-", "_")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", numbers(float))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1", "1e39", "many", ""])
def test_a_number_that_is_not_finite_or_out_of_bounds_is_refused_by_its_name(name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ArgonneError) as refusal:
        checked([f"{flag}={value}"])
    assert name in str(refusal.value).replace("-", "_")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["head_dim", "intermediate_size", "initializer_range"])
def test_a_zero_is_not_taken_for_a_flag_left_out(name: str) -> None:
    with pytest.raises(ArgonneError, match=f"^{name}=0.* is not legal; legal: (1 or more|more than 0)$"):
        checked([f"--{name.replace('_', '-')}=0"])


def test_a_shape_from_a_file_follows_a_changed_width_as_a_preset_does(tmp_path: Path) -> None:
    """The file's own numbers for what follows from the width are of another width; its initial weights stay its own."""
    file = tmp_path / "config.json"
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}
    file.write_text(json.dumps({**shape, "head_dim": 20, "intermediate_size": 40, "initializer_range": 0.5}))

    def resolved(*words: str) -> tuple[int, int, float]:
        config = parse(RunConfig, ["--model-config", str(file), *words]).model.resolve(16)
        return config.head_dim, config.intermediate_size, config.initializer_range

    assert resolved() == resolved("--num-hidden-layers=3") == (20, 40, 0.5)
    assert resolved("--hidden-size=1000") == (250, 2816, 0.5)
    assert resolved("--hidden-size=1000", "--head-dim=20") == (20, 2816, 0.5)
    assert resolved("--num-attention-heads=8", "--num-key-value-heads=4") == (6, 40, 0.5)
    assert resolved("--hidden-size=1000", "--intermediate-size=40", "--initializer-range=0.1") == (250, 40, 0.1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("llama", False, False, False)),
        (["--attention-bias", "True"], ("llama", True, True, False)),
        (["--family", "mistral"], ("mistral", False, False, False)),
        (["--family", "qwen2"], ("qwen2", True, False, False)),
        (["--family", "qwen3"], ("qwen3", False, False, True)),
        (["--family", "qwen3", "--attention-bias", "True"], ("qwen3", True, True, True)),
        (["--family", "mixtral"], "family='mixtral' is not known; legal: llama, mistral, qwen2, qwen3"),
        (
            ["--family", "mistral", "--attention-bias", "True"],
            "attention_bias=True is not offered by family='mistral'; legal:",
        ),
        (
            ["--family", "qwen2", "--attention-bias", "False"],
            "attention_bias=False is not offered by family='qwen2'; legal:",
        ),
    ],
)
def test_a_family_says_which_biases_and_norms_a_shape_has(words: list[str], expected: Any) -> None:
    flags = parse(RunConfig, ["--preset", "demo", *words]).model
    if isinstance(expected, str):
        with pytest.raises(ArgonneError) as refusal:
            flags.resolve(16)
        assert str(refusal.value).startswith(expected)
    else:
        shape = flags.resolve(16)
        assert (shape.family, shape.attention_bias, shape.output_bias, shape.qk_norm) == expected


def test_a_file_with_biases_keeps_them_unless_a_flag_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    plain = {"hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 50}
    file.write_text(json.dumps({"model_type": "llama", "intermediate_size": 40, "attention_bias": True, **plain}))
    for words, bias in (([], True), (["--attention-bias", "False"], False), (["--family", "llama"], True)):
        shape = parse(RunConfig, ["--model-config", str(file), *words]).model.resolve(16)
        assert (shape.attention_bias, shape.output_bias) == (bias, bias)


def test_the_largest_seed_is_one_that_every_sample_of_the_run_can_be_drawn_with() -> None:
    largest = 2**64 - 1 - 100
    checked([f"--seed={largest}", "--total-steps=100"])
    torch.Generator().manual_seed(largest + 100)
    with pytest.raises(ArgonneError, match=f"seed={largest + 1} is not legal; legal: 0 to {largest}"):
        checked([f"--seed={largest + 1}", "--total-steps=100"])
    checked(["--weight-decay=-0.0", "--min-learning-rate=-0.0"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--adam-beta1=1", "adam_beta1=1 is not legal, as no gradient would count; legal: 0 up to less than 1"),
        ("--adam-beta2=1.0", "adam_beta2=1 is not legal, as no gradient would count; legal: 0 up to less than 1"),
        ("--adam-beta2=1.5", "adam_beta2=1.5 is not legal; legal: a number, 0 to 1"),
        (
            "--decay-steps=3998001",
            "decay_steps=3998001 is not legal, as total_steps=4000000 less warmup_steps=2000 leaves 3998000; "
            "legal: 0 to 3998000",
        ),
        ("--adam-epsilon=0", "adam_epsilon=0.0 is not legal; legal: more than 0"),
        ("--adam-epsilon=1e-46", "adam_epsilon=1e-46 is not legal; legal: 1e-37 or more"),
        ("--label-smoothing=1.01", "label_smoothing=1.01 is not legal; legal: a number, 0 to 1"),
        ("--z-loss=-1e-4", "z_loss=-0.0001 is not legal; legal: 0 or more"),
        ("--filter-max-digits=50", "filter_max_digits=50.0 is not legal; legal: a number, 0 to 1"),
        ("--filter-min-readable=1.1", "filter_min_readable=1.1 is not legal; legal: a number, 0 to 1"),
        ("--filter-min-tokens=0", "filter_min_tokens=0 is not legal; legal: 1 or more"),
        ("--filter-long-characters=-1", "filter_long_characters=-1 is not legal; legal: 0 or more"),
        ("--text-column=", "text_column='' is not legal; legal: the name of a column, or leave the flag out"),
    ],
)
def test_what_no_run_could_use_is_refused_with_what_is_legal(word: str, message: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        checked([word])
    assert str(refusal.value) == message


def test_flags_of_the_loss_the_optimizer_and_the_filters_say_what_they_are() -> None:
    words = "--label-smoothing=0.1 --z-loss=1e-4 --adam-beta1=0 --adam-beta2=0.99 --filter-max-digits=1"
    config = parse(RunConfig, [*words.split(), "--filter-min-tokens=3"])
    config.check()
    assert config.training.objective == Objective(label_smoothing=0.1, z_loss=1e-4)
    assert (config.training.betas, config.training.adam_epsilon) == ((0.0, 0.99), 1e-8)
    assert config.data.document_filters == Filters(50, 1.0, 0.3, 3)
    assert parse(RunConfig, []).training.objective == Objective()
    assert parse(RunConfig, []).data.document_filters == FILTERS
    for spelt in (["--no-filters"], ["--no_filters"], ["--filters", "none"]):
        found = parse(RunConfig, spelt)
        assert (found.data.document_filters, found.given) == (NO_FILTERS, {"filters"})
    for saved in (config, parse(RunConfig, ["--no-filters", "--text-column", "content"])):
        assert flags_from_json(json.loads(json.dumps(flags_to_json(saved)))).data == at_home(saved.data)


@pytest.mark.parametrize("value", ["-1", str(10**23)])
def test_what_only_a_resume_is_told_is_checked_too(value: str) -> None:
    for name in ("batch-size", "rewarmup-steps"):
        config = parse(ResumeConfig, ["--checkpoint-path=x", f"--{name}={value}"])
        with pytest.raises(ArgonneError, match=f"^{name.replace('-', '_')}={value} is not legal"):
            config.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**400, "1", True])
def test_sampling_is_told_numbers(value: Any) -> None:
    for name in ("temperature", "top_k", "max_new_tokens"):
        with pytest.raises(ArgonneError, match=f"{name}=.*legal"):
            Sampling(**{name: value})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_directory_of_every_path_flag_of_a_run_is_expanded(home: Path) -> None:
    globs = ["~/a/*.parquet:0.7", "~/b:0.3"]
    words = ["--data-glob", *globs, "--validation-glob=~/c", "--tokenizer-path=~/t", "--output-dir=~/r/x"]
    config = parse(RunConfig, [*words, "--cache-dir", "~", "--model-config=~/m~/config.json"])
    assert config.data.data_glob == (f"{home}/a/*.parquet:0.7", f"{home}/b:0.3")
    assert config.data.validation_glob == (f"{home}/c",)
    assert config.data.tokenizer_path == home / "t"
    assert config.data.cache_dir == home
    assert config.run.output_dir == home / "r/x"
    assert config.model.model_config == home / "m~/config.json"
    assert flags_from_json(flags_to_json(config)).data == config.data


def test_every_flag_of_every_driver_that_is_a_path_is_expanded(home: Path) -> None:
    required = {"Demo": {"corpus": "a", "output_dir": "b"}, "ResumeConfig": {"checkpoint_path": "c"}}
    required["GenerateConfig"] = {"checkpoint_path": "d"}
    for config_type in (RunConfig, ResumeConfig, GenerateConfig, Demo, TokenIds):
        paths = path_flags(config_type) - {"config"}  # which is read
        assert paths
        flags = required.get(config_type.__name__, {}) | dict.fromkeys(paths, "~/x")
        found = parse(config_type, [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])
        values = {name: value for name, value in leaves(found).items() if name in paths}
        assert {str(value[0] if isinstance(value, tuple) else value) for value in values.values()} == {f"{home}/x"}


def path_flags(config_type: Any) -> set[str]:
    found = set()
    for name, hint in get_type_hints(config_type, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= path_flags(hint)
        elif "Path" in str(hint):
            found.add(name)
    return found


def leaves(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        found |= leaves(value) if dataclasses.is_dataclass(value) else {name: value}
    return found


@pytest.mark.parametrize(
    "word",
    ["s3://bucket/~/x", "data/~x/*.parquet", "./~x", "$HOME/x", "file:///~/x", "x~", "/a/~"],
)
def test_nothing_else_is_expanded(home: Path, word: str) -> None:
    assert parse(RunConfig, ["--data-glob", word]).data.data_glob == (word,)
    assert parse(RunConfig, ["--data-glob", f"{word}:2"]).data.data_glob == (f"{word}:2",)


def test_text_that_is_no_path_keeps_its_tilde(home: Path) -> None:
    config = parse(GenerateConfig, ["--checkpoint-path=x", "--prompt", "~/x", "~"])
    assert config.generate.prompt == ("~/x", "~")


def test_the_home_of_another_user_is_expanded_and_of_none_refused(home: Path) -> None:
    user = pwd.getpwuid(0)
    found = parse(RunConfig, [f"--tokenizer-path=~{user.pw_name}/t"]).data.tokenizer_path
    assert found == Path(user.pw_dir) / "t"
    for flag in ("--output-dir", "--data-glob"):
        with pytest.raises(ArgonneError, match=r"='~nobody-here/x' begins with the home .* or \./~nobody-here/x"):
            parse(RunConfig, [flag, "~nobody-here/x"])


def test_a_configuration_that_a_program_builds_is_expanded_too(home: Path) -> None:
    config = RunConfig(
        model=ModelFlags(model_config=Path("~/m.json")),
        data=DataFlags(data_glob=("~/d/*", "e"), cache_dir=Path("~/c")),
        run=RunFlags(output_dir=Path("~/r")),
    )
    assert config.model.model_config == home / "m.json"
    assert config.data.data_glob == (f"{home}/d/*", "e")
    assert (config.data.cache_dir, config.run.output_dir) == (home / "c", home / "r")
    assert dataclasses.replace(config) == config


def test_only_what_is_marked_is_expanded(home: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Flags:
        folder: Path | None
        words: tuple[str, ...]
        text: HomeText

    hints = {"folder": Path | None, "words": tuple[str, ...], "text": HomeText}
    Flags.__annotations__ = hints
    assert get_origin(HomeText) is Annotated
    assert at_home(Flags(Path("~"), ("~",), "~/a")) == Flags(home, ("~",), f"{home}/a")
    assert at_home(Flags(None, ("~",), "b")) == Flags(None, ("~",), "b")


def test_a_run_with_default_data_records_which_data_that_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.arrow").touch()
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert flags_to_json(RunConfig())["data"]["data_glob"] == [f"{os.path.realpath(tmp_path)}/data/*.arrow"]
    monkeypatch.chdir(tmp_path / "work" / "deep")
    assert flags_to_json(RunConfig())["data"]["data_glob"] is None
