"""Another architecture on ``argonne.parallel``: a small GPT-NeoX, trained in two ways.

``python examples/custom_model.py --nproc 2``, or ``torchrun --standalone --nproc-per-node 2 examples/custom_model.py``:
on the bytes of this file, with the loop in ``main``. One process and several print the same losses; with
``--dtype float64`` they agree to ten digits.

``python examples/custom_model.py pretrain --data-glob 'shards/*.parquet' --output-dir runs/neox --tensor-parallel 2
--nproc 2`` is the whole workflow, with the flags of ``pretrain.py``; the same command again continues the run, and so
does ``python examples/custom_model.py resume --checkpoint-path runs/neox``. ``docs/your-model.md`` explains it.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from argonne import parallel
from argonne.launch import LaunchFlags, drive, guarded, parse, world_size
from argonne.models import BaseModel, Batch, Execution

BATCH, SEQUENCE, VOCABULARY = 4, 64, 256


@dataclass(frozen=True)
class Config:
    """What is trained, and how it runs: no loss depends on the last two."""

    steps: int = 40  # Optimizer steps.
    layers: int = 2  # Transformer blocks.
    hidden: int = 64  # Width of the residual stream.
    heads: int = 4  # Attention heads.
    dtype: Literal["float32", "float64"] = "float32"  # Of the parameters and of the arithmetic.
    sequence_parallel: bool = False  # Share out the tokens between the tensor-parallel layers.
    launch: LaunchFlags = field(default_factory=LaunchFlags)  # --nproc and --device, for ``drive``


class Attention(nn.Module):
    """Multi-head attention with rotary positions on a quarter of each head; a rank has some of the heads."""

    def __init__(self, config: Config, groups: parallel.ProcessGroups, **options) -> None:
        super().__init__()
        self.dim, names = config.hidden // config.heads, ("query", "key", "value")
        parts = [parallel.Partition.blocks(name, self.dim, config.heads, groups.tensor.size) for name in names]
        self.query_key_value = parallel.ColumnParallelLinear(config.hidden, parts, groups, **options)
        self.dense = parallel.RowParallelLinear(parts[0], config.hidden, groups, **options)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def turn(heads: Tensor) -> Tensor:
            turned, rest = heads.tensor_split([cos.shape[1]], dim=-1)
            left, right = turned.chunk(2, dim=-1)
            return torch.cat((turned * cos + torch.cat((-right, left), dim=-1) * sin, rest), dim=-1)

        heads = "(batch sequence) (three head dim) -> three batch head sequence dim"
        query, key, value = rearrange(self.query_key_value(x), heads, three=3, sequence=len(cos), dim=self.dim)
        context = F.scaled_dot_product_attention(turn(query), turn(key), value, is_causal=True)
        return self.dense(rearrange(context, "batch head sequence dim -> (batch sequence) (head dim)"))


class Norm(nn.LayerNorm):
    """A norm of torch declares nothing: every rank is taken to hold it whole. It computes in its weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP side by side on one residual stream, ``[tokens, hidden]`` or this rank's share of it."""

    def __init__(self, config: Config, groups: parallel.ProcessGroups, precision: parallel.Precision) -> None:
        super().__init__()
        hidden, options = config.hidden, {"bias": True, "precision": precision}
        self.norms = nn.ModuleList(Norm(hidden, dtype=precision.parameters) for _ in range(2))
        self.attention = Attention(config, groups, **options)
        up = parallel.ColumnParallelLinear(hidden, 4 * hidden, groups, **options)
        down = parallel.RowParallelLinear(4 * hidden, hidden, groups, **options)
        self.mlp = nn.Sequential(up, nn.GELU(), down)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x + self.attention(self.norms[0](x), cos, sin) + self.mlp(self.norms[1](x))


