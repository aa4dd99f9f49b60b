"""Prompts from files and standard input, chats, and what the driver refuses in one line."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.inference import Sampling
from argonne.inference.prompts import STANDARD_INPUT, encoded, encoded_chat, read_prompts, require_chat_template
from argonne.inference.writer import Writer
from argonne.launch import parse
from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.parallel import ArgonneError, ProcessGroups
from examples import generate
from tests.inference.test_text import TOKENIZER, byte_level


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\n two \nthree", ["one", " two ", "three"]),
        ("a.txt", '{"prompt": "a\\nb"}\n{"prompt": "c", "id": 3}\n', ["a\nb", "c"]),
        ("a.jsonl", '{"prompt": "a"}', ["a"]),
        ("a.txt", '{"text": "a"}\nb', ['{"text": "a"}', "b"]),
        ("a.txt", "12\nnull", ["12", "null"]),
        ("a.txt", "été\r\nb\r\n", ["été", "b"]),
    ],
)
def test_a_file_has_a_prompt_a_line_as_text_or_as_json(
    name: str, text: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == expected
    if name == "a.txt":
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        assert read_prompts(STANDARD_INPUT) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompts; legal: at least one line"),
        (b" \n\n", "has no prompts; legal: at least one line"),
        (b"\xff\xfe", "cannot be read: .*; legal: a text file in UTF-8"),
        (b'{"prompt": "a"}\nb', "line 2 of prompt_file=.* is 'b'; legal: a JSON object with a prompt"),
        (b'{"prompt": "a"}\n{"prompt": ""}', "line 2 of prompt_file=.*; legal: a JSON object with a prompt"),
        (b'{"prompt": "a"}\n{"prompt": 3}', "line 2 of prompt_file=.*; legal: a JSON object with a prompt"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "p").write_bytes(content)
    with pytest.raises(ArgonneError, match=f"prompt_file=.*{message}" if "line 2" not in message else message):
        read_prompts(tmp_path / "p")


CHATTY = byte_level()
CHATTY.chat_template = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def test_a_chat_is_written_as_its_template_says_or_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert TOKENIZER.decode(encoded_chat(CHATTY, turns)) == "ux\nab\nuc\na"
    require_chat_template(CHATTY, tmp_path)
    with pytest.raises(ArgonneError, match="chat=True needs a chat template, and the tokenizer of .* has none"):
        require_chat_template(TOKENIZER, tmp_path)
    broken = byte_level()
    broken.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ArgonneError, match="the chat template cannot be applied: no"):
        encoded_chat(broken, turns)
    with pytest.raises(ArgonneError, match="prompt='' has no tokens; legal: a text of at least one"):
        encoded(TOKENIZER, "")


def writer(**options: Any) -> Writer:
    config = ArgonneConfig(8, 2, 2, 1, len(TOKENIZER), 12, max_position_embeddings=64, initializer_range=0.5)
    model = ArgonneModel(config, Execution(ProcessGroups.single()))
    model.initialise(seed=4)
    return Writer(model, CHATTY, Sampling(max_new_tokens=12, temperature=2.0, top_k=0, top_p=1.0), 1, (), **options)


def test_streamed_text_is_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    writer().write(["ab c"], batch=1)
    whole = capsys.readouterr()
    writer().write(["ab c"], batch=1, stream=True)
    assert capsys.readouterr() == whole
    assert whole.out.startswith("ab c")
    assert whole.err.startswith("cache: 0.000 GiB on this rank, 1 x 14 positions, 2 layers of 1 key-value heads")


def test_batches_print_the_texts_of_one_by_one_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    writer().write(["ab", "c x c x", "a"], batch=2)
    together = capsys.readouterr().out
    writer().write(["ab", "c x c x", "a"], batch=1)
    assert capsys.readouterr().out == together


def test_a_conversation_remembers_its_turns(capsys: pytest.CaptureFixture[str]) -> None:
    writer(chat=True).converse(["x", "b"])
    first, second = capsys.readouterr().out, writer(chat=True)
    ids = second._ids([{"role": "user", "content": "x"}])
    answer = second._continue([ids], 0, None)[0]
    assert first.startswith(answer + "\n")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    ids = second._ids([*turns, {"role": "user", "content": "b"}])
    assert first == answer + "\n" + second._continue([ids], 1, None)[0] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-batch", "0"], "max_batch=0 is not legal; legal: 1 or more"),
        (["--stop", "a", ""], "stop='' ends every text before it begins"),
        (["--prompt-file", "p", "--prompt", "a"], "prompt_file='p' conflicts with --prompt; legal: one of them"),
        (["--prompt-file", "nowhere"], "prompt_file='nowhere' cannot be read"),
        (["--stream", "--prompt", "a", "b"], "stream=True prints one text as it is written"),
        (["--stream", "--prompt-file", "-"], "stream=True prints one text as it is written"),
        (["--seed", "-1"], "seed=-1 is not legal"),
    ],
)
def test_the_driver_refuses_in_one_line(words: list[str], message: str) -> None:
    config = parse(generate.GenerateConfig, ["--checkpoint-path", "x", *words])
    with pytest.raises(ArgonneError, match=message):
        generate.check(config, 1)


def test_prompts_are_typed_where_none_are_named_and_somebody_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(terminal: bool, *words: str) -> bool:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: terminal))
        return generate.in_session(parse(generate.GenerateConfig, ["--checkpoint-path", "x", *words]))

    assert typed(True)
    assert typed(True, "--prompt-file", "-")
    assert typed(True, "--stream", "--chat")
    assert not typed(True, "--prompt", "a")
    assert not typed(True, "--prompt-file", "p")
    assert not typed(False)
    assert not typed(False, "--prompt-file", "-")
