"""The one exception a user is meant to see, and what may be said of others."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class InputError(ValueError):
    """Say what the user gave, what is accepted and what to do.

    The command line prints it as one line and exits with code 2. Nothing has been written to the ledger.
    """


class GatedModelError(InputError):
    """The hub gives the model's files only to those whom its owner has granted access."""


INPUT_ERRORS = ("InputError", "GatedModelError")  # as a notebook that failed names them


def check_choice(kind: str, name: object, choices: Iterable[str]) -> None:
    """Refuse a name that is none of `choices`, and tell which of them looks most like it.

    Raises
    ------
    InputError
        It is none of them.
    """
    if name not in (choices := list(choices)):
        hint = "".join(f"; did you mean {near!r}?" for near in get_close_matches(str(name), choices, 1))
        raise InputError(f"{kind} {name!r} is unknown; choose from {', '.join(choices)}{hint}")


def expand_path(path: str | Path) -> Path:
    """Return a path that the user gave, with ``~`` replaced.

    Raises
    ------
    InputError
        The path begins with the home of a user that this machine does not know.
    """
    with refusing(f"{str(path)!r} begins with an unknown user's home; give the folder itself", RuntimeError):
        return Path(path).expanduser()


@contextmanager
def refusing(message: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Turn an error of some kinds, or any, into one line for the user: the message, and in brackets what was raised.

    The error itself is not kept: its text may hold a secret.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{message} ({scrub(' '.join(str(error).split())) or type(error).__name__})") from None


def scrub(text: str, length: int = 200) -> str:
    """Return the first line of a text from elsewhere, shortened, with whatever may be a secret blotted out."""
    from huggingface_hub import get_token

    line = (text.strip().splitlines() or [""])[0]
    if token := get_token():
        line = line.replace(token, "***")
    line = re.sub(r"hf_\w+|(?<=://)[^/\s@]+(?=@)|(?i:(?<=bearer )\S+)", "***", line)
    return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", line)[:length]  # a signature stands in an address's query


def never_fail_to_print() -> None:
    """Let this process print what its console has no letters for, such as a path, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams take every letter, and have no such method
            stream.reconfigure(errors="backslashreplace")
