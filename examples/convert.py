"""Convert a model: ``python examples/convert.py old.pth runs/converted`` makes a Hugging Face directory of an old file.

IN is a file of the original, a Hugging Face directory, a distributed checkpoint of PyTorch, or a run's directory.
``--to`` names what OUT becomes; ``docs/convert.md`` has a line on each way.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from argonne.convert import ConvertFlags, convert
from argonne.launch import guarded, parse


@dataclass(frozen=True)
class ConvertConfig:
    """Make a model that somebody has into the form that somebody wants."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """The model: a file or a directory."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where to: nothing may be there."""
    convert: ConvertFlags = field(default_factory=ConvertFlags)


def main(config: ConvertConfig) -> None:
    print(convert(config.source, config.target, config.convert))


if __name__ == "__main__":
    guarded(lambda: main(parse(ConvertConfig, sys.argv[1:])))
