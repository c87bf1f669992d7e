"""Workers in processes of their own, each of which somebody will kill."""

import os
import signal
import sys
from collections.abc import Callable


def fork_workers(work: Callable[..., None]) -> None:
    """Fork a worker for each line of standard input, and answer with its process id.

    What `work` is called with stands on the line, with tabs between.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries them
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            work(*line.rstrip("\n").split("\t"))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
