"""Pretrain a model: ``torchrun --nproc-per-node 8 examples/pretrain.py --data-glob 'shards/*.parquet' ...``

Run the same command again to continue. Without torchrun, ``--nproc N`` starts N processes.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback of them

from argonne.launch import drive, guarded, parse
from argonne.training.config import RunConfig
from argonne.training.run.checks import check
from argonne.training.run.workflow import pretrain

if __name__ == "__main__":
    guarded(lambda: drive(pretrain, check, parse(RunConfig, sys.argv[1:])))
