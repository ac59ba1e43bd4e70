"""Trials for a child process. This module imports little, as the child imports it."""

import os
import sys
import time

from qnb.speed.batch_search import ChildTrials, Probe


def ends_above(most, refuses, *_):
    """Begin trials that end their process above `most` rows and raise ValueError at `refuses`."""

    def try_batch(batch_size):
        if batch_size > most:
            os._exit(1)
        if batch_size == refuses:
            raise ValueError("shape mismatch")
        return Probe(batch_size, True, float(os.getpid()))

    return try_batch


def holds_nothing(*_):
    """Begin trials that no batch fits."""
    return lambda batch_size: Probe(batch_size, False, 2000.0)


def fails(error, *_):
    """Fail to begin, as an engine that cannot run the model does."""
    raise error


if __name__ == "__main__":  # print the child's process id, and wait to be killed
    from child_trials import ends_above as begin  # where the child finds it, which does not run this script

    with ChildTrials(begin, 1, 0) as try_batch:
        print(int(try_batch(1).reserved_mib), flush=True)
        time.sleep(float(sys.argv[1]))
