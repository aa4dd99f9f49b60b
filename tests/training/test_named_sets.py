"""Named held-out sets: their words, their text, what is measured of them at any layout, and when."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.checkpoint import checkpoints
from argonne.data import DataError, encode, open_shards, train_tokenizer
from argonne.data.tokens.filters import FILTERS
from argonne.models import ArgonneModel, CrossEntropyLoss, Execution, build_replicas
from argonne.parallel import Layout, PipelinePlan, ProcessGroups, initialise
from argonne.parallel.errors import ArgonneError
from argonne.training import report
from argonne.training.config import DataFlags
from argonne.training.eval_globs import absolute, named_globs
from argonne.training.metrics import MetricsLog, Progress
from argonne.training.named_sets import NamedSet, NamedSets, announced, predicted_bytes, read_named
from argonne.training.plot import plot_loss
from argonne.training.run.corpora import Corpora
from tests.integration.runs import metrics
from tests.pool import RankPool
from tests.training.settled import SmallRun
from tests.training.test_evaluation import CONFIG, DOUBLE, held_out
from tests.training.test_metrics import record

ALONE = ProcessGroups.single()


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ((), "eval='' is not legal"),
        (("wiki",), "eval='wiki' is not legal; legal: NAME=GLOB"),
        (("=a",), "eval='=a' is not legal"),
        (("wiki=",), "eval='wiki=' is not legal"),
        (("a b=c",), "eval='a b=c' is not legal"),
        ((".a=c",), "eval='.a=c' is not legal"),
        (("a" * 33 + "=c",), "is not legal"),
        (("a=b", "a=c"), "eval='a=c' has the name of a=b; legal: a name of its own each"),
    ],
)
def test_a_word_that_names_no_set_is_refused(words: tuple[str, ...], refusal: str) -> None:
    with pytest.raises(ArgonneError, match=re.escape(refusal)):
        named_globs(words)


def test_globs_hold_from_any_directory() -> None:
    home = str(Path("~").expanduser())
    assert named_globs(["a=x=y", "b=~/c"]) == {"a": "x=y", "b": f"{home}/c"}
    assert absolute(["a=x", "b=s3://y/z"]) == [f"a={Path.cwd()}/x", "b=s3://y/z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text twice, as Parquet and as JSON lines, and a text that is too short."""
    folder = tmp_path_factory.mktemp("named")
    texts = [f"row {number} of a text that is held out, with enough words in it" for number in range(30)]
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (folder / "short.jsonl").write_text(json.dumps({"text": texts[0]}), encoding="utf-8")
    return folder


def test_a_set_that_cannot_be_used_is_refused_by_its_name_and_one_that_is_trained_on_is_told(folder: Path) -> None:
    def opened(*words: str) -> Corpora:
        return Corpora.open(DataFlags((f"{folder}/*",), eval=words, block_size=16), seed=0)

    with pytest.raises(DataError, match=rf"^eval='none={folder}/none': no data shards match"):
        opened(f"none={folder}/none")
    (line,) = opened(f"mine={folder}/*.jsonl").trained_on
    assert line == "note: eval mine has text that is trained on: b.jsonl and 1 more is of --data-glob too"
    tokenizer = train_tokenizer(["some words and more of them"] * 9)
    globs = {"short": f"{folder}/short.jsonl"}
    shards = {"short": open_shards([folder / "short.jsonl"])}
    with pytest.raises(ArgonneError, match=r"^eval='short=.*short.jsonl': the held-out text has fewer than .*=1001 "):
        read_named(shards, globs, tokenizer, 1000, None, 4, ALONE)


