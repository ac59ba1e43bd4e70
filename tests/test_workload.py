"""Prompts: seeded, cut to length, from real WikiText where it is there."""

import pytest

from qnb import model, workload
from qnb.error import InputError


@pytest.fixture(scope="module")
def tokenizer(source):
    return model.load_tokenizer(source.path)


def test_prompts_are_as_many_and_as_long_as_asked(tokenizer):
    made = workload.load(tokenizer, "sample", 5, 16, 3)
    assert [len(prompt) for prompt in made.prompts] == [16] * 5 and made.new_tokens == 3
    assert len(made.longest) == 16


def test_the_seed_decides_the_prompts(tokenizer):
    first, again, other = (workload.load(tokenizer, "sample", 4, 16, 3, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.fingerprint == again.fingerprint != other.fingerprint


def test_wikitext_comes_from_the_data_folder(tokenizer, hub):
    made = workload.load(tokenizer, "wikitext", 3, 64, 5, hub)
    assert [len(prompt) for prompt in made.prompts] == [64] * 3
    text = tokenizer.decode(made.prompts[0])
    assert any(paragraph.startswith(text.strip()[:40]) for paragraph in workload.paragraphs("wikitext", hub))


def test_bad_input_is_named(tokenizer, tmp_path):
    with pytest.raises(InputError, match="sample, wikitext"):
        workload.paragraphs("novel")
    with pytest.raises(InputError, match="Salesforce/wikitext"):
        workload.paragraphs("wikitext", tmp_path)
    with pytest.raises(InputError, match="new_tokens is 0"):
        workload.load(tokenizer, "sample", 1, 1, 0)
