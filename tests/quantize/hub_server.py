"""A hub on loopback: what huggingface_hub's client asks of one, answered from memory and one folder.

It follows the client's requests (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`; large files by git-lfs'
batch protocol), without Xet. As on the real hub, large files lie on another host than the pages (here: another name of
the same machine), which must never see a token.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One repository: its commits, each a full listing of path -> blob, and who may see it."""

    owner: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    commits: dict[str, dict[str, dict]] = field(default_factory=dict)

    def commit(self, changes: dict[str, dict], branch: str = "main") -> str:
        files = {**self.commits.get(self.refs.get(branch, ""), {}), **changes}
        text = json.dumps([len(self.commits), {path: blob["oid"] for path, blob in files.items()}])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha


@dataclass
class Fault:
    """What goes wrong with requests of `method` whose path matches `path`."""

    method: str
    path: str
    status: int = 0  # the answer; 0 cuts the connection instead, midway through the body that is sent or received
    headers: dict[str, str] = field(default_factory=dict)
    words: str = "something is wrong"


@dataclass
class Request:
    """A request that came in."""

    method: str
    path: str
    host: str
    authorization: str


class Hub:
    """The hub's state, and a server of it for the length of a ``with``."""

    def __init__(self, folder: Path, tokens: dict[str, str]) -> None:
        self.folder, self.tokens = folder, tokens  # token -> its owner
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.received: list[Request] = []

    @contextlib.contextmanager
    def serving(self) -> Iterator["Hub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        server.daemon_threads = True
        port = server.server_address[1]
        self.url, self.store_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}/store"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def publish(self, name: str, files: dict[str, bytes], **flags: bool) -> str:
        """Put a repository there by hand and return its commit."""
        repository = self.repositories.setdefault(name, Repository(name.split("/")[0]))
        for flag, value in flags.items():
            setattr(repository, flag, value)
        return repository.commit({path: self.blob(path, data) for path, data in files.items()})

    def blob(self, path: str, data: bytes) -> dict:
        large = is_large(path)
        oid = hashlib.sha256(data).hexdigest() if large else git_sha1(data)
        (self.folder / oid).write_bytes(data)
        return {"oid": oid, "size": len(data), "lfs": large}

    def requests(self, method: str, pattern: str) -> list[str]:
        """Return the paths of the requests that came, in their order."""
        return [each.path for each in self.received if each.method == method and re.search(pattern, each.path)]

    def fault(self, method: str, path: str) -> Fault | None:
        matching = (fault for fault in self.faults if fault.method == method and re.search(fault.path, path))
        return next(matching, None)


