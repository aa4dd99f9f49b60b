"""What recomputation costs and saves, and casting weights once a step: ``python -m benchmarks.recomputation``

One process and one thread on a CPU, bfloat16 over float32 weights; a step has several micro-batches. The contestants
take their steps in turns, and each is compared with the first within every round; time is that of the processor, which
others on the machine cannot take. Losses and weights of all must be the same to the bit. The bytes are those of the
closed forms (``argonne/models/activations.py``).
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.activations import Micro, kept_by_blocks
from argonne.models.recompute import Recompute
from argonne.parallel import ProcessGroups
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from benchmarks.report import environment, table, write_json

VOCABULARY = 4096


@dataclass(frozen=True)
class Options:
    """What is trained, and how often."""

    rounds: int = 12
    """Steps of each contestant, besides one that warms up."""
    sequences: int = 2
    """Of a micro-batch."""
    sequence: int = 128
    micro_batches: int = 4
    hidden: int = 1024
    layers: int = 2
    output: Path = Path(__file__).parent / "results" / "recomputation_cpu.json"
    """Where the JSON goes."""


@dataclass(frozen=True)
class Contestant:
    """One way to take a step."""

    recompute: str
    copies: bool = True

    def __str__(self) -> str:
        return f"{self.recompute}, cast {'once a step' if self.copies else 'at every call'}"


CONTESTANTS = [Contestant("full", copies=False), *(Contestant(word) for word in ("full", "2", "selective", "none"))]


class Racer:
    """A model and its optimizer, taking steps in the way of a contestant."""

    def __init__(self, contestant: Contestant, options: Options) -> None:
        execution = Execution(ProcessGroups.single(), PRECISIONS["bf16"], recompute=Recompute.of(contestant.recompute))
        config = ArgonneConfig(
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=options.sequence,
            initializer_range=0.02,
        )
        build = partial(ArgonneModel, config)
        model, replicas = build_replicas(build, execution, "replicate")
        if not contestant.copies:
            replicas.copies = []
        optimizer = build_optimizer(replicas.parameters, 0.1)
        self.learner = Learner(model=model, replicas=replicas, optimizer=optimizer)
        self.learner.initialise(0)
        assert isinstance(model, ArgonneModel)
        micro = Micro(execution, options.sequences, options.sequence)
        self.activations = kept_by_blocks(model.widths, micro, range(len(model.blocks)))
        self.copies = sum(module.working.bytes for module in replicas.copies)
        self.seconds: list[float] = []

    def step(self, number: int, options: Options) -> float:
        shape = options.micro_batches, options.sequences, options.sequence + 1
        ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(number))
        batch = Batch(ids[..., :-1], ids[..., 1:], divisor=float(ids[..., 1:].numel()))
        began = time.process_time()
        loss = train_step(self.learner, batch, CrossEntropyLoss(), 1e-3, 1.0).loss
        self.seconds.append(time.process_time() - began)
        return loss


def main(options: Options) -> None:
    torch.set_num_threads(1)
    racers = {str(contestant): Racer(contestant, options) for contestant in CONTESTANTS}
    first, *others = racers.values()
    for number in range(options.rounds + 1):
        losses = {racer.step(number, options) for racer in racers.values()}
        if len(losses) > 1:
            sys.exit(f"step {number}: the losses differ: {losses}")
    for racer in others:
        for one, another in zip(first.learner.parameters, racer.learner.parameters, strict=True):
            if not torch.equal(one.parameter, another.parameter):
                sys.exit(f"{one.name} differs")
    found = {}
    for name, racer in racers.items():
        ratios = [own / base for own, base in zip(racer.seconds[1:], first.seconds[1:], strict=True)]
        found[name] = {
            "ratio": statistics.median(ratios),
            "seconds": statistics.median(racer.seconds[1:]),
            "activations_bytes": racer.activations,
            "copies_bytes": racer.copies,
        }
    machine = environment(torch.device("cpu"))
    print(f"{machine['cpu']}, torch {machine['torch']}, one thread; the same losses and weights to the bit")
    rows = [
        (name, f"{own['ratio']:.3f}", f"{own['seconds']:.3f}", *(f"{own[key] / 2**20:.2f}" for key in list(own)[2:]))
        for name, own in found.items()
    ]
    print(table(("recompute", "time of the first", "s", "activations MiB", "copies MiB"), rows))
    write_json(options.output, {"environment": machine, "contestants": found})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
