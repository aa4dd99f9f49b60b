"""What checkpoints keep of the directory that a run began with: its configuration, its tokenizer, its chat template.

They go from checkpoint to checkpoint, in the memory of the first rank between two of them, so that the directory may be
changed or gone, and an older checkpoint pruned, when they are written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from argonne.data import DataError, special_tokens, tokenizer_fingerprint
from argonne.data.tokens.tokenizer import VOCABULARY_FILES
from argonne.data.tokens.tokenizer_files import TOKENIZER_CONFIG
from argonne.files import make_directory, read_object, write_json
from argonne.training.run.kept_tokenizer import is_kept

CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"

# The files of a tokenizer, its code and templates among them; and how other software is to generate with the model.
_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.*", "additional_chat_templates/*", "tokenization_*.py"),
)
_DTYPES = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class KeptFiles:
    """Files of the directory that a run began with, by their names in it."""

    config: Mapping[str, Any]
    """What ``config.json`` says."""
    files: Mapping[str, bytes]
    """The others, as they were."""

    @classmethod
    def read(
        cls, directory: Path, tokenizer: PreTrainedTokenizerFast, tokenizer_path: Path | None, begins: bool
    ) -> KeptFiles:
        """Those of ``directory``, from which a run goes on or which it ``begins`` with.

        The tokenizer is that of ``tokenizer_path`` where the run begins with another one, or is made to go on with
        one: its ids then are those of the configuration too.

        Raises:
            DataError: a file cannot be read.
        """
        try:
            config = read_object(directory / CONFIG)
            generation = directory / GENERATION
            files = {GENERATION: generation.read_bytes()} if generation.exists() else {}
            same = tokenizer_path is None or is_kept(directory, tokenizer_fingerprint(tokenizer))
            source = directory if tokenizer_path is None or (same and not begins) else tokenizer_path
            files |= dict(_tokenizer_files(source))
            if not same:
                ids = _ids(tokenizer)
                config |= ids
                if generation.exists():
                    files[GENERATION] = _json(read_object(generation) | ids)
        except (OSError, ValueError) as error:
            raise DataError(f"{str(directory)!r} cannot be kept in checkpoints: {error}") from error
        return cls(config, files)

    def with_chat(self, tokenizer: PreTrainedTokenizerFast, chat: tuple[str, str | None] | None) -> KeptFiles:
        """The same with the chat template that a run trains on, and the token, if any, by which a turn ends.

        The template is where each version of ``transformers`` looks for it, and the token among those that end a text.

        Raises:
            DataError: a file that these belong in cannot be read.
        """
        if chat is None:
            return self
        template, ending = chat
        files = {name: held for name, held in self.files.items() if not name.startswith("additional_chat_templates")}
        try:
            named = _object(files.get(TOKENIZER_CONFIG)) | {"chat_template": template}
            files |= {TOKENIZER_CONFIG: _json(named), TEMPLATE: template.encode()}
            if ending is not None:
                generation = _object(files.get(GENERATION))
                before = generation.get("eos_token_id", self.config.get("eos_token_id", tokenizer.eos_token_id))
                ends = [*(before if isinstance(before, list) else [] if before is None else [before])]
                own = tokenizer.convert_tokens_to_ids(ending)
                if own not in ends:
                    files[GENERATION] = _json(generation | {"eos_token_id": [*ends, own]})
        except ValueError as error:
            raise DataError(f"the chat template cannot be kept in checkpoints: {error}") from error
        return replace(self, files=files)

    def write(self, directory: Path, dtype: str) -> None:
        """Write them beside weights of ``dtype``, which is all that training changes of the configuration.

        A save sees them onto the disk, with what else it writes (``save_checkpoint``).
        """
        for name, content in self.files.items():
            make_directory((directory / name).parent)
            (directory / name).write_bytes(content)
        named = [name for name in _DTYPES if name in self.config] or _DTYPES
        write_json(directory / CONFIG, {**self.config, **dict.fromkeys(named, dtype)})


def _tokenizer_files(directory: Path) -> Iterator[tuple[str, bytes]]:
    for pattern in _FILES:
        for path in sorted(directory.glob(pattern)):
            if path.is_file():
                yield str(path.relative_to(directory)), path.read_bytes()


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids of the tokenizer's own BOS, EOS and pad token, of those that it has."""
    named = special_tokens(tokenizer).items()
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in named if token is not None}


def _object(content: bytes | None) -> dict[str, Any]:
    found = {} if content is None else json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("a file is no JSON object")
    return found


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
