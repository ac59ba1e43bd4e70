"""The ledger: whole lines, newest row shown, torn lines forgotten."""

import signal
from time import process_time

import pytest

from qnb.errors import InputError
from qnb.ledger import FAILED, Ledger, Line, fingerprint, seal


def row(precision="bf16", print_="a", **more):
    return {"stage": "perf", "precision": precision, "fingerprint": print_, **more}


def test_rows_come_back_as_written(tmp_path):
    written = Ledger(tmp_path / "new").append(row(values={"total_s": 1.5}))
    assert list(Ledger(tmp_path / "new")) == [written]


def test_newest_row_of_a_key_is_shown(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(row(print_="a", x=1)), ledger.append(row(print_="b", x=2))
    assert ledger.frame("perf").x.tolist() == [2]


def test_an_older_answer_asked_for_again_is_shown_again(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(row(print_="a", x=1)), ledger.append(row(print_="b", x=2))
    assert ledger.find(stage="perf", precision="bf16", fingerprint="a")["x"] == 1
    assert Ledger(tmp_path).frame("perf").x.tolist() == [1]


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(row())
    with ledger.path.open("ab") as file:
        file.write(b'{"stage": "pe')
    again = Ledger(tmp_path)
    assert len(again) == 1
    again.append(row("fp16"))
    assert [r["precision"] for r in Ledger(tmp_path)] == ["bf16", "fp16"]


@pytest.mark.parametrize(
    "line",
    [b"hello", b'"text"', b"[]", b'{"stage": 5}', b"\xff\xfe", b"[" * 100_000, b'{"stage": "perf", "task": [1]}',
     b'{"stage": "perf", "fingerprint": "a", "check": "0123456789abcdef"}', b""],
    ids=range(9),
)  # fmt: skip
def test_a_foreign_line_is_passed_over_and_named(tmp_path, line):
    ledger = Ledger(tmp_path)
    ledger.append(row("bf16"))
    with ledger.path.open("ab") as file:
        file.write(line + b"\n")
    ledger.append(row("fp16"))
    again = Ledger(tmp_path)
    assert [r["precision"] for r in again] == [r["precision"] for r in ledger] == ["bf16", "fp16"]
    assert len(again.damaged) == 1 and "line 2" in again.damaged[0] and line in ledger.path.read_bytes()


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append(row(x=1.5, text="déjà"))
    line = ledger.path.read_bytes()
    assert Line(line).row["x"] == 1.5
    for place in range(len(line)):
        changed = bytearray(line)
        changed[place] ^= 1
        with pytest.raises(ValueError, match=r"key is missing|was changed"):
            Line(bytes(changed))


def test_a_row_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """The disk is full from the 300th byte on: the ledger reads as before, and goes on when there is room."""
    resource = pytest.importorskip("resource")
    ledger = Ledger(tmp_path)
    ledger.append(row("bf16"))
    before = ledger.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(OSError, match=r"[Ll]arge"):
            ledger.append(row("fp16", text="x" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ledger.path.read_bytes() == before
    ledger.append(row("fp16"))
    assert [r["precision"] for r in Ledger(tmp_path)] == ["bf16", "fp16"]


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    from qnb import ledger as module

    ledger, years = Ledger(tmp_path), iter((2030, 2020))

    class Backwards(module.datetime):
        @classmethod
        def now(cls, zone):
            return cls(next(years), 1, 1, tzinfo=zone)

    monkeypatch.setattr(module, "datetime", Backwards)
    ledger.append(row(print_="a", x=1)), ledger.append(row(print_="b", x=2))
    assert Ledger(tmp_path).frame("perf").x.tolist() == [2]


def test_a_failure_stands_until_it_is_measured(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append({**row("bf16"), "stage": "perf" + FAILED, "reason": "no room"})
    assert [r["reason"] for r in ledger.failures()] == ["no room"]
    assert ledger.frame("perf").empty and ledger.find(stage="perf", precision="bf16", fingerprint="a") is None
    ledger.append(row("bf16"))
    assert ledger.failures() == [] == Ledger(tmp_path).failures()
    ledger.append({**row("bf16", "b"), "stage": "perf" + FAILED, "reason": "again"})
    assert [r["reason"] for r in ledger.failures()] == ["again"] and len(ledger.frame("perf")) == 1


def test_a_hundred_thousand_rows_open_within_two_seconds_and_take_another_at_once(tmp_path):
    """A line's size is a real row's; an append reads nothing again."""
    more = {f"field_{number}": number / 7 for number in range(25)}
    lines = (seal({**row(repeat=n, print_=f"{n:x}"), **more}) for n in range(100_000))
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines))
    started = process_time()
    ledger = Ledger(tmp_path)
    opened = process_time()
    assert ledger.find(stage="perf", fingerprint="1") is not None
    ledger.append(row("fp16"))
    appended = process_time()
    assert len(ledger) == 100_001
    assert opened - started < 2 and appended - opened < 0.1


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Ledger(tmp_path / "file")


def test_missing_numbers_are_not_written_as_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Ledger(tmp_path).append(row(x=float("nan")))
    assert not Ledger(tmp_path).path.exists() or len(Ledger(tmp_path)) == 0


def test_fingerprint_does_not_depend_on_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_what_was_asked_last_comes_last(tmp_path):
    book = Ledger(tmp_path)
    for stage in ("a", "b"):
        book.append({"stage": stage, "fingerprint": "1"})
    book.append({"stage": "a", "fingerprint": "2"})
    book.find(stage="a", fingerprint="1")
    assert [(row["stage"], row["fingerprint"]) for row in book] == [("b", "1"), ("a", "1")]


def test_a_folder_removed_meanwhile_begins_anew(tmp_path):
    book = Ledger(tmp_path)
    book.append({"stage": "a"})
    book.path.unlink()
    book.append({"stage": "b"})
    assert [row["stage"] for row in Ledger(tmp_path)] == ["b"]


def test_an_older_answer_settles_a_failure_that_came_after_it(tmp_path):
    """Measured with a, failed with b, a asked again: what is shown is a, and nothing is open."""
    ledger = Ledger(tmp_path)
    ledger.append(row(print_="a", x=1))
    ledger.append({**row(print_="b"), "stage": "perf" + FAILED, "reason": "no room"})
    assert len(ledger.failures()) == 1
    assert ledger.find(stage="perf", precision="bf16", fingerprint="a")["x"] == 1
    assert ledger.failures() == [] == Ledger(tmp_path).failures()
