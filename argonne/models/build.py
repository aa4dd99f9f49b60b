"""Which model a configuration is of, and the names of shapes."""

from __future__ import annotations

from argonne.models import config as argonne2
from argonne.models.argonne import ArgonneModel
from argonne.models.config import ArgonneConfig
from argonne.models.execution import Execution
from argonne.models.families import argonne1
from argonne.models.families.argonne1 import Argonne1Config
from argonne.models.families.argonne1_model import Argonne1Model
from argonne.parallel.errors import ArgonneError

ModelConfig = ArgonneConfig | Argonne1Config
"""The shape of a model that a run can be told by flags, or by a ``config.json``."""

PRESETS: dict[str, ModelConfig] = {**argonne2.PRESETS, **argonne1.PRESETS}
"""Every named shape. Any other is a matter of overriding fields, or of a Hugging Face ``config.json``."""


def preset(name: str) -> ModelConfig:
    """The shape called ``name``. Raises ``ArgonneError`` listing the names when there is none."""
    if name not in PRESETS:
        raise ArgonneError(f"preset={name!r} is not known; legal: {', '.join(PRESETS)}")
    return PRESETS[name]


def build_model(config: ModelConfig, execution: Execution) -> ArgonneModel | Argonne1Model:
    """The model of that shape, as its class says."""
    if isinstance(config, Argonne1Config):
        return Argonne1Model(config, execution)
    return ArgonneModel(config, execution)
