"""Another architecture on ``argonne.parallel`` alone: a small GPT-NeoX that learns the bytes of this file.

``python examples/custom_model.py --nproc 2``, or ``torchrun --standalone --nproc-per-node 2 examples/custom_model.py``.
One process and several print the same losses; with ``--dtype float64`` they agree to ten digits.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from argonne import parallel
from argonne.launch import LaunchFlags, drive, guarded, parse, world_size

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
        frequencies = 10_000.0 ** -torch.linspace(0, 1, self.dim // 8 + 1, dtype=torch.float64)[:-1]
        angles = torch.outer(torch.arange(SEQUENCE), frequencies).repeat(1, 2)
        self.cos, self.sin = (table.to(options["precision"].compute) for table in (angles.cos(), angles.sin()))

    def forward(self, x: Tensor) -> Tensor:
        heads = "(batch sequence) (three head dim) -> three batch head sequence dim"
        query, key, value = rearrange(self.query_key_value(x), heads, three=3, sequence=SEQUENCE, dim=self.dim)
        context = F.scaled_dot_product_attention(self.turn(query), self.turn(key), value, is_causal=True)
        return self.dense(rearrange(context, "batch head sequence dim -> (batch sequence) (head dim)"))

    def turn(self, x: Tensor) -> Tensor:
        turned, rest = x.tensor_split([self.cos.shape[1]], dim=-1)
        left, right = turned.chunk(2, dim=-1)
        return torch.cat((turned * self.cos + torch.cat((-right, left), dim=-1) * self.sin, rest), dim=-1)


class Block(nn.Module):
    """Attention and MLP side by side on one residual stream, ``[tokens, hidden]`` or this rank's share of it."""

    def __init__(self, config: Config, groups: parallel.ProcessGroups, precision: parallel.Precision) -> None:
        super().__init__()
        hidden, options = config.hidden, {"bias": True, "precision": precision}
        # A norm of torch declares nothing: every rank is taken to hold it whole.
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, dtype=precision.parameters) for _ in range(2))
        self.attention = Attention(config, groups, **options)
        up = parallel.ColumnParallelLinear(hidden, 4 * hidden, groups, **options)
        down = parallel.RowParallelLinear(4 * hidden, hidden, groups, **options)
        self.mlp = nn.Sequential(up, nn.GELU(), down)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norms[0](x)) + self.mlp(self.norms[1](x))


class NeoX(nn.Module):
    """The embedding, the blocks, a last norm and a head of its own: the sum of the losses over all tokens."""

    def __init__(self, config: Config, groups: parallel.ProcessGroups, precision: parallel.Precision) -> None:
        super().__init__()
        self.embedding = parallel.VocabParallelEmbedding(VOCABULARY, config.hidden, groups, precision=precision)
        self.blocks = nn.Sequential(*(Block(config, groups, precision) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.hidden, dtype=precision.parameters)
        self.head = parallel.VocabParallelHead(VOCABULARY, config.hidden, groups, precision=precision)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embedding(ids.flatten())))
        return parallel.vocab_parallel_linear_cross_entropy(x, self.head, targets.flatten())


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
            model = NeoX(config, groups, parallel.Precision(parameters=dtype, compute=dtype))
        parameters = parallel.sharded_parameters(model, groups)
        parallel.initialise(parameters, seed=0)  # the same values at every layout
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(1, config.steps + 1):
            starts = torch.randint(len(text) - SEQUENCE, (BATCH, 1), generator=torch.Generator().manual_seed(step))
            batch = text[starts + torch.arange(SEQUENCE + 1)].to(device)  # every rank has all of the tokens
            loss = model(batch[:, :-1], batch[:, 1:]) / (BATCH * SEQUENCE)
            loss.backward()
            parallel.complete_gradients(parameters, groups)  # add up what each rank knows only in part
            norm = parallel.global_gradient_norm(parameters, groups)
            parallel.clip_gradients(parameters, norm, limit=1.0)
            optimizer.step()
            optimizer.zero_grad()
            if groups.is_first:
                print(f"step {step} | loss {loss.item():.10f} | gradient norm {norm.item():.4f}", flush=True)


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(Config, sys.argv[1:])))
