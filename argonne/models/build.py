"""From a configuration to a model: the one place that knows which class has which."""

from __future__ import annotations

from argonne.models.argonne import ArgonneModel
from argonne.models.config import ArgonneConfig
from argonne.models.execution import Execution


def build_model(config: ArgonneConfig, execution: Execution) -> ArgonneModel:
    """This rank's part of the model of ``config``, empty as its class leaves it."""
    return ArgonneModel(config, execution)
