"""From a command line to running ranks, and how a process ends. A room of its own: no other one need be entered.

A driver is ``guarded(lambda: drive(main, check, parse(Config, sys.argv[1:])))``, whose ``Config`` has a field
``launch`` of ``LaunchFlags``.
"""

from argonne.launch.drive import drive, guarded, world_size
from argonne.launch.flags import Given, HomeText, LaunchFlags, RestartFlags
from argonne.launch.parse import named_flags, parse
