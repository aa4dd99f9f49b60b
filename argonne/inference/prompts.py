"""Prompts, wherever they come from: flags, a file, standard input, and as turns of a chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from argonne.parallel.errors import ArgonneError

Message = dict[str, str]
"""``role`` and ``content``."""

STANDARD_INPUT = Path("-")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, or of standard input (``-``): one a line, or JSON lines whose ``prompt`` it is.

    They are JSON lines where the name ends with ``.jsonl``, or the first line is a JSON object with a ``prompt``.

    Raises:
        ArgonneError: it cannot be read, a line is not what the others are, or there are none.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    try:
        text = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
        lines = [line for line in text.decode("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ArgonneError(f"prompt_file={name!r} cannot be read: {error}; legal: a text file in UTF-8") from error
    if not lines:
        raise ArgonneError(f"prompt_file={name!r} has no prompts; legal: at least one line")
    if path.suffix != ".jsonl" and _prompt_of(lines[0]) is None:
        return lines
    prompts = [_prompt_of(line) for line in lines]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ArgonneError(
                f"line {number + 1} of prompt_file={name!r} is {lines[number][:60]!r}; "
                "legal: a JSON object with a prompt"
            )
    return [prompt for prompt in prompts if prompt]


def _prompt_of(line: str) -> str | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    prompt = found.get("prompt") if isinstance(found, dict) else None
    return prompt if isinstance(prompt, str) else None


def typed_prompts() -> Iterator[str]:
    """What somebody types in a terminal, a line at a time, until the end of input."""
    import readline  # noqa: F401 - the line can be edited

    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line


def encoded(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a text that is to be continued.

    Raises:
        ArgonneError: it has none.
    """
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise ArgonneError(f"prompt={prompt!r} has no tokens; legal: a text of at least one")
    return ids


def require_chat_template(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Raise ``ArgonneError`` unless the tokenizer says how a chat is written."""
    if not tokenizer.chat_template:
        raise ArgonneError(
            f"chat=True needs a chat template, and the tokenizer of {str(directory)!r} has none; legal: False"
        )


def encoded_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """The ids of a chat so far, up to where the answer begins.

    Raises:
        ArgonneError: the template refuses these messages.
    """
    try:
        written: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are programs of others
        raise ArgonneError(f"the chat template cannot be applied: {error}; legal: turns as it expects them") from error
    return encoded(tokenizer, written)
