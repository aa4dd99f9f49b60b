"""The families of models that are opened and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne.models import huggingface
from argonne.models.families.argonne1 import ARGONNE1
from argonne.models.families.file import ConfigFile


def from_huggingface(path: Path) -> Any:
    file = ConfigFile.read(path)
    if file.found.get("model_type") == "gpt2":
        return ARGONNE1.read(file)
    return huggingface.from_huggingface(path)
