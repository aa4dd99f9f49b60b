"""Resume from a checkpoint: ``torchrun --nproc-per-node 8 examples/resume.py --checkpoint-path runs/argonne``

What is not said is as it was saved; the layout is that of the processes it is given.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback of them

from argonne.launch import drive, guarded
from argonne.training.run.resume import check_resume, parse_resume, resume

if __name__ == "__main__":
    guarded(lambda: drive(resume, check_resume, parse_resume(sys.argv[1:])))
