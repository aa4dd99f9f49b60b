"""Argonne: modular parallelism for pretraining language models."""

import time

from argonne.parent import end_with_parent

__version__ = "0.1.0"

STARTED = time.time()
"""When this process began to import argonne, in seconds since the epoch: ``--wall-time`` counts from here."""

end_with_parent()
