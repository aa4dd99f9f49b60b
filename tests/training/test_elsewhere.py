"""A run that goes on where a run of the original was: the same steps as a run here that stood there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from argonne.checkpoint.resume_state import RESUME_STATE
from argonne.convert import ConvertFlags, convert
from argonne.data import load_tokenizer
from argonne.parallel import ArgonneError
from argonne.training.config import ModelFlags, RunConfig
from argonne.training.run.checks import check
from argonne.training.run.resume import parse_resume, resume
from argonne.training.run.workflow import pretrain
from tests.integration.runs import history, metrics, weights
from tests.training.small_run import small_run

SEQUENCE = 17
"""Tokens of a sequence here, of 16 and the one that is predicted last."""
CHUNK = 2 * SEQUENCE
"""Tokens of a chunk of the old run: with another number, no sequence here would begin where one of its chunks did."""


def write_equal(directory: Path, tokenizer: PreTrainedTokenizerFast, sequences: int) -> str:
    """Six shards of two row groups of two documents, each of as many tokens as so many sequences; their glob."""
    directory.mkdir()
    for shard in range(6):
        texts = []
        for row in range(4):
            words = [f"of{shard}", f"more{row}"]
            while len(tokenizer.encode(" ".join(words), add_special_tokens=False)) < sequences * SEQUENCE:
                words.append("words"[: 1 + len(words) % 5])
            text = " ".join(words)
            while len(tokenizer.encode(text, add_special_tokens=False)) > sequences * SEQUENCE:
                text = text[:-1]
            assert len(tokenizer.encode(text, add_special_tokens=False)) == sequences * SEQUENCE
            texts.append(text)
        pq.write_table(pa.table({"text": texts}), directory / f"part-{shard}.parquet", row_group_size=2)
    return f"{directory}/*.parquet"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    home = tmp_path_factory.mktemp("elsewhere")
    config = small_run(home)
    tokenizer = load_tokenizer(home / "tokenizer")
    for sequences in (2, 3):
        write_equal(home / f"of-{sequences}", tokenizer, sequences)
    return replace(
        config,
        model=replace(config.model, num_key_value_heads=2),
        training=replace(config.training, total_steps=6),
    )


def with_data(base: RunConfig, sequences: int, lanes: int) -> RunConfig:
    home = base.run.output_dir.parent
    data = replace(base.data, data_glob=(f"{home}/of-{sequences}/*.parquet",), data_lanes=lanes)
    run = replace(base.run, output_dir=home / f"whole-{lanes}", save_interval=3 if lanes == 3 else 2)
    return replace(base, data=data, run=run)


def old_file(checkpoint: Path, path: Path, position: dict[str, Any] | None, **others: Any) -> Path:
    """What the original would have written of the run at ``checkpoint``, at a place in its own words."""
    convert(checkpoint, path, ConvertFlags(to="argonne2"))
    said = torch.load(path, weights_only=True)
    said |= {"data_position": position, **others}
    said["config"]["block_size"] = CHUNK
    torch.save(said, path)
    return path


def converted(path: Path, directory: Path, tokenizer: Path | None) -> Path:
    convert(path, directory, ConvertFlags(resume_state=True, tokenizer_path=tokenizer))
    return directory


def going_on(config: RunConfig, origin: Path, directory: Path, **run: Any) -> RunConfig:
    model = ModelFlags(init_from=origin, resume_state=True)
    return replace(config, model=model, run=replace(config.run, output_dir=directory, **run))


def begin(config: RunConfig) -> None:
    check(config, 1)
    assert pretrain(config) == 0


NAMES = [f"part-{index}.parquet" for index in range(6)]
# Sequences of a document, lanes, the step, where an old run would be that had read as much, and what is told of it.
PLACES: dict[str, tuple[int, int, int, dict[str, Any], str]] = {
    # Each of three lanes has been through one unit: they stand where one after the other had been read up to there.
    # The later files count sequences since they began, which are more than the document has.
    "three lanes": (
        *(2, 3, 3),
        {"current_file_idx": 1, "position_in_file": 2, "chunk_offset": 900, "files_processed": NAMES[1::-1]},
        "6 rows count as read; then row 2 of part-1.parquet, read again (all 34 tokens), as the 30,634 of resume_state",
    ),
    # Eight sequences of documents of three each: the first chunk of the third has been read.
    "within a document": (
        *(3, 1, 2),
        {"current_file_idx": 0, "position_in_file": 2, "chunk_offset": 0},
        "data: pass 1, 2 rows count as read; then row 2 of part-0.parquet, which goes on at token 34 of 51; then the",
    ),
}


@pytest.fixture(scope="module")
def wholes(base: RunConfig) -> Callable[[int, int], RunConfig]:
    """The undisturbed runs, each begun once."""
    done: dict[tuple[int, int], RunConfig] = {}

    def whole(sequences: int, lanes: int) -> RunConfig:
        if (sequences, lanes) not in done:
            done[sequences, lanes] = with_data(base, sequences, lanes)
            begin(done[sequences, lanes])
        return done[sequences, lanes]

    return whole


@pytest.mark.parametrize("name", PLACES)
def test_it_is_the_run_that_stood_there_with_new_moments(
    wholes: Callable[[int, int], RunConfig], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sequences, lanes, step, position, line = PLACES[name]
    config = wholes(sequences, lanes)
    checkpoint = config.run.output_dir / f"step_{step:08d}"
    file = old_file(checkpoint, tmp_path / "old.pth", position)
    origin = converted(file, tmp_path / "origin", config.data.tokenizer_path)
    begin(going_on(config, origin, tmp_path / "run", save_interval=9))
    told = capsys.readouterr().out
    assert f"going on at step {step} of 6: {step * 64} tokens, moments that begin anew" in told
    assert f"from step {step}" in told
    assert line in told

    words = ["--checkpoint-path", checkpoint, "--reset-optimizer", "--rewarmup-steps", 0, "--save-interval", 9]
    words += ["--output-dir", tmp_path / "as"]
    assert resume(parse_resume([str(word) for word in words])) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(step + 1, 7))
    assert history(tmp_path / "run") == history(tmp_path / "as")
    assert weights(tmp_path / "run") == weights(tmp_path / "as")
    for one, other in zip(metrics(tmp_path / "run"), metrics(config.run.output_dir)[step:], strict=True):
        assert all(one[key] == other[key] for key in ("batch_hash", "learning_rate", "tokens", "data_position"))


def test_what_the_file_does_not_say_begins_anew_and_is_told(
    wholes: Callable[[int, int], RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = wholes(3, 1)
    checkpoint, place = config.run.output_dir / "step_00000002", {"current_file_idx": 2, "position_in_file": 1}
    read_again = "row 1 of part-2.parquet, read again (all 51 tokens), as resume_state.json does not say how much of it"
    for position, line in ((None, "data: from the first row on, as resume_state.json has no"), (place, read_again)):
        directory = tmp_path / str(position is None)
        directory.mkdir()
        file = old_file(checkpoint, directory / "old.pth", position, tokens_processed=None)
        origin = converted(file, directory / "origin", config.data.tokenizer_path)
        begin(going_on(config, origin, directory / "run", stop_at_step=3))
        told = capsys.readouterr().out
        assert line in told
        assert "tokens counted from here" in told
        assert metrics(directory / "run")[-1]["tokens"] == 64


@pytest.fixture(scope="module")
def origin(wholes: Callable[[int, int], RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three lanes after three steps."""
    home, config = tmp_path_factory.mktemp("origin"), wholes(2, 3)
    _, _, step, position, _ = PLACES["three lanes"]
    file = old_file(config.run.output_dir / f"step_{step:08d}", home / "old.pth", position)
    return converted(file, home / "converted", config.data.tokenizer_path)


