"""The flags of training: the schedule, the batch, what is minimised and by what, and the numerics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from argonne.kernels import Backend
from argonne.parallel import Objective
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_share, require_whole
from argonne.training.muon import MOMENTUM
from argonne.training.optimizer import BETAS, EPSILON
from argonne.training.schedule import Kind, Schedule, Shape

MOST_STEPS = 2**63 - 1
LEAST_EPSILON = 1e-37
"""The smallest epsilon of AdamW: the smallest normal number of float32 is a ninth of it."""
MOST_SEED = 2**64 - 1
"""The largest seed of PyTorch's generators; that of a sample is the run's plus the step."""


@dataclass(frozen=True)
class TrainingFlags:
    """The schedule, the batch and the numerics."""

    total_steps: int = 4_000_000
    """Optimizer steps of the whole run; the schedule ends there."""
    initial_batch_size: int = 512
    """Sequences of a micro-batch on each data-parallel rank."""
    min_batch_size: int = 4
    """The smallest micro-batch that a new run tries, where larger ones do not fit into memory."""
    memory_limit: float | None = None
    """GiB that a rank may use: a new run's micro-batch is halved until its step needs no more. On a CPU the whole
    process counts; on a GPU what PyTorch allocates there, and the limit holds while the run goes on
    [on a CPU a rank's share of what is free; on a GPU all of it]."""
    gradient_accumulation_steps: int = 4
    """Micro-batches of an optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 1e-5
    """Where the warm-up begins and the decay ends."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    schedule: Kind = "cosine"
    """How the learning rate falls after the warm-up: cosine or linear from there to the end, wsd (it stays at its peak
    up to the last --decay-steps), or constant."""
    decay_steps: int | None = None
    """Of --schedule wsd: the last steps, in which the learning rate falls; 0 for a run to branch from
    [a tenth of --total-steps]."""
    decay_shape: Shape = "linear"
    """Of --schedule wsd: how it falls, linear, cosine or sqrt (1 - sqrt)."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What updates the weights: AdamW all of them, or Muon the matrices in the blocks and AdamW the rest."""
    muon_momentum: float = MOMENTUM
    """Muon: how much of the sum of gradients a step keeps, 0 up to less than 1."""
    muon_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Muon: the dtype in which matrices are sent and orthogonalised [that in which weights are kept]."""
    adam_beta1: float = BETAS[0]
    """AdamW: how much of the mean of gradients a step keeps, 0 up to less than 1."""
    adam_beta2: float = BETAS[1]
    """AdamW: how much of the mean of their squares a step keeps, 0 up to less than 1."""
    adam_epsilon: float = EPSILON
    """AdamW: added to the root of that mean, by which a step divides."""
    label_smoothing: float = 0.0
    """How much of the target's probability the training loss spreads over all tokens, 0 to 1; the held-out loss
    has none."""
    z_loss: float = 0.0
    """Weight in the training loss of the squared log of the softmax's sum (PaLM: 1e-4); the held-out loss has
    none."""
    gradient_clip: float = 1.0
    """Largest global gradient norm."""
    seed: int = 0
    """Seed of the initial weights and of the generated samples."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Compute dtype; weights and moments are kept in float32 (float64 for fp64) [bf16 on GPU, fp32 on CPU]."""
    kernels: Backend = "auto"
    """What computes norms, RoPE, SwiGLU and the loss: torch, triton or auto [Triton on GPU, torch on CPU]."""
    initial_loss_scale: float = 65536.0
    """What the loss is multiplied by at first, in fp16 only; it follows the overflows from there."""
    recompute: str = "full"
    """What backward computes again instead of finding it kept: full (each block, from its input), selective (norms,
    RoPE, SwiGLU), none, or N (every Nth block). Full takes the least memory and none the least time; of the others it
    depends on N (docs/layouts.md)."""
    disable_gradient_checkpointing: bool = False
    """Another name for --recompute none."""
    compile: bool = False
    """Compile the model's blocks by torch.compile, forward and backward [on a GPU they are, on a CPU they are not]."""
    disable_compile: bool = False
    """Compile nothing: every block is computed eagerly."""

    @property
    def objective(self) -> Objective:
        """What the training loss is. Raises ``ArgonneError`` naming a weight that is not legal."""
        return Objective(self.label_smoothing, self.z_loss)

    @property
    def learning_rates(self) -> Schedule:
        """The learning rate of each step. Raises ``ArgonneError`` when the decay overlaps the warm-up."""
        left, decay = max(0, self.total_steps - self.warmup_steps), self.decay_steps
        if decay is None:
            decay = min(self.total_steps // 10, left)
        elif decay > left:
            raise ArgonneError(
                f"decay_steps={decay} is not legal, as total_steps={self.total_steps} less warmup_steps="
                f"{self.warmup_steps} leaves {left}; legal: 0 to {left}"
            )
        return Schedule(
            self.learning_rate,
            self.min_learning_rate,
            self.warmup_steps,
            self.total_steps,
            kind=self.schedule,
            decay_steps=decay if self.schedule == "wsd" else 0,
            decay_shape=self.decay_shape,
        )

    @property
    def betas(self) -> tuple[float, float]:
        """Of AdamW."""
        return self.adam_beta1, self.adam_beta2

    def check(self) -> None:
        """Raise ``ArgonneError`` for the first value that no run could use."""
        require_whole("total_steps", self.total_steps, 1, MOST_STEPS)
        require_whole("warmup_steps", self.warmup_steps, 0, MOST_STEPS)
        if self.decay_steps is not None:
            require_whole("decay_steps", self.decay_steps, 0, MOST_STEPS)
        _ = self.learning_rates  # refuses a decay that has no room
        require_whole("seed", self.seed, 0, MOST_SEED - self.total_steps)
        for name in ("initial_batch_size", "min_batch_size", "gradient_accumulation_steps"):
            require_whole(name, getattr(self, name), 1)
        for name in ("learning_rate", "gradient_clip", "initial_loss_scale", "adam_epsilon"):
            require_number(name, getattr(self, name))
        if self.adam_epsilon < LEAST_EPSILON:  # in float32 it would be 0, and a weight without a gradient divided by it
            raise ArgonneError(f"adam_epsilon={self.adam_epsilon} is not legal; legal: {LEAST_EPSILON} or more")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            require_share(name, getattr(self, name))
            if getattr(self, name) == 1:
                raise ArgonneError(f"{name}=1 is not legal, as no gradient would count; legal: 0 up to less than 1")
        if self.memory_limit is not None:
            require_number("memory_limit", self.memory_limit)
        _ = self.objective  # refuses what is no weight
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ArgonneError(
                f"min_learning_rate={self.min_learning_rate} is not legal; legal: 0 to "
                f"learning_rate={self.learning_rate}"
            )
        require_number("weight_decay", self.weight_decay, zero=True)
