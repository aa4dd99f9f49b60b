"""A whole run of ``pretrain.py`` is the run that ``tests/dense.py`` makes from the same flags and the same text.

The trainer compared with itself (resumed with uninterrupted, layout with layout) cannot show a fault that all of its
runs share, and AdamW hides the scale of a gradient. Nothing is taken from the run under test but its step numbers: the
initial weights, the packing and the order of the samples are made here anew, from docs/data.md and the README.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from argonne.data import train_tokenizer
from argonne.models import ArgonneConfig
from tests import dense
from tests.integration.runs import metrics, succeed
from tests.whole import assert_close

pytestmark = pytest.mark.slow

STEPS, SAVES, SEED = 8, 4, 5
BLOCK, LANES, SAMPLES = 24, 3, 4
BOUNDARY = (0, 2)
RECIPE = dense.Recipe(peak=3e-3, minimum=2e-4, warmup=3, total=11, decay=0.3, clip=0.9)
TUNED = replace(RECIPE, betas=(0.8, 0.99), epsilon=1e-5, smoothing=0.1, z_loss=1e-3, falling=6)
"""With every constant of the optimizer and of the loss another than it is where no flag says."""
SHAPE = ArgonneConfig(24, 2, 4, 2, 300, 40, max_position_embeddings=1024, initializer_range=0.02)
GROUPS = [[3, 5, 1], [4, 2]]
"""Rows of each row group of each shard: so few that lanes begin their second pass within the run."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]], list[str]]:
    """A directory with shards, held-out text and a tokenizer; the training text by row group, and the held-out rows."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(90)]

    def document() -> str:
        return " ".join(draw.choices(words, k=draw.randint(11, 22)))

    train = [[[document() for _ in range(count)] for count in shard] for shard in GROUPS]
    held_out = [document() for _ in range(7)]
    for number, groups in enumerate(train):
        with pq.ParquetWriter(folder / f"part-{number}.parquet", pa.schema([("text", pa.string())])) as file:
            for rows in groups:
                file.write_table(pa.table({"text": rows}))
    pq.write_table(pa.table({"text": held_out}), folder / "held-out.parquet")
    tokenizer = train_tokenizer((text for shard in train for rows in shard for text in rows), SHAPE.vocab_size)
    assert len(tokenizer) <= SHAPE.vocab_size
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, [rows for shard in train for rows in shard], held_out


class Packing:
    """docs/data.md, "Lanes": documents of a lane end to end, cut into sequences, sample k from lane k mod V."""

    def __init__(self, folder: Path, groups: list[list[str]]) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        rows = math.ceil(sum(map(len, groups)) / (4 * LANES))  # fewer row groups than four a lane: runs of rows
        self.units = [group[at : at + rows] for group in groups for at in range(0, len(group), rows)]

    def tokens(self, lane: int) -> Iterator[tuple[int, int]]:
        """Each token of a lane with a number that its document has alone; without end."""
        document = 0
        for epoch in range(1000):
            for unit in self.units[(lane + epoch) % LANES :: LANES]:
                for text in unit:
                    document += 1
                    ids = self.tokenizer.encode(text, add_special_tokens=False)
                    yield from ((token, document) for token in (BOUNDARY[0], *ids, BOUNDARY[1]))

    def batches(self, apart: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        lanes = [self.tokens(lane) for lane in range(LANES)]
        for step in range(STEPS):
            numbers = range(step * SAMPLES, (step + 1) * SAMPLES)
            samples = [[next(lanes[k % LANES]) for _ in range(BLOCK + 1)] for k in numbers]
            ids, documents = torch.tensor(samples).unbind(-1)
            yield ids, documents if apart else None

    def held_out(self, rows: list[str]) -> tuple[Tensor, Tensor]:
        """Every whole sequence of the held-out text."""
        pairs = [
            (token, number)
            for number, text in enumerate(rows)
            for token in (BOUNDARY[0], *self.tokenizer.encode(text, add_special_tokens=False), BOUNDARY[1])
        ]
        whole = len(pairs) // (BLOCK + 1)
        ids, documents = torch.tensor(pairs[: whole * (BLOCK + 1)]).view(whole, BLOCK + 1, 2).unbind(-1)
        return ids, documents


def initial(config: ArgonneConfig) -> dict[str, Tensor]:
    """Norms of 1, and normal draws by Box and Muller from the words of Philox, keyed by seed and name."""
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    shapes = {"model.embed_tokens": (config.vocab_size, hidden), "model.norm": (hidden,)}
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (heads * config.head_dim, hidden),
                "self_attn.k_proj": (kv * config.head_dim, hidden),
                "self_attn.v_proj": (kv * config.head_dim, hidden),
                "self_attn.o_proj": (hidden, heads * config.head_dim),
                "mlp.gate_proj": (config.intermediate_size, hidden),
                "mlp.up_proj": (config.intermediate_size, hidden),
                "mlp.down_proj": (hidden, config.intermediate_size),
            }.items()
        }
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    weights = {}
    for stem, shape in shapes.items():
        name, std = f"{stem}.weight", config.initializer_range
        if stem.endswith(("o_proj", "down_proj")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.float64)
            continue
        key = int.from_bytes(hashlib.blake2b(f"{SEED}/{name}".encode(), digest_size=16).digest(), "little")
        words = np.random.Philox(key=key).random_raw(math.prod(shape))
        radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + 1.0) / 2**32))
        normal = radius * np.cos((words & np.uint64(2**32 - 1)) * (2 * math.pi / 2**32))
        weights[name] = torch.from_numpy(normal).float().mul(std).double().view(shape)
    return weights


def flags_of(folder: Path, config: ArgonneConfig, recipe: dense.Recipe = RECIPE) -> dict[str, Any]:
    return {
        "--preset": "demo",
        "--hidden-size": config.hidden_size,
        "--num-hidden-layers": config.num_hidden_layers,
        "--num-attention-heads": config.num_attention_heads,
        "--num-key-value-heads": config.num_key_value_heads,
        "--intermediate-size": config.intermediate_size,
        "--vocab-size": config.vocab_size,
        "--tie-word-embeddings": config.tie_word_embeddings,
        "--data-glob": folder / "part-*.parquet",
        "--validation-glob": folder / "held-out.parquet",
        "--tokenizer-path": folder / "tokenizer",
        "--block-size": BLOCK,
        "--data-lanes": LANES,
        "--add-document-boundary-tokens": None,
        "--initial-batch-size": 2,
        "--gradient-accumulation-steps": 2,
        "--learning-rate": recipe.peak,
        "--min-learning-rate": recipe.minimum,
        "--warmup-steps": recipe.warmup,
        "--total-steps": recipe.total,
        "--weight-decay": recipe.decay,
        "--gradient-clip": recipe.clip,
        **({} if recipe is RECIPE else constants(recipe)),
        "--seed": SEED,
        "--precision": "fp64",
        "--stop-at-step": STEPS,
        "--save-interval": SAVES,
        "--sample-tokens": 0,
    }


def constants(recipe: dense.Recipe) -> dict[str, Any]:
    """The flags of the schedule, AdamW and the loss, which a run that wants the usual ones leaves out."""
    return {
        "--adam-beta1": recipe.betas[0],
        "--adam-beta2": recipe.betas[1],
        "--adam-epsilon": recipe.epsilon,
        "--label-smoothing": recipe.smoothing,
        "--z-loss": recipe.z_loss,
        "--schedule": "wsd",
        "--decay-steps": recipe.falling,
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any], dense.Recipe]] = {
    "one process, documents apart": (1, {"--document-mask": None}, RECIPE),
    "tensor 3, uneven, untied": (3, {"--uneven-shards": None, "--tie-word-embeddings": False}, TUNED),
    "data 2, zero1": (2, {"--data-parallel": 2, "--zero1": None, "--initial-batch-size": 1}, RECIPE),
    "pipeline 2, documents apart": (2, {"--pipeline-parallel": 2, "--document-mask": None}, TUNED),
}


def stored_at(directory: Path, step: int) -> dict[str, Tensor]:
    """Weights and moments of a checkpoint."""
    stored = {}
    for path in (directory / f"step_{step:08d}").glob("*.safetensors"):
        stored |= load_file(path)
    return stored


@pytest.mark.parametrize(("nproc", "layout", "recipe"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_run_is_the_reference_run_to_1e_9(
    texts: tuple[Path, list[list[str]], list[str]],
    tmp_path: Path,
    nproc: int,
    layout: dict[str, Any],
    recipe: dense.Recipe,
) -> None:
    """Losses, held-out losses, norms, rates, weights and both moments, at every step that tells of them."""
    folder, groups, held_out = texts
    apart = "--document-mask" in layout
    config = ArgonneConfig(**{**vars(SHAPE), "tie_word_embeddings": layout.get("--tie-word-embeddings", True)})
    succeed("pretrain", {**flags_of(folder, config, recipe), **layout, "--output-dir": tmp_path}, nproc=nproc)
    packing = Packing(folder, groups)
    ids, documents = packing.held_out(held_out)
    batches = list(packing.batches(apart))
    expected, lines = dense.Run(initial(config)), metrics(tmp_path)
    for stop in range(SAVES, STEPS + 1, SAVES):
        expected.train(config, recipe, batches[stop - SAVES : stop])
        stored = stored_at(tmp_path, stop)
        wanted = dict(expected.weights)
        for moment, values in (("exp_avg", expected.first), ("exp_avg_sq", expected.second)):
            wanted |= {f"{name}.{moment}": value for name, value in values.items()}
        assert stored.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(stored[name], value, 1e-9, f"{name} after step {stop}")
        own = documents[:, :-1] if apart else None
        loss = dense.loss(expected.weights, config, ids[:, :-1], ids[:, 1:], own).item()
        assert lines[stop - 1]["validation_loss"] == pytest.approx(loss, rel=1e-9)
        told = json.loads((tmp_path / f"step_{stop:08d}" / "trainer.json").read_text())
        assert (told["step"], told["optimizer_step"], told["tokens"]) == (stop, stop, stop * SAMPLES * BLOCK)
    assert [line["loss"] for line in lines] == pytest.approx(expected.losses, rel=1e-9)
    assert [line["grad_norm"] for line in lines] == pytest.approx(expected.norms, rel=1e-9)
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected.rates, rel=1e-12)
    assert min(expected.norms) < recipe.clip < max(expected.norms), "some steps are clipped, and some are not"
    assert [line["validation_loss"] is None for line in lines] == [step % SAVES > 0 for step in range(1, STEPS + 1)]


def test_a_float16_run_that_overflows_is_the_reference_run_without_those_steps(
    texts: tuple[Path, list[list[str]], list[str]], tmp_path: Path
) -> None:
    """A step whose scaled gradients overflow moves nothing but the step, the tokens, the data and the scale."""
    folder, groups, _ = texts
    scale = 2.0**21
    half = {"--precision": "fp16", "--initial-loss-scale": scale, "--save-interval": 1}
    succeed("pretrain", {**flags_of(folder, SHAPE), **half, "--output-dir": tmp_path}, nproc=1)
    lines = metrics(tmp_path)
    overflows = [line["step"] for line in lines if line["grad_norm"] is None]
    assert 1 in overflows, "the first step was meant to overflow"
    assert len(overflows) <= 3, "most steps were meant not to"
    expected = dense.Run(initial(SHAPE))
    expected.train(SHAPE, RECIPE, Packing(folder, groups).batches(apart=False), overflows)

    for step in range(1, STEPS + 1):
        told = json.loads((tmp_path / f"step_{step:08d}" / "trainer.json").read_text())
        skipped = sum(each <= step for each in overflows)
        assert (told["step"], told["optimizer_step"]) == (step, step - skipped)
        assert told["tokens"] == step * SAMPLES * BLOCK
        assert told["loss_scale"]["scale"] == scale / 2**skipped
        if step in overflows:
            before = stored_at(tmp_path, step - 1) if step > 1 else {}
            for name, value in stored_at(tmp_path, step).items():
                began = initial(SHAPE).get(name, torch.zeros(())).float()  # moments begin at zero
                assert (value == before.get(name, began)).all(), f"{name} in step {step}, which overflowed"

    taken = [step for step in range(STEPS) if step + 1 not in overflows]
    assert [line["loss"] for line in lines] == pytest.approx(expected.losses, rel=1e-3)
    assert [lines[step]["grad_norm"] for step in taken] == pytest.approx([expected.norms[s] for s in taken], rel=1e-2)
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected.rates, rel=1e-12)
    stored, begun = stored_at(tmp_path, STEPS), initial(SHAPE)
    for name, value in expected.weights.items():
        # How far it went: most of a weight is what it began with.
        assert_close(stored[name].double() - begun[name], value - begun[name], 0.1, f"the way of {name}")
        assert_close(stored[f"{name}.exp_avg"].double(), expected.first[name], 0.02, f"{name}.exp_avg")
        assert_close(stored[f"{name}.exp_avg_sq"].double(), expected.second[name], 0.02, f"{name}.exp_avg_sq")
