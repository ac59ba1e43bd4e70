"""A hub in memory: what huggingface_hub's client asks of one, answered in place of the network.

It follows the client's requests (`hf_api.py`, `_commit_api.py`, `file_download.py`), with every file a small one, and
lets everybody do everything: what a hub refuses is a fault that a test puts in.
"""

import base64
import hashlib
import importlib
import json
import re
from types import SimpleNamespace
from typing import Any

from huggingface_hub.errors import HTTPError

httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])  # releases of the client differ in theirs
SITE = "https://huggingface.co/"


class Hub:
    """The hub's state, and a client of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Any] = {}  # whether each is private, and its commits: path -> content
        self.faults: dict[str, Any] = {}  # what answers in place of the hub, by a pattern of method and address
        self.received: list[str] = []  # method and address of each request

    def client(self) -> Any:
        return httpx.Client(transport=httpx.MockTransport(self.answer), follow_redirects=True)

    def publish(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Put files into a repository in one commit, and return the commit."""
        repository = self.repositories.setdefault(name, SimpleNamespace(private=private, commits={}))
        listing = {**next(reversed(repository.commits.values()), {}), **files}
        commit = hashlib.sha1(repr((len(repository.commits), listing)).encode()).hexdigest()
        repository.commits[commit] = listing
        return commit

    def answer(self, request: Any) -> Any:
        asked = f"{request.method} {request.url}".partition("?")[0]
        self.received.append(asked)
        for pattern, fault in self.faults.items():
            if re.search(pattern, asked):
                return fault(request)
        for pattern, reply in ROUTES.items():
            if match := re.fullmatch(pattern, asked):
                return reply(self, request, **match.groupdict())
        return httpx.Response(404)

    def listing(self, name: str, revision: str | None) -> Any:
        """Return the commit and its files."""
        commits = self.repositories[name].commits
        commit = next(reversed(commits)) if revision in (None, "main") else revision
        return commit, commits[commit]

    # downloads

    def info(self, request: Any, name: str, revision: str | None) -> Any:
        sha, private = self.listing(name, revision)[0], self.repositories[name].private
        return httpx.Response(200, json={"id": name, "sha": sha, "private": private})

    def tree(self, request: Any, name: str, revision: str) -> Any:
        files = self.listing(name, revision)[1].items()
        entries = [{"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)} for path, data in files]
        return httpx.Response(200, json=entries)

    def resolve(self, request: Any, name: str, revision: str, path: str) -> Any:
        commit, files = self.listing(name, revision)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(files[path])}"'}
        return httpx.Response(200, content=files[path], headers=headers)

    # uploads

    def create(self, request: Any) -> Any:
        wanted = json.loads(request.content)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name not in self.repositories:
            self.publish(name, {}, wanted.get("visibility") == "private" or wanted.get("private") is True)
        return httpx.Response(200, json={"url": SITE + name, "name": name})

    def preupload(self, request: Any, name: str) -> Any:
        files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                 for file in json.loads(request.content)["files"]]  # fmt: skip
        return httpx.Response(200, json={"files": files})

    def commit(self, request: Any, name: str) -> Any:
        lines = [json.loads(line) for line in request.content.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        commit = self.publish(name, {file["path"]: base64.b64decode(file["content"]) for file in files})
        return httpx.Response(200, json={"commitOid": commit, "commitUrl": f"{SITE}{name}/commit/{commit}"})


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = {
    rf"GET {SITE}api/models/{NAME}(/revision/{REVISION})?": Hub.info,
    rf"GET {SITE}api/models/{NAME}/tree/{REVISION}": Hub.tree,
    rf"(GET|HEAD) {SITE}{NAME}/resolve/{REVISION}/(?P<path>.+)": Hub.resolve,
    rf"POST {SITE}api/repos/create": Hub.create,
    rf"POST {SITE}api/validate-yaml": lambda *_: httpx.Response(200, json={"errors": [], "warnings": []}),
    rf"POST {SITE}api/models/{NAME}/preupload/main": Hub.preupload,
    rf"POST {SITE}api/models/{NAME}/commit/main": Hub.commit,
}
