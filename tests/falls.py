"""Trials for a process of their own: this module imports little, as that process imports it."""

import os
import sys
import time

from qnb.errors import InputError
from qnb.speed.batch_search import Apart, Probe


def falls(most, refuses):
    """Begin a trial that ends its process above `most` rows and raises at `refuses`."""

    def try_batch(batch_size):
        if batch_size > most:
            os._exit(1)
        if batch_size == refuses:
            raise ValueError("shape mismatch")
        return Probe(batch_size, True, float(os.getpid()))

    return try_batch


def cannot_begin():
    """Fail as a model does that is not there."""
    raise InputError("there is no such model")


def falls_above_five(folder, precision, device, workload, limit_mib, engine):
    """Begin, as `benchmark.trial_of`, a trial that ends its process above five rows of what the study asked for."""
    assert (folder / "manifest.json").is_file() and len(workload.prompts) == 1
    return falls(5, 0)


def holds_nothing(folder, precision, device, workload, limit_mib, engine):
    """Begin a trial that no row fits."""
    return lambda batch_size: Probe(batch_size, False, 2 * limit_mib)


def ends_at_once(folder, precision, device, workload, limit_mib, engine):
    """Begin a trial that ends its process at the first row."""
    return falls(0, 0)


def cannot_record(folder, precision, device, workload, limit_mib, engine):
    """Begin as an engine does that cannot run this model."""
    from qnb.speed.engines import Absent

    raise Absent(f"engine {engine} cannot run")


def cannot_ask(folder, precision, device, workload, limit_mib, engine):
    """Begin as a request does that is longer than the context window."""
    raise InputError("more than the model's context window")


if __name__ == "__main__":  # say which process tries, and wait to be killed
    from falls import falls as begin  # where the new process finds it, which does not run this script

    with Apart(begin, 1, 0) as try_batch:
        print(int(try_batch(1).memory_mib), flush=True)
        time.sleep(float(sys.argv[1]))
