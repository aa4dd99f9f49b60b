"""Write text with a trained model: ``python examples/generate.py --checkpoint-path runs/demo --prompt 'We the people'``

Any layout opens any checkpoint: add ``--nproc 2`` for tensor parallelism. Any Hugging Face directory of a
Llama-type model with safetensors weights works too.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from argonne.checkpoint import (
    CheckpointError,
    is_checkpoint,
    load_pieces,
    require_intact,
    resolve,
    trusted,
    weight_pieces,
)
from argonne.data import load_tokenizer
from argonne.inference import Sampling, generate
from argonne.models import ArgonneConfig, build_model, from_huggingface
from argonne.parallel import ArgonneError, choose_device, process_groups
from argonne.training.command_line import drive, guarded, parse, world_size
from argonne.training.config import ParallelFlags
from argonne.training.setup import PRECISIONS, resolve_precision


@dataclass(frozen=True)
class GenerateFlags:
    """What to write."""

    checkpoint_path: Path
    """A run's directory (its newest checkpoint), a step directory, or a Hugging Face directory."""
    prompt: tuple[str, ...] = ("Long long time ago, ",)
    """Texts to continue."""
    seed: int = 0
    """Seed of the draws."""
    precision: str = "auto"
    """Compute dtype: auto, fp32, bf16 or fp64."""


@dataclass(frozen=True)
class GenerateConfig:
    """Everything that generation can be told."""

    generate: GenerateFlags
    sampling: Sampling = field(default_factory=Sampling)
    parallel: ParallelFlags = field(default_factory=ParallelFlags)


def is_plain(path: Path) -> bool:
    """Whether this is a Hugging Face directory that has no manifest to go by."""
    return (path / "config.json").exists() and not is_checkpoint(path)


def some_config(path: Path) -> ArgonneConfig:
    """The model's shape, from the newest checkpoint whose config.json is as it was written."""
    problem: ArgonneError | None = None
    for directory in [path] if is_plain(path) else reversed(resolve(path)):
        try:
            require_intact(directory, lambda name: name == "config.json")
            return from_huggingface(directory)
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def check(config: GenerateConfig, processes: int) -> None:
    if config.generate.precision not in ("auto", *PRECISIONS):
        legal = ", ".join(("auto", *PRECISIONS))
        raise ArgonneError(f"precision={config.generate.precision!r} is not known; legal: {legal}")
    layout = config.parallel.layout(processes)
    model = some_config(config.generate.checkpoint_path)
    model.check_layout(layout)
    config.parallel.plan(layout).check_layers(model.num_hidden_layers)


def main(config: GenerateConfig) -> None:
    flags, directory = config.generate, config.generate.checkpoint_path
    device = choose_device(config.parallel.device)
    with process_groups(config.parallel.layout(world_size()), device) as groups:
        if not is_plain(directory):
            directory, reports = trusted(directory, groups)
            for report in reports if groups.is_first else ():
                print(report, file=sys.stderr, flush=True)  # the text stands alone on stdout
        with device:
            plan = config.parallel.plan(groups.layout)
            model = build_model(from_huggingface(directory), groups, resolve_precision(flags.precision, device), plan)
        load_pieces(directory, weight_pieces(model.sharded_parameters()), verify=False)
        tokenizer = load_tokenizer(directory)
        for number, prompt in enumerate(flags.prompt):
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            new = generate(model, ids, config.sampling, flags.seed + number, tokenizer.eos_token_id)
            if groups.is_first:
                print(tokenizer.decode(ids + new), flush=True)


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(GenerateConfig, sys.argv[1:])))
