"""What a save leaves for people: ``samples.md``, ``stats/*.json`` and ``loss.png``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from argonne.data import LaneState
from argonne.files import write_json
from argonne.training.config import RunConfig
from argonne.training.plot import plot_loss
from argonne.training.setup import Workload
from argonne.training.state import TrainingState


def write_report(
    config: RunConfig,
    workload: Workload,
    state: TrainingState,
    lanes: Mapping[int, LaneState],
    records: list[dict[str, Any]],
    global_batch: int,
    text: str,
) -> None:
    """Bring the reports of the run's directory up to the state's step; on one rank.

    ``lanes`` are all lanes of the run, ``records`` the lines of ``metrics.jsonl``.
    """
    directory = config.run.output_dir
    with (directory / "samples.md").open("a") as file:
        loss = records[-1]["loss"] if records else float("nan")
        file.write(f"## Step {state.step} ({state.tokens:,} tokens, loss {loss:.3f})\n\n{_quote(text)}\n\n")
    (directory / "stats").mkdir(exist_ok=True)
    write_json(
        directory / "stats" / f"step_{state.step:08d}.json", _stats(config, workload, state, lanes, global_batch)
    )
    model, layout = workload.model, state.model.groups.layout
    title = f"{model.parameter_count / 1e6:,.1f}M parameters, {layout}, {state.tokens / 1e6:.2f}M tokens"
    plot_loss(records, directory / "loss.png", title)


def data_line(lanes: Mapping[int, LaneState]) -> str:
    """What was read and what was dropped, by reason: for the log at a save."""
    documents, dropped = sum(lane.documents for lane in lanes.values()), _dropped(lanes)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common()) or "none"
    return f"data: {documents:,} documents read; rows dropped: {reasons}"


def _dropped(lanes: Mapping[int, LaneState]) -> Counter[str]:
    dropped: Counter[str] = Counter()
    for lane in lanes.values():
        dropped.update(lane.dropped)
    return dropped


def _stats(
    config: RunConfig,
    workload: Workload,
    state: TrainingState,
    lanes: Mapping[int, LaneState],
    global_batch: int,
) -> dict[str, Any]:
    t, model, layout = config.training, workload.model, state.model.groups.layout
    return {
        "total_tokens": state.tokens,
        "batch_size": t.initial_batch_size,
        "global_steps": state.step,
        "num_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_size": model.hidden_size,
        "model_params": model.parameter_count,
        "data_shards_seen": workload.data.shards_seen(lanes),
        "documents_seen": sum(lane.documents for lane in lanes.values()),
        "documents_dropped": dict(_dropped(lanes)),
        "base_learning_rate": t.learning_rate,
        "min_learning_rate": t.min_learning_rate,
        "warmup_steps": t.warmup_steps,
        "max_steps": t.total_steps,
        "gradient_accumulation_steps": global_batch // (t.initial_batch_size * layout.data),
        "effective_tokens_per_step": global_batch * config.data.block_size,
        "amp_dtype": str(workload.precision.compute).removeprefix("torch."),
        "fused_adamw": True,
        "parallelism": str(layout),
    }


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])
