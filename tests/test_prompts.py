"""Prompts: seeded, cut to length, from real WikiText where it is there."""

import pandas as pd
import pytest

from qnb import prompts
from qnb.errors import InputError


def test_short_paragraphs_are_left_out_where_longer_ones_go_round(tokenizer):
    lengths = [len(tokenizer(text)["input_ids"]) for text in prompts.paragraphs("sample")]
    most = sorted(lengths)[len(lengths) // 2] + 1
    assert min(lengths) < most <= max(lengths)
    made = prompts.load(tokenizer, "sample", 2 * len(lengths), most, 3)
    assert {len(prompt) for prompt in made.prompts} == {most}
    none = prompts.load(tokenizer, "sample", 4, max(lengths) + 1, 3)
    assert len(none.prompts) == 4 and len(none.longest) <= max(lengths)


def test_what_is_long_enough_is_found_wherever_it_stands(tokenizer, monkeypatch):
    """Paragraphs of many characters and few tokens are no reason to take short prompts, or one prompt twice."""
    short, long = ["the " * 25] * 300, [f"{place} " + "the " * 40 for place in range(3)]
    monkeypatch.setattr(prompts, "paragraphs", lambda *_: short + long)
    for seed in range(4):
        made = prompts.load(tokenizer, "sample", 3, 40, 3, seed=seed)
        assert {len(prompt) for prompt in made.prompts} == {40} and len(set(made.prompts)) == 3


def test_the_seed_decides_the_prompts(tokenizer):
    first, again, other = (prompts.load(tokenizer, "sample", 4, 16, 3, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.fingerprint == again.fingerprint != other.fingerprint
    assert [len(prompt) for prompt in (*first.prompts, first.longest)] == [16] * 5 and first.new_tokens == 3


def test_wikitext_comes_from_the_data_folder(tokenizer, hub):
    made = prompts.load(tokenizer, "wikitext", 3, 64, 5, hub)
    assert [len(prompt) for prompt in made.prompts] == [64] * 3
    text = tokenizer.decode(made.prompts[0])
    assert any(paragraph.startswith(text.strip()[:40]) for paragraph in prompts.paragraphs("wikitext", hub))


def test_bad_input_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="Salesforce/wikitext"):
        prompts.paragraphs("wikitext", tmp_path)
    monkeypatch.setattr(prompts, "_wikitext", lambda *_: [" = Heading = \n", ""])
    with pytest.raises(InputError, match="no paragraph of text"):
        prompts.paragraphs("wikitext", tmp_path)


def test_lengths_are_of_whole_paragraphs_and_none_is_counted_twice(tokenizer):
    texts = prompts.paragraphs("sample")
    every, some = (prompts.lengths(tokenizer, "sample", most) for most in (5000, 7))
    assert sorted(every) == sorted(len(tokenizer(text)["input_ids"]) for text in texts) and some == every[:7]
    assert prompts.lengths(tokenizer, "sample", 7, seed=1) != some


def test_lengths_are_drawn_from_every_split(tokenizer, hub):
    test, every = (prompts.paragraphs("wikitext", hub, split) for split in ("test", None))
    assert len(test) < len(every) and set(test) < set(every)
    found = prompts.lengths(tokenizer, "wikitext", 5000, hub)
    assert len(found) == min(5000, len(every)) and max(found) > 400 > 10 > min(found)


def test_a_data_folder_that_changed_is_read_again(tmp_path):
    file = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    data_files = "[{split: test, path: wikitext-2-raw-v1/test-*}]"
    config = f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files: {data_files}\n---\n"
    (file.parents[1] / "README.md").write_text(config)
    for text in ("The first text.", "Another text, longer."):
        pd.DataFrame({"text": [text]}).to_parquet(file)
        assert prompts.paragraphs("wikitext", tmp_path) == [text]
