"""Is tensor parallelism by Argonne worth it on a CPU? Its step beside DTensor's, Megatron-Core's and dense ones.

``python benchmarks/tp_peers.py`` takes about five minutes on two cores. Every contestant trains the same model
from the same weights on the same batches, in processes of its own; the losses must agree before anything is
timed. They take turns, one at a time, and each ratio is of one round, so that a slow minute of the machine falls
on all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its ranks

from argonne.launch import guarded, parse
from argonne.launch.allocation import KEEPING
from argonne.models import ArgonneConfig
from argonne.parallel import ArgonneError, Layout
from benchmarks.peers_megatron import is_installed as megatron_is_installed
from benchmarks.peers_megatron import megatron_step
from benchmarks.peers_models import Contestant, argonne_gloo_step, argonne_step, dense_step, dtensor_step
from benchmarks.report import environment, table, write_json

_TWO = Layout(tensor=2)
_DTENSOR, _DENSE = "DTensor TP 2", "dense, 2 threads"


@dataclass(frozen=True)
class Contest:
    """Who takes part, and whom the ratios compare with."""

    contestants: tuple[Contestant, ...]
    controls: Mapping[str, str]
    """By a word for it, the name of a contestant."""
    file: str
    """Of the results."""


CONTESTS = {
    "peers": Contest(
        (
            Contestant("argonne TP 2", argonne_step, _TWO, variables=KEEPING),
            Contestant(
                "argonne TP 2 + sequence", argonne_step, replace(_TWO, sequence_parallel=True), variables=KEEPING
            ),
            Contestant(_DTENSOR, dtensor_step, _TWO),
            Contestant(f"{_DTENSOR}, memory kept", dtensor_step, _TWO, variables=KEEPING),
            Contestant(_DENSE, dense_step, Layout(), threads=2),
            Contestant(f"{_DENSE}, memory kept", dense_step, Layout(), threads=2, variables=KEEPING),
            *([Contestant("Megatron-Core TP 2", megatron_step, _TWO)] if megatron_is_installed() else []),
        ),
        {"dtensor": _DTENSOR, "dense": _DENSE},
        "tp_peers_cpu.json",
    ),
    "options": Contest(
        (
            Contestant("argonne TP 2", argonne_step, _TWO, variables=KEEPING),
            Contestant("memory not kept", argonne_step, _TWO),
            Contestant("sums by Gloo", argonne_gloo_step, _TWO, variables=KEEPING),
            Contestant("neither", argonne_gloo_step, _TWO),
        ),
        {"neither": "neither"},
        "tp_options_cpu.json",
    ),
}
"""``peers``: of others, as they come and with memory kept as Argonne's launcher has it. ``options``: what that and sums
in shared memory are worth."""

CHECKED_STEPS = 5
"""The first steps, whose losses must be equal; they warm every process up as well."""
TOLERANCE = 1e-4
"""Of those losses, relative. Sums in another order differ by about 1e-6 there."""


@dataclass(frozen=True)
class Flags:
    """What to train, and how often."""

    contest: Literal["peers", "options"] = "peers"
    """Who takes part."""
    layers: int = 8
    """Transformer blocks."""
    hidden: int = 256
    """Width of the residual stream."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    """Key-value heads."""
    ffn: int = 768
    """Width of the feed-forward layer."""
    sequence: int = 512
    """Tokens in a sequence."""
    vocab: int = 8192
    """Tokens in the vocabulary."""
    batch: int = 4
    """Sequences in a step."""
    rounds: int = 6
    """Turns of each contestant."""
    steps_per_round: int = 4
    """Timed steps in a turn; one more before them is not timed."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/tp_<contest>_cpu.json]."""

    def config(self) -> ArgonneConfig:
        """The model. Raises ``ArgonneError`` for what some contestant could not train."""
        for field in ("ffn", "sequence", "batch", "rounds", "steps_per_round"):
            if getattr(self, field) < 1:
                raise ArgonneError(f"{field}={getattr(self, field)} is not legal; legal: 1 or more")
        config = ArgonneConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            intermediate_size=self.ffn,
            max_position_embeddings=self.sequence,
            tie_word_embeddings=False,
        )
        for contestant in CONTESTS[self.contest].contestants:
            config.check_layout(contestant.layout)
        for field in ("kv_heads", "vocab"):  # Argonne shares these out unevenly too; DTensor's plan does not
            if getattr(self, field) % 2:
                raise ArgonneError(f"{field}={getattr(self, field)} is odd; legal for the 2 ranks of DTensor: even")
        if self.batch * self.sequence % 2:
            raise ArgonneError(f"batch * sequence = {self.batch * self.sequence} tokens are odd; legal: even")
        return config

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        """The ids and targets ``[batch, sequence]`` of a step: tokens of unequal frequency, so that there is
        something to learn."""
        draws = torch.rand(self.batch, self.sequence + 1, generator=torch.Generator().manual_seed(step))
        tokens = (draws**3 * self.vocab).long()
        return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True)
