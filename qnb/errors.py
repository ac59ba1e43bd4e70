"""The one exception a user is meant to see."""

from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used: says what was given, what is accepted and what to do.

    The command line prints it as one line and exits with code 2; nothing has been written to the ledger.
    """


def path_of(path: str | Path) -> Path:
    """Return a path that the user gave, with ``~`` replaced.

    Raises
    ------
    InputError
        It begins with the home of a user that this machine does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # pathlib's own
        raise InputError(f"{str(path)!r} begins with a home that is not known here; give the folder itself") from error
