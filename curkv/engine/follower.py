"""A process that runs its share of a model beside rank 0, whose orders come by its standard input."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys

from curkv.engine.build import build_follower
from curkv.engine.lockstep import Start, follow
from curkv.exits import Exit

logger = logging.getLogger(__name__)


def main() -> Exit:
    """Joins and follows; returns the status to end with.

    Signals that end a server are for rank 0, whose running requests may finish: this process ends when its
    orders do.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ready = os.dup(1)
    os.dup2(2, 1)
    orders = sys.stdin.buffer
    start: Start = pickle.load(orders)
    logging.basicConfig(format=f"%(levelname)s rank {start.rank}: %(message)s", level=logging.WARNING)
    os.write(ready, b".")
    os.close(ready)
    try:
        follow(build_follower(start), orders)
    except Exception as error:
        logger.critical("%s", error)
        return Exit.ENGINE_BROKEN
    return Exit.DONE


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # whatever threads of a group that has lost a process would wait for
