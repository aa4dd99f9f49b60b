"""The reusable layer: process groups, parallel layers and the declarations that everything else follows.

Needs torch, numpy and einops; of the rest only ``argonne`` itself and ``argonne.parent``, which need nothing more.
"""

from argonne.parallel.communication.groups import Axis, ProcessGroups
from argonne.parallel.communication.job import choose_device, process_groups
from argonne.parallel.communication.layout import AXES, Layout
from argonne.parallel.communication.recording import Collective, Log, record
from argonne.parallel.communication.regions import (
    copy_to_region,
    gather_from_region,
    gather_from_sequence_region,
    reduce_from_region,
    reduce_scatter_to_sequence_region,
    scatter_to_region,
)
from argonne.parallel.context_parallel.attention import context_parallel_attention, context_positions, shard_sequence
from argonne.parallel.data_parallel.kinds import data_parallel
from argonne.parallel.data_parallel.strategy import DataParallel
from argonne.parallel.errors import ArgonneError, CollectiveMismatch, LayoutError
from argonne.parallel.legal import require_number, require_whole
from argonne.parallel.pipeline_parallel.plan import PipelinePlan, balance
from argonne.parallel.pipeline_parallel.stages import Activation, pipeline_forward
from argonne.parallel.sharding.check import check_declarations, check_gradients
from argonne.parallel.sharding.declare import Use, replicated, sharded, transposed
from argonne.parallel.sharding.dropout import Draws, Dropout
from argonne.parallel.sharding.gradients import clip_gradients, complete_gradients, global_gradient_norm
from argonne.parallel.sharding.initialisation import Constant, Initialiser, Normal
from argonne.parallel.sharding.partition import Partition, share
from argonne.parallel.sharding.region import Holders, Region, ShardSpec
from argonne.parallel.sharding.spec import (
    Sharded,
    ShardedParameter,
    initialise,
    narrow_rows,
    regions_of,
    sharded_parameters,
)
from argonne.parallel.tensor_parallel.cross_entropy import IGNORE_INDEX, Objective, vocab_parallel_cross_entropy
from argonne.parallel.tensor_parallel.distillation import Distillation, DistillationSoftmax, TeacherRows
from argonne.parallel.tensor_parallel.embedding import (
    VocabParallelEmbedding,
    VocabParallelHead,
    VocabularyRange,
    vocab_parallel_logits,
)
from argonne.parallel.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from argonne.parallel.tensor_parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from argonne.parallel.tensor_parallel.precision import Precision
from argonne.parallel.tensor_parallel.products import column_parallel_linear

share_sequence = shard_sequence  # its name before
