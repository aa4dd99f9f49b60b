"""The reusable layer: process groups, parallel layers and the declarations that everything else follows.

Needs torch and einops only, and nothing else of argonne.
"""

from argonne.parallel.collectives import (
    copy_to_region,
    gather_from_region,
    reduce_from_region,
    scatter_to_region,
)
from argonne.parallel.cross_entropy import IGNORE_INDEX, vocab_parallel_cross_entropy
from argonne.parallel.embedding import (
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabularyRange,
    vocab_parallel_logits,
)
from argonne.parallel.errors import ArgonneError, LayoutError
from argonne.parallel.gradients import clip_gradients, complete_gradients, global_gradient_norm
from argonne.parallel.groups import Axis, ProcessGroups, choose_device, process_groups
from argonne.parallel.layout import AXES, Layout
from argonne.parallel.linear import (
    ColumnParallelLinear,
    OutputPart,
    RowParallelLinear,
    column_parallel_linear,
)
from argonne.parallel.precision import Precision
from argonne.parallel.random import Constant, Initialiser, Normal
from argonne.parallel.sharding import (
    Region,
    Sharded,
    ShardedParameter,
    ShardSpec,
    initialise,
    regions_of,
    replicated,
    sharded_parameters,
)

__all__ = [
    "AXES",
    "IGNORE_INDEX",
    "ArgonneError",
    "Axis",
    "ColumnParallelLinear",
    "Constant",
    "Initialiser",
    "Layout",
    "LayoutError",
    "Normal",
    "OutputPart",
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
    "choose_device",
    "clip_gradients",
    "column_parallel_linear",
    "complete_gradients",
    "copy_to_region",
    "gather_from_region",
    "global_gradient_norm",
    "initialise",
    "process_groups",
    "reduce_from_region",
    "regions_of",
    "replicated",
    "scatter_to_region",
    "sharded_parameters",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logits",
]
