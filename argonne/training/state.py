"""What a run is at one moment: weights, moments, the step, and the place in the data. Saved whole, restored whole."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

import argonne
from argonne.checkpoint import (
    CheckpointError,
    load_pieces,
    load_trainer,
    save_checkpoint,
    weight_pieces,
)
from argonne.checkpoint.format import TRAINER
from argonne.data import LaneState, special_tokens, write_tokenizer
from argonne.files import write_json
from argonne.models import Execution, build_replicas
from argonne.parallel import ProcessGroups, ShardedParameter
from argonne.parallel.communication.collectives import collectively, gather_objects
from argonne.training.config import RunConfig, TrainingFlags
from argonne.training.loss_scale import LossScale
from argonne.training.optimizer import Optimizer, build_muon, build_optimizer, moments_of
from argonne.training.run.file import Search
from argonne.training.run.flags_json import flags_to_json
from argonne.training.run.identity import dtype_name
from argonne.training.run.kept_files import KeptFiles
from argonne.training.run.setup import Workload
from argonne.training.schedule import Schedule
from argonne.training.step import Learner


@dataclass(kw_only=True)
class TrainingState(Learner):
    """Everything that changes from step to step, on one rank."""

    schedule: Schedule
    tokens: int = 0
    """Target tokens trained on."""
    next_sample: int = 0
    """The number of the next global sample."""
    lanes: dict[int, LaneState] = field(default_factory=dict)
    """The state of each lane that this rank reads; empty where none was read yet."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """What was changed on the way, each with the last ``step`` before it and a ``text``."""
    search: Search | None = None
    """How the run's micro-batch was found, if it was searched for."""
    kept: KeptFiles | None = None
    """What checkpoints keep of the directory that the run began with, if it began with one; on the first rank."""

    @classmethod
    def build(cls, config: RunConfig, workload: Workload, groups: ProcessGroups) -> TrainingState:
        """Allocate the model and its optimizer; the weights are still empty."""
        t = config.training
        plan = config.parallel.plan(groups.layout)
        kind, shard = config.parallel.kind, config.parallel.fsdp_shard
        compiled = workload.conditions["compile"]
        execution = Execution(groups, workload.precision, t.kernels, plan, config.recompute, compiled)
        torch.manual_seed(t.seed)  # for a model that draws values itself; ours are drawn by name
        model, replicas = build_replicas(workload.model.build, execution, kind, shard)
        optimizer = optimizer_of(t, replicas.parameters, groups)
        loss_scale = LossScale.of(t.precision, t.initial_loss_scale)
        return cls(
            model=model, replicas=replicas, optimizer=optimizer, schedule=t.learning_rates, loss_scale=loss_scale
        )

    @torch.no_grad()
    def begin_with(self, directory: Path) -> None:
        """Begin with the weights of ``directory``, of which each rank reads what it holds (collective)."""
        pieces = weight_pieces(self.parameters)
        collectively(lambda: load_pieces(directory, pieces, verify=False), self.model.groups.world)
        self.replicas.publish()

    @torch.no_grad()
    def restore(self, checkpoint: Path, reset_optimizer: bool = False, rewarmup_steps: int = 0) -> None:
        """Become exactly what ``checkpoint`` says, whatever layout wrote it.

        With ``reset_optimizer`` the moments begin anew, and the learning rate warms up over ``rewarmup_steps``.
        """
        saved = load_trainer(checkpoint)
        try:
            self.step, self.tokens = saved["step"], saved["tokens"]
            self.next_sample = saved["data"]["next_sample"]
            self.lanes = {int(n): LaneState.from_dict(s) for n, s in saved["data"]["lanes"].items()}
            rewarmup = {name: saved["schedule"][name] for name in ("rewarmup_after", "rewarmup_steps")}
            updates = saved["optimizer_step"]
            if self.loss_scale.is_dynamic and (kept := saved.get("loss_scale")):
                self.loss_scale = replace(self.loss_scale, **kept)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{str(checkpoint / TRAINER)!r} is not complete: {error!r}") from error
        load_pieces(checkpoint, weight_pieces(self.parameters), verify=False)
        self.replicas.publish()
        if reset_optimizer:
            rewarmup = {"rewarmup_after": self.step, "rewarmup_steps": rewarmup_steps}
        else:
            load_pieces(checkpoint, moments_of(self.optimizer, self.parameters), verify=False)
            for sharded in self.parameters:
                self.optimizer.state[sharded.parameter]["step"].fill_(updates)
        self.schedule = replace(self.schedule, **rewarmup)

    def all_lanes(self) -> dict[int, LaneState]:
        """The state of every lane, whichever rank reads it (collective)."""
        lanes: dict[int, LaneState] = {}
        for part in gather_objects(self.lanes, self.model.groups.world):
            lanes |= part
        return {lane: lanes[lane] for lane in sorted(lanes)}

    def save(self, config: RunConfig, workload: Workload, lanes: dict[int, LaneState], global_batch: int) -> Path:
        """Write the checkpoint of this step (collective), and return its directory."""
        groups = self.model.groups

        def write_rest(directory: Path) -> None:
            assert workload.tokenizer is not None
            block_size, dtype = config.data.block_size, dtype_name(workload.precision.parameters)
            if self.kept is not None:
                self.kept.write(directory, dtype)
            else:
                tokens = write_tokenizer(workload.tokenizer, directory, workload.boundary, block_size)
                # The positions that were trained; the run's identity keeps what its flags made of the shape.
                write_json(directory / "config.json", self.model.config_json(block_size, tokens, dtype))
                write_json(directory / "generation_config.json", tokens)
            write_json(directory / TRAINER, self._trainer(config, workload, lanes, global_batch))

        return save_checkpoint(
            config.run.output_dir,
            self.step,
            weight_pieces(self.parameters),
            moments_of(self.optimizer, self.parameters),
            write_rest,
            groups,
        )

    def of_run(self, config: RunConfig, workload: Workload, global_batch: int) -> dict[str, Any]:
        """What the run is, and in which layout and by which versions it is computed: JSON values."""
        return {
            "global_batch": global_batch,
            "layout": dataclasses.asdict(self.model.groups.layout),
            "identity": workload.identity.to_json(),
            "conditions": workload.conditions,
            "changes": self.changes,
            "search": None if self.search is None else dataclasses.asdict(self.search),
            "flags": flags_to_json(config),
            "versions": versions(),
        }

    def _trainer(
        self, config: RunConfig, workload: Workload, lanes: dict[int, LaneState], global_batch: int
    ) -> dict[str, Any]:
        first, scale = self.optimizer.state[self.parameters[0].parameter]["step"], self.loss_scale
        kept_scale = {"scale": scale.scale, "steps_since_change": scale.steps_since_change}
        assert workload.tokenizer is not None
        return {
            "step": self.step,
            "tokens": self.tokens,
            "optimizer_step": int(first.item()),
            "schedule": dataclasses.asdict(self.schedule),
            **({"loss_scale": kept_scale} if scale.is_dynamic else {}),
            "data": {
                "next_sample": self.next_sample,
                "shards": [shard.path.name for shard in workload.data.shards],
                "lanes": {str(lane): state.to_dict() for lane, state in lanes.items()},
            },
            # Nothing random is carried from step to step: initial weights and samples are drawn by seed and step.
            "rng": {"seed": config.training.seed},
            **self.of_run(config, workload, global_batch),
            # The directory's tokenizer names the run's boundary tokens instead.
            "special_tokens": special_tokens(workload.tokenizer),
        }


def optimizer_of(flags: TrainingFlags, parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> Optimizer:
    """That of the flags (collective).

    Raises:
        ArgonneError: the model has nothing for it to update.
    """
    given, pinned = (parameters, flags.weight_decay, flags.betas, flags.adam_epsilon), groups.reproducible
    if flags.optimizer == "adamw":
        return build_optimizer(*given, pinned=pinned)
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[flags.muon_precision]
    return build_muon(given[0], groups, *given[1:], momentum=flags.muon_momentum, dtype=dtype, pinned=pinned)


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "argonne": argonne.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
