"""The hub's own client against a hub on loopback: what goes up comes back, and no fault half-takes a model.

The client reads where its hub is when it is imported, so it works in processes of its own here.
"""

import json
import os
import re
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from hub_server import Fault, Hub

from qnb.quantize import checkpoint, hub, sources

MINE, OTHER = "hf_" + "planted" * 4, "hf_" + "somebodyelse" * 2
LOOP = """
import json, os, sys, time, traceback
from pathlib import Path
time.sleep = lambda seconds: None  # between tries
answers, sys.stdout = sys.stdout, sys.stderr
import qnb
from qnb.quantize import checkpoint, hub, sources
for line in sys.stdin:
    expression, os.environ["HF_TOKEN"] = json.loads(line)
    reply = {"result": None, "error": None, "trace": ""}
    try:
        reply["result"] = eval(expression)
    except qnb.InputError as error:
        reply |= {"error": str(error), "trace": traceback.format_exc()}
    print(json.dumps(reply, default=str), file=answers, flush=True)
"""


class Client:
    """A process that evaluates expressions with the hub at `url`; its log is kept."""

    def __init__(self, url, folder):
        self.log = folder / "client.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen([sys.executable, "-c", LOOP], text=True, env=environment, **pipes)

    def ask(self, expression, token=MINE):
        """Return what the expression gave, or the error for the user; any other error ends the process."""
        self.process.stdin.write(json.dumps([expression, token]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        reply = json.loads(line)
        for text in (reply["error"] or "", reply["trace"], self.log.read_text()):
            assert MINE not in text and OTHER not in text and "signed" not in text, text
        assert "\n" not in (reply["error"] or "")
        return reply

    def error(self, expression, token=MINE):
        """Return the error for the user; empty where there is none."""
        return self.ask(expression, token)["error"] or ""

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture
def start(tmp_path_factory):
    """Returns a function that starts a client in a home of its own, or in one that was there before."""
    clients = []

    def make(url, home=None):
        clients.append(Client(url, home or tmp_path_factory.mktemp("client")))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One hub and one client for many tests, each with repositories of its own."""
    server = Hub(tmp_path_factory.mktemp("hub"), {MINE: "me", OTHER: "you"})
    with server.serving():
        client = Client(server.url, tmp_path_factory.mktemp("client"))
        yield server, client
        client.close()


@pytest.fixture
def server(running):
    server, _ = running
    server.faults.clear()
    server.received.clear()
    yield server
    assert not any(each.authorization for each in server.received if each.host == "localhost"), "a token went astray"


@pytest.fixture
def client(running):
    return running[1]


@pytest.fixture(scope="module")
def nowhere():
    """The address of a hub that does not exist."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama in several files of weights, with a tokenizer and a manifest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    with checkpoint.quiet(), checkpoint.replacing(folder) as draft:
        LlamaForCausalLM(config).save_pretrained(draft, max_shard_size="150KB")
        sources.save_byte_tokenizer(draft)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


def contents(folder, *but):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


def push(folder, repository, **options):
    return f"hub.push(Path({str(folder)!r}), {repository!r}, **{ {'card': '# A card', 'dry_run': False, **options} })"


def resolve(name, device="cpu"):
    return f"(lambda source: [source.name, source.fingerprint, source.path])(sources.resolve({name!r}, {device!r}))"


# up and down


def test_what_is_pushed_is_private_and_whole_and_comes_back_as_the_same_model(server, client, tiny):
    planned = client.ask(push(tiny, "me/whole", dry_run=True))["result"]
    assert not server.received, "a dry run asks nobody"
    client.ask(push(tiny, "me/whole"))
    repository = server.repositories["me/whole"]
    commit = repository.refs["main"]
    stored = {name: (server.folder / blob["oid"]).read_bytes() for name, blob in repository.commits[commit].items()}
    del stored[".gitattributes"]
    assert repository.private and stored == contents(tiny) | {"README.md": b"# A card"}
    assert all(f"'{name}'" in planned for name in stored)
    name, fingerprint, _ = client.ask(resolve("me/whole"))["result"]
    assert (name, fingerprint) == (f"me/whole@{commit}", sources.resolve(str(tiny), "cpu").fingerprint)


def test_an_interrupted_push_goes_on_with_what_is_missing(server, client, tiny):
    oids = [sha256(path.read_bytes()).hexdigest() for path in sorted(tiny.glob("*.safetensors"))]
    for oid in oids:
        (server.folder / oid).unlink(missing_ok=True)
    server.faults = [Fault("PUT", f"/store/{oids[-1]}")]
    error = client.error(push(tiny, "me/resumed"))
    assert re.search("^pushing to 'me/resumed' failed: no answer from .*network", error)
    assert len(server.requests("PUT", oids[-1])) == 6, "it was tried again, and not without end"
    repository = server.repositories["me/resumed"]
    assert len(repository.commits) == 1, "no commit before everything is there"
    server.faults.clear()
    server.received.clear()
    assert not client.error(push(tiny, "me/resumed"))
    assert {path.split("/")[2].split("?")[0] for path in server.requests("PUT", "/store/")} == {oids[-1]}
    assert len(repository.commits) == 2


def test_a_study_stays_with_the_commit_it_began_with(server, client, tiny, tmp_path):
    first = server.publish("me/moving", contents(tiny))
    study = f"qnb.Study({{!r}}, 'bf16', {str(tmp_path)!r}).session.source.name"
    assert client.ask(study.format("me/moving"))["result"] == f"me/moving@{first}"
    second = server.publish("me/moving", {"config.json": (tiny / "config.json").read_bytes() + b"\n"})
    before, after = (client.ask(resolve(name))["result"] for name in (f"me/moving@{first}", "me/moving@main"))
    assert after[0] == f"me/moving@{second}" and before[1] != after[1], "another configuration"
    assert client.ask(study.format("me/moving"))["result"] == f"me/moving@{first}"
    assert "holds a study of" in client.error(study.format(f"me/moving@{second}"))


def test_only_what_transformers_reads_is_fetched_and_then_needs_no_hub(server, client, start, nowhere, tiny):
    copies = {"consolidated.safetensors": b"1", "checkpoint-5/model.safetensors": b"2", "model.fp16.safetensors": b"3",
              "original/tokenizer.json": b"{}", "modeling_own.py": b"4", "README.md": b"5"}  # fmt: skip
    server.publish("me/copies", contents(tiny) | copies)
    fetched = client.ask(resolve("me/copies"))["result"]
    files = {path.relative_to(fetched[2]).as_posix() for path in Path(fetched[2]).rglob("*") if path.is_file()}
    assert files == set(contents(tiny, "manifest.json"))
    offline = start(nowhere, client.log.parent)
    assert offline.ask(resolve("me/copies"))["result"] == offline.ask(resolve(fetched[0]))["result"] == fetched


def test_an_interrupted_download_is_never_used(server, client, start, nowhere, tiny):
    server.publish("me/cut", contents(tiny))
    oids = [sha256(path.read_bytes()).hexdigest() for path in sorted(tiny.glob("*.safetensors"))]
    server.faults = [Fault("GET", f"/store/{oids[1]}")]
    assert re.search("'me/cut.*' could not be fetched: no answer from .*network", client.error(resolve("me/cut")))
    error = start(nowhere, client.log.parent).ask(resolve("me/cut"))["error"]
    assert re.search("no answer from|could not be fetched|is not whole", error)
    server.faults.clear()
    assert client.ask(resolve("me/cut"))["result"][1] == sources.resolve(str(tiny), "cpu").fingerprint


# refusals


@pytest.mark.parametrize("make", [resolve, lambda name: push(Path(__file__).parent, name)], ids=["fetch", "push"])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, r"refuses the token \(401\); set HF_TOKEN"),
        (403, r"no right to do that \(403\)"),
        (418, r"answers 418: .*418"),
        (429, r"no more requests for now \(429\); try again later"),
        (500, r"out of order \(500\); try again later"),
        (503, r"out of order \(503\)"),
    ],
)
def test_a_refusal_is_one_line_without_secrets(server, client, tiny, make, status, expected):
    name = f"me/refused{len(server.repositories)}"
    server.publish(name, contents(tiny))
    words = f"your token {MINE} is no good"
    server.faults = [Fault(method, "/", status, {}, words) for method in ("GET", "HEAD", "POST")]
    error = client.error(make(name))
    assert re.search(f"{name}.*(fetched|failed): .*{expected}", error), error
    assert len(server.received) < 20


