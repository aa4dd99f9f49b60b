"""How fast is text written? Here and in ``transformers``, with and without a cache, at TP 1 and TP 2, side by side.

``python benchmarks/generate.py --checkpoint-path DIRECTORY --nproc 2``. All contestants continue the same prompt with
the same weights greedily, and must write the same tokens. They take turns, and each ratio is of one round, so that a
slow minute of the machine falls on all of them. Processor time stands beside that of the clock: on a machine that does
other work it says more of one process, and nothing of how long two wait for each other. On a GPU: bfloat16, batches of
1, 8 and 64.

A token's time on a CPU is mostly that of reading the weights, and two cores of a virtual machine seldom read twice as
fast as one. So each round also times plain reads of as much, by one rank and by all at once: what memory allows.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its ranks

from argonne.inference import Sampling, continue_all
from argonne.inference.opening import check_opening, model_at
from argonne.launch import LaunchFlags, drive, guarded, parse, world_size
from argonne.models import ArgonneConfig, LanguageModel, preset, to_huggingface
from argonne.parallel import ArgonneError, Layout, Precision, ProcessGroups, choose_device, process_groups
from argonne.parallel.communication.collectives import barrier, gather_objects
from argonne.parallel.legal import require_whole
from argonne.parallel.tensor_parallel.precision import resolve_precision
from benchmarks.report import environment, table, write_json

LEAST = {"transformers / TP 1": 1.2, "TP 1 / TP {ranks}": 1.4, "no cache / cache": 10.0}
"""What each ratio of times is to be."""
READ_BYTES = 512 << 20
"""Read in the place of a token: about the weights of SmolLM2-135M."""


@dataclass(frozen=True)
class Flags:
    """What to write, and how often."""

    checkpoint_path: Path | None = None
    """A Hugging Face directory, or a step directory [random weights of the preset, which take as long]."""
    preset: str | None = None
    """Of random weights [argonne-2.5-1b on GPU, demo on CPU]."""
    launch: LaunchFlags = field(default_factory=LaunchFlags)
    prompt_tokens: int = 32
    """Tokens of the prompt."""
    new_tokens: int = 64
    """Tokens to add in a turn."""
    context: int = 512
    """Tokens of the context at which a cache is compared with none."""
    rounds: int = 5
    """Turns of each contestant."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/generate_<device>.json]."""


class Clock:
    """Notes when each token is there: a ``Follower`` here, and a streamer to ``transformers``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.marks: list[tuple[float, float]] = []

    def take(self, token: int) -> bool:
        self.put(token)
        return False

    def put(self, value: object) -> None:
        self.marks.append(_now(self._device))

    def end(self) -> None:
        """All have come."""


Turn = Callable[[int, Clock], list[list[int]]]
"""Writes so many tokens, before whose first and at each of which it marks the time."""


@dataclass
class Contestant:
    """One way to write, and what it took, a turn each."""

    name: str
    turn: Turn
    together: bool = False
    """All ranks take part."""
    seconds: list[float] = field(default_factory=list)
    """Of the clock, for each token after the first."""
    processor: list[float] = field(default_factory=list)
    """Of this rank's processor, likewise."""
    first: list[float] = field(default_factory=list)
    """Of the clock, until the first token is there."""
    tokens: list[list[int]] | None = None
    """What it wrote, of a contestant that writes."""

    def measure(self, groups: ProcessGroups, new: int) -> None:
        if not (self.together or groups.is_first):
            barrier(groups.world)
            return
        clock = Clock(groups.device)
        self.tokens = self.turn(new, clock) or None
        if groups.is_first:
            (began, _), first, last = clock.marks[0], clock.marks[1], clock.marks[-1]
            assert len(clock.marks) == new + 1
            self.first.append(first[0] - began)
            self.seconds.append((last[0] - first[0]) / (new - 1))
            self.processor.append((last[1] - first[1]) / (new - 1))
        barrier(groups.world)


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def check(flags: Flags, ranks: int) -> None:
    """Raise ``ArgonneError`` unless the model can be opened at every layout that is compared."""
    require_whole("prompt_tokens", flags.prompt_tokens, 1)
    require_whole("new_tokens", flags.new_tokens, 2)
    require_whole("rounds", flags.rounds, 1)
    layout = Layout(tensor=ranks, uneven_shards=True)
    if flags.checkpoint_path is None:
        config = _preset(flags)
        config.check_layout(layout)
    else:
        config = check_opening(flags.checkpoint_path, layout)
    longest = max(flags.context + 8, flags.prompt_tokens + flags.new_tokens)
    if longest > config.max_position_embeddings:
        raise ArgonneError(
            f"context={flags.context} is too long for a model of {config.max_position_embeddings} positions"
        )


