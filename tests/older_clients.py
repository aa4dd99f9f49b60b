"""What transformers 4.57.6 and its contemporaries accept in an exported directory, as a list kept here.

From ``PreTrainedTokenizerBase.__init__`` and ``PreTrainedTokenizerFast.__init__``, ``LlamaConfig``,
``PretrainedConfig`` and ``GenerationConfig`` of 4.57.6. ``dtype`` is what 4.56 and later call ``torch_dtype``;
``rope_parameters`` is 5's, and kept beside ``rope_theta`` without a meaning before.
"""

from __future__ import annotations

import json
from pathlib import Path

FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
SPECIAL_TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
TOKENIZER_CLASSES = {"PreTrainedTokenizerFast"}
TOKENIZER_FIELDS = {
    *SPECIAL_TOKENS,
    "tokenizer_class",
    "additional_special_tokens",
    "model_max_length",
    "model_input_names",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "add_prefix_space",
    "chat_template",
}
CONFIG_FIELDS = {
    "architectures",
    "model_type",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "rope_theta",
    "rope_parameters",
    "attention_dropout",
    "dtype",
    "torch_dtype",
    "use_cache",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
GENERATION_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def require_accepted(directory: Path) -> None:
    """Fail naming what in a directory an older client does not know; files that are there are looked at."""
    for name, known in (
        ("tokenizer_config.json", TOKENIZER_FIELDS),
        ("config.json", CONFIG_FIELDS),
        ("generation_config.json", GENERATION_FIELDS),
    ):
        if (directory / name).exists():
            fields = json.loads((directory / name).read_text())
            assert set(fields) <= known, f"{name}: {sorted(set(fields) - known)}"
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] in TOKENIZER_CLASSES
    assert all(isinstance(tokenizer.get(name, ""), str) for name in SPECIAL_TOKENS)
    assert not (directory / "special_tokens_map.json").exists()  # it would count before tokenizer_config.json
