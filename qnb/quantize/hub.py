"""The Hugging Face hub: fetch a model's files at one commit, push a checkpoint in one commit.

The hub's client retries what may pass by itself. Any error that remains becomes one line for the user, without the
secrets that the client's own messages may hold.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnb.errors import GatedModelError, InputError, scrub
from qnb.memory import MIB

ANSWERS = {
    401: "the hub refuses the token (401); set HF_TOKEN to a valid one, or unset it",
    403: "this token has no right to do that (403); use one that does",
    404: "the hub has no such repository or revision, or this token cannot see it (404); check the name and HF_TOKEN",
    429: "the hub takes no more requests for now (429); try again later, or set HF_TOKEN, which raises the limit",
}


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


def push(folder: Path, repository: str, private: bool, dry_run: bool, card: str) -> Push:
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

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
    additions.append(CommitOperationAdd("README.md", card.encode()))
    files = tuple(addition.path_in_repo for addition in additions)
    total_mib = sum(addition.upload_info.size for addition in additions) / MIB
    if dry_run:
        return Push(repository, private, files, total_mib)
    with _talking(f"pushing to {repository!r} failed"):
        api = HfApi()
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repository).private:
            raise InputError(f"{repository!r} exists and is public; give another push_to, or set private to false")
        commit = api.create_commit(repository, additions, commit_message=f"Add {folder.name}").commit_url
    return Push(repository, private, files, total_mib, commit)


@contextmanager
def _talking(what: str) -> Iterator[None]:
    """Turn the client's errors within the block into one line, and mute its log, which shows signed addresses."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _explain(what, error) from None  # the error's own text may hold a secret
    finally:
        logging.set_verbosity(level)


def _explain(what: str, error: BaseException) -> InputError:
    """Return the error for the user: what failed, what the hub answered, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    cause = error.__cause__ or error
    answer: Any = next((each for each in (error, cause) if getattr(each, "response", None) is not None), None)
    if answer is None:
        return InputError(f"{what}: {scrub(str(cause)) or type(cause).__name__}; check the network and try again")
    if isinstance(answer, GatedRepoError):
        return GatedModelError(f"{what}: it is gated; ask for access on the model's page and set HF_TOKEN")
    status = 404 if isinstance(answer, RepositoryNotFoundError) else answer.response.status_code
    text = f"the hub answers {status} ({scrub(str(answer))}); try again later"
    return InputError(f"{what}: {ANSWERS.get(status, text)}")
