"""Pretrain a model: ``torchrun --nproc-per-node 8 examples/pretrain.py --data-glob 'shards/*.parquet' ...``

Run the same command again to continue. Without torchrun, ``--nproc N`` starts N processes.
"""

import sys

from argonne.training.command_line import drive, guarded, parse
from argonne.training.config import RunConfig
from argonne.training.setup import check
from argonne.training.workflow import pretrain

if __name__ == "__main__":
    guarded(lambda: drive(pretrain, check, parse(RunConfig, sys.argv[1:])))
