"""The reusable layer: process groups, parallel layers and the declarations that everything else follows.

Needs torch, numpy and einops, and nothing else of argonne.
"""

from argonne.parallel.context import context_parallel_attention, context_positions, share_sequence
from argonne.parallel.cross_entropy import IGNORE_INDEX, Objective, vocab_parallel_cross_entropy
from argonne.parallel.data_parallel import data_parallel
from argonne.parallel.embedding import (
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabularyRange,
    vocab_parallel_logits,
)
from argonne.parallel.errors import ArgonneError, CollectiveMismatch, LayoutError
from argonne.parallel.gradients import clip_gradients, complete_gradients, global_gradient_norm
from argonne.parallel.groups import Axis, ProcessGroups, choose_device, process_groups
from argonne.parallel.layout import AXES, Layout
from argonne.parallel.legal import require_number, require_whole
from argonne.parallel.linear import ColumnParallelLinear, RowParallelLinear
from argonne.parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from argonne.parallel.partition import Partition, share
from argonne.parallel.pipeline_plan import PipelinePlan, balance
from argonne.parallel.precision import Precision
from argonne.parallel.products import column_parallel_linear
from argonne.parallel.random import Constant, Initialiser, Normal
from argonne.parallel.recording import Collective, Log, record
from argonne.parallel.regions import (
    copy_to_region,
    gather_from_region,
    gather_from_sequence_region,
    reduce_from_region,
    reduce_scatter_to_sequence_region,
    scatter_to_region,
)
from argonne.parallel.sharding import (
    Region,
    Sharded,
    ShardedParameter,
    ShardSpec,
    initialise,
    narrow_rows,
    regions_of,
    replicated,
    sharded_parameters,
)
from argonne.parallel.stages import Activation, pipeline_forward
from argonne.parallel.strategy import DataParallel

__all__ = [
    "AXES",
    "IGNORE_INDEX",
    "Activation",
    "ArgonneError",
    "Axis",
    "Collective",
    "CollectiveMismatch",
    "ColumnParallelLinear",
    "Constant",
    "DataParallel",
    "Initialiser",
    "Layout",
    "LayoutError",
    "Log",
    "Normal",
    "Objective",
    "Partition",
    "PipelinePlan",
    "Precision",
    "ProcessGroups",
    "Region",
    "RowParallelLinear",
    "ShardSpec",
    "Sharded",
    "ShardedParameter",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "VocabularyRange",
    "balance",
    "choose_device",
    "clip_gradients",
    "column_parallel_linear",
    "complete_gradients",
    "context_parallel_attention",
    "context_positions",
    "copy_to_region",
    "data_parallel",
    "gather_from_region",
    "gather_from_sequence_region",
    "global_gradient_norm",
    "initialise",
    "narrow_rows",
    "pipeline_forward",
    "process_groups",
    "record",
    "reduce_from_region",
    "reduce_scatter_to_sequence_region",
    "regions_of",
    "replicated",
    "require_number",
    "require_whole",
    "scatter_to_region",
    "sharded_parameters",
    "share",
    "share_sequence",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_logits",
]
