"""A short reproducible training run at any layout, and the layouts and options that are compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from argonne.checkpoint import weight_pieces
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.families import decoder_family
from argonne.models.recompute import Recompute
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.pipeline_parallel.plan import SCHEDULES, PipelinePlan
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.batch_shape import BatchShape
from argonne.training.optimizer import Optimizer, build_muon, build_optimizer, moments_of
from argonne.training.step import Learner, StepResult, train_step
from tests.whole import Parts

SEQUENCE, VOCABULARY, HEADS = 40, 1003, 8  # a divisor of the loss that is no power of two
KINDS = ("replicate", "zero1", "fsdp")
CHOICES = (Recompute.NONE, Recompute.SELECTIVE, Recompute(2), Recompute.FULL)


@dataclass(frozen=True)
class Options:
    """What is trained, and how; the same at every layout."""

    precision: str = "fp32"
    tied: bool = True
    key_values: int = 4
    """Key-value heads, of 8 heads."""
    blocks: int | None = None
    """Canonical blocks; None: as many as key-value heads."""
    sequences: int = 2
    """Of a micro-batch."""
    documents: bool = False
    """Sequences are packed of documents that do not see each other."""
    recompute: Recompute = Recompute.NONE
    accumulation: int = 4
    """Micro-batches of a replica, at least; a pipeline's replica has as many as it has ranks, or more."""
    family: str = "llama"
    """qwen3: with norms of heads, and biases in all of attention."""
    muon: str | None = None
    """The dtype of Muon's iterations, where it is the optimizer."""

    @property
    def config(self) -> ArgonneConfig:
        # Sizes that no vector of a processor divides, nor a rank's share of them.
        return ArgonneConfig(
            hidden_size=50,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=self.key_values,
            vocab_size=VOCABULARY,
            intermediate_size=152,
            max_position_embeddings=SEQUENCE,
            head_dim=10,
            tie_word_embeddings=self.tied,
            **decoder_family(self.family).features(self.family == "qwen3"),
        )

    def __str__(self) -> str:
        heads = "MHA" if self.key_values == HEADS else "GQA"
        words = [self.precision, "tied" if self.tied else "untied", heads, f"{self.accumulation} of {self.sequences}"]
        words += [] if self.blocks is None else [f"{self.key_values} KV heads in {self.blocks} blocks"]
        words += [] if self.muon is None else [f"muon in {self.muon}"]
        return ", ".join([*words, *(["documents"] * self.documents), f"recompute {self.recompute}", self.family])


@dataclass(frozen=True)
class Place:
    """Where it is trained."""

    layout: Layout = Layout()  # noqa: RUF009 - frozen
    schedule: str = "1f1b"
    kind: str = "replicate"

    def micro_batches(self, options: Options) -> int:
        """Of a step, on all replicas together."""
        return self.layout.data * max(options.accumulation, self.layout.pipeline)

    def __str__(self) -> str:
        schedule = f", {self.schedule}" if self.layout.pipeline > 1 else ""
        return f"{self.layout}{schedule}" + (f", {self.kind}" if self.layout.data > 1 else "")


ALONE = Place()


def train(
    groups: ProcessGroups, place: Place, options: Options, micro_batches: int, steps: int
) -> tuple[list[StepResult], Parts]:
    """What each step tells; this rank's parts of the weights, and of both moments under their names, after the last."""
    plan = PipelinePlan.of(place.schedule, groups.pipeline.size)  # type: ignore[arg-type]
    execution = Execution(
        groups,
        PRECISIONS[options.precision],
        plan=plan,
        recompute=options.recompute,
        reproducible=options.blocks or options.key_values,
    )
    model, replicas = build_replicas(partial(ArgonneModel, options.config), execution, place.kind)  # type: ignore[arg-type]
    optimizer: Optimizer = build_optimizer(replicas.parameters, weight_decay=0.1, pinned=True)
    if options.muon is not None:
        dtype = getattr(torch, options.muon)
        optimizer = build_muon(replicas.parameters, groups, weight_decay=0.1, dtype=dtype, pinned=True)
    learner = Learner(model=model, replicas=replicas, optimizer=optimizer)
    learner.initialise(seed=3)
    shape = BatchShape(options.sequences, micro_batches // groups.data.size, groups.data.size, SEQUENCE)
    shape.check_reproducible(place.kind)  # type: ignore[arg-type]
    own = torch.from_numpy(shape.assignment(place.kind, reproducible=True).samples(groups.data.rank, 0))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(11)
    told = []
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (shape.global_batch, SEQUENCE + 1), generator=generator)[own]
        documents = (ids[..., :-1] % 17 == 0).long().cumsum(-1) if options.documents else None
        batch = Batch(ids[..., :-1], ids[..., 1:], documents, divisor=shape.global_batch * SEQUENCE)
        told.append(train_step(learner, batch, CrossEntropyLoss(), 1e-2 / (1 + step), gradient_clip=1.0))
    pieces = [*weight_pieces(learner.parameters), *moments_of(learner.optimizer, learner.parameters)]
    return told, [(replace(piece.region, name=piece.name), piece.part.clone()) for piece in pieces]


