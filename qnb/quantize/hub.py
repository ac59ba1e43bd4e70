"""The Hugging Face hub: a model fetched from it at one commit, a checkpoint pushed to it.

Nothing that comes from there is executed: safetensors only, and no code of a model's own. A model counts when every
file of its commit is here, and goes by the name of that commit from then on. The hub's client retries what may pass
by itself, five times; what remains is said in one line, without its own words where they could repeat a secret.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qnb.device import MIB
from qnb.errors import InputError

GATED, MIRROR = "meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B"
ANSWER_S = 10  # for the first sign that there is a hub
PATIENCE_S = 300  # the longest silence borne and pause kept to: the hub counts requests over five minutes
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
BESIDE = ["original/*", "onnx/*"]  # the same weights once more


def fetch(name: str) -> tuple[Path, str]:
    """Bring a model to the hub client's cache and return its folder and the commit it is of.

    Parameters
    ----------
    name
        ``organization/model``, or with ``@`` and a commit, tag or branch behind it, as in the hub's own addresses.
        A commit that is in the cache already needs no network.

    Raises
    ------
    InputError
        There is no such model or revision, it is gated, has no safetensors or needs code of its own; or the hub
        cannot be reached, or refuses. Nothing half fetched is returned.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError

    repository, _, revision = name.partition("@")
    absent = None
    with _patient():
        try:
            absent = _absent(repository, revision or None)
            where: dict[str, Any] = {"repo_id": repository, "local_files_only": absent is not None}
            config = Path(hf_hub_download(filename="config.json", revision=revision or None, **where))
            commit = config.parent.name
            refuse_code(name, config)
            folder = Path(snapshot_download(revision=commit, allow_patterns=FILES, ignore_patterns=BESIDE, **where))
        except InputError:
            raise
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"model {name!r} {_unfetched(repository, revision, absent or error)}") from None
    refuse_missing(name, folder)
    return folder, commit


def _absent(repository: str, revision: str | None) -> Exception | None:
    """Return why nobody answers at the hub's address, so that the cache must do; None where somebody does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        HfApi().model_info(repository, revision=revision, timeout=ANSWER_S)
    except HfHubHTTPError as error:
        if error.response.status_code not in (429, 500, 502, 503, 504):  # those the client tries again, with the files
            raise
    except (HTTPError, OSError, ValueError) as error:
        return error
    return None


def _unfetched(repository: str, revision: str, error: Exception) -> str:
    """Say why a model is not here and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import EntryNotFoundError

    cause = _answered(error)
    if isinstance(cause, GatedRepoError):
        mirror = f", or take the ungated mirror {MIRROR}" if repository == GATED else ""
        return (
            f"is gated and this token has no access; ask for it at https://huggingface.co/{repository} and set "
            f"HF_TOKEN{mirror}"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return "is not on the hub (or is private and the token cannot see it); check the name and HF_TOKEN"
    if isinstance(cause, RevisionNotFoundError):
        return f"has no revision {revision!r}; give a commit, tag or branch of it after the @, or leave that out"
    if isinstance(cause, EntryNotFoundError):
        return "has no config.json on the hub, so transformers cannot load it; give a model that has one"
    return f"could not be fetched from the hub: {_why(error)}; smollm2-135m and local folders need no hub"


def refuse_code(name: str, config: Path) -> None:
    """Refuse a model that transformers has no class for and that brings its own code, going by its config.json.

    Raises
    ------
    InputError
        The model would run code of its own.
    """
    try:
        settings = json.loads(config.read_text())
        code, kind = settings.get("auto_map"), str(settings.get("model_type"))
    except (ValueError, AttributeError):
        raise InputError(f"model {name!r} has a config.json that is no JSON object; give a saved model") from None
    if not code:
        return
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"model {name!r} needs code of its own (auto_map in its config.json, and model_type {kind!r} is unknown "
            "to transformers), which is never run here; give a model that transformers itself can load"
        )


