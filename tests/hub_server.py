"""A hub on loopback: what the hub's own client asks of one, answered from memory and one folder.

Written after what huggingface_hub's client sends (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`; large
files by git-lfs' batch protocol), without Xet. As on the real one, large files lie on another host than the pages
(here: another name of the same machine), which must never see a token.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BLOCK = 1 << 20


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
    """What goes wrong with requests of `method` whose path matches `path`, the first `times` of them."""

    method: str
    path: str
    status: int = 0  # the answer; 0 cuts the connection instead, midway through the body that is sent or received
    headers: dict[str, str] = field(default_factory=dict)
    words: str = "something is wrong"
    times: int = 1_000_000
    act: Callable[[], object] | None = None  # happens when the request comes, which is answered well


@dataclass
class Asked:
    """A request that came in."""

    method: str
    path: str
    host: str
    authorization: str


class Hub:
    """The hub's state, and a server of it for the length of a ``with``."""

    def __init__(self, folder: Path, tokens: dict[str, str], part_bytes: int = 1 << 30) -> None:
        self.folder, self.tokens, self.part_bytes = folder, tokens, part_bytes  # token -> its owner
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def serving(self) -> Iterator["Hub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        server.daemon_threads = True
        self.port = server.server_address[1]
        self.url, self.store_url = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}/store"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def publish(self, name: str, files: dict[str, bytes], **flags: bool) -> str:
        """Put a repository there by hand and return its commit."""
        made = self.repositories.setdefault(name, Repository(name.split("/")[0]))
        made.private, made.gated = flags.get("private", made.private), flags.get("gated", made.gated)
        return made.commit({path: self.blob(path, data) for path, data in files.items()})

    def blob(self, path: str, data: bytes) -> dict:
        large = is_large(path, len(data))
        oid = hashlib.sha256(data).hexdigest() if large else git_sha1(data)
        (self.folder / oid).write_bytes(data)
        return {"oid": oid, "size": len(data), "lfs": large}

    def requests(self, method: str, pattern: str) -> list[str]:
        """Return the paths of the requests there were, in their order."""
        return [each.path for each in self.asked if each.method == method and re.search(pattern, each.path)]

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    if not fault.act:
                        return fault
                    fault.act()
        return None


