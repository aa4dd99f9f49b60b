"""The configuration of a run: the single source of the flags, their defaults, ``--help`` and ``run.json``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from argonne.kernels import Backend
from argonne.models.config import ArgonneConfig, preset
from argonne.models.huggingface import from_huggingface
from argonne.parallel.data_parallel import Kind
from argonne.parallel.errors import ArgonneError
from argonne.parallel.layout import Layout
from argonne.parallel.pipeline_plan import PipelinePlan, ScheduleName

DEFAULT_PRESET = "argonne-2.0-4.9b"

_flag = tyro.conf.arg


@dataclass(frozen=True)
class ModelFlags:
    """The model: a preset, any field of which may be overridden."""

    preset: str | None = None
    """A named shape: demo, argonne-2.0-4.9b, argonne-2.0-2b, argonne-2.5-1b or argonne-2.0-8b
    [argonne-2.0-4.9b]."""
    model_config: Path | None = None
    """A Hugging Face Llama config.json (or its directory) to take the shape from, instead of a preset."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_hidden_layers: int | None = None
    """Transformer blocks."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key-value heads."""
    head_dim: int | None = None
    """Width of a head [hidden_size / num_attention_heads]."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer [8/3 of hidden_size, rounded up to a multiple of 256]."""
    vocab_size: int | None = None
    """Tokens in the model; at least the tokenizer's [the preset's; the tokenizer's own for one trained here]."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    rms_norm_eps: float | None = None
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool | None = None
    """Whether the output head is the embedding (True or False)."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights [hidden_size ** -0.5]."""

    def resolve(self, block_size: int) -> ArgonneConfig:
        """The whole shape. Raises ``ArgonneError`` naming what is not legal."""
        if self.preset is not None and self.model_config is not None:
            raise ArgonneError(
                f"preset={self.preset!r} conflicts with model_config={str(self.model_config)!r}; legal: one"
            )
        base = from_huggingface(self.model_config) if self.model_config else preset(self.preset or DEFAULT_PRESET)
        changed = {name: value for name, value in vars(self).items() if value is not None}
        changed = {name: value for name, value in changed.items() if name not in ("preset", "model_config")}
        # What a preset derives from another field is derived again when that field is changed.
        if "hidden_size" in changed:
            changed = {"head_dim": 0, "intermediate_size": 0, **changed}
        elif "num_attention_heads" in changed:
            changed = {"head_dim": 0, **changed}
        if "hidden_size" in changed and not self.model_config and self.preset != "demo":
            changed = {"initializer_range": 0.0, **changed}
        changed["max_position_embeddings"] = max(block_size, base.max_position_embeddings)
        return replace(base, **changed)


@dataclass(frozen=True)
class DataFlags:
    """The data: shards of Parquet or Arrow with a text column, and the tokenizer."""

    data_glob: tuple[str, ...] | None = None
    """Globs of the training shards, GLOB:WEIGHT each to mix several corpora
    [../data/CC-MAIN-2025-26/*.parquet, or the next default that matches]."""
    validation_glob: tuple[str, ...] | None = None
    """Globs of held-out shards, on which the loss is measured at every save [none]."""
    validation_sequences: int = 64
    """Sequences of the held-out text that are used, from its beginning."""
    tokenizer_path: Path | None = None
    """Directory of a Hugging Face tokenizer [a byte-level BPE of 12,000 is trained on the data]."""
    trust_remote_code: bool = False
    """Allow a tokenizer that comes with its own code."""
    block_size: int = 4096
    """Tokens of a training sequence."""
    add_document_boundary_tokens: bool = False
    """Put BOS before and EOS after every document."""
    document_mask: bool = False
    """Keep attention within documents: what else is packed into a sequence is not seen."""
    data_lanes: int | None = None
    """Virtual streams that the data is dealt to, best a multiple of --data-parallel [64; fewer for tiny data]."""
    on_bad_shard: Literal["raise", "skip"] = "raise"
    """What becomes of a shard, or a row group of one, that cannot be read: stop, or pass over it and record that."""
    accept_data_change: bool = False
    """Go on with shards, weights or a tokenizer other than those that the run was saved with."""
    streaming: bool = True
    """Tokenise while training. --no-streaming: once, before it, to a cache on disk, shuffled anew in every epoch."""
    num_proc: int = 8
    """Processes that tokenise with --no-streaming."""
    cache_dir: Path | None = None
    """Where the caches of --no-streaming lie, which several runs may share [token_cache in the output directory]."""
    prefetch_batches: int = 2
    """Batches that are read and tokenised ahead of training."""


