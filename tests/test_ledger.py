"""The ledger: whole lines, newest row shown, torn lines forgotten."""

import pytest

from qnb.error import InputError
from qnb.ledger import Ledger, fingerprint


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


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"stage": "perf"}\nhello\n')
    with pytest.raises(InputError, match="line 2"):
        Ledger(tmp_path)


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
