"""Models assembled from the parallel layers and the kernels, and the contract that others may meet."""

from argonne.models.argonne import ArgonneModel
from argonne.models.base import BaseModel
from argonne.models.build import build_model
from argonne.models.cache import CachingModel, KeyValueCache, Scores
from argonne.models.config import PRESETS, ArgonneConfig, preset
from argonne.models.contract import Batch, Head, LanguageModel, LossFunction, require_contract
from argonne.models.end_tokens import end_tokens
from argonne.models.execution import Execution
from argonne.models.families import from_huggingface, to_huggingface
from argonne.models.loss import CrossEntropyLoss
from argonne.models.replicas import build_replicas, replicas_of
from argonne.models.rope import RopeScaling

__all__ = [
    "PRESETS",
    "ArgonneConfig",
    "ArgonneModel",
    "BaseModel",
    "Batch",
    "CachingModel",
    "CrossEntropyLoss",
    "Execution",
    "Head",
    "KeyValueCache",
    "LanguageModel",
    "LossFunction",
    "RopeScaling",
    "Scores",
    "build_model",
    "build_replicas",
    "end_tokens",
    "from_huggingface",
    "preset",
    "replicas_of",
    "require_contract",
    "to_huggingface",
]
