"""The training loop: read ``Trainer._run`` from top to bottom."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from typing import Any

import torch
from torch import Tensor

from argonne.checkpoint import prune
from argonne.checkpoint.format import MANIFEST, step_directory
from argonne.data import BatchStream
from argonne.launch.refusal import NOTHING_GAINED, STOPPING, log, stopped_status
from argonne.launch.signals import STOP
from argonne.models import Batch, CrossEntropyLoss
from argonne.parallel import Draws
from argonne.parallel.communication.environment import seconds_since_start
from argonne.parallel.communication.job import TRAINING_TIMEOUT
from argonne.parallel.communication.reduction import sum_over
from argonne.training.batch_shape import BatchShape
from argonne.training.config import RunConfig
from argonne.training.evaluation import held_out_loss, sample_text
from argonne.training.feed import BatchFeed, Fed
from argonne.training.loss_parts import LossParts
from argonne.training.metrics import Progress, memory_gib, peak_flops
from argonne.training.named_sets import Measured, NamedSets
from argonne.training.report import Reports, data_line
from argonne.training.run.setup import Workload
from argonne.training.state import TrainingState
from argonne.training.step import NotFinite, StepResult, train_step
from argonne.training.trace import StepTrace

WALL_TIME = "--wall-time"


class Trainer:
    """One rank of one run. Every method is collective over all ranks."""

    def __init__(self, config: RunConfig, workload: Workload, state: TrainingState, shape: BatchShape) -> None:
        self.config, self.workload, self.state, self.shape = config, workload, state, shape
        self.groups = groups = state.model.groups
        accurate = torch.promote_types(workload.precision.compute, torch.float32)
        self.parts = LossParts(workload.loss.objective, groups, accurate)
        self.loss = workload.loss.build(state.model, workload.precision, self.parts.found)
        self.assignment = shape.assignment(config.parallel.kind, groups.reproducible)
        data = config.data
        weighs = data.source.weighs
        self.feed = BatchFeed(self._stream(), shape.ids, groups, data.document_mask, data.prefetch_batches, weighs)
        self.held_out = workload.held_out
        self.named = NamedSets(workload.named, config.run.evaluates, config.training.total_steps)
        self.reports = Reports(config.run.output_dir)
        self.step_seconds = 0.0
        # Until a save has been timed: weights and moments at 200 MB/s.
        self.save_seconds = sum(3 * s.parameter.nbytes for s in state.parameters) / 200e6

    def run(self) -> int:
        """Train to ``--total-steps``, ``--stop-at-step``, ``--wall-time`` or a signal; save on the way and at the end.

        Returns the status that this process is to end with.
        """
        with STOP.patience():
            return self._run()

    def _run(self) -> int:
        flags, state = self.config.run, self.state
        last = min(self.config.training.total_steps, flags.stop_at_step or self.config.training.total_steps)
        progress = Progress(state.step, last, flags.log_interval) if self.groups.is_first else None
        first = saved_at = state.step
        leaving = ""
        while state.step < last and not (leaving := self._why_leave()):
            began = time.perf_counter()
            batch = self.feed.next()
            waited = time.perf_counter() - began
            result = self._step(self._batch(batch))
            self._consume(batch)
            seconds = time.perf_counter() - began
            record = self._record(batch, result, seconds, waited)
            if not self.step_seconds:  # every rank is up: from now on a slow collective is a lost peer
                self.groups.set_timeout(TRAINING_TIMEOUT)
            self.step_seconds = max(self.step_seconds, seconds)

            save_now = state.step % flags.save_interval == 0 or state.step == last
            if save_now and self.held_out is not None:
                record["validation_loss"] = self._held_out_loss(self.held_out)
            if self.named.due(state.step):
                record["eval"], took = self._named_sets()
                if progress and took:
                    progress.say(took)
            if progress:
                self.reports.step(record)
                progress.step(record)
            if save_now:
                self._save(progress)
                saved_at = state.step
        if leaving and saved_at != state.step and progress:
            progress.say(f"leaving at step {state.step:,}: {leaving}")
        if saved_at != state.step:
            self._save(progress)
        self.feed.close()
        if progress:
            progress.close()
        return self._ending(leaving, state.step > first or self._saved_since_start()) if leaving else 0

    def _step(self, batch: Batch) -> StepResult:
        """Take one optimizer step, and trace it if it is one of ``--trace``."""
        state, step = self.state, self.state.step + 1
        rate, clip = state.schedule.learning_rate(step), self.config.training.gradient_clip
        if step not in self.config.run.traced_steps:
            return train_step(state, batch, self.loss, rate, clip)
        shape, leaves = self.shape, self.assignment.leaves_of(self.groups.data.rank)
        trace = StepTrace(state.model, leaves, self.assignment.leaves, (shape.micro_batch, shape.block_size))
        try:
            with trace:
                result = train_step(state, batch, trace.loss(self.loss), rate, clip, trace)
        except NotFinite:  # where that began is what the trace shows
            self._write(trace, step)
            raise
        self._write(trace, step)
        return result

    def _write(self, trace: StepTrace, step: int) -> None:
        lines = trace.lines()
        if self.groups.is_first:
            self.reports.trace(step, trace.count, lines)

    def _ending(self, leaving: str, gained: bool) -> int:
        """The status of a process that leaves for this reason before its last step; the first rank says why."""
        step = self.state.step
        if leaving != WALL_TIME:
            status = stopped_status(signal.Signals[leaving])
            line = f"stopped by {leaving} at step {step:,}{', saved' if step else ''}"
        elif gained:
            status = 0
            line = f"stopped at step {step:,}, saved: --wall-time is near"
        else:
            status, ran = NOTHING_GAINED, seconds_since_start()
            # The next start may take longer; what this one could not measure, a step, is given five seconds.
            least = math.ceil(1.5 * ran + self._time_to_leave(0.0)) + 5
            line = (
                f"nothing was gained: --wall-time {self.config.run.wall_time:g} leaves no time for a step and a save "
                f"after a start of {ran:.0f} s; legal: {least} or more"
            )
        if self.groups.is_first:
            log(line if status == NOTHING_GAINED else f"{line}. The same command continues the run.")
        return status

    def _saved_since_start(self) -> bool:
        """Whether this very command, before a launcher started it again, has saved what it goes on from."""
        saved = step_directory(self.config.run.output_dir, self.state.step) / MANIFEST
        return saved.exists() and saved.stat().st_mtime > time.time() - seconds_since_start()

    def _batch(self, fed: Fed) -> Batch:
        """The micro-batches of a step as the model is given them."""
        documents = None if fed.documents is None else fed.documents[..., :-1]
        state = self.state
        targets, divisor = fed.targets(self.config.training.objective.ignore_index), self._weight(fed)
        samples = torch.from_numpy(self.assignment.samples(self.groups.data.rank, state.next_sample))
        draws = Draws(self.config.training.seed, state.step + 1, samples)
        return Batch(fed.tokens[..., :-1], targets, documents, divisor=divisor, draws=draws)

    def _weight(self, fed: Fed) -> int:
        """How many targets of the global batch the loss is the mean over, whichever rank has them."""
        return self.shape.tokens_per_step if fed.weights is None else fed.weight

    def _consume(self, batch: Fed) -> None:
        """Count the data of this batch as consumed."""
        self.state.tokens += self.shape.tokens_per_step
        self.state.next_sample += self.shape.global_batch
        self.state.lanes = dict(batch.states)

    def _held_out_loss(self, sequences: Tensor) -> float:
        """The mean cross-entropy per token of the held-out text, whatever training minimises."""
        loss = CrossEntropyLoss(kernels=self.config.training.kernels)
        apart = self.config.data.document_mask
        return held_out_loss(self.state.model, sequences, self.shape.micro_batch, loss, apart)

    def _named_sets(self) -> tuple[Measured, str]:
        """The same of each named held-out set."""
        loss, apart = CrossEntropyLoss(kernels=self.config.training.kernels), self.config.data.document_mask
        return self.named.measure(self.state.model, self.shape.micro_batch, loss, apart)

    def _save(self, progress: Progress | None) -> None:
        """Show what the model has learnt, write the checkpoint, then let old checkpoints go.

        The reports come first: what they say of a step whose checkpoint was never completed is dropped
        on continuing, so that no interruption leaves a hole in them.
        """
        began = time.monotonic()
        state, config = self.state, self.config
        seed = config.training.seed + state.step
        text = sample_text(state.model, self.workload.tokenizer, config.run.sample_tokens, seed)
        lanes = state.all_lanes()
        if progress:
            self.reports.save(config, self.workload, state, lanes, self.shape, text or "")
        path = state.save(config, self.workload, lanes, self.shape.global_batch)
        if progress:
            directory, keep = config.run.output_dir, config.run.keep_checkpoints
            pruned = self.reports.attempt(directory, lambda: prune(directory, keep, path))
            gone = f"; {len(pruned)} older pruned" if pruned else ""
            progress.say(f"saved {path}{gone}\n  {data_line(lanes)}\n  {text!r}")
        self.save_seconds = max(self.save_seconds, time.monotonic() - began)

    def _why_leave(self) -> str:
        """Why all ranks leave before another step: a signal's name, ``WALL_TIME``, or nothing (collective).

        A signal may have come to one rank alone, so all tell each other; the first rank's clock is the one that counts.
        What this costs is one message of four numbers a step, over the CPU even where the model is on GPUs, so that no
        queue is waited for: less than a millisecond beside steps of seconds.
        """
        limit = self.config.run.wall_time
        late = limit is not None and self.groups.is_first and seconds_since_start() + self._time_to_leave(limit) > limit
        told = torch.tensor([*(STOP.number == number for number in STOPPING), late], dtype=torch.int32)
        reasons = (*(number.name for number in STOPPING), WALL_TIME)
        asked = sum_over(told, self.groups.world).tolist()
        return next((reason for reason, count in zip(reasons, asked, strict=True) if count), "")

    def _time_to_leave(self, limit: float) -> float:
        """Seconds in which another step and a save surely fit, under a ``--wall-time`` of ``limit``."""
        return 1.5 * (self.step_seconds + self.named.seconds) + max(2 * self.save_seconds, 0.02 * limit, 10.0)

    def _record(self, batch: Fed, result: StepResult, seconds: float, waited: float) -> dict[str, Any]:
        """The line of ``metrics.jsonl`` for this step."""
        rate = self.shape.tokens_per_step / seconds
        peak = peak_flops(self.groups.device)
        flops = self.state.model.flops_per_token(self.shape.block_size)
        position: dict[str, Any] = {}
        if 0 in batch.states:  # the first rank reads lane 0
            position = dataclasses.asdict(batch.states[0].position)
            position |= {
                "shard": self.workload.data.shard_of(0, batch.states[0]).path.name,
                "sample": batch.next_sample,
            }
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "loss": result.loss,
            **self.parts.take(self._weight(batch), result.loss),
            **({} if batch.weights is None else {"trained_tokens": batch.weight}),
            "validation_loss": None,
            **self.named.fields,
            "learning_rate": self.state.schedule.learning_rate(self.state.step),
            "grad_norm": result.norm,
            "tokens_per_second": rate,
            "step_time": seconds,
            "data_wait": waited,
            "mfu": rate * flops / (peak * self.groups.world.size) if peak else None,
            "memory_gib": memory_gib(self.groups.device),
            "data_position": position,
            "layout": dataclasses.asdict(self.groups.layout),
            "batch_hash": batch.digest,
        }

    def _stream(self) -> BatchStream | None:
        """The batches of this data-parallel rank, on the rank that reads them for those that share it."""
        workload, data = self.workload, self.groups.data
        if workload.tokenizer is None:
            return None
        served = self.assignment.served_lanes(data.rank, workload.data.lanes)
        mixture = workload.data.mixture(workload.tokenizer, workload.boundary, served, self.state.lanes)
        return BatchStream(mixture, self.assignment, data.rank, self.state.next_sample)
