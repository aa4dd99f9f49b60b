"""Instruction tuning is pretraining with another source of batches: its steps, what it keeps, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from argonne.launch import parse
from argonne.parallel import ArgonneError
from argonne.training.run.checks import check
from argonne.training.run.resume import check_resume, parse_resume, resume
from argonne.training.run.workflow import pretrain
from argonne.training.tuning.config import TuneConfig
from tests.data import chats
from tests.data.chats import CHATML_TOKENS, byte_level, write_chats
from tests.integration.runs import history, metrics, weights, words_of

NAMES = [f"{first}{last}" for first in ("Ba", "Do", "Li", "Mu") for last in ("rin", "sel", "tok", "vana", "xi")]


def write_model(directory: Path) -> Path:
    """A tiny Llama without a chat template, whose tokenizer has the tokens of one."""
    torch.manual_seed(2)
    tokenizer = byte_level("", *CHATML_TOKENS)
    tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def flags(home: Path, directory: str, **others: Any) -> list[str]:
    """The words of a command that tunes the model of ``home``."""
    return words_of(flags_by_name(home, directory, **others))


def flags_by_name(home: Path, directory: str, **others: Any) -> dict[str, Any]:
    """The same flags as ``words_of`` takes them; True stands alone, and None leaves one out."""
    named: dict[str, Any] = {
        "init_from": home / "model",
        "data_glob": home / "chats.parquet",
        "chat_template": home / "chatml.jinja",
        "block_size": 48,
        "initial_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "data_lanes": 2,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "save_interval": 3,
        "sample_tokens": 2,
        "output_dir": home / directory,
        **others,
    }
    said = {f"--{name.replace('_', '-')}": value for name, value in named.items() if value is not None}
    return {name: None if value is True else value for name, value in said.items()}


def write_home(home: Path) -> Path:
    """A model, rows of which two are of no use, and a template."""
    write_model(home / "model")
    rows: list[dict[str, Any]] = [{"prompt": f"Who is {name}?", "completion": f"A {name[2:]}."} for name in NAMES]
    rows[3:3] = [{"prompt": "Who?", "completion": None}, {"prompt": "Who?", "completion": "No. " * 60}]
    write_chats(home / "chats.parquet", rows)
    (home / "chatml.jinja").write_text(chats.CHATML, encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(scope="module")
def tuned(home: Path) -> Path:
    """Two passes, saved at each third step."""
    assert pretrain(parse(TuneConfig, flags(home, "tuned", epochs=2))) == 0
    return home / "tuned"


def test_the_steps_are_as_many_as_the_passes_have_sequences_for(tuned: Path, home: Path) -> None:
    lines = metrics(tuned)
    saved = json.loads((tuned / "run.json").read_text())
    sequences = saved["identity"]["data"]["sequences"]
    assert len(lines) == -(-2 * sequences // 4) == saved["identity"]["schedule"]["total_steps"]
    assert sum(line["trained_tokens"] for line in lines) < sum(4 * 48 for _ in lines) / 3
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    stats = json.loads(sorted((tuned / "stats").glob("*.json"))[-1].read_text())
    assert {"malformed", "too_long"} == set(stats["documents_dropped"]), stats


def test_a_run_that_stopped_goes_on_to_the_same_bits(
    tuned: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stop in (2, 4, None):
        assert pretrain(parse(TuneConfig, flags(home, "stopped", epochs=2, stop_at_step=stop))) == 0
    assert history(home / "stopped") == history(tuned)
    assert weights(home / "stopped") == weights(tuned)
    assert capsys.readouterr().out.count(" conversations of ") == 1, "rows are counted once"
    with pytest.raises(ArgonneError, match=r"holds a different run.*total_steps: "):
        pretrain(parse(TuneConfig, flags(home, "stopped", epochs=3)))
    (home / "other.jinja").write_text(chats.SMOLLM2, encoding="utf-8")
    with pytest.raises(ArgonneError, match=r"holds a different run.*tokenizer.chat_template: "):
        pretrain(parse(TuneConfig, flags(home, "stopped", epochs=2, chat_template=home / "other.jinja")))


def test_the_checkpoint_has_the_template_and_what_ends_a_turn(tuned: Path, home: Path) -> None:
    newest = sorted(tuned.glob("step_????????"))[-1]
    tokenizer = AutoTokenizer.from_pretrained(newest)
    template = (home / "chatml.jinja").read_text(encoding="utf-8")
    assert tokenizer.chat_template == template
    assert json.loads((newest / "tokenizer_config.json").read_text())["chat_template"] == template
    generation = json.loads((newest / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert LlamaForCausalLM.from_pretrained(newest).config.hidden_size == 24


def test_a_resume_of_a_tuned_run_is_told_what_tuning_is(tuned: Path, home: Path) -> None:
    path = ["--checkpoint-path", str(tuned)]
    (home / "resume.json").write_text(json.dumps({"checkpoint-path": str(tuned), "learning_rate": 5e-4}))
    for words in (path, [f"--checkpoint_path={tuned}"], ["--config", str(home / "resume.json")]):
        config = parse_resume([*words, "--total-steps", "50", "--eval", f"own={home}/chats.parquet"])
        check_resume(config, 1)
        assert isinstance(config, TuneConfig)
        assert (config.data.block_size, config.training.total_steps) == (48, 50)
        assert config.data.chat_template == home / "chatml.jinja"
        assert config.run.output_dir == tuned
    assert config.training.learning_rate == 5e-4
    (home / "chatml.jinja").rename(home / "away.jinja")
    gone = parse_resume(path)
    (home / "away.jinja").rename(home / "chatml.jinja")
    assert gone.data.chat_template == sorted(tuned.glob("step_????????"))[-1] / "chat_template.jinja"
    for words, line in (
        (["--epochs", "3"], "epochs=3 is not for a run that has its steps; legal: --total-steps, or leave it out"),
        (["--text-column", "body"], "--text-column"),
        (["--alpha", "0.5"], "--alpha"),
        (["--block-size", "32", "--too-long", "split"], "--too-long"),
    ):
        with pytest.raises(ArgonneError) as refused:
            check_resume(parse_resume([*path, *words]), 1)
        assert line in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ArgonneError, match=r"holds a different run .*data.too_long: drop -> truncate"):
        resume(parse_resume([*path, "--total-steps", "50", "--too-long", "truncate"]))


def test_the_loss_on_held_out_conversations_is_that_of_each_of_them_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"Who is {name}?", "Nobody. " * number) for number, name in enumerate(("Ba", "Do", "Mi"), start=1)]
    held = write_chats(home / "held.parquet", [{"prompt": one, "completion": other} for one, other in rows])
    several = {"total_steps": 5, "eval_interval": 2, "eval": [f"held={held}", f"own={home}/chats.parquet"]}
    stopped = {**several, "eval": f"held={held}", "stop_at_step": 3}
    for asked in (stopped, several):
        assert pretrain(parse(TuneConfig, flags(home, "measured", **asked))) == 0
    told = capsys.readouterr().out
    assert "eval held: 3 conversations of 3 rows (dropped: none)" in told
    assert "changed from here on: eval.own: null -> " in told
    assert "note: eval own has text that is trained on: chats.parquet" in told
    lines = metrics(home / "measured")
    assert [sorted(line["eval"] or ()) for line in lines] == [[], ["held"], [], ["held", "own"], ["held", "own"]]
    loss = lines[-1]["eval"]["held"]["loss"]
    assert f" (held {loss:.4f}; own " in told

    model = LlamaForCausalLM.from_pretrained(home / "measured" / "step_00000005")
    tokenizer = AutoTokenizer.from_pretrained(home / "measured" / "step_00000005")
    total, count = 0.0, 0
    for prompt, completion in rows:
        asked = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        before, said = (tokenizer.encode(text) for text in (asked, f"{completion}<|im_end|>"))
        with torch.no_grad():
            scores = model(torch.tensor([[*before, *said]])).logits[0].double().log_softmax(-1)
        total -= sum(scores[len(before) - 1 + place, token].item() for place, token in enumerate(said))
        count += len(said)
    assert lines[-1]["eval"]["held"] == {"loss": pytest.approx(total / count, rel=1e-5), "bits_per_byte": None}


REFUSED = {
    "no model": ({"init_from": None}, "init_from=None is not legal; legal: the directory of the model that is tuned"),
    "no data": ({"data_glob": None}, "data_glob=None is not legal"),
    "glob": ({"data_glob": "nowhere/*.parquet"}, "no data shards match nowhere"),
    "template": ({"chat_template": "nowhere.jinja"}, "chat_template='nowhere.jinja' cannot be read"),
    "epochs": ({"epochs": 0}, "epochs=0 is not legal; legal: 1 or more"),
    "both": ({"epochs": 2, "total_steps": 5}, "epochs=2 conflicts with total_steps=5; legal: one of them"),
    "too long": ({"too_long": "split"}, "--too-long"),
    "eval": ({"eval": "held"}, "eval='held' is not legal; legal: NAME=GLOB"),
    "eval glob": ({"eval": "held=nowhere/*"}, "eval='held=nowhere/*': no data shards match nowhere"),
    "eval alone": ({"eval_interval": 3}, "eval_interval=3 has no effect without --eval; legal: --eval too"),
    "texts": ({"text_column": "body"}, "--text-column"),
    "window": ({"block_size": 65}, "block_size=65 is more than the model of init_from="),
    "weights": ({"data_glob": ["a:0.5", "b:0.5"]}, "has weights, with which no number of passes"),
    "step": ({"resume_state": True}, "resume_state=True is not for tuning"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line_before_any_process_is_started(home: Path, name: str) -> None:
    changed, line = REFUSED[name]
    with pytest.raises(ArgonneError) as refused:
        check(parse(TuneConfig, flags(home, "never", **changed)), 1)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (home / "never").exists()


LATER = {
    "no template": ({"chat_template": None}, "the tokenizer has no chat template; legal: one, or --chat-template FILE"),
    "bad template": ({"chat_template": "bad.jinja"}, "the chat template cannot be applied: "),
    "no rows": ({"data_glob": "useless.parquet"}, "no usable documents in the data; rows dropped: no_assistant"),
}


@pytest.mark.parametrize("name", LATER)
def test_what_a_tokenizer_cannot_write_is_refused_before_anything_is_made(home: Path, name: str) -> None:
    (home / "bad.jinja").write_text("{% for", encoding="utf-8")
    write_chats(home / "useless.parquet", [chats.messages(("user", "Who?"))])
    changed, line = LATER[name]
    changed = {each: value and home / value for each, value in changed.items()}
    with pytest.raises(ArgonneError) as refused:
        pretrain(parse(TuneConfig, flags(home, "never", **changed)))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (home / "never").exists()


def test_a_configuration_file_cannot_say_what_belongs_to_texts(home: Path) -> None:
    config = parse(TuneConfig, flags(home, "never"))
    for name in config.data.of_texts:
        assert getattr(config.data, name) == type(config.data).__dataclass_fields__[name].default
    with pytest.raises(ArgonneError, match="streaming=False is not for conversations; legal: True"):
        replace(config, data=replace(config.data, streaming=False)).check()
    assert {each.name for each in dataclasses.fields(config.data)} >= {*config.data.of_texts}
