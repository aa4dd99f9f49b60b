"""Making the caches of ``--no-streaming``: one rank does it, while the others wait without losing patience."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from argonne.data import TokenCache, build_cache, open_cache
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import broadcast, collectively, gather_objects
from argonne.training.run.corpora import Corpora

_WORKING, _DONE = 0, 1


def token_caches(
    corpora: Corpora,
    tokenizer: PreTrainedTokenizerFast | None,
    boundary: tuple[int, int] | None,
    directory: Path,
    groups: ProcessGroups,
) -> list[TokenCache]:
    """The cache of each corpus, on every rank (collective); built on the first rank where they are missing.

    ``tokenizer`` and ``boundary``, the (BOS, EOS) ids put around each document, are read there alone. The caches are in
    ``directory``, on a disk that every rank sees, unless ``--cache-dir`` names another.
    """

    def tell(status: int) -> int:
        """The first rank says how it stands: a rank that is told so now and then does not give up on it."""
        return int(broadcast(torch.tensor(status, device=groups.device), groups.world).item())

    def build() -> list[Path]:
        if not groups.is_first:
            while tell(_WORKING) == _WORKING:
                pass
            return []
        assert tokenizer is not None
        try:
            return [
                build_cache(
                    part.shards,
                    tokenizer,
                    boundary,
                    corpora.flags.cache_dir or directory,
                    corpora.flags.num_proc,
                    corpora.flags.on_bad_shard,
                    tick=lambda: tell(_WORKING),
                    filters=corpora.flags.document_filters,
                ).path
                for part in corpora.parts
            ]
        finally:
            tell(_DONE)

    paths = gather_objects(collectively(build, groups.world), groups.world)[0]
    return collectively(lambda: [open_cache(path) for path in paths], groups.world)
