"""Flags that contradict each other, or that would do nothing: refused, so that nobody waits for what never comes.

What counts is what a command names: a default contradicts nothing. Flags that say how tensor-parallel ranks share out
layers and tokens may stand with one rank, as their number follows from the machine. So may what launch scripts of the
first Argonne always say: ``--num-proc``, ``--min-batch-size``, ``--disable-compile``, ``--trust-remote-code`` and
``--local_rank``. A run that is given one of these in vain says so as it begins (``in_vain``).
"""

from __future__ import annotations

from argonne.parallel import Layout, choose_device
from argonne.parallel.errors import ArgonneError
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.run.identity import RunIdentity


def check_meaning(config: RunConfig, saved: RunIdentity | None = None) -> None:
    """Raise ``ArgonneError`` for the first flag that this command names and that has no effect as things are.

    ``saved`` is the identity of the run in the output directory. What the flags say against it is refused elsewhere.
    """
    data, training, parallel, given = config.data, config.training, config.parallel, config.given
    _ = parallel.kind  # refuses two at once
    pipelined = parallel.pipeline_parallel != 1 or "pipeline_parallel" in given
    replicated = parallel.data_parallel * parallel.context_parallel > 1 or {"data_parallel", "context_parallel"} & given
    made_before = saved is not None and saved.is_streamed is False
    replicas = "--data-parallel or --context-parallel"
    schedule = "--pipeline-schedule interleaved"
    needs = (
        (data, "validation_sequences", data.validation_glob is not None, "--validation-glob"),
        (data, "eval_sequences", data.eval is not None, "--eval"),
        (config.run, "eval_interval", data.eval is not None, "--eval"),
        (data, "cache_dir", not data.streaming or made_before, "--no-streaming"),
        (training, "decay_steps", training.schedule == "wsd", "--schedule wsd"),
        (training, "decay_shape", training.schedule == "wsd", "--schedule wsd"),
        (training, "decay_shape", training.learning_rates.decay_steps > 0, "--decay-steps"),
        (training, "initial_loss_scale", training.precision == "fp16", "--precision fp16"),
        (training, "muon_momentum", training.optimizer == "muon", "--optimizer muon"),
        (training, "muon_precision", training.optimizer == "muon", "--optimizer muon"),
        (parallel, "pipeline_schedule", pipelined, "--pipeline-parallel"),
        (parallel, "pipeline_interleave", parallel.pipeline_schedule == "interleaved", schedule),
        (parallel, "fsdp", replicated, replicas),
        (parallel, "zero1", replicated, replicas),
        (parallel, "reproducible_blocks", parallel.reproducible, "--reproducible"),
    )
    for flags, name, has_effect, what in needs:
        if name in given and not has_effect:
            raise without_effect(flags, name, what)
    for name in sorted(given):
        if name.startswith("filter_") and data.filters == "none":
            raise ArgonneError(f"{name}={getattr(data, name)} conflicts with filters='none'; legal: one of them")
    if isinstance(config, ResumeConfig):
        _check_resume(config)


def in_vain(config: RunConfig, layout: Layout) -> list[str]:
    """A line for each flag that this command names, that is taken, and that does nothing as things are."""
    data = config.data
    alone, unstaged = "the layout has tensor_parallel=1", "the layout has pipeline_parallel=1"
    on_cpu = choose_device(config.launch.device).type == "cpu"
    one, single = layout.data * layout.context == 1, "there is one replica"
    trained = data.tokenizer_path is None and config.model.init_from is None
    past_the_end = all(steps.start > config.training.total_steps for steps in config.run.traced_steps.ranges)
    idle = (
        ("--disable-compile", on_cpu, "on a CPU only --compile compiles anything"),
        ("--num-proc", data.streaming, "without --no-streaming, tokens are made while training"),
        ("--trust-remote-code", trained, "without --tokenizer-path, no tokenizer comes with code"),
        ("--local_rank", True, "LOCAL_RANK in the environment is what counts"),
        ("--sequence-parallel", layout.tensor == 1, alone),
        ("--uneven-shards", layout.tensor == 1, alone),
        ("--pipeline-schedule", layout.pipeline == 1, unstaged),
        ("--pipeline-interleave", layout.pipeline == 1, unstaged),
        ("--fsdp", one, single),
        ("--zero1", one, single),
        ("--trace", past_the_end, f"the run ends at step {config.training.total_steps:,}"),
    )
    named = {flag: flag.removeprefix("--").replace("-", "_") for flag, *_ in idle}
    return [f"note: {flag} has no effect: {why}" for flag, now, why in idle if now and named[flag] in config.given]


def without_effect(flags: object, name: str, what: str) -> ArgonneError:
    """The refusal of a flag of the group ``flags`` that does nothing without ``what``."""
    value = getattr(flags, name)
    shown = repr(value) if isinstance(value, str) else value
    return ArgonneError(f"{name}={shown} has no effect without {what}; legal: {what} too, or leave it out")


def _check_resume(config: ResumeConfig) -> None:
    flags = config.resume
    if flags.force_from_scratch and flags.reset_optimizer:
        raise ArgonneError(
            "force_from_scratch=True conflicts with reset_optimizer=True: at step 0 there is nothing to reset; "
            "legal: one of them"
        )
    if "rewarmup_steps" in config.given and not flags.reset_optimizer:
        raise without_effect(flags, "rewarmup_steps", "--reset-optimizer")
