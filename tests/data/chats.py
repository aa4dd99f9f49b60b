"""Chat templates, each beside what it writes, said in Python; and small tokenizers with their special tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from argonne.data import train_tokenizer

Turn = tuple[str, str]
"""Role and content."""
Piece = tuple[str, bool]
"""A text, and whether the assistant is to write it."""

WORDS = "Who are you? A small model. Why? Nobody knows, alas. You are brief. user assistant system Yes, but when?"

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for m in messages %}
{% if m['role'] in ('system', 'user', 'assistant') %}
{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}"
)
LAST_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] != 'assistant' or loop.last %}"
    "{{ m['content'] }}{% else %}(said){% endif %}<|im_end|>\n{% endfor %}"
)


def chatml(turns: Sequence[Turn], system: str | None) -> list[Piece]:
    if turns[0][0] != "system" and system is not None:
        turns = [("system", system), *turns]
    found: list[Piece] = []
    for role, content in turns:
        said = role == "assistant"
        found += [("<|im_start|>", False), (f"{role}\n", False), (content, said), ("<|im_end|>", said), ("\n", False)]
    return found


def llama3(turns: Sequence[Turn]) -> list[Piece]:
    found: list[Piece] = [("<|start_of_text|>", False)]
    for role, content in turns:
        said = role == "assistant"
        found += [("<|start_header_id|>", False), (role, False), ("<|end_header_id|>", False), ("\n\n", False)]
        found += [(content, said), ("<|eot_id|>", said)]
    return found


def zephyr(turns: Sequence[Turn]) -> list[Piece]:
    found: list[Piece] = []
    for role, content in turns:
        said = role == "assistant"
        found += [(f"<|{role}|>", False), ("\n", False), (content, said), ("<|end_of_text|>", said), ("\n", False)]
    return found


def phi3(turns: Sequence[Turn]) -> list[Piece]:
    found: list[Piece] = []
    for role, content in turns:
        said = role == "assistant"
        found += [(f"<|{role}|>", False), ("\n", False), (content, said), ("<|end|>", said), ("\n", False)]
    return [*found, ("<|end_of_text|>", False)]


def mistral(turns: Sequence[Turn]) -> list[Piece]:
    found: list[Piece] = [("<s>", False)]
    for role, content in turns:
        said = role == "assistant"
        found += [(f" {content}", True), ("</s>", True)] if said else [(f"[INST] {content} [/INST]", False)]
    return found


@functools.cache
def byte_level(template: str, *special: str) -> PreTrainedTokenizerFast:
    """A few merges of bytes, and these special tokens."""
    tokenizer = train_tokenizer([WORDS] * 4, vocab_size=330)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def sentence_piece(template: str) -> PreTrainedTokenizerFast:
    """As of Llama 2: a space begins a word's token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["[", "]", "/", "I", "N", "S", "T"]
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def write_chats(path: Path, rows: Sequence[dict[str, Any]], row_group_size: int = 5) -> Path:
    """A Parquet file of such rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size, write_page_checksum=True)
    return path


def messages(*turns: Turn) -> dict[str, Any]:
    """A row of these turns."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


Pieces = Callable[[Sequence[Turn]], list[Piece]]