def test_what_is_not_there_or_not_for_us_is_said(server, client, tiny):
    server.publish("me/open", {"config.json": b"{}"})
    server.publish("me/secret", contents(tiny), private=True)
    server.publish("me/gated", contents(tiny), gated=True)
    server.publish("me/bare", {"model.gguf": b"GGUF"})
    for name, token, expected in (
        ("me/none", MINE, "no such repository or revision.*HF_TOKEN"),
        ("me/secret", OTHER, "no such repository or revision"),
        ("me/secret", "", "no such repository or revision"),
        ("me/open@v9", MINE, "no such repository or revision"),
        ("me/gated", OTHER, "is gated; ask for access"),
        ("me/gated", "", "is gated; ask for access"),
        ("me/bare", MINE, "has settings that transformers cannot read"),
        ("me/open", "hf_unknown", r"refuses the token \(401\)"),
    ):
        error = client.error(resolve(name), token)
        assert re.search(f"^model '{name}'.*{expected}", error), error
        assert not server.requests("GET", "/store/"), "no weights"


def test_auto_takes_the_mirror_only_where_the_model_is_gated(server, client, tiny):
    server.publish(sources.GATED, contents(tiny), gated=True)
    mirror = server.publish(sources.MIRROR, contents(tiny))
    server.faults = [Fault("GET", sources.GATED, 429), Fault("HEAD", sources.GATED, 429)]
    assert "no more requests" in client.error(resolve("auto", "cuda"))
    server.faults.clear()
    assert client.ask(resolve("auto", "cuda"))["result"][0] == f"{sources.MIRROR}@{mirror}"
    commit = server.publish(sources.GATED, {}, gated=False)
    assert client.ask(resolve("auto", "cuda"))["result"][0] == f"{sources.GATED}@{commit}"