def test_it_goes_on_by_itself_once_it_has_begun(
    wholes: Callable[[int, int], RunConfig], origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = going_on(wholes(2, 3), shutil.copytree(origin, tmp_path / "origin"), tmp_path / "run", save_interval=2)
    whole = replace(asked, run=replace(asked.run, output_dir=tmp_path / "whole"))
    begin(whole)
    assert [path.name for path in sorted((tmp_path / "whole").glob("step_*"))] == ["step_00000004", "step_00000006"]
    begin(replace(asked, run=replace(asked.run, stop_at_step=4)))
    shutil.rmtree(tmp_path / "run" / "step_00000004")  # as if it had been killed before its first save
    begin(replace(asked, run=replace(asked.run, stop_at_step=5)))
    shutil.rmtree(tmp_path / "origin")
    capsys.readouterr()
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    begin(asked)
    assert resume(parse_resume(["--checkpoint-path", str(tmp_path / "resumed")])) == 0
    assert "changed from here on" not in capsys.readouterr().out
    for name in ("run", "resumed"):
        assert history(tmp_path / name) == history(tmp_path / "whole")
        assert weights(tmp_path / name) == weights(tmp_path / "whole")
    kept = json.loads((tmp_path / "run" / "step_00000006" / "trainer.json").read_text())
    assert (kept["step"], kept["optimizer_step"], kept["identity"]["resume_state"]["step"]) == (6, 3, 3)
    assert not (tmp_path / "run" / "step_00000006" / RESUME_STATE).exists()


def test_without_the_flag_it_begins_at_step_0_and_is_another_run(
    wholes: Callable[[int, int], RunConfig], origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = going_on(wholes(2, 3), origin, tmp_path / "run", stop_at_step=4)
    plain = replace(asked, model=ModelFlags(init_from=origin))
    begin(replace(plain, run=replace(plain.run, output_dir=tmp_path / "plain", stop_at_step=1)))
    assert f"note: {origin / RESUME_STATE} is not read, and this run begins at step 0" in capsys.readouterr().out
    begin(asked)
    for directory, other in ((tmp_path / "run", plain), (tmp_path / "plain", asked)):
        there = replace(other, run=replace(other.run, output_dir=directory, stop_at_step=None))
        with pytest.raises(ArgonneError, match=r"holds a different run \(resume_state: "):
            pretrain(there)
    moved = Path(shutil.copytree(origin, tmp_path / "moved"))
    said = json.loads((moved / RESUME_STATE).read_text())
    (moved / RESUME_STATE).write_text(json.dumps(said | {"step": 2}))
    shutil.rmtree(tmp_path / "run" / "step_00000004")
    with pytest.raises(ArgonneError, match=r"holds a different run \(resume_state.step: 3 -> 2\)"):
        pretrain(replace(asked, model=replace(asked.model, init_from=moved)))


def said(**fields: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        value = json.loads(path.read_text())
        value["data_position"] |= fields.pop("data_position", {})
        path.write_text(json.dumps(value | fields))

    return change


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (Path.unlink, r"holds no resume_state.json; legal: what convert.py FILE DIR --resume-state makes"),
    "no JSON": (lambda path: path.write_text("{"), "resume_state.json' cannot be used: "),
    "a list": (lambda path: path.write_text("[]"), "cannot be used: it is not a JSON object"),
    "no step": (lambda path: path.write_text("{}"), "it lacks step"),
    "another name": (said(loss=1.0), "loss is not known; legal: step, tokens, data_position"),
    "the last step": (said(step=6), r"total_steps=6 is not past step 6, of resume_state.json; legal: more than 6"),
    "a negative step": (said(step=-1), "step=-1 is not legal; legal: 0 or more"),
    "a step in words": (said(step="3"), "step='3' is not legal; legal: a whole number"),
    "tokens that are no number": (said(tokens=float("nan")), "tokens=nan is not legal"),
    "a place in words": (lambda path: path.write_text('{"step": 1, "data_position": "x"}'), "data_position='x'"),
    "a place without a row": (
        lambda path: path.write_text('{"step": 1, "data_position": {"shard": 1}}'),
        "it lacks data_position.row",
    ),
    "a negative row": (said(data_position={"row": -1}), r"data_position.row=-1 is not legal"),
    "past the shards": (said(data_position={"shard": 6}), "has data_position.shard=6, past the 6 shards of data_glob"),
    "past the rows": (said(data_position={"row": 4}), r"data_position.row=4, past the 4 rows of .*part-1.parquet"),
    "other shards": (
        said(data_position={"files": ["x.parquet"]}),
        "shard=1, here part-1.parquet, which is none of those that it names; legal: the shards of the run before",
    ),
    "a shard too few": (
        said(data_position={"files": ["part-1.parquet", "part-2.parquet"]}),
        "here part-1.parquet, which is before part-2.parquet, which the run had begun too",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gone_on_from_is_refused_in_one_line(
    wholes: Callable[[int, int], RunConfig], origin: Path, tmp_path: Path, name: str
) -> None:
    change, message = REFUSED[name]
    change(shutil.copytree(origin, tmp_path / "origin") / RESUME_STATE)
    with pytest.raises(ArgonneError, match=message) as refusal:
        begin(going_on(wholes(2, 3), tmp_path / "origin", tmp_path / "run"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_what_has_no_meaning_with_it_is_refused_in_one_line(
    wholes: Callable[[int, int], RunConfig], origin: Path, tmp_path: Path
) -> None:
    asked = going_on(wholes(2, 3), origin, tmp_path / "run")
    glob = asked.data.data_glob
    assert glob is not None
    wrong = {
        r"stop_at_step=3 is not past step 3": replace(asked, run=replace(asked.run, stop_at_step=3)),
        r"which streaming=False shuffles; legal: no --no-streaming, or the file without its data_position": replace(
            asked, data=replace(asked.data, streaming=False)
        ),
        r"a place in one corpus, and data_glob names 2; legal: one": replace(
            asked, data=replace(asked.data, data_glob=(f"{glob[0]}:0.5", f"{glob[0]}:0.5"))
        ),
        r"resume_state=True has no effect without --init-from": replace(
            asked, model=replace(wholes(2, 3).model, resume_state=True), given=frozenset({"resume_state"})
        ),
    }
    for message, config in wrong.items():
        with pytest.raises(ArgonneError, match=message) as refusal:
            check(config, 1)
        assert "\n" not in str(refusal.value)
