"""The data pipeline: shards -> documents -> token ids -> sequences -> batches, exact across any interruption.

The corpus is read in a fixed number of lanes. What a lane delivers depends on the corpus alone, so that the
global order of samples stays the same for every data-parallel size and after every restart.
"""

from argonne.data.assignment import Assignment
from argonne.data.batches import Batch, BatchStream
from argonne.data.cache.build import build_cache
from argonne.data.cache.store import TokenCache, open_cache
from argonne.data.cache.stream import CachedStream, check_cache
from argonne.data.corpus.inventory import changes, describe, restore
from argonne.data.corpus.location import Location, Url, is_url
from argonne.data.corpus.shards import (
    DEFAULT_GLOBS,
    OnBad,
    Shard,
    find_shards,
    fingerprint,
    matching_default,
    open_shard,
    open_shards,
    quarantine,
    quarantined,
    read_texts,
)
from argonne.data.errors import DataError, naming
from argonne.data.lanes.packing import Packed, SequenceStream
from argonne.data.lanes.plan import default_lanes
from argonne.data.lanes.reader import check_block_size
from argonne.data.lanes.state import DataPosition, LaneState
from argonne.data.mixture import LaneStream, Mixture, Weighted, parse_globs, states_of_source
from argonne.data.prefetch import Prefetcher
from argonne.data.tokens.encoder import Encoder, encode
from argonne.data.tokens.filters import REASONS, rejection
from argonne.data.tokens.tokenizer import (
    boundary_tokens,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from argonne.data.tokens.tokenizer_files import special_tokens, write_tokenizer
