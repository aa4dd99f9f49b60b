"""Before a reproducible run begins, the facts of the libraries that it rests on are tried where it is to run."""

from __future__ import annotations

import functools
import platform
from dataclasses import replace
from pathlib import Path

import torch

from argonne.kernels.swiglu import VECTOR
from argonne.models import ArgonneConfig
from argonne.parallel import Precision, ProcessGroups
from argonne.parallel.communication.collectives import collectively
from argonne.parallel.errors import ArgonneError
from argonne.training.config import RunConfig
from argonne.training.run.facts import FACTS, Sizes
from argonne.training.run.reproducible import blocks_of


def require_facts(config: RunConfig, groups: ProcessGroups, precision: Precision, own_model: bool) -> None:
    """Refuse a reproducible run where its libraries do not compute as it needs them to (collective).

    Raises:
        ArgonneError: on every rank, all that does not hold.
    """
    if not groups.reproducible:
        return
    sizes = sizes_of(config, groups.device, precision, own_model)
    collectively(functools.partial(try_facts, sizes), groups.world)


def try_facts(sizes: Sizes) -> None:
    """Raise ``ArgonneError`` unless all of ``FACTS`` hold here; random numbers drawn elsewhere stay as they are."""
    broken = [text for text, holds in FACTS.items() if not holds(sizes)]
    if broken:
        raise ArgonneError(
            f"reproducible=True cannot hold on this machine: {'; '.join(broken)} (torch {torch.__version__}, "
            f"{_machine(sizes.device)}); legal: leave the flag out"
        )


def sizes_of(config: RunConfig, device: torch.device, precision: Precision, own_model: bool) -> Sizes:
    """Those of the flags; of a model of one's own, which they do not tell, the defaults. On a CPU not too large."""
    blocks, sequence = blocks_of(config) or 1, config.data.block_size
    found = Sizes(
        device,
        precision,
        config.training.kernels,
        blocks,
        config.training.initial_batch_size,
        sequence,
        documents=config.data.document_mask,
    )
    if not own_model:
        found = _with_shape(found, config.model.resolve(sequence))
    return found if device.type == "cuda" else _small(found)


def _with_shape(sizes: Sizes, shape: ArgonneConfig) -> Sizes:
    key_values = shape.num_key_value_heads * shape.blocks_of_head(sizes.blocks)  # as attention has them
    return replace(
        sizes,
        hidden=shape.hidden_size,
        width=shape.intermediate_size // sizes.blocks,
        heads=shape.num_attention_heads // key_values,
        key_values=key_values,
        head_dim=shape.head_dim,
    )


def _small(sizes: Sizes) -> Sizes:
    """What a CPU does in a moment. It computes heads, rows and features in the same way however many there are."""
    heads, key_values, compute = min(sizes.heads, 2), min(sizes.key_values, 2), sizes.precision.compute
    slow = compute == torch.float16  # which few CPUs multiply
    most = {torch.float16: 1 << 22, torch.float64: 1 << 27}.get(compute, 1 << 29)
    of_pair = heads * key_values * sizes.head_dim
    longest = next(n for n in (768, 256, 64, 16) if n == 16 or of_pair * n * n < most)
    return replace(
        sizes,
        blocks=min(sizes.blocks, 4),
        batch=min(sizes.batch, 2),
        sequence=min(sizes.sequence, longest),
        hidden=min(sizes.hidden, 256 if slow else 1024),
        width=sizes.width if sizes.width < 256 else 256 + sizes.width % VECTOR,
        heads=heads,
        key_values=key_values,
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
