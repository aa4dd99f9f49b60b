"""Conversations: which of their tokens are trained, which rows are dropped, and how they come in sequences."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from argonne.data import DataError, find_shards, open_shards
from argonne.data.chat import packing
from argonne.data.chat.packing import ConversationReader, ConversationStream, count_pass, first_fit
from argonne.data.chat.rows import CONVERSATION
from argonne.data.chat.tokens import ChatEncoder
from argonne.data.lanes.packing import Packed
from argonne.data.lanes.plan import LanePlan
from argonne.data.lanes.state import LaneState
from tests.data import chats
from tests.data.chats import CHATML_TOKENS, Piece, Turn, byte_level, messages, sentence_piece, write_chats
from tests.qwen import qwen

TURNS: list[Turn] = [
    ("user", "Who are you?"),
    ("assistant", "A small model."),
    ("user", "Why?"),
    ("assistant", "Nobody knows, alas."),
]
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


def expected(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Ids and weights of pieces of which each is tokenised alone: they meet where no tokenizer joins characters."""
    ids, weights = [], []
    for text, said in pieces:
        own = tokenizer.encode(text, add_special_tokens=False)
        ids += own
        weights += [int(said)] * len(own)
    return ids, weights


CASES = {
    "qwen2.5": (lambda: with_template(qwen(), chats.QWEN), lambda turns: chats.chatml(turns, QWEN)),
    "smollm2": (lambda: byte_level(chats.SMOLLM2, *CHATML_TOKENS), lambda turns: chats.chatml(turns, SMOLLM)),
    "llama3": (lambda: byte_level(chats.LLAMA3, *HEADERS), chats.llama3),
    "mistral": (lambda: sentence_piece(chats.MISTRAL), chats.mistral),
    "zephyr": (lambda: byte_level(chats.ZEPHYR, *ROLES), chats.zephyr),
    "phi3": (lambda: byte_level(chats.PHI3, *ROLES, "<|end|>"), chats.phi3),
    "marked": (lambda: byte_level(chats.MARKED, *CHATML_TOKENS), lambda turns: chats.chatml(turns, None)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("system", [False, True], ids=["plain", "system"])
def test_what_is_trained_is_what_the_assistant_says_and_the_marker_behind_it(name: str, system: bool) -> None:
    tokenizer, pieces = CASES[name][0](), CASES[name][1]
    encoder = ChatEncoder(tokenizer, 1000)
    turns = [("system", "You are brief."), *TURNS] if system else TURNS
    (found,) = encoder([messages(*turns)])
    if name == "mistral" and system:
        assert found == "role"
        return
    assert not isinstance(found, str), found
    assert (found[0].tolist(), found[1].tolist()) == expected(tokenizer, pieces(turns))
    others = {"llama3": "<|eot_id|>", "mistral": "</s>", "zephyr": "<|end_of_text|>", "phi3": "<|end|>"}
    assert encoder.template.ending == others.get(name, "<|im_end|>")
    # A prompt is not trained, whoever speaks in it.
    prompt, completion = messages(*turns[:-1])["messages"], messages(turns[-1])["messages"]
    (last,) = encoder([{"prompt": prompt, "completion": completion}])
    wanted = pieces(turns)
    said = [number for number, (_, is_said) in enumerate(wanted) if is_said]
    wanted = [(text, number in said[-2:]) for number, (text, _) in enumerate(wanted)]
    assert (last[0].tolist(), last[1].tolist()) == expected(tokenizer, wanted), "only the completion is trained"


def test_a_marker_that_only_ends_a_conversation_is_left_out_whole() -> None:
    """It begins as the next question does, and not as the answer to it."""
    closed = (
        "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
        "' ' + m['content'] }}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    tokenizer = sentence_piece(closed)
    (found,) = ChatEncoder(tokenizer, 1000)([messages(*TURNS)])
    assert not isinstance(found, str), found
    (_, one), (_, two), (_, three), (_, four) = TURNS
    pieces = [("<s>", False), (f"[INST] {one} [/INST]", False), (f" {two}", True), ("<s>", False)]
    pieces += [(f"[INST] {three} [/INST]", False), (f" {four}", True), ("</s>", True)]
    assert (found[0].tolist(), found[1].tolist()) == expected(tokenizer, pieces)


def test_rows_that_cannot_be_used_are_dropped_for_a_reason() -> None:
    encoder = ChatEncoder(byte_level(chats.ZEPHYR, *ROLES), 40)
    rows: dict[str, list[Any]] = {
        "broken_json": [None, {"messages": "[{"}],
        "malformed": [{"messages": 3}, {"prompt": "a"}, {"messages": [{"role": "user"}]}, {"messages": [1]}, 7],
        "no_assistant": [messages(("user", "Why?")), {"messages": []}],
        "role": [messages(("robot", "Why?"), ("assistant", "Yes"))],
        "too_long": [messages(("user", "Why?"), ("assistant", "Nobody knows " * 30))],
    }
    for reason, given in rows.items():
        assert encoder(given) == [reason] * len(given), reason
    last = ChatEncoder(byte_level(chats.LAST_ONLY, *CHATML_TOKENS), 100)
    assert last([messages(*TURNS)]) == ["unstable"]
    assert not isinstance(last([messages(*TURNS[:2])])[0], str)
    cut = ChatEncoder(byte_level(chats.ZEPHYR, *ROLES), 40, "truncate")
    (short,) = cut(rows["too_long"])
    assert not isinstance(short, str)
    assert short.shape == (2, 40)
    long_question = messages(("user", "Nobody knows " * 30), ("assistant", "Yes"))
    assert cut([long_question]) == ["too_long"], "nothing of the answer is left"
    assert not isinstance(cut([{"messages": json.dumps(messages(*TURNS[:2])["messages"])}])[0], str)


def test_a_template_that_is_no_use_is_refused() -> None:
    for template, line in (
        (None, "the tokenizer has no chat template; legal: one, or --chat-template FILE"),
        ("{% for", "the chat template cannot be applied: "),
        ("{{ messages | length }}", "the chat template does not show what the assistant says"),
    ):
        tokenizer = byte_level(chats.ZEPHYR, "<|other|>")
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=line.replace("|", r"\|")):
            ChatEncoder(tokenizer, 10)


BLOCK = 30


def corpus(directory: Path, rows: int, seed: int = 3) -> list[dict[str, Any]]:
    """Rows of all lengths, a fifth of them of no use; in row groups of five."""
    draw = random.Random(seed)
    found = []
    for number in range(rows):
        answer = " ".join(draw.choices(chats.WORDS.split(), k=draw.choice([1, 2, 5, 9, 40])))
        found.append({"prompt": f"{number}?", "completion": answer} if draw.random() > 0.1 else {"prompt": "x"})
    for shard in range(2):
        write_chats(directory / f"part-{shard}.parquet", found[shard * rows // 2 : (shard + 1) * rows // 2])
    return found


def stream(directory: Path, lanes: int, states: list[LaneState] | None = None) -> ConversationStream:
    return ConversationStream(reader(directory, lanes), BLOCK, range(lanes), 3, states)


def reader(directory: Path, lanes: int) -> ConversationReader:
    shards = open_shards(find_shards([f"{directory}/*.parquet"]), column=CONVERSATION)
    encoder = ChatEncoder(byte_level(chats.ZEPHYR, *ROLES), BLOCK + 1)
    return ConversationReader(shards, LanePlan(shards, lanes), encoder)


def whole(packed: Packed) -> list[list[int]]:
    """The ids of each conversation of a sequence; what is behind them weighs nothing."""
    assert packed.weights is not None
    last = packed.documents.max()
    ids = [packed.tokens[packed.documents == number].tolist() for number in range(last + 1)]
    if set(ids[-1]) == {3}:
        assert not packed.weights[packed.documents == last].any()
        ids.pop()
    return ids


@pytest.mark.parametrize(("rows", "lanes"), [(60, 1), (60, 3), (7, 4)])
def test_each_pass_has_each_conversation_once_and_whole(
    tmp_path: Path, rows: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "GROUP", 3)
    read = corpus(tmp_path, rows)
    encoder = ChatEncoder(byte_level(chats.ZEPHYR, *ROLES), BLOCK + 1)
    usable = sorted(each[0].tolist() for each in encoder(read) if not isinstance(each, str))
    found: list[list[int]] = []
    sequences = 0
    lane_stream = stream(tmp_path, lanes)
    for lane in range(lanes):
        in_lane = sum(not isinstance(each, str) for each in reader(tmp_path, lanes).one_pass(lane))
        while lane_stream.state(lane).documents < in_lane:
            of_sequence = whole(lane_stream.next_sequence(lane))
            found += of_sequence
            sequences += 1
    assert sorted(found) == usable
    counted = count_pass(reader(tmp_path, lanes), BLOCK + 1)
    assert (counted.rows, counted.sequences, counted.tokens) == (rows, sequences, sum(map(len, usable)))
    assert sum(counted.dropped.values()) == rows - len(usable)
    assert set(counted.dropped) <= {"malformed", "too_long"}
    assert counted.tokens / (sequences * (BLOCK + 1)) > 0.5


def test_a_lane_goes_on_exactly_from_any_of_its_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "GROUP", 3)
    corpus(tmp_path, 60)
    undisturbed, wanted, states = stream(tmp_path, 2), [], []
    for _ in range(20):
        states.append([undisturbed.state(lane) for lane in range(2)])
        wanted.append([undisturbed.next_sequence(lane) for lane in range(2)])
    states.append([undisturbed.state(lane) for lane in range(2)])
    assert states[-1][0].position.epoch > 0
    assert sum(states[-1][0].dropped.values()) > 0
    for step in range(0, 20, 3):
        saved = [LaneState.from_dict(json.loads(json.dumps(state.to_dict()))) for state in states[step]]
        continued = stream(tmp_path, 2, saved)
        for after in range(step, 20):
            for lane in range(2):
                packed = continued.next_sequence(lane)
                for name in ("tokens", "documents", "weights"):
                    assert np.array_equal(getattr(packed, name), getattr(wanted[after][lane], name)), (step, after)
        assert [continued.state(lane) for lane in range(2)] == states[-1]


def test_first_fit_puts_each_where_there_is_room_first() -> None:
    assert first_fit([6, 5, 4, 5, 10, 1], 10) == [[0, 2], [1, 3], [4], [5]]
    assert first_fit([], 10) == []


def test_a_file_without_conversations_is_refused(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "x.parquet", [{"text": "a"}])
    with pytest.raises(DataError, match="none of the columns 'messages', 'prompt', 'completion'; its columns: text"):
        open_shards([path], column=CONVERSATION)
