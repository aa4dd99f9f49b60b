"""Models assembled from the parallel layers and the kernels, and the contract that others may meet."""

from argonne.models.argonne import ArgonneModel
from argonne.models.base import BaseModel
from argonne.models.build import PRESETS, ModelConfig, build_model, preset
from argonne.models.cache import CachingModel, KeyValueCache, Scores
from argonne.models.config import ArgonneConfig
from argonne.models.contract import Batch, Head, LanguageModel, LossFunction, require_contract
from argonne.models.distillation import DistillationLoss, Teacher, teacher_groups
from argonne.models.end_tokens import end_tokens
from argonne.models.execution import Execution
from argonne.models.families import from_huggingface, to_huggingface
from argonne.models.families.argonne1 import Argonne1Config
from argonne.models.families.argonne1_model import Argonne1Model
from argonne.models.loss import CrossEntropyLoss
from argonne.models.replicas import build_replicas, replicas_of
from argonne.models.rope import RopeScaling