TENSOR = [Place(Layout(tensor=size, sequence_parallel=share)) for size in (2, 4) for share in (False, True)]
EIGHT = [Place(Layout(tensor=8, sequence_parallel=share)) for share in (False, True)]
"""Of eight blocks alone."""
PIPELINE = [Place(Layout(pipeline=2), schedule) for schedule in SCHEDULES]
DATA = [Place(Layout(data=size), kind=kind) for size in (2, 4) for kind in KINDS]
PRODUCTS = [
    Place(Layout(tensor=2, pipeline=2, data=2)),
    Place(Layout(tensor=2, pipeline=2, data=2, sequence_parallel=True), "zb", "zero1"),
    Place(Layout(tensor=2, pipeline=2, data=2), "interleaved", "fsdp"),
]


def option_sets() -> list[Options]:
    """Eight, such that each two values of different options are together in two of them (an orthogonal array)."""
    return [
        Options(
            precision=("fp32", "bf16")[a],
            tied=not b,
            key_values=(4, HEADS)[c],
            sequences=(2, 1)[a ^ b],
            documents=bool(a ^ c),
            recompute=CHOICES[2 * (b ^ c) + a],
            accumulation=(4, 1)[a ^ b ^ c],
        )
        for a, b, c in product((0, 1), repeat=3)
    ]


def every_place() -> list[Place]:
    return [ALONE, *TENSOR, *EIGHT, *PIPELINE, *DATA, *PRODUCTS]


def every_case() -> Iterator[tuple[Place, Options]]:
    """Every layout with every option set that it can have, and with one of another family."""
    sets = option_sets()
    for number, place in enumerate(every_place()):
        other = replace(sets[(5 * number) % 8], family="qwen3")
        yield from ((place, options) for options in (*sets, other) if _is_legal(place, options))


def long_cases() -> Iterator[tuple[Place, Options]]:
    """Every layout with two of the sets, taken in turns, which differ in precision, tying, heads and accumulation."""
    sets = option_sets()
    for number, place in enumerate(every_place()):
        for options in (sets[number % 4], sets[7 - number % 4]):
            if _is_legal(place, options):
                yield place, options


def _is_legal(place: Place, options: Options) -> bool:
    return (options.blocks or options.key_values) >= place.layout.tensor


SHARED_HEADS = [
    Options(key_values=2, blocks=8, accumulation=1, family="qwen3"),
    Options(key_values=1, blocks=8, precision="bf16", tied=False, documents=True, sequences=1),
    Options(key_values=4, blocks=8, recompute=Recompute.SELECTIVE, family="qwen3"),
]


def shared_heads_cases() -> Iterator[tuple[Place, Options]]:
    """Layouts in which ranks, or canonical blocks of one rank, share a key-value head."""
    places = [*TENSOR, *EIGHT, Place(Layout(tensor=4, data=2, sequence_parallel=True), kind="fsdp"), PRODUCTS[1]]
    return product(places, SHARED_HEADS)


def few_cases() -> list[tuple[Place, Options]]:
    """One option set for each of some layouts: every axis and kind, and every value of every option."""
    cases = {
        ALONE: 6,
        TENSOR[0]: 3,
        TENSOR[1]: 1,
        TENSOR[2]: 5,
        PIPELINE[0]: 4,
        PIPELINE[2]: 2,
        DATA[1]: 0,
        DATA[2]: 3,
        DATA[3]: 7,
        PRODUCTS[1]: 6,
    }
    sets, others = option_sets(), (TENSOR[1], TENSOR[2], DATA[2], PRODUCTS[1])
    shared = [(TENSOR[0], SHARED_HEADS[1]), (EIGHT[1], SHARED_HEADS[0])]
    families = {place: "qwen3" if place in others else "llama" for place in cases}
    return [*((place, replace(sets[n], family=families[place])) for place, n in cases.items()), *shared, *muon_cases()]


def muon_cases() -> list[tuple[Place, Options]]:
    """Matrices that are cut by ranks, by rows of replicas, and by both, with heads that ranks share."""
    shared = replace(SHARED_HEADS[2], muon="float32")
    in_bfloat16 = Options(accumulation=1, muon="bfloat16")
    return [(TENSOR[3], shared), (PRODUCTS[2], in_bfloat16), (DATA[4], in_bfloat16)]
