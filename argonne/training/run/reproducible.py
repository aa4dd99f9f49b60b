"""What a reproducible run (``--reproducible``) asks of its flags, its process and its libraries; all else is refused.

The way it computes is in ``argonne.parallel``: ``ProcessGroups.in_blocks`` is all that turns it on.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from argonne.models import ArgonneConfig, ModelConfig
from argonne.models.families.argonne1 import Argonne1Config, require_not_reproducible
from argonne.parallel import Layout, LayoutError
from argonne.parallel.communication.layout import divisors
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.run.shape import shape_of

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_LEGAL = (":4096:8", ":16:8")


def blocks_of(config: RunConfig) -> int | None:
    """The canonical blocks along the tensor axis; None where the run is not reproducible.

    Raises:
        ArgonneError: the model is Argonne 1.x, which has no such blocks.
    """
    parallel = config.parallel
    if not parallel.reproducible:
        return None
    if parallel.reproducible_blocks is not None:
        return parallel.reproducible_blocks
    shape = shape_of(config)
    if isinstance(shape, Argonne1Config):
        require_not_reproducible()
    return shape.num_key_value_heads


def reproducible_identity(config: RunConfig) -> dict[str, Any] | None:
    """What the bits of a reproducible run follow from besides the rest of its identity: JSON values."""
    if not config.parallel.reproducible:
        return None
    return {"blocks": blocks_of(config), "micro_batch": config.training.initial_batch_size}


def check_reproducible(config: RunConfig, layout: Layout, shape: ModelConfig | None) -> None:
    """Refuse what has not the same bits at every layout; ``shape`` is None for a model of one's own."""
    blocks = blocks_of(config)
    if blocks is None:
        return
    if isinstance(shape, Argonne1Config):
        require_not_reproducible()
    if shape is None and config.parallel.reproducible_blocks is None:
        raise ArgonneError(
            "reproducible=True needs --reproducible-blocks for a model of one's own; legal: a number that divides "
            "whatever its tensor-parallel layers share out"
        )
    if blocks < 1:
        raise ArgonneError(f"reproducible_blocks={blocks} is not legal; legal: 1 or more")
    if layout.context > 1:
        raise ArgonneError(
            f"context_parallel={layout.context} is not reproducible: gradients of keys and values are summed over its "
            "processes in another order; legal with --reproducible: 1"
        )
    if layout.uneven_shards:
        raise ArgonneError(
            "uneven_shards=True conflicts with reproducible=True, whose blocks are equal; legal: one of them"
        )
    if config.parallel.fsdp_shard is not None:
        raise ArgonneError(
            f"fsdp_shard={config.parallel.fsdp_shard} is not reproducible: its groups are summed in another order; "
            "legal with --reproducible: --fsdp alone"
        )
    if shape is not None:
        _check_blocks(blocks, layout.tensor, shape)
    tokens = config.training.initial_batch_size * config.data.block_size
    if tokens % blocks:
        raise ArgonneError(
            f"initial_batch_size x block_size = {tokens} tokens are not {blocks} equal blocks of a reproducible sum; "
            f"legal: a multiple of {blocks} (or another --reproducible-blocks)"
        )


def _check_blocks(blocks: int, tensor: int, shape: ArgonneConfig) -> None:
    """Refuse blocks that the layers cannot be cut into, and ranks that cannot have a subtree of them."""
    heads, key_values = shape.num_attention_heads, shape.num_key_value_heads
    widths = {
        "num_attention_heads x head_dim": heads * shape.head_dim,
        "num_key_value_heads x head_dim": key_values * shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    if shape.blocks_of_head(blocks) > 1:
        del widths["num_key_value_heads x head_dim"]
    for field, width in widths.items():
        if width % blocks:
            raise LayoutError(
                f"{field} = {width} is not cut into reproducible_blocks={blocks} equal blocks; legal: a divisor of "
                "each of " + ", ".join(f"{name} = {value}" for name, value in widths.items())
            )
    if shape.qk_norm and key_values % blocks and shape.blocks_of_head(blocks) == 1:
        raise LayoutError(
            f"reproducible_blocks={blocks} cuts heads, of which family={shape.family!r} norms each on its own; legal: "
            f"a divisor of num_key_value_heads={key_values}"
        )
    legal = [
        size
        for size in divisors(blocks)
        if (size == 1 or (blocks // size).bit_count() == 1)
        and not (heads % size or (key_values % size and shape.blocks_of_head(blocks) == 1))
    ]
    if tensor not in legal:
        raise LayoutError(
            f"tensor_parallel={tensor} does not give each process a subtree of the {blocks} blocks of a reproducible "
            f"run, and whole key-value heads ({key_values} in all); legal sizes: {', '.join(map(str, legal))}"
        )


def settle_process(device: torch.device) -> None:
    """Make this process compute as every other of a reproducible run does: one thread, deterministic kernels.

    Raises:
        ArgonneError: the environment asks for something else.
    """
    if device.type == "cpu":
        asked = os.environ.get("OMP_NUM_THREADS") or "1"
        if asked != "1":
            raise ArgonneError(
                f"OMP_NUM_THREADS={asked} conflicts with reproducible=True: how many threads share a product decides "
                "its order; legal: 1, or leave it out"
            )
        torch.set_num_threads(1)
        return
    if os.environ.setdefault(_CUBLAS, _CUBLAS_LEGAL[0]) not in _CUBLAS_LEGAL:
        raise ArgonneError(
            f"{_CUBLAS}={os.environ[_CUBLAS]} conflicts with reproducible=True; legal: {', '.join(_CUBLAS_LEGAL)}, or "
            "leave it out"
        )
    torch.use_deterministic_algorithms(True)


def pin_threads(config: RunConfig) -> None:
    """Before ranks are started: what they are given is not a share of the cores but one thread each."""
    if config.parallel.reproducible:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
