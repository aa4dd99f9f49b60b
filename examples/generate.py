"""Write text with a trained model: ``python examples/generate.py --checkpoint-path runs/demo --prompt 'We the people'``

Any layout opens any checkpoint: add ``--nproc 2`` for tensor parallelism. Any Hugging Face directory of a
Llama-type model with safetensors weights works too. Prompts come from flags, a file, or whoever types in a terminal.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from argonne.inference import Sampling
from argonne.inference.opening import check_opening, open_model
from argonne.inference.prompts import STANDARD_INPUT, read_prompts, require_chat_template, typed_prompts
from argonne.inference.text import check_stops
from argonne.inference.writer import Writer
from argonne.launch import Given, LaunchFlags, drive, guarded, parse, world_size
from argonne.models import end_tokens
from argonne.parallel import ArgonneError, choose_device, process_groups
from argonne.parallel.communication.collectives import collectively, gather_objects
from argonne.parallel.legal import require_whole
from argonne.parallel.tensor_parallel.precision import check_precision, resolve_precision
from argonne.training.layout_flags import LayoutFlags
from argonne.training.run.conflicts import without_effect
from argonne.training.training_flags import MOST_SEED


@dataclass(frozen=True)
class GenerateFlags:
    """What to write."""

    checkpoint_path: Path
    """A run's directory (its newest checkpoint), a step directory, or a Hugging Face directory."""
    prompt: tuple[str, ...] = ("Long long time ago, ",)
    """Texts to continue [in a terminal: what is typed there; elsewhere "Long long time ago, "]."""
    prompt_file: Path | None = None
    """A file of prompts, one a line, or JSON lines with a "prompt" each; - for standard input [none]."""
    chat: bool = False
    """Prompts are what a user says: they are written as the tokenizer's chat template has it, and answered."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, before which it is cut off [none]."""
    stream: bool = False
    """Print the text while it is written, of one prompt; a session in a terminal always does."""
    max_batch: int = 8
    """Prompts that are continued at a time, at most."""
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


def in_session(config: GenerateConfig) -> bool:
    """Whether prompts are typed, one after the other."""
    flags = config.generate
    named = "prompt" in config.given or flags.prompt_file not in (None, STANDARD_INPUT)
    return not named and sys.stdin is not None and sys.stdin.isatty()


def check(config: GenerateConfig, processes: int) -> None:
    flags = config.generate
    check_precision(flags.precision)
    for name in ("top_k", "top_p") if config.sampling.temperature == 0 else ():
        if name in config.given:
            raise without_effect(config.sampling, name, "a --temperature above 0")
    require_whole("seed", flags.seed, 0, MOST_SEED)
    require_whole("max_batch", flags.max_batch, 1)
    check_stops(flags.stop)
    if flags.prompt_file is not None and "prompt" in config.given:
        raise ArgonneError(f"prompt_file={str(flags.prompt_file)!r} conflicts with --prompt; legal: one of them")
    if flags.stream and (len(flags.prompt) != 1 or flags.prompt_file is not None) and not in_session(config):
        raise ArgonneError("stream=True prints one text as it is written; legal: with one --prompt, or in a terminal")
    if flags.prompt_file not in (None, STANDARD_INPUT):
        read_prompts(flags.prompt_file)
    check_opening(flags.checkpoint_path, config.parallel.layout(processes))


def main(config: GenerateConfig) -> None:
    flags, device = config.generate, choose_device(config.launch.device)
    with process_groups(config.parallel.layout(world_size()), device) as groups, torch.inference_mode():
        precision = resolve_precision(flags.precision, device)
        opened = open_model(flags.checkpoint_path, groups, precision, generating=True)
        for report in opened.reports if groups.is_first else ():
            print(report, file=sys.stderr, flush=True)  # the text stands alone on stdout
        if flags.chat:
            require_chat_template(opened.tokenizer, opened.directory)
        ends = end_tokens(opened.directory) | {opened.tokenizer.eos_token_id}
        writer = Writer(opened.model, opened.tokenizer, config.sampling, flags.seed, ends, flags.stop, flags.chat)
        if gather_objects(in_session(config), groups.world)[0]:
            writer.converse(typed_prompts())
            return
        file = flags.prompt_file if groups.is_first else None
        read = collectively(lambda: flags.prompt if file is None else read_prompts(file), groups.world)
        writer.write(gather_objects(read, groups.world)[0], flags.max_batch, flags.stream)


if __name__ == "__main__":
    guarded(lambda: drive(main, check, parse(GenerateConfig, sys.argv[1:])))
