"""What a run's directory tells people: ``metrics.jsonl``, and with each save samples, statistics and the plot."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from argonne.data import LaneState
from argonne.files import TEMPORARY, sync, write_json
from argonne.training.appended import AppendedFile
from argonne.training.metrics import MetricsLog
from argonne.training.plot import plot_loss
from argonne.training.trace_file import DIRECTORY, TraceLine, write_trace

if TYPE_CHECKING:
    from argonne.training.batch_shape import BatchShape
    from argonne.training.config import RunConfig
    from argonne.training.run.setup import Workload
    from argonne.training.state import TrainingState

T = TypeVar("T")


class Reports:
    """The reports of a run's directory, kept by one rank. None of them is worth the run: nothing here raises."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics = MetricsLog(directory / "metrics.jsonl")
        self.samples = AppendedFile(directory / "samples.md")
        self.stats, self.plot = directory / "stats", directory / "loss.png"
        self.traces = directory / DIRECTORY
        self._failing: set[Path] = set()
        self._loss = float("nan")

    def step(self, record: dict[str, Any]) -> None:
        """Add the line of one optimizer step."""
        self._loss = record["loss"]
        self.attempt(self.metrics.file.path, lambda: self.metrics.write(record))

    def trace(self, step: int, leaves: int, lines: Sequence[TraceLine]) -> None:
        """Write the trace of one optimizer step."""
        self.attempt(self.traces, lambda: write_trace(self.directory, step, leaves, lines))

    def save(
        self,
        config: RunConfig,
        workload: Workload,
        state: TrainingState,
        lanes: Mapping[int, LaneState],
        shape: BatchShape,
        text: str,
    ) -> None:
        """Bring all reports up to the state's step. ``lanes`` are all lanes of the run, ``text`` the model's."""
        model, layout = state.model, state.model.groups.layout
        quoted = "\n".join(f"> {line}" for line in text.splitlines() or [""])
        section = f"## Step {state.step} ({state.tokens:,} tokens, loss {self._loss:.3f})\n\n{quoted}\n\n"
        title = f"{model.parameter_count / 1e6:,.1f}M parameters, {layout}, {state.tokens / 1e6:.2f}M tokens"

        def write_stats() -> None:
            self.stats.mkdir(exist_ok=True)
            file = self.stats / f"step_{state.step:08d}.json"
            write_json(file, _stats(config, workload, state, lanes, shape))

        self.attempt(self.samples.path, lambda: self.samples.append(section))
        self.attempt(self.stats, write_stats)
        curves = self.metrics.training.points, self.metrics.held_out.points
        named = {name: (loss.points, bits.points) for name, (loss, bits) in self.metrics.named.items()}
        self.attempt(self.plot, lambda: plot_loss(*curves, self.plot, title, named))
        # What a checkpoint follows is on the disk before it, or the run would go on from there with a hole behind it.
        for path in (self.metrics.file.path, self.samples.path):
            if path not in self._failing:
                self.attempt(path, lambda path=path: sync(path))  # type: ignore[misc]

    def drop_after(self, step: int) -> None:
        """Forget what an interrupted run told of steps past ``step``; of the plot, all of it."""

        def drop_files(folder: Path) -> bool:
            later = [path for path in folder.glob("step_*.json*") if _step(path.stem) > step]
            for path in {*later, *folder.glob("*" + TEMPORARY)}:
                path.unlink()
            return bool(later)

        def drop_plot() -> None:
            for name in ("loss.png", "run.json", "metrics.jsonl", "samples.md"):
                (self.directory / (name + TEMPORARY)).unlink(missing_ok=True)
            if any(dropped):
                self.plot.unlink(missing_ok=True)

        dropped = [
            self.attempt(self.metrics.file.path, lambda: self.metrics.drop_after(step)),
            self.attempt(self.samples.path, lambda: self.samples.keep(_sections_up_to(step))),
            self.attempt(self.stats, lambda: drop_files(self.stats)),
        ]
        self.attempt(self.traces, lambda: drop_files(self.traces))
        self.attempt(self.plot, drop_plot)

    def attempt(self, path: Path, action: Callable[[], T]) -> T | None:
        """Do what is not worth a run; if it fails, say so once, until it succeeds again."""
        try:
            result = action()
        except Exception as error:  # whatever it is: other ranks wait for this one in the next collective
            if path not in self._failing:
                self._failing.add(path)
                reason = str(error).strip().partition("\n")[0]
                what = reason if isinstance(error, OSError) else f"{type(error).__name__}: {reason}"
                _warn(f"warning: {path}: {what}; training goes on, and will try again")
            return None
        if path in self._failing:
            self._failing.discard(path)
            _warn(f"{path} is up to date again")
        return result


def _warn(line: str) -> None:
    tqdm.write(f"argonne: {line}", file=sys.stderr)


def _step(name: str) -> int:
    """The step that ``step_00000012`` says; -1 for any other name."""
    number = name.removeprefix("step_")
    return int(number) if number.isascii() and number.isdigit() else -1


def _sections_up_to(step: int) -> Callable[[bytes], bool]:
    """Whether each line of ``samples.md`` in turn tells of nothing past ``step``."""
    kept = True

    def stays(line: bytes) -> bool:
        nonlocal kept
        if heading := re.match(rb"## Step (\d+)", line):
            kept = int(heading.group(1)) <= step
        return kept

    return stays


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
    shape: BatchShape,
) -> dict[str, Any]:
    t, sizes, layout = config.training, workload.model.shape, state.model.groups.layout
    return {
        "total_tokens": state.tokens,
        "batch_size": shape.micro_batch,
        "global_steps": state.step,
        "num_layers": sizes.get("num_hidden_layers"),
        "num_attention_heads": sizes.get("num_attention_heads"),
        "hidden_size": sizes.get("hidden_size"),
        "model_params": state.model.parameter_count,
        "data_shards_seen": workload.data.shards_seen(lanes),
        "documents_seen": sum(lane.documents for lane in lanes.values()),
        "documents_dropped": dict(_dropped(lanes)),
        "base_learning_rate": t.learning_rate,
        "min_learning_rate": t.min_learning_rate,
        "warmup_steps": t.warmup_steps,
        "max_steps": t.total_steps,
        "gradient_accumulation_steps": shape.accumulation,
        "effective_tokens_per_step": shape.tokens_per_step,
        "amp_dtype": str(workload.precision.compute).removeprefix("torch."),
        "optimizer": t.optimizer,
        "fused_adamw": any(group.get("fused") for group in state.optimizer.param_groups),
        "parallelism": str(layout),
    }
