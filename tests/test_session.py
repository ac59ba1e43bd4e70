"""A session remembers its model, finds what was measured, records what failed, and proves its checkpoints."""

import errno
import json
import os
import shutil
from contextlib import nullcontext
from threading import Timer
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from tiny_models import save_tiny

from qnb import InputError, Study
from qnb import session as module
from qnb.device import Device
from qnb.ledger import file_sha256
from qnb.quantize import files, sources
from qnb.session import Session


@pytest.fixture
def session(source, tmp_path):
    return Session("smollm2-135m", "bf16,int8", tmp_path / "study")


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_changed_in_place_is_noticed(part, tmp_path):
    local, output = save_tiny(tmp_path / "model"), tmp_path / "study"
    first = Session(str(local), output=output).source.fingerprint
    assert Session(str(local), output=output).source.fingerprint == first
    if part.endswith(".json"):
        (local / part).write_bytes((local / part).read_bytes() + b"\n")  # still a file of its kind
    else:
        flip(local / part)
    with pytest.raises(InputError, match="changed since"):
        _ = Session(str(local), output=output).source


@pytest.mark.parametrize("model", ["broken", "foo/bar--baz", "foo/bar.git"])
def test_a_model_that_cannot_be_one_has_a_card_which_fetches_nothing_and_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    session = Session(model, "bf16", tmp_path / "study", device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(sources, "resolve", lambda *_: pytest.fail("the model was looked for"))
        facts = session.facts()
    assert "not fetched yet" in facts["model"] and facts["already measured"] == "nothing"
    with pytest.raises(InputError):
        session.source  # noqa: B018


def test_a_folder_of_another_model_or_a_broken_record_is_refused(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"requested": "a/b", "name": "a/b@1", "path": "", "reason": ""}))
    assert Session("auto", output=tmp_path).record["name"] == "a/b@1"
    with pytest.raises(InputError, match=r"study of a/b@1, not of smollm2-135m"):
        Session("smollm2-135m", output=tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        Session("auto", output=tmp_path)


def test_a_study_that_cannot_be_written_is_read_and_refused_where_it_would_be(studied, tmp_path, monkeypatch):
    folder = shutil.copytree(studied.folder, tmp_path / "study")
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    study = Study(precisions="all", output=folder)
    assert len(study.results().bs1) == len(studied.results().bs1)
    for write in (study.report, study.figures):
        with pytest.raises(InputError, match="cannot be written"):
            write()
    with pytest.raises(InputError, match="cannot be written"):
        Study(output=tmp_path / "new")


def test_only_versions_that_can_change_a_row_are_in_its_key(session):
    """Another `datasets` measures nothing again; another `bitsandbytes` measures all but the device's peaks."""
    stages = ("quantize", "accuracy", "divergence", "perf", "peaks")
    precision, versions = session.precisions[0], session.versions

    def keys(**changed):
        session.versions = {**versions, **changed}
        return {stage: session.key(stage, precision)["fingerprint"] for stage in stages}

    before = keys()
    assert keys(datasets="99.0", accelerate="99.0") == before
    changed = keys(bitsandbytes="99.0")
    assert {stage for stage in stages if changed[stage] != before[stage]} == set(stages) - {"peaks"}
    assert keys(lm_eval="99.0") == {**before, "accuracy": keys(lm_eval="99.0")["accuracy"]} != before


def test_on_another_gpu_accuracy_is_kept_and_speed_is_measured_anew(session):
    """And what began with float16 goes on with it, where bfloat16 is native too."""

    def on(kind, name, bf16, half="auto"):
        study = Session("smollm2-135m", "nf4", session.folder, half=half)
        study.device = Device(kind, name, 2**14, bf16, "")
        return study

    def keys(study):
        return {stage: study.key(stage, *study.precisions) for stage in (*module.LIBRARIES, "budget")}

    t4 = on("cuda", "Tesla T4", "emulated")
    for key in keys(t4).values():
        t4.append(key, {})
    for kind, kept in {"cuda": module.ON_ANY_GPU, "cpu": set()}.items():
        other = on(kind, "another", "native")
        assert {stage for stage, key in keys(other).items() if other.find(key)} == kept - {"lengths"}
        assert (other.half, keys(other)["perf"]["dtype"]) == ("float16", "float16")
    assert on("cuda", "another", "native", "float16").half == "float16"
    with pytest.raises(InputError, match=f"{session.folder} holds a study in float16, not in bfloat16"):
        on("cuda", "another", "native", "bfloat16")


def test_what_was_asked_last_is_shown_and_overwriting_measures_once(session):
    first, second = (session.key("perf", session.precisions[0], {"limit": limit}) for limit in (1, 2))
    session.append(first, {"x": 1}), session.append(second, {"x": 2})
    assert session.find(first)["x"] == 1 and [row["x"] for row in session.ledger.rows()] == [1]
    session.find(first)
    assert len(session.ledger.path.read_bytes().splitlines()) == 3, "what is shown already is not written again"
    again = Session("smollm2-135m", "bf16", session.folder, overwrite=True)
    assert again.find(first) is None and again.decided(first)["x"] == 1
    again.append(first, {"x": 3})
    assert again.find(first)["x"] == 3 and again.find(second) is None  # which this session has not measured


def test_a_folder_is_the_same_model_however_it_is_spelled(tmp_path, monkeypatch):
    folder, other = tmp_path / "here" / "m", tmp_path / "there" / "m"
    for each in (folder, other):
        save_tiny(each)
    monkeypatch.chdir(folder.parent)
    assert Session("m", "bf16", tmp_path / "study").source.path == str(folder)
    for spelling in ("m/", "./m", str(folder), "auto"):
        assert Session(spelling, "bf16", tmp_path / "study").source.path == str(folder)
    monkeypatch.chdir(other.parent)
    with pytest.raises(InputError, match=r"holds a study of .*here/m, not of m"):
        Session("m", "bf16", tmp_path / "study")


def test_a_failure_is_recorded_with_its_reason_and_the_others_go_on(session, capsys):
    key = session.key("perf", session.precisions[0])
    with session.failing(key, "bf16"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    (failure,) = session.ledger.failures()
    assert (failure["stage"], failure["error"], failure["reason"]) == (
        "perf.failed", "OutOfMemoryError", "out of memory")  # fmt: skip
    assert "bf16 could not be measured (out of memory)" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="nothing of stage perf could be measured: out of memory"):
        session.require("perf")
    with session.failing(key, "bf16"):
        raise RuntimeError("https://user:hunter2@host/x?sig=abc hf_secret123")
    assert session.ledger.failures()[0]["reason"] == "RuntimeError: https://***@host/x ***"
    for error in (InputError("bad"), OSError("disk")):
        with pytest.raises(type(error)), session.failing(key, "bf16"):
            raise error
    session.append(key, {"x": 1})
    session.require("perf")
    assert session.ledger.failures() == []


def test_a_second_run_waits_for_the_first(session, capsys):
    session.folder.mkdir()
    held = FileLock(session.folder / ".lock", thread_local=False).acquire().lock
    Timer(1, held.release).start()
    with session.exclusive(), session.exclusive():
        assert not held.is_locked
    assert "waiting for it" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_folder_without_locks_is_measured_into_with_a_notice(number, session, monkeypatch, caplog):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    denied = pytest.raises(OSError) if number == errno.EIO else nullcontext()
    with denied, session.exclusive():
        session.append(session.key("perf"), {"x": 1})
    assert number == errno.EIO or ("no file locks" in caplog.text and len(session.ledger) == 1)


def test_a_damaged_checkpoint_is_noticed_and_made_again(tmp_path, capsys):
    """Flipped in one bit, truncated, a file gone, its manifest changed: each is named and made again."""
    model = str(save_tiny(tmp_path / "model"))
    Session(model, "fp32", tmp_path).checkpoint(module.parse("fp32")[0])
    folder = tmp_path / "checkpoints" / "fp32"
    weights, config, manifest = min(folder.glob("*.safetensors")), folder / "config.json", folder / "manifest.json"
    whole = file_sha256(weights)
    damages = ((flip, weights), (os.truncate, weights, 1000), (os.remove, config), (flip, manifest, 20))
    for damage, path, *how in damages:
        damage(path, *how)
        Session(model, "fp32", tmp_path).checkpoint(module.parse("fp32")[0])
        assert f"{path.name} in" in capsys.readouterr().out
        assert files.damage(folder) == "" and file_sha256(weights) == whole


def test_no_checkpoint_is_made_again_of_a_model_that_is_damaged_too(tmp_path):
    """One file of weights is the model's and the checkpoint's, and a bit of it flips without a trace in its times."""
    model = save_tiny(tmp_path / "model")
    Session(str(model), "bf16", tmp_path).checkpoint(module.parse("bf16")[0])
    weights, times = model / "model.safetensors", (model / "model.safetensors").stat()
    flip(weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"changed since output .* or is damaged"):
        Session(str(model), "bf16", tmp_path).checkpoint(module.parse("bf16")[0])
