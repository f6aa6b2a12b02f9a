"""The server that workers are forked from: it imports this first, and nothing else does.

A worker takes up its task seconds after it was forked, for it imports the study's main module
before. From the fork on it ends with the study, and leaves Ctrl-C to it.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import threading
from contextlib import suppress

signal.signal(signal.SIGINT, signal.SIG_IGN)
atexit.register(os._exit, 0)  # there is nothing to put in order, and torch takes seconds to unload


def _end_with(study: int) -> None:
    select.select([study], [], [])
    os._exit(1)


with suppress(AttributeError, OSError):  # a system that has no pidfd_open: see workers._in_process
    _STUDY = os.pidfd_open(os.getppid())
    os.register_at_fork(
        after_in_child=lambda: threading.Thread(
            target=_end_with, args=(_STUDY,), daemon=True
        ).start()
    )