def _preset(flags: Flags) -> ArgonneConfig:
    on_gpu = choose_device(flags.launch.device).type == "cuda"
    return preset(flags.preset or ("argonne-2.5-1b" if on_gpu else "demo"))


def random_weights(config: ArgonneConfig, directory: Path, dtype: torch.dtype) -> None:
    """Write a model that nobody has trained: its tokens mean nothing, and take as long as any."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**to_huggingface(config, {}, "float32"))).to(dtype).save_pretrained(directory)


def ours(model: LanguageModel, prompts: list[list[int]], cached: bool = True) -> Turn:
    def turn(new: int, clock: Clock) -> list[list[int]]:
        clock.put(prompts)
        followers = [clock, *(Clock(torch.device("cpu")) for _ in prompts[1:])]
        return continue_all(model, prompts, Sampling(new, 0.0), 0, followers=followers, cached=cached)

    return turn


def theirs(directory: Path, prompts: list[list[int]], precision: Precision, device: torch.device) -> Turn:
    """``transformers``, which is not told when to stop, so that all write as much."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=precision.compute).to(device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.tensor(prompts, device=device)

    def turn(new: int, clock: Clock) -> list[list[int]]:
        # It hands the prompt to the streamer first.
        found = model.generate(ids, max_new_tokens=new, do_sample=False, streamer=clock)
        return found[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return turn


def reads(groups: ProcessGroups) -> Turn:
    """Read ``READ_BYTES`` for each token, an equal part on each rank of ``groups``."""
    part = np.ones(READ_BYTES // 4 // groups.world.size, dtype=np.float32)

    def turn(new: int, clock: Clock) -> list[list[int]]:
        barrier(groups.world)
        for _ in range(new + 1):
            clock.put(None)
            np.dot(part, part)
        return []

    return turn


def _absent(new: int, clock: Clock) -> list[list[int]]:
    return []


def contest(contestants: list[Contestant], groups: ProcessGroups, flags: Flags, new: int) -> None:
    """A turn to warm up, then ``rounds`` of each, one after the other; all must write the same."""
    for number in range(flags.rounds + 1):
        for contestant in contestants:
            contestant.measure(groups, new)
            if number == 0:
                contestant.seconds, contestant.processor, contestant.first = [], [], []
    if groups.is_first and groups.device.type == "cpu":
        for contestant in contestants[1:]:
            if contestant.tokens not in (None, contestants[0].tokens):
                raise ArgonneError(f"{contestant.name} writes other tokens than {contestants[0].name}")


def rows_of(contestants: list[Contestant], batch: int) -> list[dict[str, Any]]:
    return [
        {
            "name": c.name,
            "batch": batch,
            "milliseconds_a_token": 1e3 * median(c.seconds),
            "best_milliseconds_a_token": 1e3 * min(c.seconds),
            "processor_milliseconds_a_token": 1e3 * median(c.processor),
            "tokens_per_second": batch / median(c.seconds),
            "first_token_milliseconds": 1e3 * median(c.first),
        }
        for c in contestants
    ]


def ratio(slower: Contestant, faster: Contestant) -> dict[str, float]:
    """How many times as long the first takes: the median over rounds, the same of processor time, and of best rounds.

    Of ranks that wait for each other, what disturbs one stops all: on a machine that does other work, best rounds say
    most of them.
    """
    pairs = zip(slower.seconds, faster.seconds, strict=True)
    times = zip(slower.processor, faster.processor, strict=True)
    best = min(slower.seconds) / min(faster.seconds)
    return {"clock": median(a / b for a, b in pairs), "processor": median(a / b for a, b in times), "best": best}


def main(flags: Flags) -> None:
    device = choose_device(flags.launch.device)
    torch.set_num_threads(1)
    with (
        process_groups(Layout(tensor=world_size(), uneven_shards=True), device) as groups,
        tempfile.TemporaryDirectory(prefix="argonne-") as made,
        torch.inference_mode(),
    ):
        ranks, precision = groups.world.size, resolve_precision("auto", device)
        path = flags.checkpoint_path or Path(gather_objects(made, groups.world)[0])
        if flags.checkpoint_path is None and groups.is_first:
            random_weights(_preset(flags), path, precision.compute)
        barrier(groups.world)
        alone = ProcessGroups.single(device)
        single = model_at(path, alone, precision, generating=True) if groups.is_first else None
        shared = model_at(path, groups, precision, generating=True) if ranks > 1 else None
        ratios: dict[str, dict[str, float]] = {}
        rows: list[dict[str, Any]] = []
        for batch in (1, 8, 64) if device.type == "cuda" else (1,):
            prompts = [
                [(37 * place + 11 * row) % 997 + 10 for place in range(flags.prompt_tokens)] for row in range(batch)
            ]
            found: list[Contestant] = []
            if groups.is_first:
                assert single is not None
                found.append(Contestant("TP 1", ours(single, prompts)))
                found.append(Contestant("transformers", theirs(path, prompts, precision, device)))
            else:
                found += [Contestant("TP 1", _absent), Contestant("transformers", _absent)]
            if shared is not None:
                found.append(Contestant(f"TP {ranks}", ours(shared, prompts), together=True))
                if device.type == "cpu":
                    found.append(Contestant("reads of one rank", reads(alone)))
                    found.append(Contestant(f"reads of {ranks} ranks", reads(groups), together=True))
            contest(found, groups, flags, flags.new_tokens)
            if groups.is_first:
                mark = f", batch {batch}" if batch > 1 else ""
                ratios[f"transformers / TP 1{mark}"] = ratio(found[1], found[0])
                if shared is not None:
                    ratios[f"TP 1 / TP {ranks}{mark}"] = ratio(found[0], found[2])
                if len(found) == 5:
                    ratios[f"reads of one rank / of {ranks}"] = ratio(found[3], found[4])
                rows += rows_of(found, batch)
        long = [[(41 * place) % 991 + 10 for place in range(flags.context)]]
        kinds = [Contestant(f"{name} at {flags.context}", _absent) for name in ("cache", "no cache")]
        if single is not None:
            kinds[0].turn, kinds[1].turn = ours(single, long), ours(single, long, cached=False)
        contest(kinds, groups, flags, 5)
        if groups.is_first:
            ratios["no cache / cache"] = ratio(kinds[1], kinds[0])
            rows += rows_of(kinds, 1)
            _report(flags, groups, ratios, rows, str(precision.compute).removeprefix("torch."))


def _report(
    flags: Flags, groups: ProcessGroups, ratios: dict[str, dict[str, float]], rows: list[dict[str, Any]], dtype: str
) -> None:
    import transformers

    least = {name.format(ranks=groups.world.size): value for name, value in LEAST.items()}
    for name, value in ratios.items():
        wanted = f" (to be {least[name]} or more)" if name in least else ""
        figures = f"{value['clock']:.2f} by the clock, {value['processor']:.2f} by the processor, best rounds"
        print(f"{name}: {figures} {value['best']:.2f}{wanted}")
    print(table(list(rows[0]), [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows]))
    written = {
        "benchmark": "generate",
        "environment": environment(groups.device) | {"transformers": transformers.__version__},
        "model": flags.checkpoint_path.name
        if flags.checkpoint_path
        else f"random weights of {flags.preset or 'the preset'}",
        "load_average": os.getloadavg()[0],
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "ranks": groups.world.size,
        "prompt_tokens": flags.prompt_tokens,
        "new_tokens": flags.new_tokens,
        "rounds": flags.rounds,
        "ratios": ratios,
        "contestants": rows,
    }
    write_json(flags.output or Path(f"benchmarks/results/generate_{groups.device.type}.json"), written)


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(Flags, sys.argv[1:])))
