"""Trials for a process of their own: this module imports little, as that process imports it."""

import os

from qnb.batch import Probe
from qnb.error import InputError


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
