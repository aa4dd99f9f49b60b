"""The original's files: which of their forms one is in, and the whole tensors in it by their plain names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argonne.convert.progress import POSITION, STEP, TOKENS
from argonne.convert.stored import Progress, Stored, concatenated
from argonne.parallel.errors import ArgonneError

STATES = ("model_state_dict", "model_state", "state_dict", "model")
"""Under which of these a file has its tensors, if they are not all that it has."""
SHARDS = "tensor_parallel_shards"
EMBEDDING = {"argonne2": "embed_tokens.weight", "argonne1": "token_embedding.weight"}
"""The tensor by which each version is known."""

# Put before names, anywhere, by torch.compile and by DistributedDataParallel.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")
_COLUMN_PARALLEL = re.compile(r"\.(?:attn\.[qkv]_proj|mlp\.(?:gate|up)_proj)\.weight$")
_ROW_PARALLEL = re.compile(r"\.(?:attn\.o_proj|mlp\.down_proj)\.weight$")
_STAGE = re.compile(r"pipeline_stages\.(\d+)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class OldFile:
    """A file of the original, its tensors whole."""

    version: str
    """``argonne1`` or ``argonne2``."""
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any]
    """What the file says of the model's shape; often nothing."""
    progress: Progress


def read_old(loaded: Any, take_first: bool = False) -> OldFile:
    """What a file of the original holds, whichever form it is in.

    With ``take_first`` rank 0 is believed where tensor-parallel ranks differ in what each has whole.

    Raises:
        ArgonneError: it holds no weights, a part of them, or two of anything.
    """
    if not isinstance(loaded, Mapping):
        raise ArgonneError(f"it holds a {type(loaded).__name__}; legal: a state dict, or a checkpoint that has one")
    shards = loaded.get(SHARDS)
    if shards:
        tensors = _merged(shards, loaded.get("world_size"), take_first)
    else:
        tensors = _whole_layers(_plain(_state(loaded)))
        _require_all_ranks(loaded, tensors)
    versions = [version for version, name in EMBEDDING.items() if name in tensors]
    if len(versions) != 1:
        both = " and ".join(map(repr, EMBEDDING.values()))
        raise ArgonneError(f"it has {'both' if versions else 'neither'} {both}; legal: the one of a model's version")
    config: Mapping[str, Any] = next(
        (loaded[name] for name in ("config", "model_config") if isinstance(loaded.get(name), Mapping)), {}
    )
    return OldFile(versions[0], tensors, config, _progress(loaded))