def refuse_missing(name: str, folder: Path) -> None:
    """Refuse a model without safetensors, or with fewer of them than its index names.

    Raises
    ------
    InputError
        Weights are missing or lie in another format.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    if not present:
        raise InputError(
            f"model {name!r} has no *.safetensors; weights in other formats are not read, as pickled ones (*.bin, "
            "*.pt) can run code; give a model saved as safetensors"
        )
    index = folder / "model.safetensors.index.json"
    try:
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else present
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"model {name!r} has a {index.name} that lists no weights; give a saved model") from None
    if named - present:
        raise InputError(
            f"model {name!r} is not whole: {', '.join(sorted(named - present))} of its index is missing; fetch it "
            "again with the network there"
        )


@dataclass(frozen=True, slots=True)
class Push:
    """What one push uploads, or would upload."""

    repository: str
    private: bool
    files: tuple[str, ...]
    total_mib: float
    commit: str = ""  # its address; empty where nothing was uploaded


def check_push(repository: str, dry_run: bool = True) -> None:
    """Refuse a push that cannot succeed, before anything is made for it and without the network.

    Raises
    ------
    InputError
        The name is none the hub has, or one is to be uploaded to and there is no token.
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
    """Upload every file in a checkpoint's folder to the hub in one commit; again, only what is missing there.

    Parameters
    ----------
    folder
        The checkpoint.
    repository
        ``you/model``, or ``model`` for the token's owner; made if it is not there.
    private
        Whether only its owner sees the repository. One that is public already is refused then.
    dry_run
        Only say what would be uploaded, which needs neither token nor network.
    card
        The repository's README.md; empty where it gets none.

    Raises
    ------
    InputError
        No token, no right to write, a public repository where a private one was asked for, or no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    check_push(repository, dry_run)
    contents: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    if card:
        contents["README.md"] = card.encode()
    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in contents.values())
    files, total_mib = tuple(contents), size / MIB
    if dry_run:
        return Push(repository, private, files, total_mib)
    with _patient():
        try:
            api = HfApi()
            repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
            open_to_all = private and not api.model_info(repository, timeout=ANSWER_S).private
            if not open_to_all:
                added = [CommitOperationAdd(name, content) for name, content in contents.items()]
                done = api.create_commit(repository, added, commit_message=f"Add {folder.name}")
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"pushing to {repository!r} failed: {_why(error)}; files that arrived whole are not sent again"
            ) from None
    if open_to_all:
        raise InputError(
            f"{repository!r} is there already and is public, so nothing was uploaded; give another push_to, or set "
            "private to false"
        )
    return Push(repository, private, files, total_mib, done.commit_url)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """For a while, bound the client's patience, which by itself has no end, and keep its log to itself.

    The log names addresses that are signed for a while.
    """
    from huggingface_hub.utils import get_session, logging

    level, session = logging.get_verbosity(), get_session()
    logging.set_verbosity(logging.CRITICAL)
    hooks, silence_s = session.event_hooks["response"], session.timeout
    hooks.append(_keep_to_pause)
    session.timeout = PATIENCE_S
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hooks.remove(_keep_to_pause)
        session.timeout = silence_s


def _keep_to_pause(response: Any) -> None:
    """Let the client wait as long as the hub asks, and say so; fail at once where that is longer than a user would."""
    from huggingface_hub.errors import HfHubHTTPError

    pause_s = _pause_s(response.headers) if response.status_code >= 400 else 0
    if pause_s > PATIENCE_S:
        raise HfHubHTTPError(f"a pause of {pause_s} s", response=response)
    if pause_s:
        tqdm.write(f"the hub asks for a pause of {pause_s} s")


def _pause_s(headers: Mapping[str, str]) -> int:
    """Return the pause that an answer asks for as the client reads it: the limit's reset, or else Retry-After."""
    reset = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    named = reset or re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", ""))
    return int(named[1]) if named else 0


def _causes(error: BaseException) -> list[BaseException]:
    """Return `error` and what led to it, the first cause last."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


def _answered(error: BaseException) -> Any:
    """Return the error that carries the hub's answer, itself or among its causes; None where there was no answer."""
    return next((each for each in _causes(error) if getattr(each, "response", None) is not None), None)


def _why(error: BaseException) -> str:
    """Say what went wrong between here and the hub, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    cause, chain = _answered(error), _causes(error)
    if cause is None:
        reasons = [text for each in chain if (text := getattr(each, "strerror", None))]
        reason = scrub(reasons[-1] if reasons else str(chain[-1]) or type(error).__name__)
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
            return "it is not in the cache, and HF_HUB_OFFLINE forbids to ask; unset that"
        if any(isinstance(each, HTTPError | ConnectionError | TimeoutError) for each in chain):
            return f"no answer from {scrub(constants.ENDPOINT)} ({reason}); check the network and try again"
        return reason
    status, words = cause.response.status_code, scrub(cause.server_message or "no reason given")
    if status == 401:
        return "the hub refuses the token (401); set HF_TOKEN to a valid one, or unset it"
    if status == 403:
        return f"this token may not do that (403: {words}); take one with the right to"
    if status == 429:
        when = f"in {pause_s} s" if (pause_s := _pause_s(cause.response.headers)) else "later"
        return f"the hub takes no more requests for now (429); try again {when}; with HF_TOKEN set it takes more"
    if status >= 500:
        return f"the hub is out of order ({status}); try again later"
    return f"the hub answers {status}: {words}"


def scrub(text: str, most: int = 200) -> str:
    """Return the first line of a text from elsewhere, shortened, with what may be a secret in it blotted out."""
    from huggingface_hub import get_token

    line = (text.strip().splitlines() or [""])[0]
    if token := get_token():
        line = line.replace(token, "***")
    line = re.sub(r"hf_\w+|(?<=://)[^/\s@]+(?=@)|(?i:(?<=bearer )\S+)", "***", line)
    return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", line)[:most]  # an address's signature stands in its query
