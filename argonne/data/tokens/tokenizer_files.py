"""A tokenizer's files as other software opens them: older clients too, and with what training decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from argonne.files import write_json

TOKENIZER_CONFIG = "tokenizer_config.json"

# The class that takes tokenizer.json as it is, by the name that every transformers with fast tokenizers knows.
_CLASS = "PreTrainedTokenizerFast"


def write_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    boundary: tuple[int, int] | None = None,
    max_length: int | None = None,
) -> dict[str, int | None]:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and chat templates; the tokenizer itself stays as it is.

    Args:
        boundary: the BOS and EOS that were put around documents; the tokenizer's own where none were.
        max_length: tokens of the longest sequence that the model was trained on, if there is a model.

    Returns ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as the files have them.
    """
    tokenizer.save_pretrained(directory)
    path = directory / TOKENIZER_CONFIG
    written = json.loads(path.read_text(encoding="utf-8"))
    special = special_tokens(tokenizer)
    if boundary is not None:
        special |= zip(("bos_token", "eos_token"), tokenizer.convert_ids_to_tokens(list(boundary)), strict=True)
        special["pad_token"] = special["pad_token"] or special["eos_token"]
    extra = [str(token) for token in tokenizer.extra_special_tokens]
    # Named one by one: what else the library writes is about how it loaded the tokenizer, and not all of it is
    # understood by other versions. A list of extra tokens has this name in all of them.
    config: dict[str, Any] = {
        "tokenizer_class": _CLASS,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        **{name: token for name, token in special.items() if token is not None},
        **({"additional_special_tokens": extra} if extra else {}),
        "model_max_length": max_length or tokenizer.model_max_length,
        # A Llama takes no token_type_ids, which older clients would make.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "clean_up_tokenization_spaces": _cleans_up(tokenizer),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        **_prefix_space(tokenizer),
        **{name: written[name] for name in ("chat_template",) if name in written},
    }
    write_json(path, config)
    return {
        f"{name}_id": None if token is None else tokenizer.convert_tokens_to_ids(token)
        for name, token in special.items()
    }


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str | None]:
    """The tokens that the tokenizer calls its own BOS, EOS and pad token."""
    return {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}


def _cleans_up(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether decoding removes spaces before punctuation: never for BPE, where older clients would obey the flag."""
    return bool(tokenizer.clean_up_tokenization_spaces) and type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


def _prefix_space(tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    """What ``tokenizer.json`` says of a space before the text: older clients take the flag's word, and its default."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    state = {} if pre_tokenizer is None else json.loads(pre_tokenizer.__getstate__())
    return {name: value for name, value in state.items() if name == "add_prefix_space"}