def test_nobody_is_waited_for_without_end(start, nowhere, tiny):
    """A hub that is not there, and one that takes the connection and says nothing."""
    alone = start(nowhere)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        waiting = start(f"http://127.0.0.1:{silent.getsockname()[1]}")
        waiting.ask("setattr(hub, 'SILENCE_S', 0.3)")
        for client in (alone, waiting):
            for expression in (resolve("me/kept"), push(tiny, "me/kept")):
                assert re.search("no answer from .*check the network", client.error(expression))


def test_a_push_that_would_show_or_take_what_is_not_ones_own_is_refused(server, client, tiny):
    server.publish("me/public", {"config.json": b"{}"})
    assert "'me/public' exists and is public" in client.error(push(tiny, "me/public"))
    assert not server.requests("POST", "preupload") and not server.requests("PUT", "")
    assert "no right to do that (403)" in client.error(push(tiny, "you/mine"))
    assert not client.error(push(tiny, "short")) and server.repositories["me/short"].private
    assert not client.error(push(tiny, "me/open2", private=False))
    assert not server.repositories["me/open2"].private


def test_a_model_with_code_of_its_own_is_refused_before_its_weights(server, client, tiny, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    auto_map = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    settings = {**json.loads((tiny / "config.json").read_bytes()), "auto_map": auto_map}
    files = {**contents(tiny), "modeling_own.py": code}
    server.publish("me/own", files | {"config.json": json.dumps(settings | {"model_type": "own"}).encode()})
    assert "code of a model's own is never run" in client.error(resolve("me/own"))
    assert not server.requests("GET", "/store/")
    server.publish("me/both", files | {"config.json": json.dumps(settings).encode()})  # of a class of transformers
    assert not client.error(resolve("me/both"))
    assert not (tmp_path / "ran").exists() and not server.requests("GET", r"\.py$")


def test_only_safetensors_are_taken(server, client, tiny):
    weights = [path.name for path in tiny.glob("*.safetensors*")]
    server.publish("me/pickled", {**contents(tiny, *weights), "pytorch_model.bin": b"\x80\x04pickled"})
    assert re.search("is not whole: model.safetensors is missing; .*pickled", client.error(resolve("me/pickled")))
    assert not server.requests("GET", "/store/")


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        (f"denied for {MINE}", "denied for ***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("https://user:password@host/simple gone", "https://***@host/simple gone"),
        ("PUT https://store/x?X-Amz-Signature=abc failed", "PUT https://store/x failed"),
        ("no rights for correct-horse", "no rights for ***"),
        ("one\ntwo", "one"),
        ("", ""),
    ],
)
def test_secrets_are_blotted_out(text, scrubbed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    assert hub.scrub(text) == scrubbed
