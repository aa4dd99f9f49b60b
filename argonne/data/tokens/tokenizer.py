"""Loading or training a tokenizer, and the tokens that it puts between documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from argonne.data.errors import DataError, one_line
from argonne.data.tokens.byte_pair import AWKWARD, unless_refused
from argonne.files import read_object

# With a configuration alone, transformers would make a tokenizer that has no vocabulary.
VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")

# In the order of their ids, 0 to 4.
SPECIAL_TOKENS = {
    "bos_token": "<|start_of_text|>",
    "pad_token": "<pad>",
    "eos_token": "<|end_of_text|>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
BOS_NAMES = ("<|im_start|>", "<s>", "[CLS]")
EOS_NAMES = ("<|im_end|>", "</s>", "[SEP]")

OWN_WORDS = 200
"""Of a vocabulary, so many words are tried besides `AWKWARD`: rules that differ show where tokens would meet."""


def load_tokenizer(
    path: str | Path,
    trust_remote_code: bool = False,
    special_tokens: Mapping[str, str | None] | None = None,
    compare: bool = True,
) -> PreTrainedTokenizerFast:
    """The fast tokenizer kept in a local directory; without a pad token of its own it pads with EOS.

    Args:
        special_tokens: what counts instead of the directory's ``bos_token``, ``eos_token`` or ``pad_token``.
        compare: refuse a tokenizer that gives other ids than ``tokenizer.json``. Not needed where its fingerprint is
            compared, with that of a run that began before this was looked at.

    Raises:
        DataError: the directory does not exist, holds no tokenizer, only a slow one, or files that disagree.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise DataError(f"tokenizer path {path} is not a directory; give the local directory of a tokenizer")
    if not holds_tokenizer(directory):
        raise DataError(f"tokenizer path {path} holds no tokenizer: none of {', '.join(VOCABULARY_FILES)}")
    try:
        options = {"local_files_only": True, **(special_tokens or {})}
        if _is_as_it_is(directory):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **options)
        else:
            options |= {"use_fast": True, "trust_remote_code": trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:  # a broken file surfaces as whatever the parser in question raises
        raise DataError(f"tokenizer path {path} cannot be loaded: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"tokenizer path {path} has no fast implementation; expected a tokenizer.json")
    if compare:
        _require_own_ids(tokenizer, directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _is_as_it_is(directory: Path) -> bool:
    """Whether a directory says that ``tokenizer.json`` counts as it is.

    Beside the ``config.json`` of a Qwen2, ``transformers`` 5 would take Qwen's rules nonetheless.
    """
    named = directory / "tokenizer_config.json"
    if not (named.is_file() and (directory / "tokenizer.json").is_file()):
        return False
    return read_object(named).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def holds_tokenizer(directory: Path) -> bool:
    """Whether there is a vocabulary in a directory."""
    return any(file for pattern in VOCABULARY_FILES for file in directory.glob(pattern))


def train_tokenizer(texts: Iterable[str], vocab_size: int = 12_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens: the same texts give the same tokenizer, byte for byte.

    Ids 0 to 4 are `SPECIAL_TOKENS`, then come the 256 bytes, then the merges of pairs seen twice or more.

    Raises:
        DataError: `vocab_size` has no room for the special tokens and the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise DataError(f"vocab_size={vocab_size} is too small for a byte-level BPE; at least {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


def boundary_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The (BOS, EOS) ids to put around each document.

    The tokenizer's own come first, then the usual names, then its additional special tokens in their order.

    Raises:
        DataError: one of the two, or both, cannot be found.
    """
    ids = {
        "BOS": _first_id(tokenizer, tokenizer.bos_token, BOS_NAMES),
        "EOS": _first_id(tokenizer, tokenizer.eos_token, EOS_NAMES),
    }
    bos, eos = ids.values()
    if bos is None or eos is None:
        missing = " and no ".join(name for name, token_id in ids.items() if token_id is None)
        raise DataError(f"document boundary tokens were asked for and the tokenizer has no {missing} token")
    return bos, eos


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend, without the padding and truncation that are set on it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A SHA-256 (hex) of all that decides how text becomes ids; padding and truncation settings do not."""
    return hashlib.sha256(plain_backend(tokenizer).to_str().encode()).hexdigest()


def _require_own_ids(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Raise ``DataError`` unless the tokenizer gives the ids that the directory's ``tokenizer.json`` says.

    The class that a directory names may build its own rules from the vocabulary alone, and every other program that
    opens the file then makes other ids of a text.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return  # made from a vocabulary: there is nothing to compare with
    try:
        told = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"tokenizer path {directory}: tokenizer.json cannot be read: {one_line(error)}") from error
    built = plain_backend(tokenizer)
    ids = built.get_vocab()
    moved = [token for token, token_id in told.get_vocab().items() if ids.get(token) != token_id]
    told.no_padding()
    told.no_truncation()
    # What a configuration calls special is no text, whether or not the file says so too.
    told.add_special_tokens([token for token in built.get_added_tokens_decoder().values() if token.special])
    built.encode_special_tokens = told.encode_special_tokens = True  # as in training
    texts = (text for text in (*AWKWARD, *_own_words(told)) if _ids(built, text) != _ids(told, text))
    differs = min(moved) if moved else next(texts, None)
    if differs is not None:
        raise DataError(
            f"tokenizer path {directory}: {type(tokenizer).__name__}, which its configuration names, gives other ids "
            f"than tokenizer.json for {differs[:40]!r}; legal: files that agree (tokenizer_class "
            "PreTrainedTokenizerFast takes tokenizer.json as it is)"
        )


def _own_words(backend: Tokenizer) -> list[str]:
    """Texts of a vocabulary's own words, put together in the ways in which rules of cutting differ."""
    size = backend.get_vocab_size()
    some = (backend.decode([token_id]) for token_id in range(0, size, max(1, size // OWN_WORDS)))
    words = [word for word in some if word and "\ufffd" not in word]
    return [between.join(words) for between in ("", " ", "\n", "\t", "1", "'s ", ".")]


def _ids(backend: Tokenizer, text: str) -> list[int] | None:
    """None where a vocabulary has nothing for the text."""
    return unless_refused(lambda: backend.encode(text, add_special_tokens=False).ids)


def _first_id(tokenizer: PreTrainedTokenizerFast, own: str | None, names: tuple[str, ...]) -> int | None:
    others = [token for token in (*names, *tokenizer.extra_special_tokens) if token != tokenizer.unk_token]
    for token in (own, *others):  # GPT-2 declares one token to be its own BOS, EOS and unknown token
        token_id = None if token is None else tokenizer.convert_tokens_to_ids(token)
        # The id of an absent token is that of the unknown token, or None.
        if isinstance(token_id, int) and tokenizer.convert_ids_to_tokens(token_id) == token:
            return token_id
    return None
