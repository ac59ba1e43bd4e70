"""The one exception a user is meant to see."""


class InputError(ValueError):
    """Something the user gave cannot be used: says what was given, what is accepted and what to do.

    The command line prints it as one line and exits with code 2; nothing has been written to the ledger.
    """
