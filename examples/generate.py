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
from argonne.launch import Given, LaunchFlags, drive, guarded, parse, world_size
from argonne.models import Execution, ModelConfig, build_model, end_tokens, from_huggingface
from argonne.output import show
from argonne.parallel import ArgonneError, PipelinePlan, choose_device, process_groups
from argonne.parallel.legal import require_whole
from argonne.training.config import MOST_SEED
from argonne.training.layout_flags import LayoutFlags
from argonne.training.run.conflicts import without_effect
from argonne.training.run.setup import PRECISIONS, resolve_precision


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
    """Compute dtype: auto, fp32, bf16, fp16 or fp64 [bf16 on GPU, fp32 on CPU]."""


@dataclass(frozen=True)
class GenerateConfig:
    """Everything that generation can be told."""

    generate: GenerateFlags
    sampling: Sampling = field(default_factory=Sampling)
    parallel: LayoutFlags = field(default_factory=LayoutFlags)
    launch: LaunchFlags = field(default_factory=LaunchFlags)
    given: Given = frozenset()


def is_plain(path: Path) -> bool:
    """Whether this is a Hugging Face directory that has no manifest to go by."""
    return (path / "config.json").exists() and not is_checkpoint(path)


def some_config(path: Path) -> ModelConfig:
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
    for name in ("top_k", "top_p") if config.sampling.temperature == 0 else ():
        if name in config.given:
            raise without_effect(config.sampling, name, "a --temperature above 0")
    require_whole("seed", config.generate.seed, 0, MOST_SEED - len(config.generate.prompt))
    layout = config.parallel.layout(processes)
    model = some_config(config.generate.checkpoint_path)
    model.check_layout(layout)
    PipelinePlan.of("1f1b", layout.pipeline).check_layers(model.num_hidden_layers)


def main(config: GenerateConfig) -> None:
    flags, directory = config.generate, config.generate.checkpoint_path
    device = choose_device(config.launch.device)
    with process_groups(config.parallel.layout(world_size()), device) as groups:
        if not is_plain(directory):
            directory, reports = trusted(directory, groups)
            for report in reports if groups.is_first else ():
                print(report, file=sys.stderr, flush=True)  # the text stands alone on stdout
        with device:
            execution = Execution(groups, resolve_precision(flags.precision, device))
            model = build_model(from_huggingface(directory), execution)
        load_pieces(directory, weight_pieces(model.sharded_parameters()), verify=False)
        tokenizer = load_tokenizer(directory)
        stop = end_tokens(directory) | {tokenizer.eos_token_id}
        for number, prompt in enumerate(flags.prompt):
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            new = generate(model, ids, config.sampling, flags.seed + number, stop)
            if groups.is_first:
                show(tokenizer.decode(ids + new))


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(GenerateConfig, sys.argv[1:])))