def _state(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a file: under one of the names for it, or the file itself."""
    named = [name for name in STATES if isinstance(loaded.get(name), Mapping) and loaded[name]]
    if len(named) > 1:
        raise ArgonneError(f"it has tensors under both {named[0]!r} and {named[1]!r}; legal: one of them")
    return loaded[named[0]] if named else loaded


def _plain(state: Any) -> dict[str, Stored]:
    """The tensors of a state dict without what wrappers put before their names."""
    if not isinstance(state, Mapping):
        raise ArgonneError(f"it has a {type(state).__name__} for a state dict; legal: tensors by name")
    found: dict[str, Stored] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor | Stored):
            if isinstance(key, str) and ("weight" in key or "embed" in key):
                raise ArgonneError(f"{key!r} is a {type(value).__name__}; legal: a tensor")
            continue  # a bare state dict may have numbers beside its tensors
        if not isinstance(key, str):
            raise ArgonneError(f"it has a tensor of the name {key!r}; legal: text")
        name = _WRAPPERS.sub("", key)
        if name in found:
            raise ArgonneError(f"it has {name!r} twice, with and without a prefix; legal: one form")
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_quantized):
            raise ArgonneError(f"{key!r} is sparse or quantised; legal: plain tensors")
        found[name] = Stored.of(value) if isinstance(value, Tensor) else value
    if not found:
        raise ArgonneError("it holds no tensors")
    return found


def _whole_layers(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Blocks by their number in the model, where a file has them by pipeline stage.

    While it trained in a pipeline, 1.x held each block twice, as ``blocks.N`` and in its stage: they must be one.
    """
    staged = {name: found for name in tensors if (found := _STAGE.fullmatch(name))}
    if not staged:
        return tensors
    sizes: dict[int, int] = {}
    for found in staged.values():
        stage, inner = int(found.group(1)), int(found.group(2))
        sizes[stage] = max(sizes.get(stage, 0), inner + 1)
    per_stage = max(sizes.values())
    whole = {name: tensor for name, tensor in tensors.items() if name not in staged}
    for stage in range(max(sizes)):
        if sizes.get(stage) != per_stage:
            raise ArgonneError(
                f"pipeline stage {stage} has {sizes.get(stage, 0)} blocks and another {per_stage}; legal: as many in "
                "each but the last"
            )
    for name, found in staged.items():
        plain = f"blocks.{int(found.group(1)) * per_stage + int(found.group(2))}.{found.group(3)}"
        if plain in whole and not torch.equal(whole[plain].load(), tensors[name].load()):
            raise ArgonneError(f"{plain!r} and {name!r} differ; legal: one block, or the same twice")
        whole[plain] = tensors[name]
    return whole


def _require_all_ranks(loaded: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    """Refuse the shard of one tensor-parallel rank, whose fellows were never saved."""
    size = loaded.get("world_size", 1)
    if not loaded.get("tensor_parallel") or not isinstance(size, int) or size <= 1:
        return
    query, norm = (tensors.get(f"blocks.0.{part}.weight") for part in ("attn.q_proj", "input_norm"))
    if query is not None and norm is not None and query.shape == (*norm.shape, *norm.shape):
        return  # whole after all: the original's queries are as wide as the model
    raise ArgonneError(
        f"it has the part of rank {loaded.get('rank', 0)} of {size} tensor-parallel ranks; the other {size - 1} parts "
        f"were never saved, and the model is lost with them; legal: a file with {SHARDS}"
    )


def _merged(shards: Any, world_size: Any, take_first: bool) -> dict[str, Stored]:
    """Whole tensors of the shards of all tensor-parallel ranks, in their order.

    Queries, keys, values, gate and up are cut by rows, attention's output and down by columns; embedding, head and
    norms each rank has whole, and all of them must have the same.
    """
    if not isinstance(shards, Sequence) or isinstance(shards, str):
        raise ArgonneError(f"its {SHARDS} is a {type(shards).__name__}; legal: a list of state dicts")
    if world_size is not None and world_size != len(shards):
        raise ArgonneError(f"it has {len(shards)} {SHARDS} and says world_size={world_size}; legal: one of each rank")
    ranks = [_whole_layers(_plain(shard)) for shard in shards]
    whole: dict[str, Stored] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        missing = [number for number, rank in enumerate(ranks) if name not in rank]
        if missing:
            raise ArgonneError(f"tensor {name!r} is missing in the shard of rank {missing[0]}")
        parts = [rank[name] for rank in ranks]
        if _COLUMN_PARALLEL.search(name):
            whole[name] = concatenated(name, parts, 0)
        elif _ROW_PARALLEL.search(name):
            whole[name] = concatenated(name, parts, 1)
        else:
            whole[name] = _same(name, parts, take_first)
    return whole


def _same(name: str, parts: Sequence[Stored], take_first: bool) -> Stored:
    """What each rank has whole: of the first, if all have the same."""
    first = parts[0].load()
    for rank, part in enumerate(parts[1:], 1):
        other = part.load()
        if first.shape != other.shape:
            raise ArgonneError(
                f"tensor {name!r} has the shape {list(first.shape)} on rank 0 and {list(other.shape)} on rank {rank}"
            )
        if not take_first and not torch.equal(first, other):
            far = (first.double() - other.double()).abs().max().item()
            raise ArgonneError(
                f"tensor {name!r} is whole on every rank, and differs by up to {far:.3g} between rank 0 and rank "
                f"{rank}: they drifted apart in training, and no single model computes what they did together; legal: "
                "--take-first-rank, which takes rank 0's, as the original did"
            )
    return parts[0]


def _progress(loaded: Mapping[str, Any]) -> Progress:
    """How far a file says its training was."""

    def count(*names: str) -> int | None:
        found = next((loaded[name] for name in names if type(loaded.get(name)) is int), None)
        return found if found is None or found >= 0 else None

    position = loaded.get(POSITION)
    said = {name: loaded[name] for name in (*STEP, *TOKENS, POSITION) if name in loaded}
    return Progress(count(*STEP), count(*TOKENS), position if isinstance(position, Mapping) else None, said)
