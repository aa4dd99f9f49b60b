"""A run that is begun and continued within a second: its flags, on a corpus and a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path

from argonne.data import train_tokenizer
from argonne.launch import RestartFlags
from argonne.training.config import DataFlags, ModelFlags, RunConfig, RunFlags, TrainingFlags
from tests.integration.runs import write_corpus


def small_run(home: Path) -> RunConfig:
    """Four steps of a tiny model; shards in ``corpus``, two tokenizers beside them, and the run in ``run``."""
    write_corpus(home / "corpus", documents=30)
    for name, text in (("tokenizer", "some words and more of them"), ("another", "quite other text")):
        train_tokenizer([text] * 9).save_pretrained(home / name)
    return RunConfig(
        model=ModelFlags(
            "demo",
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            vocab_size=400,
        ),
        data=DataFlags((f"{home}/corpus/*.parquet",), block_size=16, tokenizer_path=home / "tokenizer", data_lanes=3),
        training=TrainingFlags(4, 2, gradient_accumulation_steps=2, learning_rate=0.01, warmup_steps=1),
        launch=RestartFlags("cpu"),
        run=RunFlags(home / "run", save_interval=2, sample_tokens=2),
    )
