"""Write text with a trained model: ``python examples/generate.py --checkpoint-path runs/demo --prompt 'We the people'``

Any layout opens any checkpoint: add ``--nproc 2`` for tensor parallelism. Any Hugging Face directory of a
Llama-type model with safetensors weights works too.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from argonne.inference import Sampling, generate
from argonne.inference.opening import check_opening, open_model
from argonne.launch import Given, LaunchFlags, drive, guarded, parse, world_size
from argonne.models import end_tokens
from argonne.output import show
from argonne.parallel import choose_device, process_groups
from argonne.parallel.legal import require_whole
from argonne.parallel.tensor_parallel.precision import check_precision, resolve_precision
from argonne.training.config import MOST_SEED
from argonne.training.layout_flags import LayoutFlags
from argonne.training.run.conflicts import without_effect


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


def check(config: GenerateConfig, processes: int) -> None:
    check_precision(config.generate.precision)
    for name in ("top_k", "top_p") if config.sampling.temperature == 0 else ():
        if name in config.given:
            raise without_effect(config.sampling, name, "a --temperature above 0")
    require_whole("seed", config.generate.seed, 0, MOST_SEED - len(config.generate.prompt))
    check_opening(config.generate.checkpoint_path, config.parallel.layout(processes))


def main(config: GenerateConfig) -> None:
    flags, device = config.generate, choose_device(config.launch.device)
    with process_groups(config.parallel.layout(world_size()), device) as groups:
        opened = open_model(flags.checkpoint_path, groups, resolve_precision(flags.precision, device))
        for report in opened.reports if groups.is_first else ():
            print(report, file=sys.stderr, flush=True)  # the text stands alone on stdout
        tokenizer = opened.tokenizer
        stop = end_tokens(opened.directory) | {tokenizer.eos_token_id}
        for number, prompt in enumerate(flags.prompt):
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            new = generate(opened.model, ids, config.sampling, flags.seed + number, stop)
            if groups.is_first:
                show(tokenizer.decode(ids + new))


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(GenerateConfig, sys.argv[1:])))
