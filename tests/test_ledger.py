"""The ledger: whole lines, the newest row shown, torn lines forgotten."""

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from io import FileIO
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
from filelock import FileLock
from tiny_models import save_tiny

from qnb import InputError
from qnb import ledger as module
from qnb.ledger import FAILED, Ledger, file_sha256, fingerprint, write_atomic, write_parquet
from qnb.quantize.stages import quantize
from qnb.session import Session


def row(precision="bf16", print_="a", **fields):
    return {"stage": "perf", "precision": precision, "fingerprint": print_, **fields}


def precisions(ledger):
    return [each["precision"] for each in ledger.rows()]


def test_the_newest_row_of_a_key_is_shown_and_an_older_one_is_still_found(tmp_path):
    ledger = Ledger(tmp_path / "new")
    written = [ledger.append(row(print_=print_, x=x, values={"total_s": 1.5})) for print_, x in (("a", 1), ("b", 2))]
    assert ledger.rows("perf") == Ledger(tmp_path / "new").rows() == written[1:]
    before = ledger.path.read_bytes()
    older = ledger.find(row(print_="a"))
    assert older["x"] == 1 and not ledger.is_newest(older) and ledger.is_newest(ledger.find(row(print_="b")))
    assert ledger.path.read_bytes() == before, "a query writes nothing"


@pytest.mark.parametrize("is_torn", [False, True])
@pytest.mark.parametrize("can_cut", [False, True])
def test_a_torn_last_line_is_dropped_or_left_where_no_file_can_be_cut(can_cut, is_torn, tmp_path, monkeypatch):
    class Uncut(FileIO):
        def truncate(self, _):
            raise OSError(errno.EOPNOTSUPP, "not supported")

    if not can_cut:
        monkeypatch.setattr(module.Path, "open", lambda path, mode, **_: Uncut(path, mode))
    ledger = Ledger(tmp_path)
    for count, name in enumerate(("bf16", "fp16", "nf4")):
        damaged = is_torn * (0 if can_cut else count - 1)
        assert len(Ledger(tmp_path)) == count and len(Ledger(tmp_path).damaged) == max(0, damaged)
        ledger.append(row(name))
        (tmp_path / "ledger.jsonl").open("ab").write(b'{"stage": "pe' if is_torn else b"")
    assert precisions(Ledger(tmp_path)) == ["bf16", "fp16", "nf4"]


FOREIGN = [b"hello", b'"text"', b"[]", b'{"stage": 5}', b"\xff\xfe", b"[" * 100_000, b'{"stage": "perf", "task": [1]}',
           b'{"stage": "perf", "fingerprint": {}}', b""]  # fmt: skip


def test_foreign_lines_are_passed_over_and_named(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(row("bf16"))
    with ledger.path.open("ab") as file:
        file.writelines(line + b"\n" for line in FOREIGN)
    ledger.append(row("fp16"))
    again = Ledger(tmp_path)
    assert precisions(again) == precisions(ledger) == ["bf16", "fp16"]
    assert [f"line {2 + place}" in text for place, text in enumerate(again.damaged)] == [True] * len(FOREIGN)
    assert b"\n".join(FOREIGN) in ledger.path.read_bytes()


def test_a_row_that_cannot_be_written_leaves_nothing(tmp_path):
    """The disk is full from the 300th byte on: the ledger reads as before, and goes on when there is room."""
    resource = pytest.importorskip("resource")
    ledger = Ledger(tmp_path)
    ledger.append(row("bf16"))
    before = ledger.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(OSError, match=r"[Ll]arge"):
            ledger.append(row("fp16", text="x" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ledger.path.read_bytes() == before
    ledger.append(row("fp16"))
    assert precisions(Ledger(tmp_path)) == ["bf16", "fp16"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EIO])
def test_a_file_system_that_cannot_flush_loses_nothing_and_a_broken_one_is_told(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, os.strerror(number))))
    for write in (lambda: write_atomic(tmp_path / "text", "x"), lambda: Ledger(tmp_path).append(row())):
        with pytest.raises(OSError, match="error") if number == errno.EIO else nullcontext():
            write()
    assert len(Ledger(tmp_path)) == (number != errno.EIO) == (tmp_path / "text").exists()


@pytest.mark.parametrize(
    ("leave", "left"),
    [
        (lambda folder: None, ""),
        (lambda folder: (folder.parent / "other").mkdir(), "new"),
        (lambda folder: (folder / "notes.md").touch(), "new/study"),
        (lambda folder: Ledger(folder).append(row()), "new/study"),
        (lambda folder: FileLock(folder / ".lock").acquire().lock, "new/study"),  # one who measures beside it
    ],
    ids=["nothing", "a neighbour", "a file", "a row", "a lock"],
)
def test_refused_input_takes_away_only_the_folders_that_were_made_for_it(leave, left, tmp_path):
    folder = tmp_path / "new" / "study"
    for is_there in (False, True):
        if is_there:
            folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(InputError, match="refused"), Ledger(folder).locked(".run.lock", pytest.fail):
            _held = leave(folder) if not is_there else None
            raise InputError("refused")
        assert folder.exists() == (is_there or left == "new/study")
        assert folder.parent.exists() == (is_there or left != "")


