"""The Hugging Face hub: fetch a model's files at one commit, push a checkpoint in one commit.

The hub's client retries what may pass by itself. Any error that remains becomes one line for the user, without the
secrets that the client's own messages may hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnb.errors import InputError, scrub
from qnb.memory import MIB

SILENCE_S = 60  # the longest wait for an answer: the hub checks large files before it confirms them
ANSWERS = {
    401: "the hub refuses the token (401); set HF_TOKEN to a valid one, or unset it",
    403: "this token has no right to do that (403); use one that does",
    404: "the hub has no such repository or revision, or this token cannot see it (404); check the name and HF_TOKEN",
    429: "the hub takes no more requests for now (429); try again later, or set HF_TOKEN, which raises the limit",
}


class GatedModelError(InputError):
    """Say that a model is gated and that this token has no access to it."""


def fetch(name: str, patterns: Iterable[str]) -> Path:
    """Bring some of a model's files to the hub client's cache and return their folder, which is named by the commit.

    The cache answers alone when the hub does not answer, or refuses.

    Parameters
    ----------
    name
        ``organization/model``, or with ``@`` and a commit, tag or branch behind it.
    patterns
        Names of files, with wildcards.

    Raises
    ------
    GatedModelError
        The model is gated and this token has no access.
    InputError
        There is no such model or revision, or the hub cannot be reached, or it refuses.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    with _talking(f"model {name!r} could not be fetched"):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))


@dataclass(frozen=True, slots=True)
class Push:
    """What one push uploads, or would upload."""

    repository: str
    private: bool
    files: tuple[str, ...]
    total_mib: float
    commit: str = ""  # its address; empty where nothing was uploaded


def check_push(repository: str, dry_run: bool = True) -> None:
    """Refuse a push that cannot succeed, without the network.

    Raises
    ------
    InputError
        The hub allows no such name, or there is no token for an upload.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise InputError(f"push_to {repository!r} is no name on the hub; give one such as you/llama-3.2-1b") from None
    if not dry_run and not get_token():
        raise InputError(f"pushing to {repository!r} needs a hub token with write access; set HF_TOKEN")


def push(folder: Path, repository: str, private: bool = True, dry_run: bool = True, card: str = "") -> Push:
    """Upload a checkpoint's files to the hub in one commit. A second try sends only the files that did not arrive.

    Parameters
    ----------
    folder
        The checkpoint.
    repository
        ``you/model``, or ``model`` for the token's owner; made if it does not exist.
    private
        Whether only its owner sees the repository. A public repository is then refused.
    dry_run
        Only say what would be uploaded, which needs neither token nor network.
    card
        The repository's README.md.

    Raises
    ------
    InputError
        The token is refused or has no right to write, the repository is public, or the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    contents: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    contents["README.md"] = card.encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    total_mib = sum(operation.upload_info.size for operation in operations) / MIB
    if dry_run:
        return Push(repository, private, tuple(contents), total_mib)
    with _talking(f"pushing to {repository!r} failed"):
        api = HfApi()
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repository).private:
            raise InputError(f"{repository!r} exists and is public; give another push_to, or set private to false")
        commit = api.create_commit(repository, operations, commit_message=f"Add {folder.name}").commit_url
    return Push(repository, private, tuple(contents), total_mib, commit)


@contextlib.contextmanager
def _talking(what: str) -> Iterator[None]:
    """Bound the client's patience within the block, mute its log, and turn its errors into one line.

    By itself the client waits for an answer without end, and logs addresses that are signed.
    """
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session, logging

    level, hooks = logging.get_verbosity(), get_session().event_hooks["request"]
    logging.set_verbosity(logging.CRITICAL)
    hooks.append(_bound_silence)
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explain(what, error) from None  # the error's own text may hold a secret
    finally:
        hooks.remove(_bound_silence)
        logging.set_verbosity(level)


def _bound_silence(request: Any) -> None:
    timeouts = request.extensions["timeout"]
    timeouts.update({phase: SILENCE_S for phase, limit_s in timeouts.items() if limit_s is None})


def _explain(what: str, error: BaseException) -> InputError:
    """Return the error for the user: what failed, what the hub answered, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    answer: Any = next((each for each in chain if getattr(each, "response", None) is not None), None)
    if answer is None:
        reason = scrub(str(chain[-1])) or type(error).__name__
        if any(isinstance(each, HTTPError | ConnectionError | TimeoutError) for each in chain):
            reason = f"no answer from {scrub(constants.ENDPOINT)} ({reason}); check the network and try again"
        return InputError(f"{what}: {reason}")
    if isinstance(answer, GatedRepoError):
        return GatedModelError(f"{what}: it is gated; ask for access on the model's page and set HF_TOKEN")
    status = 404 if isinstance(answer, RepositoryNotFoundError) else answer.response.status_code
    if status >= 500:
        return InputError(f"{what}: the hub is out of order ({status}); try again later")
    return InputError(f"{what}: {ANSWERS.get(status, f'the hub answers {status}: {scrub(str(answer))}')}")
