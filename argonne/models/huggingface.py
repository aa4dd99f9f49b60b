"""To and from Hugging Face's ``config.json`` for Llama, which is what the Argonne 2.x architecture is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from argonne.models.config import ArgonneConfig
from argonne.parallel.errors import ArgonneError

# What ArgonneConfig and LlamaConfig call by the same name.
_SHARED = (
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
)
# What a Llama checkpoint may say that this architecture does not have.
_REQUIRED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def to_huggingface(config: ArgonneConfig, special_tokens: dict[str, int | None], dtype: str) -> dict[str, Any]:
    """The ``config.json`` with which ``transformers`` (4.57 and 5) opens the weights as Llama.

    Args:
        config: the model's shape.
        special_tokens: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
        dtype: the dtype of the stored weights, ``float32`` say.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        **_REQUIRED,
        **{field: getattr(config, field) for field in _SHARED},
        # transformers 5 reads the second form, everything older the first.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        # Of this form, not of the library here. Without it, 4.57 takes a large vocabulary for Mistral's faulty one.
        "transformers_version": "5.0.0",
        **special_tokens,
    }


def from_huggingface(path: Path) -> ArgonneConfig:
    """The shape that a ``config.json`` (or the directory that holds it) describes.

    Raises:
        ArgonneError: there is no such file, or it describes something that is not a plain Llama.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ArgonneError(f"model config {str(file)!r} cannot be read: {error}") from error
    for field, required in _REQUIRED.items():
        value = found.get(field, required)
        if value != required:
            raise ArgonneError(f"{field}={value!r} in {str(file)!r} is not supported; legal: {required!r}")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ArgonneError(f"rope scaling {rope!r} in {str(file)!r} is not supported; legal: rope_type 'default'")
    known = {field: found[field] for field in _SHARED if found.get(field) is not None}
    missing = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} - set(known)
    if missing:
        raise ArgonneError(f"{str(file)!r} lacks {', '.join(sorted(missing))}")
    # What LlamaConfig assumes when the file is silent.
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    known.setdefault("tie_word_embeddings", False)
    known.setdefault("max_position_embeddings", 2048)
    known.setdefault("initializer_range", 0.02)
    theta = rope.get("rope_theta") or found.get("rope_theta") or 10_000.0
    return ArgonneConfig(**known, rope_theta=float(theta))


def end_tokens(directory: Path) -> set[int]:
    """The ids that end a text, one or several, as ``generation_config.json`` and ``config.json`` name them.

    Raises:
        ArgonneError: a file cannot be read, or names something that is no id.
    """
    found: set[int] = set()
    for file in (directory / "generation_config.json", directory / "config.json"):
        if not file.exists():
            continue
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ArgonneError(f"{str(file)!r} cannot be read: {error}") from error
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int for token in ids):
            raise ArgonneError(
                f"eos_token_id={named!r} in {str(file)!r} is not legal; legal: an id, a list of ids or null"
            )
        found.update(ids)
    return found
