"""A hub token in the environment is shown nowhere: not in results, not in errors."""

import pytest
from conftest import SECRET, command
from tiny_models import save_tiny


def shown(folder, *texts):
    """Whether the secret stands in one of the texts or in a file below `folder`."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return any(SECRET in text for text in texts) or any(SECRET.encode() in content for content in files)


@pytest.mark.slow
def test_a_whole_study_shows_no_secret(smoke):
    folder, run = smoke
    assert run.returncode == 0, run.stderr
    assert (folder / "ledger.jsonl").exists() and not shown(folder, run.stdout, run.stderr)


@pytest.mark.parametrize("options", ["push_to me/x -p dry_run false --only 01", "tasks arc_easy --only 02"])
def test_no_failing_stage_shows_a_secret(tmp_path, options):
    """The hub is a closed port: every stage that needs it fails, with the token in its hands."""
    words = ["run", "--profile", "smoke", "--output", str(tmp_path / "study"), "-p", "model"]
    words += [str(save_tiny(tmp_path / "model")), "-p", *options.split()]
    run = command(*words, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=SECRET)
    assert run.returncode == 2, run.stderr
    assert not shown(tmp_path, run.stdout, run.stderr)
