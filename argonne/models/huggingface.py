"""To and from Hugging Face's ``config.json`` for Llama, which is what the Argonne 2.x architecture is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne.files import read_json
from argonne.models.config import ArgonneConfig
from argonne.models.contract import SpecialTokens
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_whole

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
# What a Llama checkpoint may say that this architecture does not have, and this toolkit writes.
_PLAIN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_REQUIRED = {**_PLAIN, "partial_rotary_factor": 1.0, "attention_dropout": 0.0}
_MAY_BE_NULL = ("partial_rotary_factor", "attention_dropout")

# What LlamaConfig assumes when a file is silent.
_LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
    "intermediate_size": 11_008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
# What follows from other fields where a file says null, or nothing.
_DERIVED = ("num_key_value_heads", "head_dim")


def to_huggingface(config: ArgonneConfig, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
    """The ``config.json`` with which ``transformers`` (4.57 and 5) opens the weights as Llama.

    Args:
        config: the model's shape.
        special_tokens: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
        dtype: the dtype of the stored weights, ``float32`` say.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        **_PLAIN,
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

    What the file does not say is what ``LlamaConfig`` assumes.

    Raises:
        ArgonneError: there is no such file, or it describes something that is not a plain Llama.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = read_json(file)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
        if not {"model_type", *_SHARED} & set(found):
            raise ValueError("it describes no model")
    except (OSError, ValueError) as error:
        raise ArgonneError(f"model config {str(file)!r} cannot be read: {error}") from error
    for field, required in _REQUIRED.items():
        if field in found and not (found[field] is None and field in _MAY_BE_NULL):
            _require_plain(file, field, found[field], required)
    named = found.get("architectures") or []
    if not isinstance(named, list) or (named and not any(str(name).lower().endswith("forcausallm") for name in named)):
        raise ArgonneError(f"architectures={named!r} in {str(file)!r} is not supported; legal: ['LlamaForCausalLM']")
    theta = _rope_theta(file, found)
    known = _LLAMA | {field: found[field] for field in _SHARED if field in found}
    for field in [field for field in _DERIVED if known.get(field) is None]:
        known.pop(field, None)  # null means that it follows from others
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    try:
        require_whole("intermediate_size", known["intermediate_size"], 1)  # null would ask for a rule of ours
        require_number("initializer_range", known["initializer_range"])
        return ArgonneConfig(**known, rope_theta=theta)
    except ArgonneError as error:
        raise ArgonneError(f"model config {str(file)!r}: {error}") from None


def _rope_theta(file: Path, found: dict[str, Any]) -> Any:
    """The base of the rotary frequencies, whichever of its three places names it; other rotations are refused."""
    theta: dict[str, Any] = {}
    for place in ("rope_parameters", "rope_scaling"):
        rope = {} if found.get(place) is None else found[place]
        if not isinstance(rope, dict):
            raise ArgonneError(f"{place}={rope!r} in {str(file)!r} is not legal; legal: a JSON object, or null")
        kinds = [rope[name] for name in ("rope_type", "type") if name in rope]
        if any(kind != "default" for kind in kinds) or any(isinstance(value, dict) for value in rope.values()):
            raise ArgonneError(f"rope scaling {rope!r} in {str(file)!r} is not supported; legal: rope_type 'default'")
        _require_plain(file, f"{place}.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
        if "rope_theta" in rope:
            theta[f"{place}.rope_theta"] = rope["rope_theta"]
    if "rope_theta" in found:
        theta["rope_theta"] = found["rope_theta"]
    for name, value in theta.items():
        try:
            require_number(name, value)
        except ArgonneError as error:
            raise ArgonneError(f"model config {str(file)!r}: {error}") from None
    if len(set(theta.values())) > 1:
        told = ", ".join(f"{name}={value}" for name, value in theta.items())
        raise ArgonneError(f"model config {str(file)!r} has {told}; legal: the same in every place")
    return next(iter(theta.values()), 10_000.0)


def _require_plain(file: Path, field: str, value: Any, required: Any) -> None:
    """Refuse what asks for anything but ``required``: other numbers, and other types (0 is not False)."""
    number = isinstance(required, float) and isinstance(value, int) and not isinstance(value, bool)
    if value != required or (type(value) is not type(required) and not number):
        raise ArgonneError(f"{field}={value!r} in {str(file)!r} is not supported; legal: {required!r}")


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
            named = read_json(file).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ArgonneError(f"{str(file)!r} cannot be read: {error}") from error
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int for token in ids):
            raise ArgonneError(
                f"eos_token_id={named!r} in {str(file)!r} is not legal; legal: an id, a list of ids or null"
            )
        found.update(ids)
    return found
