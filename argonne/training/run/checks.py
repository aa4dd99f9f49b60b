"""What can be refused before any process is started, from the flags and the files that they name."""

from __future__ import annotations

import torch

from argonne.checkpoint import is_small, require_intact
from argonne.data import DataError
from argonne.kernels.dispatch import Backend, interprets
from argonne.models.replicas import check_kind
from argonne.parallel import Axis, Layout, choose_device, context_positions
from argonne.parallel.communication.layout import require_divisible
from argonne.parallel.data_parallel.kinds import check_shard
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_directory
from argonne.training.config import RunConfig
from argonne.training.run.beginning import check_beginning
from argonne.training.run.compilation import check_compile
from argonne.training.run.conflicts import check_meaning
from argonne.training.run.corpora import Corpora
from argonne.training.run.directory import read_run
from argonne.training.run.elsewhere import check_elsewhere
from argonne.training.run.model import ModelBuilder, check_own_model
from argonne.training.run.reproducible import check_reproducible, pin_threads
from argonne.training.run.shape import shape_of


def check(config: RunConfig, world_size: int, model: ModelBuilder | None = None) -> None:
    """Refuse what can be refused without peers: flags, layout, shape, data files, tokenizer path.

    ``model`` is as of ``pretrain``; what it is is seen once there are processes.
    """
    config.check()
    saved = read_run(config.run.output_dir)
    check_meaning(config, saved.identity if saved else None)
    layout = config.parallel.layout(world_size)
    check_kernels(config.training.kernels, choose_device(config.launch.device), config.training.precision)
    check_compile(config, layout, choose_device(config.launch.device), own_model=model is not None)
    plan = config.parallel.plan(layout)
    shape = elsewhere = None
    if model is not None:
        check_own_model(config)
    else:
        shape = shape_of(config)
        elsewhere = check_beginning(config)
        shape.check_layout(layout)
        plan.check_layers(shape.num_hidden_layers)
    check_reproducible(config, layout, shape)
    pin_threads(config)
    check_kind(config.parallel.kind, plan.schedule if layout.pipeline > 1 else "")
    check_shard(config.parallel.kind, config.parallel.fsdp_shard, layout.data * layout.context)
    if saved is None:  # a run that is continued keeps its global batch
        plan.check_micro_batches(config.training.gradient_accumulation_steps)
    check_sequence(config.data.block_size, layout)
    if (path := config.data.tokenizer_path) is not None:
        if not path.is_dir():
            raise DataError(
                f"tokenizer_path={str(path)!r} does not exist; legal: the directory of a Hugging Face tokenizer"
            )
        require_intact(path, is_small)
    identity = saved.identity if saved else None
    data = Corpora.open(config.data, config.training.seed, identity, whole=elsewhere is not None)
    if elsewhere is not None:
        check_elsewhere(config, elsewhere, data)
    require_directory("output_dir", config.run.output_dir)


def check_kernels(kernels: Backend, device: torch.device, precision: str) -> None:
    """Raise ``ArgonneError`` unless that backend can compute on ``device`` with that ``--precision``."""
    if kernels != "triton":
        return
    if device.type != "cuda" and not interprets():
        raise ArgonneError(f"kernels='triton' needs a GPU, but the device is {device}; legal: auto, torch")
    if precision == "fp64":
        raise ArgonneError("kernels='triton' does not compute in precision='fp64'; legal: auto, torch")


def check_sequence(block_size: int, layout: Layout) -> None:
    """Raise ``LayoutError`` unless a sequence of ``block_size`` can be shared out as ``layout`` asks."""
    context_positions(block_size, Axis("context", layout.context))
    if layout.sequence_parallel:
        local = block_size // layout.context
        name = "block_size / context_parallel" if layout.context > 1 else "block_size"
        require_divisible(name, local, "tensor_parallel", layout.tensor)
