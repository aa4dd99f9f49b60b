"""Flags from a file: what it says counts unless the command line says otherwise, and what is printed reads back."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.launch import config_file, drive, parse
from argonne.launch.config_file import ConfigFlags, as_toml, with_file
from argonne.parallel import ArgonneError
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.run.conflicts import check_meaning
from argonne.training.run.flags_json import flags_to_json

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="~\0"), min_size=1, max_size=9).filter(
    lambda text: not text.startswith("-") and text != "None"
)
VALUES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {
        "hidden_size": st.none() | st.integers(1, 99),
        "init_from": st.none() | TEXTS.map(Path),
        "tie_word_embeddings": st.none() | st.booleans(),
    },
    "data": {
        "data_glob": st.none() | st.lists(TEXTS, max_size=3).map(tuple),
        "streaming": st.booleans(),
        "filters": st.sampled_from(["default", "none"]),
        "text_column": TEXTS,
    },
    "training": {
        "seed": st.integers(0, 2**64),
        "learning_rate": st.floats(1e-300, 1e300),
        "schedule": st.sampled_from(["wsd", "cosine"]),
        "decay_steps": st.none() | st.integers(0, 9),
    },
    "parallel": {"pipeline_parallel": st.sampled_from(["auto", 1, 3]), "zero1": st.booleans()},
    "launch": {"nproc": st.none() | st.integers(1, 9)},
    "run": {"output_dir": TEXTS.map(Path), "wall_time": st.none() | st.floats(0.1, 9)},
}


@st.composite
def configurations(draw: st.DrawFn) -> RunConfig:
    """Some flags of every type as a command may name them, at their defaults too."""
    config = RunConfig()
    for group, flags in VALUES.items():
        named = {name: draw(flags[name]) for name in draw(st.lists(st.sampled_from(sorted(flags)), unique=True))}
        changed = replace(getattr(config, group), **named)
        config = replace(config, given=config.given | set(named), **{group: changed})
    return config


def written(tmp_path: Path, text: str, name: str = "flags.toml") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def without_file(config: Any) -> Any:
    return replace(config, file=ConfigFlags(), given=config.given - {"config", "print_config"})


@given(configurations())
def test_what_is_printed_is_read_back_as_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    """With what the command named, as that decides about conflicts; and it prints the same again."""
    path = written(tmp_path_factory.getbasetemp(), as_toml(config), "printed.toml")
    again, named = with_file(RunConfig, None, Path(path))
    assert replace(again, given=named) == config
    assert as_toml(replace(again, given=named)) == as_toml(config)


def test_a_command_that_is_printed_is_the_same_command_from_the_file(tmp_path: Path) -> None:
    words = "--no-streaming --data-glob ~/a b --seed 0 --attention-bias False --wall-time None --z-loss 1e-4 --fsdp"
    config = parse(RunConfig, words.split())
    again = parse(RunConfig, ["--config", written(tmp_path, as_toml(config))])
    assert without_file(again) == config


def test_tables_and_names_alone_are_flags_and_those_of_the_command_line_win(tmp_path: Path) -> None:
    text = """
        z-loss = 1e-4
        filters = false  # as in an earlier version
        data_glob = ["a b", "c"]
        [training]
        learning_rate = 1
        total_steps = 300
        [data]
        streaming = false
        tokenizer_path = "~/t"
        [model]
        preset = "None"
    """
    words = ["--total-steps", "200", "--streaming"]
    config = parse(RunConfig, [*words, f"--config={written(tmp_path, text)}"])
    t, d = config.training, config.data
    assert (t.z_loss, t.learning_rate, t.total_steps, type(t.learning_rate)) == (1e-4, 1.0, 200, float)
    assert (d.filters, d.data_glob, d.streaming, d.tokenizer_path) == ("none", ("a b", "c"), True, Path.home() / "t")
    assert config.model.preset is None
    named = {"z_loss", "filters", "data_glob", "learning_rate", "total_steps", "streaming", "tokenizer_path", "preset"}
    assert config.given == {*named, "config"}


def test_what_a_file_names_in_vain_is_refused_as_on_the_command_line(tmp_path: Path) -> None:
    config = parse(RunConfig, ["--config", written(tmp_path, "decay_steps = 5")])
    with pytest.raises(ArgonneError, match="^decay_steps=5 has no effect without --schedule wsd"):
        check_meaning(config)


def test_a_resume_takes_its_checkpoint_from_the_file_or_from_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, 'checkpoint_path = "x"\n[training]\ntotal_steps = 9')
    assert parse(ResumeConfig, ["--config", path]).resume.checkpoint_path == Path("x")
    assert parse(ResumeConfig, ["--config", path, "--checkpoint-path", "y"]).resume.checkpoint_path == Path("y")
    with pytest.raises(ArgonneError, match="--checkpoint-path"):
        parse(ResumeConfig, ["--config", written(tmp_path, "total_steps = 9")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("z_los = 1", "{} has z_los, which is not known; legal: z_loss (--help lists all flags)"),
        ("[trainning]\nz_loss = 1", "{} has the table [trainning], which is not known; legal: training (--help"),
        ("[data]\nz_loss = 1", "{} has z_loss in [data]; legal: in [training]"),
        ("z_loss = 1\n[training]\nz-loss = 1", "{} has z_loss twice, as z_loss and as z-loss; legal: once"),
        ("config = 'x'", "{} has config, which is not known; legal: "),
        ("checkpoint_path = 'x'", "{} has checkpoint_path, which is not known; legal: "),
        ("z_loss = 'x'", "z_loss='x' in {} is not legal; legal: a number"),
        ("z_loss = true", "z_loss=True in {} is not legal; legal: a number"),
        ("total_steps = 1.5", "total_steps=1.5 in {} is not legal; legal: a whole number"),
        ("streaming = 'no'", "streaming='no' in {} is not legal; legal: true or false"),
        ("data_glob = 'x'", "data_glob='x' in {} is not legal; legal: a list of texts or None"),
        ("data_glob = [1]", "data_glob=[1] in {} is not legal; legal: a list of texts or None"),
        ("output_dir = 'None'\ntext_column = 3", "text_column=3 in {} is not legal; legal: text"),
        ("pipeline_parallel = 'all'", "pipeline_parallel='all' in {} is not legal; legal: a whole number or auto"),
        ("schedule = 'step'", "schedule='step' in {} is not legal; legal: cosine, wsd, linear, constant"),
        ("z_loss 1", "{} cannot be read: "),
        ("z_loss = 1\nz_loss = 1", "{} cannot be read: "),
        ("# \udcff", "{} cannot be read: 'utf-8' codec"),
    ],
)
def test_what_a_file_has_wrong_is_said_in_one_line_with_key_and_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "flags.toml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ArgonneError) as refusal:
        parse(RunConfig, ["--config", str(path)])
    assert str(refusal.value).startswith(message.format(f"config={str(path)!r}"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.toml", None, "cannot be read: "),
        ("flags.yaml", "a: 1", "is not legal; legal: a file whose name ends in .toml or .json"),
        ("list.json", "[1]", "is not legal; legal: a JSON object of flags, or a run.json"),
        ("cut.json", '{"z_loss": 1', "cannot be read: "),
    ],
)
def test_what_is_no_file_of_flags_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ArgonneError) as refusal:
        parse(RunConfig, ["--config", str(tmp_path / name)])
    assert str(refusal.value).startswith(f"config={str(tmp_path / name)!r} {message}")


def test_without_a_reader_of_toml_the_refusal_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(config_file.importlib, "import_module", none)
    with pytest.raises(ArgonneError, match="legal: a .json file, pip install tomli, or Python 3.11 or newer"):
        parse(RunConfig, ["--config", written(tmp_path, "z_loss = 1")])
    assert parse(RunConfig, ["--config", written(tmp_path, '{"z_loss": 1}', "a.json")]).training.z_loss == 1


def test_the_run_json_of_another_run_gives_its_flags_and_names_those_that_are_not_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of an earlier version, which had other flags, and some in another group or with other values."""
    words = "--total-steps=9 --seed=0 --nproc=2 --data-glob=/x/*.parquet --no-filters --output-dir=/runs/a --zero1"
    first = parse(RunConfig, words.split())
    flags = flags_to_json(first)
    flags["data"]["filters"] = False
    flags["parallel"] |= {**flags.pop("launch"), "flag_of_the_past": 3}
    path = written(tmp_path, json.dumps({"sha256": "x", "identity": {}, "flags": flags}), "run.json")
    again = parse(RunConfig, ["--config", path])
    assert replace(without_file(again), given=first.given) == first
    assert again.given == {"config", "total_steps", "data_glob", "filters", "output_dir", "zero1", "nproc"}
    other = parse(RunConfig, ["--config", path, "--output-dir", "b"])
    assert other == replace(again, run=replace(again.run, output_dir=Path("b")))
    with monkeypatch.context() as launched:  # by torchrun, which says itself how many ranks there are
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
            launched.setenv(name, value)
        found, named = with_file(RunConfig, None, Path(path))
    assert found == replace(without_file(again), launch=replace(again.launch, nproc=None), given=frozenset())
    assert named == again.given - {"config", "nproc"}
    flags["training"]["z_loss"] = "much"
    with pytest.raises(ArgonneError, match=r"^z_loss='much' in config='.*run.json' is not legal; legal: a number$"):
        parse(RunConfig, ["--config", written(tmp_path, json.dumps({"flags": flags}), "run.json")])


def test_printing_starts_nothing_and_refuses_what_no_run_could_use(capsys: pytest.CaptureFixture[str]) -> None:
    def never(*arguments: Any) -> int:
        raise AssertionError

    config = parse(RunConfig, ["--print-config", "--nproc", "3", "--z-loss", "1e-4"])
    drive(never, never, config)
    assert capsys.readouterr().out == as_toml(config) + "\n"
    with pytest.raises(ArgonneError, match="^z_loss=-1.0 is not legal"):
        drive(never, never, parse(RunConfig, ["--print-config", "--z-loss=-1"]))


def test_a_value_that_no_file_can_have_is_refused_by_name() -> None:
    with pytest.raises(ArgonneError, match="^text_column='.*' is not legal in a file; legal: text of Unicode"):
        as_toml(parse(RunConfig, ["--text-column=\udcff"]))