@dataclass(frozen=True)
class TrainingFlags:
    """The schedule, the batch and the numerics."""

    total_steps: int = 4_000_000
    """Optimizer steps of the whole run; the schedule ends there."""
    initial_batch_size: int = 512
    """Sequences of a micro-batch on each data-parallel rank."""
    min_batch_size: int = 4
    """The smallest micro-batch that an out-of-memory search may use (the search is not built yet)."""
    gradient_accumulation_steps: int = 4
    """Micro-batches of an optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    min_learning_rate: float = 1e-5
    """Where the warm-up begins and the cosine ends."""
    warmup_steps: int = 2000
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only."""
    gradient_clip: float = 1.0
    """Largest global gradient norm."""
    seed: int = 0
    """Seed of the initial weights and of the generated samples."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Compute dtype; weights and moments are kept in float32 (float64 for fp64) [bf16 on GPU, fp32 on CPU]."""
    kernels: Backend = "auto"
    """What computes norms, RoPE, SwiGLU and the loss: torch, triton or auto (Triton on GPU, torch on CPU)."""
    initial_loss_scale: float = 65536.0
    """What the loss is multiplied by at first, in fp16 only; it follows the overflows from there."""
    disable_gradient_checkpointing: bool = False
    """Keep every activation instead of recomputing each block in backward: faster, more memory."""
    disable_compile: bool = False
    """Run without torch.compile. Compilation is not built yet: every run is eager, with or without this."""


