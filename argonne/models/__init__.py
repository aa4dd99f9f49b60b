"""Models assembled from the parallel layers and the kernels."""

from argonne.models.argonne import ArgonneModel
from argonne.models.config import PRESETS, ArgonneConfig, preset
from argonne.models.huggingface import end_tokens, from_huggingface, to_huggingface
from argonne.models.pipelined import PipelinedModel, build_model
from argonne.models.replicas import build_replicas, replicas_of

__all__ = [
    "PRESETS",
    "ArgonneConfig",
    "ArgonneModel",
    "PipelinedModel",
    "build_model",
    "build_replicas",
    "end_tokens",
    "from_huggingface",
    "preset",
    "replicas_of",
    "to_huggingface",
]