@pytest.mark.parametrize("boundary", [None, (1, 2)])
def test_the_bytes_of_a_set_are_those_of_the_tokens_that_are_predicted(folder: Path, boundary) -> None:
    rows = pq.read_table(folder / "a.parquet")["text"].to_pylist()
    tokenizer = train_tokenizer(rows, 300)
    first, last = ([], []) if boundary is None else ([0], [0])
    lengths = []
    for ids in encode(tokenizer, rows):
        assert ids is not None
        lengths += [*first, *map(len, tokenizer.convert_ids_to_tokens(ids.tolist())), *last]
    for count, length in ((1, 10), (4, 37), (len(lengths) // 20, 20)):
        expected = sum(sum(lengths[at + 1 : at + length]) for at in range(0, count * length, length))
        for name in ("a.parquet", "b.jsonl"):
            shards = open_shards([folder / name])
            assert predicted_bytes(shards, tokenizer, (count, length), boundary, FILTERS) == expected
    sets = read_named({"b": shards}, {"b": ""}, tokenizer, 19, boundary, 10**4, ALONE)
    assert (sets["b"].tokens, sets["b"].bytes) == (len(lengths) // 20 * 19, expected)
    assert announced(sets, 7)[0].startswith(f"eval b: {len(lengths) // 20} sequences, {sets['b'].tokens:,} tokens, ")


def measured(groups: ProcessGroups, kind: str) -> dict[str, dict[str, float]]:
    plan = PipelinePlan.of("1f1b", groups.layout.pipeline)
    build = partial(ArgonneModel, CONFIG)
    model, replicas = build_replicas(build, Execution(groups, DOUBLE, plan=plan), kind)  # type: ignore[arg-type]
    initialise(replicas.parameters, seed=3)
    replicas.publish()
    sets = NamedSets({"one": NamedSet(held_out(5), 300), "two": NamedSet(held_out(2), 70)}, 3, 10)
    return sets.measure(model, 2, CrossEntropyLoss(), True)[0]


def test_what_is_measured_is_the_same_at_every_layout(ranks: RankPool) -> None:
    (alone,) = ranks.run(Layout(), measured, "replicate")
    assert alone["one"]["bits_per_byte"] == pytest.approx(alone["one"]["loss"] * 5 * 16 / 300 / math.log(2))
    for layout in (Layout(tensor=2), Layout(data=2), Layout(pipeline=2)):
        for rank, found in enumerate(ranks.run(layout, measured, "replicate")):
            for name, expected in alone.items():
                assert found[name] == pytest.approx(expected, rel=1e-12), f"rank {rank} of {layout}, {name}"


def test_sets_are_measured_at_their_own_interval_and_alike_where_a_run_goes_on(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "plot_loss", lambda *what: False)
    run = SmallRun(small.config, replace(small.workload, named={"web": NamedSet(held_out(3) % 200, 120)}))
    undisturbed = run.configured(tmp_path / "one", {}, eval_interval=3)
    run.trainer(undisturbed, ALONE).run()
    lines = metrics(tmp_path / "one")
    assert [line["step"] for line in lines if line["eval"]] == [3, 5]
    assert set(lines[2]["eval"]["web"]) == {"loss", "bits_per_byte"}
    told = capsys.readouterr().out
    assert told.count("eval: training waits ") == 1
    assert f"(web {lines[2]['eval']['web']['loss']:.4f}, {lines[2]['eval']['web']['bits_per_byte']:.4f} b/B)" in told
    # Stopped where no set is due, and what was told past the checkpoint is told again.
    stopped = run.configured(tmp_path / "two", {}, eval_interval=3, stop_at_step=4)
    run.trainer(stopped, ALONE).run()
    again = run.configured(tmp_path / "two", {}, eval_interval=3)
    trainer = run.trainer(again, ALONE, checkpoints(tmp_path / "two")[0])
    assert trainer.state.step == 2
    trainer.reports.drop_after(2)
    trainer.run()
    assert [line["eval"] for line in metrics(tmp_path / "two")] == [line["eval"] for line in lines]


def test_the_plot_and_the_live_line_tell_of_each_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, progress = MetricsLog(tmp_path / "metrics.jsonl"), Progress(0, 3, 1)
    for step in range(1, 4):
        found = {"web": {"loss": 3.0 / step, "bits_per_byte": math.nan if step == 2 else 1.0 / step}}
        line = record(step, eval=None if step == 3 else found)
        log.write(line)
        progress.step(line)
    progress.close()
    said = capsys.readouterr().out.splitlines()
    assert ["(web 1.5000, nan b/B)" in each for each in said] == [False, True, True]
    loss, bits = log.named["web"]
    assert loss.points == [(12_345, 3.0), (24_690, 1.5)]
    assert bits.points == [(12_345, 1.0)]
    again = MetricsLog(tmp_path / "metrics.jsonl")
    log.file.append("")
    again.drop_after(1)
    assert again.named["web"][0].points == loss.points[:1]
    pytest.importorskip("matplotlib")
    assert plot_loss(log.training.points, [], tmp_path / "a.png", "a run", {"web": (loss.points, bits.points)})