class NeoX(BaseModel):
    """The embedding, the blocks, a last norm and a head of its own."""

    longest_sequence = 4096

    def __init__(self, config: Config, execution: Execution, vocabulary: int) -> None:
        super().__init__(execution)
        self.config, self.vocabulary = config, vocabulary
        groups, precision = execution.groups, execution.precision
        self.embedding = parallel.VocabParallelEmbedding(vocabulary, config.hidden, groups, precision=precision)
        self.blocks = nn.ModuleList(Block(config, groups, precision) for _ in range(config.layers))
        self.norm = Norm(config.hidden, dtype=precision.parameters)
        self.head = parallel.VocabParallelHead(vocabulary, config.hidden, groups, precision=precision)

    @property
    def shape(self) -> dict[str, int]:
        """What makes it this model: a run goes on only with the same."""
        config = self.config
        return {"layers": config.layers, "hidden": config.hidden, "heads": config.heads, "vocabulary": self.vocabulary}

    def forward(self, batch: Batch) -> Tensor:
        """Hidden values of all positions ``[tokens, hidden]``, or this rank's share of them."""
        size, sequence = self.config.hidden // self.config.heads, batch.ids.shape[1]
        frequencies = 10_000.0 ** -torch.linspace(0, 1, size // 8 + 1, dtype=torch.float64)[:-1]
        angles = torch.outer(torch.arange(sequence), frequencies).repeat(1, 2)
        cos, sin = (t.to(self.groups.device, self.execution.precision.compute) for t in (angles.cos(), angles.sin()))
        x = self.embedding(batch.ids.flatten())
        for number, block in enumerate(self.blocks):
            x = self.execution.run(block, x, cos, sin, number=number)  # recomputed in backward, if the flags say so
        return self.norm(x)


def check(config: Config, processes: int) -> None:
    for name, least in {"steps": 1, "layers": 1, "hidden": 1, "heads": processes}.items():
        parallel.require_whole(name, getattr(config, name), least)
    if config.hidden % (8 * config.heads):
        raise parallel.ArgonneError(f"hidden={config.hidden} is not a multiple of 8 * heads={8 * config.heads}")


def main(config: Config) -> None:
    device, dtype = parallel.choose_device(config.launch.device), getattr(torch, config.dtype)
    layout = parallel.Layout(tensor=world_size(), sequence_parallel=config.sequence_parallel)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    with parallel.process_groups(layout, device) as groups:
        with device:
            model = NeoX(config, Execution(groups, parallel.Precision(parameters=dtype, compute=dtype)), VOCABULARY)
        parameters = parallel.sharded_parameters(model, groups)
        parallel.initialise(parameters, seed=0)  # the same values at every layout
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(1, config.steps + 1):
            starts = torch.randint(len(text) - SEQUENCE, (BATCH, 1), generator=torch.Generator().manual_seed(step))
            tokens = text[starts + torch.arange(SEQUENCE + 1)].to(device)  # every rank has all of the tokens
            batch = Batch(tokens[:, :-1], tokens[:, 1:])
            total = parallel.vocab_parallel_linear_cross_entropy(model(batch), model.head, batch.targets.flatten())
            loss = total / (BATCH * SEQUENCE)
            loss.backward()
            parallel.complete_gradients(parameters, groups)  # add up what each rank knows only in part
            norm = parallel.global_gradient_norm(parameters, groups)
            parallel.clip_gradients(parameters, norm, limit=1.0)
            optimizer.step()
            optimizer.zero_grad()
            if groups.is_first:
                print(f"step {step} | loss {loss.item():.10f} | gradient norm {norm.item():.4f}", flush=True)


def build(execution: Execution, vocabulary: int) -> NeoX:
    return NeoX(Config(), execution, vocabulary)


def workflow(command: str, *words: str) -> None:
    """Pretrain, or resume, with everything that the Argonne model has: what ``examples/pretrain.py`` is to it."""
    from argonne.training.config import RunConfig
    from argonne.training.run.checks import check
    from argonne.training.run.resume import check_resume, parse_resume, resume
    from argonne.training.run.workflow import pretrain

    if command == "resume":
        drive(partial(resume, model=build), partial(check_resume, model=build), parse_resume(words))
    else:
        drive(partial(pretrain, model=build), partial(check, model=build), parse(RunConfig, words))


if __name__ == "__main__":
    words = sys.argv[1:]
    whole = words[:1] in (["pretrain"], ["resume"])
    guarded(lambda: workflow(*words) if whole else drive(main, check, parse(Config, words)))
