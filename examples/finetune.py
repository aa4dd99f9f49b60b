"""Tune a model on conversations: ``python examples/finetune.py --init-from MODEL --data-glob 'chats/*.parquet'``

MODEL is any directory that opens. Run the same command again to continue; ``--nproc N`` starts N processes.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback of them

from argonne.launch import drive, guarded, parse
from argonne.training.run.checks import check
from argonne.training.run.workflow import pretrain
from argonne.training.tuning.config import TuneConfig

if __name__ == "__main__":
    guarded(lambda: drive(pretrain, check, parse(TuneConfig, sys.argv[1:])))