def test_who_waits_for_the_lock_of_a_refused_run_finds_a_folder(tmp_path):
    folder = tmp_path / "new" / "study"
    waits = "import sys, qnb.ledger\nwith qnb.ledger.Ledger(sys.argv[1]).locked('.lock', lambda: print('waits')):"
    with pytest.raises(InputError), Ledger(folder).locked(".lock", pytest.fail):
        other = subprocess.Popen(
            [sys.executable, "-uc", waits + " print('in')", folder], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout.readline() == "waits\n"
        raise InputError("refused")
    assert other.wait() == 0


def test_a_vanished_machines_study_on_a_drive_goes_on_under_another_name(tmp_path, monkeypatch, caplog):
    """The drive refuses locks and takes its time to flush; the first machine gives nothing back."""
    flushes, folder, free_bytes = [], tmp_path / "study", [0]
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "no locks")))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free_bytes[-1]))
    monkeypatch.setattr(os, "fsync", lambda _: (flushes.append(1), time.sleep(0.1)))
    save_tiny(tmp_path / "model")

    def measure(name):
        for module_name in ("platform.node", "socket.gethostname"):
            monkeypatch.setattr(module_name, lambda: name)
        session = Session(str(tmp_path / "model"), "bf16,nf4", folder)
        held.enter_context(session.exclusive())
        quantize(session)
        return session

    with pytest.raises(InputError, match="are free in"), ExitStack() as held:
        measure("no room")
    assert not len(Ledger(folder)) and not (folder / "study.json").exists()
    free_bytes.append(2**40)
    with ExitStack() as held:
        first = measure("first")
        assert "disk" not in first.facts()
        written = [path for path in folder.rglob("*") if path.is_file()]
        assert len(first.ledger) == 2 and len(flushes) <= len(written) + len(first.ledger)
        assert not any(path.read_bytes() for path in folder.glob(".*lock")), "a marker would outlive its machine"
        before = first.ledger.path.read_bytes(), len(flushes)
        second = measure("second")
    assert (second.ledger.path.read_bytes(), len(flushes)) == before, "measured again"
    assert caplog.text.count("no file locks") and "at most" in second.facts()["host memory"]
    free_bytes.append(0)
    assert "disk" not in second.facts(), "and all is there"
    assert "make room" in Session("shape:llama-3.2-1b", "fp16", tmp_path / "b").facts()["disk"]


def test_a_failure_stands_until_it_is_measured(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append({**row("bf16"), "stage": "perf" + FAILED, "reason": "no room"})
    assert [each["reason"] for each in ledger.failures()] == ["no room"]
    assert ledger.rows() == ledger.rows("perf") == [] and ledger.find(row("bf16")) is None
    ledger.append(row("bf16"))
    assert ledger.failures() == [] == Ledger(tmp_path).failures()
    ledger.append({**row("bf16", "b"), "stage": "perf" + FAILED, "reason": "again"})
    assert [each["reason"] for each in ledger.failures()] == ["again"] and len(ledger) == 1
    assert not ledger.is_newest(ledger.find(row("bf16"))), "a failure came after it"


def test_rows_of_another_process_are_seen_and_change_the_revision(tmp_path):
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    before = first.revision
    second.append(row("bf16"))
    assert first.revision != before and precisions(first) == ["bf16"]
    first.path.unlink()
    second.append(row("fp16"))
    assert precisions(Ledger(tmp_path)) == precisions(second) == ["fp16"]


def test_rows_of_versions_before_1_are_passed_over_with_one_line(tmp_path, caplog):
    ledger = Ledger(tmp_path)
    ledger.append({**row("fp16"), "versions": {"qnb": "1.0.0"}})
    old = json.dumps({**row("bf16"), "versions": {"qnb": "0.9.2"}})
    ledger.path.write_text(f"{old}\n{ledger.path.read_text()}{old}\n")
    again = Ledger(tmp_path)
    assert precisions(again) == ["fp16"] and not again.damaged
    assert caplog.messages == [f"{again.path}: 2 rows of versions before 1.0 are passed over"]


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Ledger(tmp_path).append(row(x=float("nan")))
    assert len(Ledger(tmp_path)) == 0


def test_a_fingerprint_does_not_depend_on_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_files_are_written_whole_and_named_by_their_hash(tmp_path):
    write_atomic(tmp_path / "a" / "text.txt", "déjà")
    assert (tmp_path / "a" / "text.txt").read_text(encoding="utf-8") == "déjà"
    name, digest = write_parquet(tmp_path, "items/x", pd.DataFrame({"a": [1, 2]}))
    assert name == f"items/x.{digest[:8]}.parquet" and file_sha256(tmp_path / name) == digest
    other, _ = write_parquet(tmp_path, "items/x", pd.DataFrame({"a": [1, 3]}))
    assert other != name and pd.read_parquet(tmp_path / name).a.tolist() == [1, 2]
    assert not list(tmp_path.rglob("*.draft"))
