"""A hub in memory: what huggingface_hub's client asks of one, answered in place of the network.

It follows the client's requests (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`; large files by git-lfs'
batch protocol), without Xet. As on the real hub, large files lie on another host, which must never see a token.
"""

import base64
import hashlib
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import HTTPError

httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])  # releases of the client differ in theirs
STORE = "https://store.example/"


@dataclass
class Repository:
    """One repository: its commits, each a full listing of path -> content, and who may see it."""

    owner: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with requests of `method` whose address matches `pattern`."""

    method: str
    pattern: str
    status: int = 0  # the answer; 0 cuts the connection instead, midway through what is sent
    words: str = "something is wrong"


class Refused(Exception):
    """An answer with a status other than 200, and the hub's own code for it."""

    def __init__(self, status: int, words: str, code: str = "") -> None:
        super().__init__(words)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": words}


class Hub:
    """The hub's state, and a client of it."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens  # token -> its owner
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}  # sha256 -> a large file's content
        self.faults: list[Fault] = []
        self.received: list[Any] = []

    def client(self) -> Any:
        return httpx.Client(transport=httpx.MockTransport(self.answer), follow_redirects=True, timeout=None)

    def publish(self, name: str, files: dict[str, bytes], **flags: bool) -> str:
        """Put files into a repository by hand, in one commit, and return the commit."""
        repository = self.repositories.setdefault(name, Repository(name.split("/")[0]))
        for flag, value in flags.items():
            setattr(repository, flag, value)
        listing = {**repository.commits.get(repository.refs.get("main", ""), {}), **files}
        commit = hashlib.sha1(repr((len(repository.commits), listing)).encode()).hexdigest()
        repository.commits[commit], repository.refs["main"] = listing, commit
        self.store |= {sha256(data): data for path, data in files.items() if is_large(path)}
        return commit

    def requests(self, method: str, pattern: str) -> list[str]:
        """Return the addresses of the requests that came, in their order."""
        addresses = [str(request.url) for request in self.received if request.method == method]
        return [address for address in addresses if re.search(pattern, address)]

    def answer(self, request: Any) -> Any:
        self.received.append(request)
        address = str(request.url)
        faults = [each for each in self.faults if each.method == request.method and re.search(each.pattern, address)]
        fault = faults[0] if faults else None
        if fault and fault.status:
            return httpx.Response(fault.status, json={"error": fault.words})
        if fault and request.method != "GET":
            raise httpx.WriteError(f"cut while sending to {address}", request=request)
        for method, pattern, reply in ROUTES:
            match = re.fullmatch(pattern, address.partition("?")[0])
            if match and request.method in method.split():
                try:
                    response = reply(self, request, **match.groupdict())
                except Refused as refused:
                    return httpx.Response(refused.status, json={"error": str(refused)}, headers=refused.headers)
                if fault:
                    response = httpx.Response(200, content=half(response.content), headers=response.headers)
                return response
        return httpx.Response(404, json={"error": "Sorry, we can't find the page you are looking for."})

    # who asks, and for what

    def user(self, request: Any) -> str:
        """Return whose token came with the request; empty without one."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token, "")

    def repository(self, request: Any, name: str, write: bool = False) -> Repository:
        user, repository = self.user(request), self.repositories.get(name)
        if repository is None or (repository.private and user != repository.owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repository.owner:
            raise Refused(403, f"You don't have the rights to write to {name}")
        return repository

    def listing(self, request: Any, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(request, name)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # pages

    def create(self, request: Any) -> Any:
        wanted, user = json.loads(request.content), self.user(request)
        owner = wanted.get("organization") or user
        if not user or owner != user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        status = 409 if name in self.repositories else 200
        if status == 200:
            self.publish(name, {}, private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return httpx.Response(status, json={"url": f"https://huggingface.co/{name}", "name": name})

    def info(self, request: Any, name: str, revision: str | None) -> Any:
        commit, files = self.listing(request, name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        private = self.repositories[name].private
        return httpx.Response(200, json={"id": name, "sha": commit, "siblings": siblings, "private": private})

    def tree(self, request: Any, name: str, revision: str) -> Any:
        entries = []
        for path, data in self.listing(request, name, revision)[1].items():
            large = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if is_large(path) else {}
            entries.append({"type": "file", "path": path, "size": len(data), "oid": git_sha1(data), **large})
        return httpx.Response(200, json=entries)

    def check_card(self, request: Any) -> Any:
        return httpx.Response(200, json={"errors": [], "warnings": []})

    # uploads

    def preupload(self, request: Any, name: str, revision: str) -> Any:
        self.repository(request, name, write=True)
        paths = [file["path"] for file in json.loads(request.content)["files"]]
        modes = {path: "lfs" if is_large(path) else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return httpx.Response(200, json={"files": files})

    def batch(self, request: Any, name: str) -> Any:
        """Say where each object is to be put: nowhere if it is here."""
        self.repository(request, name, write=True)
        objects = json.loads(request.content)["objects"]
        for each in objects:
            if each["oid"] not in self.store:
                each["actions"] = {"upload": {"href": f"{STORE}{each['oid']}?X-Amz-Signature=signed", "header": {}}}
        return httpx.Response(200, json={"transfer": "basic", "objects": objects})

    def put(self, request: Any, oid: str) -> Any:
        self.store[sha256(request.read())] = request.content
        return httpx.Response(200 if oid in self.store else 400)

    def commit(self, request: Any, name: str, revision: str) -> Any:
        self.repository(request, name, write=True)
        lines = [json.loads(line) for line in request.content.splitlines()]
        values = {kind: [line["value"] for line in lines if line["key"] == kind] for kind in ("file", "lfsFile")}
        small = {value["path"]: base64.b64decode(value["content"]) for value in values["file"]}
        large = {value["path"]: self.store[value["oid"]] for value in values["lfsFile"]}
        commit = self.publish(name, small | large)
        address = f"https://huggingface.co/{name}/commit/{commit}"
        return httpx.Response(200, json={"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})

    # downloads

    def resolve(self, request: Any, name: str, revision: str, path: str) -> Any:
        """Answer with a file, or for a large one with where it lies."""
        commit, files = self.listing(request, name, revision)
        repository, user = self.repositories[name], self.user(request)
        if repository.gated and user != repository.owner:
            raise Refused(403 if user else 401, f"Access to model {name} is restricted.", "GatedRepo")
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data, headers = files[path], {"X-Repo-Commit": commit}
        if not is_large(path):
            return httpx.Response(200, content=data, headers={**headers, "ETag": f'"{git_sha1(data)}"'})
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        address = f"{STORE}{sha256(data)}?X-Amz-Signature=signed"
        return httpx.Response(302, headers={**headers, "Location": address})

    def get(self, request: Any, oid: str) -> Any:
        return httpx.Response(200, content=self.store[oid], headers={"ETag": f'"{oid}"'})


def half(data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]
    raise httpx.ReadError("cut while receiving")


def is_large(path: str) -> bool:
    """Return whether a new repository's .gitattributes put a file under LFS."""
    return path.endswith((".safetensors", ".bin"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


API, NAME, REVISION = "https://huggingface.co/api/models/", r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("POST", "https://huggingface.co/api/repos/create", Hub.create),
    ("POST", "https://huggingface.co/api/validate-yaml", Hub.check_card),
    ("GET", rf"{API}{NAME}(/revision/{REVISION})?", Hub.info),
    ("GET", rf"{API}{NAME}/tree/{REVISION}", Hub.tree),
    ("POST", rf"{API}{NAME}/preupload/{REVISION}", Hub.preupload),
    ("POST", rf"https://huggingface.co/{NAME}\.git/info/lfs/objects/batch", Hub.batch),
    ("POST", rf"{API}{NAME}/commit/{REVISION}", Hub.commit),
    ("PUT", rf"{STORE}(?P<oid>\w+)", Hub.put),
    ("GET HEAD", rf"{STORE}(?P<oid>\w+)", Hub.get),
    ("GET HEAD", rf"https://huggingface.co/{NAME}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
)
