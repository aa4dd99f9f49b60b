"""A small run on Parquet text, for tests of what happens within one: its flags, what is settled, and its trainer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne.checkpoint import MOMENTS
from argonne.parallel import ProcessGroups
from argonne.parallel.tensor_parallel.precision import resolve_precision
from argonne.training.batch_shape import BatchShape
from argonne.training.config import DataFlags, ModelFlags, RunConfig, RunFlags, TrainingFlags
from argonne.training.run.setup import Workload, prepare
from argonne.training.state import TrainingState
from argonne.training.trainer import Trainer
from tests.integration.runs import write_corpus

SEED = 5
SHAPE: dict[str, Any] = {
    "preset": "demo",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}


@dataclass(frozen=True)
class SmallRun:
    """What all runs of a test file share: text, a tokenizer and what was settled of them."""

    config: RunConfig
    workload: Workload

    @classmethod
    def settle(cls, directory: Path) -> SmallRun:
        """Write the text and train the tokenizer; ``directory`` becomes the parent of every run."""
        corpus = write_corpus(directory / "corpus", documents=40, shards=2)
        config = RunConfig(
            model=ModelFlags(**SHAPE),
            data=DataFlags(data_glob=(f"{corpus}/*.parquet",), block_size=16, data_lanes=3),
            training=TrainingFlags(
                total_steps=5,
                initial_batch_size=2,
                gradient_accumulation_steps=3,
                learning_rate=3e-3,
                min_learning_rate=1e-4,
                warmup_steps=2,
                seed=SEED,
                disable_gradient_checkpointing=True,
            ),
            run=RunFlags(directory / "run", save_interval=2, sample_tokens=3, log_interval=1),
        )
        return cls(config, prepare(config, ProcessGroups.single()))

    def configured(self, directory: Path, training: dict[str, Any], **run: Any) -> RunConfig:
        """The flags of a run in ``directory`` with other values of ``training`` and ``run``."""
        directory.mkdir(exist_ok=True)
        return replace(
            self.config,
            training=replace(self.config.training, **training),
            run=replace(self.config.run, output_dir=directory, **run),
        )

    def trainer(self, config: RunConfig, groups: ProcessGroups, checkpoint: Path | None = None) -> Trainer:
        """The trainer of a run that begins, or that goes on from ``checkpoint``."""
        t = config.training
        workload = replace(self.workload, precision=resolve_precision(t.precision, groups.device))
        state = TrainingState.build(config, workload, groups)
        if checkpoint is None:
            state.initialise(t.seed)
        else:
            state.restore(checkpoint)
        accumulation = t.gradient_accumulation_steps // groups.data.size
        shape = BatchShape(t.initial_batch_size, accumulation, groups.data.size, config.data.block_size)
        return Trainer(config, workload, state, shape)


def held(state: TrainingState) -> dict[str, Tensor]:
    """Copies of the weights and moments of this rank."""
    found = {}
    for sharded in state.parameters:
        (name, *_) = (region.name for region in sharded.spec.regions)
        found[name] = sharded.parameter.detach().clone()
        for moment in MOMENTS:
            found[f"{name}.{moment}"] = state.optimizer.state[sharded.parameter][moment].clone()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the bit, but that anything that is not a number equals any other."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=message)
