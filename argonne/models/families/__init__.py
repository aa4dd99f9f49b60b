"""The families of models that are opened and saved: each has a file here, and ``config.json`` says which one it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne.models.contract import SpecialTokens
from argonne.models.families.decoder import SHARED, DecoderFamily, Family
from argonne.models.families.file import ConfigFile
from argonne.models.families.llama import LLAMA
from argonne.models.families.mistral import MISTRAL
from argonne.models.families.qwen2 import QWEN2
from argonne.models.families.qwen3 import QWEN3
from argonne.parallel.errors import ArgonneError

DECODERS = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
"""Those of ``ArgonneConfig``."""
FAMILIES: dict[str, Family] = {**DECODERS}
"""All of them, by ``model_type``."""


def from_huggingface(path: Path) -> Any:
    """The configuration that a ``config.json`` (or the directory that holds it) describes.

    What the file does not say is what the family's class of ``transformers`` assumes; without a ``model_type`` it is
    Llama's.

    Raises:
        ArgonneError: there is no such file, or it describes something that no family here has.
    """
    file = ConfigFile.read(path)
    if not {"model_type", *SHARED} & set(file.found):
        raise ArgonneError(f"model config {str(file.path)!r} cannot be read: it describes no model")
    name = file.found.get("model_type", "llama")
    if not isinstance(name, str) or name not in FAMILIES:
        raise file.refusal("model_type", name, ", ".join(FAMILIES))
    return FAMILIES[name].read(file)


def to_huggingface(config: Any, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
    """The ``config.json`` with which ``transformers`` (4.57 and 5) opens the weights as the class of their family.

    Args:
        config: the model's shape; its ``family`` says which one it is.
        special_tokens: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
        dtype: the dtype of the stored weights, ``float32`` say.

    Raises:
        ArgonneError: there is no such family, or it does not have what the shape has.
    """
    return family_of(config.family).write(config, special_tokens, dtype)


def family_of(name: str) -> Family:
    """The family of that ``model_type``. Raises ``ArgonneError`` listing the names when there is none."""
    if name not in FAMILIES:
        raise ArgonneError(f"family={name!r} is not known; legal: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def decoder_family(name: str) -> DecoderFamily:
    """As ``family_of``, of those of ``ArgonneConfig`` alone."""
    if name not in DECODERS:
        raise ArgonneError(f"family={name!r} is not known; legal: {', '.join(DECODERS)}")
    return DECODERS[name]
