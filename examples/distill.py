"""Distil a model from a teacher: ``torchrun --nproc-per-node 8 examples/distill.py --teacher-path DIR ...``

The flags are those of ``pretrain.py`` and the teacher's. Run the same command again to continue.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback of them

from argonne.launch import drive, guarded, parse
from argonne.training.distill_config import DistillConfig
from argonne.training.run.teacher import check_distill, distill

if __name__ == "__main__":
    guarded(lambda: drive(distill, check_distill, parse(DistillConfig, sys.argv[1:])))
