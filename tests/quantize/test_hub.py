"""The hub's own client against a hub in memory: what goes up comes back, and every refusal is one line."""

import traceback
from pathlib import Path

import pytest
from hub_server import Hub, httpx
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from tiny_models import save_tiny

from qnb.errors import INPUT_ERRORS, InputError, scrub
from qnb.quantize import files, hub, sources
from qnb.session import Session

MINE = "hf_" + "planted" * 4


@pytest.fixture
def server(tmp_path, monkeypatch, capfd):
    """A hub that the client takes for the real one; nothing that is printed may show a secret."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    monkeypatch.setenv("HF_TOKEN", MINE)
    server = Hub()
    set_client_factory(server.client)
    yield server
    set_client_factory(default_client_factory)
    assert MINE not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama in several files of weights, with a tokenizer and a manifest."""
    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    with files.replacing(folder) as draft:
        save_tiny(draft, max_shard_size="150KB")
    return folder


def contents(folder, *but):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


def push(folder, repository, private=True, dry_run=False):
    return hub.push(folder, repository, private, dry_run, card="# A card")


def error(call, *arguments):
    """Return the line that the user gets; neither it nor its traceback shows a secret."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert type(caught.value).__name__ in INPUT_ERRORS, "what the command line calls an input error"
    assert MINE not in "".join(traceback.format_exception(caught.value)) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_pushed_is_private_and_whole_and_comes_back_as_the_same_model(server, tiny):
    planned = push(tiny, "me/whole", dry_run=True)
    assert not server.received, "a dry run asks nobody"
    pushed = push(tiny, "me/whole")
    repository = server.repositories["me/whole"]
    commit, stored = repository.commits.popitem()
    assert repository.private and stored == contents(tiny) | {"README.md": b"# A card"}
    assert set(planned.files) == set(pushed.files) == set(stored) and pushed.commit.endswith(commit)
    repository.commits[commit] = stored
    source = sources.resolve("me/whole", "cpu")
    assert source.name == f"me/whole@{commit}"
    assert source.fingerprint == sources.resolve(str(tiny), "cpu").fingerprint


def test_a_study_stays_with_the_commit_it_began_with(server, tiny, tmp_path):
    first = server.publish("me/moving", contents(tiny))
    assert Session("me/moving", "bf16", tmp_path / "study").source.name == f"me/moving@{first}"
    second = server.publish("me/moving", {"config.json": (tiny / "config.json").read_bytes() + b"\n"})
    before, after = (sources.resolve(name, "cpu") for name in (f"me/moving@{first}", "me/moving@main"))
    assert after.name == f"me/moving@{second}" and before.fingerprint != after.fingerprint
    assert Session("me/moving", "bf16", tmp_path / "study").source == before
    assert "holds a study of" in error(Session, f"me/moving@{second}", "bf16", tmp_path / "study")


@pytest.mark.parametrize(
    ("copies", "read"),
    [
        (["consolidated.safetensors", "checkpoint-5/model.safetensors", "model.fp16.safetensors", "pytorch_model.bin",
          "original/tokenizer.json", "modeling_own.py", "README.md"], "*"),
        # one file is read before an index, as transformers does; the index may be an older upload's
        (["model.safetensors", "fp32/model.safetensors", "model-00001-of-00009.safetensors", "onnx/model.onnx",
          "model.safetensors.index.fp16.json", "metal/model.bin"], "model.safetensors"),
    ],
)  # fmt: skip
def test_only_what_transformers_reads_is_fetched_and_then_needs_no_hub(copies, read, server, tiny):
    weights = [path.name for path in tiny.glob("model-*")]
    server.publish("me/copies", contents(tiny) | {name: b"{}" for name in copies})
    source = sources.resolve("me/copies", "cpu")
    files = {path.relative_to(source.path).as_posix() for path in Path(source.path).rglob("*") if path.is_file()}
    assert files == set(contents(tiny, "manifest.json", *weights)) | set(weights if read == "*" else [read])
    for status in (429, 500):
        server.faults = {"": lambda _, status=status: httpx.Response(status)}
        assert sources.resolve("me/copies", "cpu").path == sources.resolve(source.name, "cpu").path == source.path


def refusal(status, code="", message=f"your token {MINE} is no good"):
    """The hub's answer to any request, by a status and the hub's own code for it; without a status, no answer."""

    def refuse(request):
        if not status:
            raise httpx.ConnectError("no luck")
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        return httpx.Response(status, json={"error": message}, headers=headers)

    return refuse


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (refusal(401, message="Invalid credentials in Authorization header"), "refuses the token (401)"),
        (refusal(401, "RepoNotFound"), "no such repository or revision"),
        (refusal(401, "GatedRepo"), "is gated; ask for access"),
        (refusal(403), "no right to do that (403)"),
        (refusal(404, "RevisionNotFound"), "no such repository or revision"),
        (refusal(418), "the hub answers 418 ("),
        (refusal(429), "no more requests for now (429); try again later"),
        (refusal(500), "the hub answers 500 ("),
        (refusal(None), "no luck; check the network and try again"),
    ],
)
def test_a_refusal_is_one_line(server, tiny, answer, expected):
    server.faults = {"": answer}
    for call in ((sources.resolve, "me/x", "cpu"), (push, tiny, "me/x")):
        message = error(*call)
        assert "'me/x'" in message and expected in message
    assert len(server.received) < 20


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"config.json": None}, "has settings that transformers cannot read"),
        ({"model.safetensors.index.json": None, "pytorch_model.bin": b"\x80\x04"},
         "is not whole: model.safetensors is missing; give a model saved as safetensors"),
        ({"config.json": b'{"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Config"}}',
          "modeling_own.py": b"1 / 0", "model.safetensors": b"{}"}, "code of a model's own is never run"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_its_weights(server, tiny, changes, expected):
    files = contents(tiny) | changes
    server.publish("me/own", {name: content for name, content in files.items() if content is not None})
    message = error(sources.resolve, "me/own", "cpu")
    assert "model 'me/own" in message and expected in message
    fetched = [asked for asked in server.received if asked.startswith("GET") and "resolve" in asked]
    assert not any(asked.endswith((".safetensors", ".bin", ".py")) for asked in fetched)


def test_auto_takes_the_mirror_only_where_the_model_is_gated(server, tiny):
    gated, mirror = (server.publish(name, contents(tiny)) for name in (sources.GATED, sources.MIRROR))
    server.faults = {sources.GATED: refusal(429)}
    assert "no more requests" in error(sources.resolve, "auto", "cuda")
    server.faults = {f"{sources.GATED}/resolve": refusal(403, "GatedRepo")}
    assert sources.resolve("auto", "cuda").name == f"{sources.MIRROR}@{mirror}"
    server.faults = {}
    assert sources.resolve("auto", "cuda").name == f"{sources.GATED}@{gated}"


def test_a_push_is_private_unless_it_is_asked_to_be_public(server, tiny):
    server.publish("me/public", {"config.json": b"{}"})
    assert "'me/public' exists and is public" in error(push, tiny, "me/public")
    assert not any("preupload" in asked for asked in server.received)
    assert push(tiny, "short").repository == "me/short" and server.repositories["me/short"].private
    push(tiny, "me/open", private=False)
    assert not server.repositories["me/open"].private


def test_secrets_are_blotted_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    scrubbed = {
        f"denied for {MINE}": "denied for ***",
        "Authorization: Bearer abc.def": "Authorization: Bearer ***",
        "https://user:password@host/simple gone": "https://***@host/simple gone",
        "PUT https://store/x?X-Amz-Signature=abc failed": "PUT https://store/x failed",
        "no rights for correct-horse": "no rights for ***",
        "one\ntwo": "one",
        "": "",
    }
    assert {text: scrub(text) for text in scrubbed} == scrubbed