class Turn:
    """One contestant's timed steps in one round."""

    tokens_per_second: float
    cpu_seconds: float
    """For each step, of all its processes."""
    peak_bytes: int
    """That the process with most of it has had resident so far."""


class Team:
    """The processes of one contestant. They wait at a pipe, and so use no CPU, until it is their turn."""

    def __init__(self, contestant: Contestant, flags: Flags, folder: Path) -> None:
        self.name = contestant.name
        self.tokens = flags.batch * flags.sequence
        self.pipes: list[Connection] = []
        self.processes = []
        # OpenMP and MKL read it when the process starts.
        variables = {"OMP_NUM_THREADS": str(contestant.threads), **contestant.variables}
        os.environ.update(variables)
        spawn = multiprocessing.get_context("spawn")
        for rank in range(contestant.layout.world_size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(contestant, flags, rank, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for name in contestant.variables:
            del os.environ[name]

    def ready(self) -> None:
        """Wait until every process has its model."""
        self._answers()

    def train(self, warm_up: int, timed: int) -> tuple[list[float], Turn]:
        """Take ``warm_up + timed`` steps: all their losses, and how fast the timed ones were."""
        for pipe in self.pipes:
            pipe.send((warm_up, timed))
        answers = self._answers()
        losses, seconds, cpu_seconds, peaks = zip(*answers, strict=True)
        return losses[0], Turn(self.tokens * timed / max(seconds), sum(cpu_seconds) / timed, max(peaks))

    def _answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise ArgonneError(f"a process of {self.name!r} ended early; what it said is above") from None

    def stop(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.terminate()


def serve(contestant: Contestant, flags: Flags, rank: int, folder: Path, pipe: Connection) -> None:
    """The life of one process: build the model, then train as many steps as the pipe says, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher ends every process, with one message
    torch.set_num_threads(contestant.threads)
    ranks = contestant.layout.world_size
    if ranks > 1:
        meeting = folder / contestant.name.replace(" ", "_")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    step = contestant.build(flags.config(), contestant.layout)
    pipe.send(None)
    taken = 0
    while True:
        try:
            warm_up, timed = pipe.recv()
        except EOFError:
            break
        batches = [flags.data(taken + number) for number in range(warm_up + timed)]
        taken += len(batches)
        losses = [step(*batch) for batch in batches[:warm_up]]
        began, began_cpu = time.perf_counter(), time.process_time()
        losses += [step(*batch) for batch in batches[warm_up:]]
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((losses, time.perf_counter() - began, time.process_time() - began_cpu, 1024 * used))
    if ranks > 1:
        dist.destroy_process_group()


@contextmanager
def teams(flags: Flags) -> Iterator[list[Team]]:
    """Every contestant's processes, ready to train."""
    with tempfile.TemporaryDirectory() as folder:
        found: list[Team] = []
        try:
            found += (Team(each, flags, Path(folder)) for each in CONTESTS[flags.contest].contestants)
            for team in found:
                team.ready()
            yield found
        finally:
            for team in found:
                team.stop()


def check_losses(losses: dict[str, list[float]], control: str) -> float:
    """The largest relative difference from the losses of ``control``. Raises ``ArgonneError`` if it is not rounding."""
    worst = 0.0
    for name, own in losses.items():
        for step, (loss, expected) in enumerate(zip(own, losses[control], strict=True), start=1):
            difference = abs(loss - expected) / abs(expected)
            if not difference <= TOLERANCE:  # so that NaN is refused too
                raise ArgonneError(
                    f"the loss of step {step} is {loss:.6f} of {name!r}, but {expected:.6f} of {control!r}"
                )
            worst = max(worst, difference)
    return worst


def summarise(turns: dict[str, list[Turn]], controls: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds; a ratio is taken within each round first."""
    rates = {name: [turn.tokens_per_second for turn in own] for name, own in turns.items()}

    def ratio(own: Sequence[float], other: Sequence[float]) -> float:
        return median(a / b for a, b in zip(own, other, strict=True))

    return {
        name: {
            **{f"ratio_to_{word}": ratio(own, rates[control]) for word, control in controls.items()},
            "tokens_per_second": {"median": median(own), "best": max(own), "rounds": own},
            "cpu_seconds_per_step": median(turn.cpu_seconds for turn in turns[name]),
            "peak_bytes": max(turn.peak_bytes for turn in turns[name]),
        }
        for name, own in rates.items()
    }


def show(found: dict[str, dict[str, Any]], controls: Mapping[str, str], machine: dict[str, Any], rounds: int) -> None:
    """The table."""
    print(f"\n{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; medians of {rounds} rounds")
    rows = [
        (
            name,
            *(f"{own[f'ratio_to_{word}']:.2f}" for word in controls),
            f"{own['tokens_per_second']['median']:,.0f}",
            f"{own['tokens_per_second']['best']:,.0f}",
            f"{own['cpu_seconds_per_step']:.2f}",
            f"{own['peak_bytes'] / 2**30:.2f}",
        )
        for name, own in found.items()
    ]
    print(
        table(("", *(f"x {control}" for control in controls.values()), "tokens/s", "best", "CPU s/step", "GiB"), rows)
    )


def main(flags: Flags) -> None:
    """Check, measure, print the table and write the JSON."""
    config, contest = flags.config(), CONTESTS[flags.contest]
    controls, output = contest.controls, flags.output or Path(__file__).parent / "results" / contest.file
    *_, last = controls.values()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgonneError(f"output={str(output)!r} cannot be written: {error.strerror}") from None
    machine = environment(torch.device("cpu"))
    if (machine["cores"] or 1) < 2:
        print("warning: one core for two ranks; the figures will say little of tensor parallelism", flush=True)
    with teams(flags) as all_teams:
        losses = {team.name: team.train(CHECKED_STEPS - 1, 1)[0] for team in all_teams}
        worst = check_losses(losses, last)
        way = f"{losses[last][0]:.4f} -> {losses[last][-1]:.4f}"
        print(f"the first {CHECKED_STEPS} losses of all are equal: {way}, within {worst:.0e} relative", flush=True)
        turns: dict[str, list[Turn]] = {team.name: [] for team in all_teams}
        for number in range(flags.rounds):
            first = number % len(all_teams)
            for team in all_teams[first:] + all_teams[:first]:
                turns[team.name].append(team.train(1, flags.steps_per_round)[1])
            rates = ", ".join(f"{name} {own[-1].tokens_per_second:,.0f}" for name, own in turns.items())
            print(f"round {number + 1} of {flags.rounds}, tokens/s: {rates}", flush=True)
    found = summarise(turns, controls)
    show(found, controls, machine, flags.rounds)
    report = {
        "benchmark": "tp_peers",
        "environment": machine,
        "config": asdict(config),
        "sequence": flags.sequence,
        "batch": flags.batch,
        "rounds": flags.rounds,
        "steps_per_round": flags.steps_per_round,
        "largest_relative_loss_difference": worst,
        "contestants": {name: {**own, "losses": losses[name]} for name, own in found.items()},
    }
    write_json(output, report)
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    guarded(lambda: main(parse(Flags, sys.argv[1:])))  # type: ignore[type-var]  # it starts its ranks itself
