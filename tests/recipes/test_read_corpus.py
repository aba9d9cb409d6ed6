"""Which text a recipe reads."""

import json

import pytest

from minillm.recipes.common import CorpusConfig, read_corpus


def test_a_number_is_a_column_of_a_table_without_header(tmp_path):
    table = tmp_path / "messages.tsv"
    table.write_text("".join(f"ham\tmessage number {i}\n" for i in range(40)))
    training, held_out = read_corpus(CorpusConfig(train=str(table), text="1", held_out_share=0.25))
    assert {document.text for document in training + held_out} == {f"message number {i}" for i in range(40)}


def test_the_held_out_text_may_be_a_file_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text("one text to learn")
    (tmp_path / "b.txt").write_text("another to measure on")
    training, held_out = read_corpus(CorpusConfig(train=str(tmp_path / "a.txt"), held_out=str(tmp_path / "b.txt")))
    assert [document.text for document in training] == ["one text to learn"]
    assert [document.text for document in held_out] == ["another to measure on"]


def test_names_of_fields_without_effect_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"q": f"{i}?", "a": f"{i}!"}) for i in range(4)))
    with pytest.raises(ValueError, match=r"data\.prompt=q and data\.completion=a have no effect: .*a\.txt"):
        read_corpus(CorpusConfig(train=str(tmp_path / "a.txt"), prompt="q", completion="a"))
    pairs = CorpusConfig(train=str(tmp_path / "pairs.jsonl"), prompt="q", completion="a", held_out_share=0.25)
    training, held_out = read_corpus(pairs)
    assert len(training + held_out) == 4