def is_large(path: str) -> bool:
    """Return whether a new repository's .gitattributes put a file under LFS."""
    return path.endswith((".safetensors", ".bin"))


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Refused(Exception):
    """An answer with a status other than 200, and the hub's own code for it."""

    def __init__(self, status: int, words: str, code: str = "") -> None:
        super().__init__(words)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keep quiet; `Hub.received` is the log."""

    def do_GET(self) -> None:
        hub, headers = self.hub, self.headers
        self.left = int(headers.get("Content-Length") or 0)  # bytes of the request's body not read yet
        host, token = headers["Host"].split(":")[0], headers.get("Authorization", "")
        hub.received.append(Request(self.command, self.path, host, token))
        self.fault = hub.fault(self.command, self.path)
        try:
            if self.fault and self.fault.status:
                return self.answer(self.fault.status, {"error": self.fault.words}, **self.fault.headers)
            if self.fault and self.command in ("PUT", "POST"):
                self.rfile.read(self.left // 2)
                return self.cut()
            path = unquote(urlsplit(self.path).path)
            for methods, pattern, act in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods:
                    return act(self, **match.groupdict())
            raise Refused(404, "Sorry, we can't find the page you are looking for.")
        except Refused as refused:
            code = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)} if refused.code else {}
            self.answer(refused.status, {"error": str(refused)}, **code)

    do_HEAD = do_POST = do_PUT = do_GET

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        data = self.rfile.read(self.left)
        self.left = 0
        return data

    def answer(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.body()  # what is not read would be taken for the next request
        self.send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers})
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # who asks, and for what

    def user(self) -> str:
        """Return whose token came with the request; empty without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, "")

    def repository(self, name: str, write: bool = False) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(name)
        if repository is None or (repository.private and user != repository.owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repository.owner:
            raise Refused(403, f"You don't have the rights to write to {name}")
        return repository

    def files(self, name: str, revision: str) -> tuple[str, dict[str, dict]]:
        repository = self.repository(name)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # pages

    def create(self) -> None:
        wanted, user = json.loads(self.body()), self.user()
        owner = wanted.get("organization") or user
        if not user or owner != user:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        content = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **content})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories[name] = Repository(owner, private)
        self.hub.publish(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, content)

    def info(self, name: str, revision: str | None) -> None:
        commit, files = self.files(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        flags = {"private": self.hub.repositories[name].private, "gated": self.hub.repositories[name].gated}
        self.answer(200, {"id": name, "sha": commit, "siblings": siblings, **flags})

    def tree(self, name: str, revision: str) -> None:
        """List a commit's files; the `oid` of a large one is its pointer's."""
        entries = []
        for path, blob in self.files(name, revision)[1].items():
            entry = {"type": "file", "path": path, "size": blob["size"], "oid": blob["oid"]}
            if blob["lfs"]:
                entry["oid"] = git_sha1(blob["oid"].encode())
                entry["lfs"] = {"oid": blob["oid"], "size": blob["size"], "pointerSize": 134}
            entries.append(entry)
        self.answer(200, entries)

    def check_card(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    # uploads

    def preupload(self, name: str, revision: str) -> None:
        self.repository(name, write=True)
        files = self.files(name, revision)[1]
        self.answer(200, {"files": [
            {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"]) else "regular",
             "shouldIgnore": False, "oid": files.get(file["path"], {}).get("oid")}
            for file in json.loads(self.body())["files"]
        ]})  # fmt: skip

    def batch(self, name: str) -> None:
        """Say where each object is to be put: nowhere if it is here."""
        self.repository(name, write=True)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body())["objects"]]
        for each in objects:
            if not (self.hub.folder / each["oid"]).exists():
                address = f"{self.hub.store_url}/{each['oid']}?X-Amz-Signature=signed"
                each["actions"] = {"upload": {"href": address, "header": {}}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "the content is not that of its oid")
        (self.hub.folder / oid).write_bytes(data)
        self.answer(200, b"")

    def commit(self, name: str, revision: str) -> None:
        hub, repository, changes = self.hub, self.repository(name, write=True), {}
        for line in map(json.loads, self.body().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = hub.blob(value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not (hub.folder / value["oid"]).exists():
                    raise Refused(400, f"the object of {value['path']} was never uploaded")
                changes[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
        sha = repository.commit(changes, revision)
        url = f"{hub.url}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        """Answer with a file, or for a large one with where it lies."""
        commit, files = self.files(name, revision)
        repository = self.hub.repositories[name]
        if repository.gated and self.user() != repository.owner:
            words = f"Access to model {name} is restricted and you are not in the authorized list."
            raise Refused(403 if self.user() else 401, words, "GatedRepo")
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob["oid"]}"'}
        if blob["lfs"]:
            linked = {"X-Linked-Etag": f'"{blob["oid"]}"', "X-Linked-Size": str(blob["size"])}
            address = f"{self.hub.store_url}/{blob['oid']}?X-Amz-Signature=signed"
            return self.answer(302, b"", **headers, **linked, Location=address)
        return self.get(blob["oid"], headers)

    def get(self, oid: str, headers: dict[str, str] | None = None) -> None:
        """Send an object; under a fault break off halfway."""
        data = (self.hub.folder / oid).read_bytes()
        self.send_head(200, {"ETag": f'"{oid}"', "Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.fault else data)
            if self.fault:
                self.cut()


NAME, REVISION, OID = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)", r"(?P<oid>[0-9a-f]{64})"
ROUTES = (
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.check_card),
    (("GET",), rf"/api/models/{NAME}(/revision/{REVISION})?", Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
    (("POST",), rf"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("POST",), rf"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (("PUT",), rf"/store/{OID}", Handler.put),
    (("GET", "HEAD"), rf"/store/{OID}", Handler.get),
    (("GET", "HEAD"), rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)