@dataclass(frozen=True)
class ParallelFlags:
    """The layout: one size for each axis; their product is the number of processes."""

    tensor_parallel: int | None = None
    """Processes that share each layer [all that the other axes leave]."""
    pipeline_parallel: int | Literal["auto"] = 1
    """Processes that hold successive layers; auto: all that the other axes leave."""
    pipeline_schedule: ScheduleName = "1f1b"
    """The order of a pipeline's work: 1f1b (least memory), interleaved (several stages a process, a smaller
    bubble), zb (zero bubble: two stages a process, weight gradients while it would wait) or gpipe."""
    pipeline_interleave: int = 2
    """Stages a process has when the schedule is interleaved."""
    data_parallel: int = 1
    """Replicas of the model, each with its own samples of a step."""
    context_parallel: int = 1
    """Processes that share each sequence: for long ones."""
    sequence_parallel: bool = False
    """Share out the tokens between the tensor-parallel layers: less memory for activations, a quarter more to send."""
    uneven_shards: bool = False
    """Allow heads and a feed-forward width that do not divide by --tensor-parallel: some ranks get one more."""
    fsdp: bool = False
    """Share out parameters, gradients and optimizer state over the data- and context-parallel processes (FSDP2)."""
    fsdp_shard: int | None = None
    """Share out over groups of so many neighbouring processes only, which are replicas of each other (hybrid
    sharding), with --fsdp [all data- and context-parallel processes]."""
    zero1: bool = False
    """Share out the optimizer's state alone over them (ZeRO stage 1)."""
    reproducible: bool = False
    """The same bits at every layout (not built yet; the same bits at the same layout always hold)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run [CUDA when there is one]."""
    nproc: int | None = None
    """Processes to start when not under torchrun [every GPU, or 1 on CPU]."""
    max_restarts: int = 0
    """Times to start all processes again, from the newest checkpoint, when one fails. Under torchrun: its own flag."""
    local_rank: Annotated[int | None, _flag(name="local_rank")] = None
    """Set by old launchers; LOCAL_RANK is what counts."""

    @property
    def kind(self) -> Kind:
        """The kind of data parallelism. Raises ``ArgonneError`` when the flags ask for two."""
        if self.fsdp and self.zero1:
            raise ArgonneError("fsdp=True conflicts with zero1=True, which shares out less; legal: one of them")
        return "fsdp" if self.fsdp else "zero1" if self.zero1 else "replicate"

    def plan(self, layout: Layout) -> PipelinePlan:
        """The pipeline's stages. Raises ``LayoutError`` when the schedule has none such."""
        return PipelinePlan.of(self.pipeline_schedule, layout.pipeline, self.pipeline_interleave)

    def layout(self, world_size: int) -> Layout:
        """The layout of ``world_size`` processes. Raises ``LayoutError`` when they do not match."""
        if self.reproducible:
            raise ArgonneError("reproducible=True is not built yet; leave the flag out")
        auto = self.pipeline_parallel == "auto"
        layout = Layout(
            tensor=1 if self.tensor_parallel is None else self.tensor_parallel,
            pipeline=1 if isinstance(self.pipeline_parallel, str) else self.pipeline_parallel,
            data=self.data_parallel,
            context=self.context_parallel,
            sequence_parallel=self.sequence_parallel,
            uneven_shards=self.uneven_shards,
        )
        left = max(1, world_size // layout.world_size)
        if auto:
            layout = replace(layout, pipeline=left)
        elif self.tensor_parallel is None:
            layout = replace(layout, tensor=left)
        layout.require_world_size(world_size)
        return layout


@dataclass(frozen=True)
class RunFlags:
    """Where the run lies, and when it saves, logs and stops."""

    output_dir: Path = Path("runs/argonne")
    """Directory of the run. Starting again there continues it from its newest valid checkpoint."""
    save_interval: int = 350
    """Steps between checkpoints; each also generates text and measures the held-out loss."""
    sample_tokens: int = 100
    """Tokens of the text that is generated at each checkpoint."""
    keep_checkpoints: int = 50
    """Newest checkpoints to keep."""
    log_interval: int = 10
    """Steps between log lines."""
    stop_at_step: int | None = None
    """Save and leave at this step; the schedule of the run stays as it is."""
    wall_time: float | None = None
    """Seconds after which to save and leave, with time to spare for the save."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that pretraining can be told."""

    model: ModelFlags = field(default_factory=ModelFlags)
    data: DataFlags = field(default_factory=DataFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)
    parallel: ParallelFlags = field(default_factory=ParallelFlags)
    run: RunFlags = field(default_factory=RunFlags)

    def check(self) -> None:
        """Raise ``ArgonneError`` for the first value that no run could use; needs neither data nor peers."""
        t, d, r = self.training, self.data, self.run
        least = {
            "total_steps": (t.total_steps, 1),
            "initial_batch_size": (t.initial_batch_size, 1),
            "min_batch_size": (t.min_batch_size, 1),
            "gradient_accumulation_steps": (t.gradient_accumulation_steps, 1),
            "warmup_steps": (t.warmup_steps, 0),
            "seed": (t.seed, 0),
            "block_size": (d.block_size, 1),
            "num_proc": (d.num_proc, 1),
            "prefetch_batches": (d.prefetch_batches, 1),
            "validation_sequences": (d.validation_sequences, 1),
            "save_interval": (r.save_interval, 1),
            "sample_tokens": (r.sample_tokens, 0),
            "keep_checkpoints": (r.keep_checkpoints, 1),
            "log_interval": (r.log_interval, 1),
            "data_lanes": (1 if d.data_lanes is None else d.data_lanes, 1),
            "nproc": (1 if self.parallel.nproc is None else self.parallel.nproc, 1),
            "stop_at_step": (1 if r.stop_at_step is None else r.stop_at_step, 1),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ArgonneError(f"{name}={value} is not legal; legal: {minimum} or more")
        positive = {
            "learning_rate": t.learning_rate,
            "gradient_clip": t.gradient_clip,
            "initial_loss_scale": t.initial_loss_scale,
        }
        if r.wall_time is not None:
            positive["wall_time"] = r.wall_time
        for name, number in positive.items():
            if not number > 0:
                raise ArgonneError(f"{name}={number} is not legal; legal: more than 0")
        if not 0 <= t.min_learning_rate <= t.learning_rate:
            raise ArgonneError(
                f"min_learning_rate={t.min_learning_rate} is not legal; legal: 0 to learning_rate={t.learning_rate}"
            )
        if not t.weight_decay >= 0:
            raise ArgonneError(f"weight_decay={t.weight_decay} is not legal; legal: 0 or more")
        for name, globs in (("data_glob", d.data_glob), ("validation_glob", d.validation_glob)):
            if globs is not None and not all(globs or [""]):
                raise ArgonneError(f"{name}={' '.join(globs)!r} is empty; legal: a glob, or leave the flag out")


@dataclass(frozen=True)
class ResumeFlags:
    """What to resume from, and what to change."""

    checkpoint_path: Path
    """A run's directory (its newest valid checkpoint), a step directory, or a file in one."""
    batch_size: int | None = None
    """Sequences of a micro-batch on each data-parallel rank [the one saved]."""
    reset_optimizer: bool = False
    """Begin the optimizer's moments anew, and warm the learning rate up again."""
    rewarmup_steps: int = 100
    """Steps of that warm-up."""
    force_from_scratch: bool = False
    """Take the saved configuration but start at step 0, in an --output-dir that holds no run."""
    given: Annotated[frozenset[str], tyro.conf.Suppress] = frozenset()
    """The flags that this command names: what they say counts even where it equals a default."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig(RunConfig):
    """Everything that a resume can be told; what is left out is as it was saved."""

    resume: ResumeFlags