def is_large(path: str, size: int) -> bool:
    """Return whether a new repository's .gitattributes put a file under LFS."""
    return path.endswith((".safetensors", ".bin")) or size > 10 * BLOCK


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
        """Keep quiet; `Hub.asked` is the log."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        hub, heads = self.hub, self.headers
        self.left = int(heads.get("Content-Length") or 0)  # of the request's body
        asked = Asked(self.command, self.path, heads["Host"].split(":")[0], heads.get("Authorization", ""))
        hub.asked.append(asked)
        self.fault = hub.fault(self.command, self.path)
        try:
            if self.fault and self.fault.status:
                return self.answer(self.fault.status, {"error": self.fault.words}, **self.fault.headers)
            if self.fault and self.command in ("PUT", "POST"):
                self.rfile.read(self.left // 2)
                return self.cut()
            url = urlsplit(self.path)
            self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            for methods, pattern, act in ROUTES:
                found = re.fullmatch(pattern, unquote(url.path))
                if found and self.command in methods:
                    return act(self, **found.groupdict())
            raise Refused(404, "Sorry, we can't find the page you are looking for.")
        except Refused as refused:
            code = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)} if refused.code else {}
            self.answer(refused.status, {"error": str(refused)}, **code)

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
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # who asks, and for what

    def user(self) -> str:
        """Return whose token came with the request; empty without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, "")

    def found(self, name: str, write: bool = False) -> Repository:
        user, made = self.user(), self.hub.repositories.get(name)
        if made is None or (made.private and user != made.owner):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != made.owner:
            raise Refused(403, f"You don't have the rights to write to {name}")
        return made

    def at(self, name: str, revision: str) -> tuple[str, dict[str, dict]]:
        made = self.found(name)
        commit = made.refs.get(revision, revision)
        if commit not in made.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, made.commits[commit]

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
        made = self.hub.repositories[name] = Repository(owner, private)
        made.commit({".gitattributes": self.hub.blob(".gitattributes", b"*.safetensors filter=lfs\n")})
        return self.answer(200, content)

    def info(self, name: str, revision: str | None) -> None:
        commit, files = self.at(name, revision or "main")
        made = self.hub.repositories[name]
        flags = {"private": made.private, "gated": "manual" if made.gated else False}
        siblings = [{"rfilename": path} for path in files]
        self.answer(200, {"id": name, "sha": commit, "siblings": siblings, **flags})

    def tree(self, name: str, revision: str) -> None:
        _, files = self.at(name, revision)
        self.answer(200, [entry(path, blob) for path, blob in files.items()])

    def check_card(self) -> None:
        self.body()
        self.answer(200, {"errors": [], "warnings": []})

    # uploads

    def preupload(self, name: str, revision: str) -> None:
        self.found(name, write=True)
        files, asked = self.at(name, revision)[1], json.loads(self.body())["files"]
        self.answer(200, {"files": [
            {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
             "shouldIgnore": False, "oid": files.get(file["path"], {}).get("oid")} for file in asked
        ]})  # fmt: skip

    def batch(self, name: str) -> None:
        """Say where each object is to be put: whole, in parts, or nowhere as it is here."""
        self.found(name, write=True)
        hub, objects = self.hub, []
        for wanted in json.loads(self.body())["objects"]:
            oid, size, made = wanted["oid"], wanted["size"], {"oid": wanted["oid"], "size": wanted["size"]}
            if not (hub.folder / oid).exists():
                upload: dict = {"href": f"{hub.store_url}/{oid}?X-Amz-Signature=signed", "header": {}}
                if size > hub.part_bytes:
                    parts = range(1, -(-size // hub.part_bytes) + 1)
                    upload["header"] = {str(part): f"{hub.store_url}/{oid}/{part}" for part in parts}
                    upload["header"]["chunk_size"] = str(hub.part_bytes)
                    upload["href"] = f"{hub.url}/complete/{oid}"
                made["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/verify/{oid}", "header": {}}}
            objects.append(made)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str, part: str | None) -> None:
        """Keep an object under its sha256, or one of its parts beside it."""
        draft, digest = self.hub.folder / f"{oid}.{part}.{threading.get_ident()}", hashlib.sha256()
        with draft.open("wb") as file:
            while block := self.rfile.read(min(BLOCK, self.left)):
                self.left -= len(block)
                digest.update(block)
                file.write(block)
        if not part and digest.hexdigest() != oid:
            raise Refused(400, "the content is not that of its oid")
        draft.replace(self.hub.folder / (f"{oid}.part{part}" if part else oid))
        self.answer(200, b"", ETag=f'"{digest.hexdigest()}"')

    def complete(self, oid: str) -> None:
        """Join an object's parts, which must be the ones named."""
        parts = json.loads(self.body())["parts"]
        data = b"".join((self.hub.folder / f"{oid}.part{part['partNumber']}").read_bytes() for part in parts)
        if hashlib.sha256(data).hexdigest() != oid or not all(part["etag"] for part in parts):
            raise Refused(400, "the parts do not make the object")
        (self.hub.folder / oid).write_bytes(data)
        self.answer(200, {})

    def verify(self, oid: str) -> None:
        if (self.hub.folder / oid).stat().st_size != json.loads(self.body())["size"]:
            raise Refused(400, "the size is not the one announced")
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        made, hub, changes = self.found(name, write=True), self.hub, {}
        for line in map(json.loads, self.body().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = hub.blob(value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not (hub.folder / value["oid"]).exists():
                    raise Refused(400, f"the object of {value['path']} was never uploaded")
                changes[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
        sha = made.commit(changes, revision)
        url = f"{hub.url}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        """Answer with a file, or for a large one with where it lies."""
        commit, files = self.at(name, revision)
        if self.hub.repositories[name].gated and self.user() != self.hub.repositories[name].owner:
            words = f"Access to model {name} is restricted and you are not in the authorized list."
            raise Refused(403 if self.user() else 401, words, "GatedRepo")
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob["oid"]}"'}
        if blob["lfs"]:
            linked = {"X-Linked-Etag": f'"{blob["oid"]}"', "X-Linked-Size": str(blob["size"])}
            where = f"{self.hub.store_url}/{blob['oid']}?X-Amz-Signature=signed"
            return self.answer(302, b"", **headers, **linked, Location=where)
        return self.send_file(blob["oid"], headers)

    def get(self, oid: str, part: str | None) -> None:
        self.send_file(oid, {"ETag": f'"{oid}"'})

    def send_file(self, oid: str, headers: dict[str, str]) -> None:
        """Send an object or the range asked for; under a fault break off halfway."""
        path = self.hub.folder / oid
        size, first, status = path.stat().st_size, 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, status = int(found[1]), 206
            headers = {**headers, "Content-Range": f"bytes {first}-{size - 1}/{size}"}
        length = size - first
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = length // 2 if self.fault else length
        with path.open("rb") as file:
            file.seek(first)
            while left and (block := file.read(min(BLOCK, left))):
                left -= len(block)
                self.wfile.write(block)
        if self.fault:
            self.cut()


def entry(path: str, blob: dict) -> dict:
    """Return a file as the tree names it; of a large one `oid` is the pointer's."""
    made = {"type": "file", "path": path, "size": blob["size"], "oid": blob["oid"]}
    if blob["lfs"]:
        made["oid"] = git_sha1(blob["oid"].encode())
        made["lfs"] = {"oid": blob["oid"], "size": blob["size"], "pointerSize": 134}
    return made


NAME, REVISION, OID = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)", r"(?P<oid>[0-9a-f]{64})"
ROUTES = (
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.check_card),
    (("GET",), rf"/api/models/{NAME}(/revision/{REVISION})?", Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
    (("POST",), rf"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("POST",), rf"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (("PUT",), rf"/store/{OID}(/(?P<part>\d+))?", Handler.put),
    (("GET", "HEAD"), rf"/store/{OID}(/(?P<part>\d+))?", Handler.get),
    (("POST",), rf"/complete/{OID}", Handler.complete),
    (("POST",), rf"/verify/{OID}", Handler.verify),
    (("GET", "HEAD"), rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)
