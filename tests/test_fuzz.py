"""Whatever is given, the answer is a study, or one line and exit code 2; never a traceback, never a lost row."""

import shutil

import papermill
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from qnb import colab, run
from qnb.__main__ import main
from qnb.ledger import Ledger
from qnb.run import NOTEBOOKS, notebook_parameters

calm = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PARAMETERS = sorted(set().union(*map(notebook_parameters, NOTEBOOKS.glob("*.ipynb"))))
WORDS = ["run", "audit", "--profile", "smoke", "--only", "05", "-p", "limit", "--output", "report", "verify", "--help"]
words = some.text(max_size=30) | some.sampled_from(["auto", "all", "bf16,int8", "0", "-1", "1e9", "nan", "~", "[1]"])


@pytest.fixture
def ask(tmp_path, monkeypatch, capfd):
    """Returns a function that gives words to the command line, notebooks not executed: its code and what it said."""
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run_with(*given_words):
        try:
            code = main([str(word) for word in given_words])
        except SystemExit as end:
            code = end.code
        said = capfd.readouterr().err
        assert code in (0, 2), said
        lines = [line for line in said.splitlines() if line.startswith("qnb: ")]
        assert len(lines) == (code == 2) and "Traceback" not in said, said
        return code

    return run_with


@calm
@given(some.lists(some.binary(max_size=60) | some.just(b'{"stage": "perf"}'), max_size=5))
def test_any_ledger_opens_and_takes_a_row(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("ledger")
    (folder / "ledger.jsonl").write_bytes(b"\n".join(lines))
    before = Ledger(folder)
    after = before.append({"stage": "perf", "fingerprint": "a"})
    again = Ledger(folder)
    assert before.rows() == again.rows() == [after] and again.damaged == before.damaged


@calm
@given(some.sampled_from(PARAMETERS) | words, words)
@example("output", "\0")
@example("data_dir", "\0")
@example("model", "\ud800")
@example("limit", "9" * 5000)
@example("precisions", "bf16: [")
def test_any_parameter_is_taken_or_refused(ask, tmp_path, name, text):
    code = ask("run", "--profile", "smoke", "--output", tmp_path / "study", "-p", name, text)
    assert code == 2 or name in PARAMETERS
    assert not (tmp_path / "study" / "ledger.jsonl").exists()


@pytest.mark.parametrize("content", [b"- a\n- b", b"just text", b"\xff", b"limit: {a: 1}", b"1: 2"])
def test_a_profile_that_is_none_is_refused(ask, content, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "NOTEBOOKS", shutil.copytree(NOTEBOOKS, tmp_path / "notebooks"))
    (run.NOTEBOOKS / "profiles" / "mine.yaml").write_bytes(content)
    assert ask("run", "--profile", "mine", "--output", tmp_path / "study") == 2


@calm
@given(some.lists(some.sampled_from([*WORDS, ""]) | some.text(max_size=8), max_size=6))
def test_any_command_line_is_taken_or_refused(ask, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(colab, "locate", lambda output: tmp_path / "relative")
    ask(*line)
