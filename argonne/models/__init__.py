"""Models assembled from the parallel layers and the kernels."""

from argonne.models.argonne import ArgonneModel
from argonne.models.config import PRESETS, ArgonneConfig, preset
from argonne.models.huggingface import from_huggingface, to_huggingface

__all__ = ["PRESETS", "ArgonneConfig", "ArgonneModel", "from_huggingface", "preset", "to_huggingface"]
