"""What is wrong with a published set's files is said in one error; and the pieces that all parsers share."""

import pytest
from published_files import write

from minillm.data.tasks.published import load, unlabelled
from minillm.data.tasks.published.bias import crows_pairs
from minillm.data.tasks.published.cut import cut
from minillm.data.tasks.published.files import Files, Flaw, member
from minillm.data.tasks.published.source import FOLDER, Source

SET = Source("toy", "github.com/a/b, data", "1234abcd", "Paper 2020", "CC0")


@pytest.fixture(autouse=True)
def no_folder(monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)


def test_the_folder_is_the_sets_own_or_that_of_all_sets(tmp_path, monkeypatch):
    own = write(tmp_path / "toy", {"a.tsv": "1\n"})
    for folder in (own, str(own), tmp_path):
        assert SET.find(folder, ["a.tsv"]) == own
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert SET.find(None, ["a.tsv"]) == own
    help = (
        r"Get b.tsv, c.tsv from github.com/a/b, data at 1234abcd, put them into a folder toy, .*folder=.*MINILLM_DATA"
    )
    with pytest.raises(ValueError, match=rf"none of the files of the set toy is in .*{help}"):
        SET.find(None, ["b.tsv", "c.tsv"])
    monkeypatch.delenv(FOLDER)
    with pytest.raises(ValueError, match=r"no folder is named for the set toy. Get a.tsv from"):
        SET.find(None, ["a.tsv"])


def test_every_flaw_of_every_file_is_in_one_error(tmp_path):
    write(tmp_path, {"train.tsv": "fine\t1\nno label\n\nodd\t2\n\t0\n"})
    (tmp_path / "dev.tsv").write_bytes(b"na\xefve\t1\n")
    with pytest.raises(ValueError) as error:
        load("sst2", tmp_path)
    text = str(error.value)
    for flaw in (
        f"the set sst2 in {tmp_path} cannot be used",
        "train.tsv:3: an empty line",
        "train.tsv:2: 1 cells, not 2 (text, label)",
        "train.tsv:4: the label '2' is none of 0, 1",
        "train.tsv:5: 'text' is '', expected a str that is not empty",
        "dev.tsv is not UTF-8 text: byte 2 is 0xEF",
        "test.tsv is missing; its folder holds dev.tsv, train.tsv",
        "Its files come from github.com/clairett/pytorch-sentiment-classification, data/SST2 at 457ffd83",
    ):
        assert flaw in text, flaw


def test_many_flaws_are_counted(tmp_path):
    write(tmp_path, {"a.tsv": "x\n" * 50})
    with pytest.raises(ValueError, match=r"a.tsv:20: .*\n  and 30 more\n"), Files(SET, tmp_path, ["a.tsv"]) as files:
        files.table("a.tsv", ("text", "label"))


def test_another_error_is_not_hidden(tmp_path):
    write(tmp_path, {"a.tsv": "x\n"})
    with pytest.raises(KeyError, match="mine"), Files(SET, tmp_path, ["a.tsv"]) as files:
        files.table("a.tsv", ("text", "label"))
        raise KeyError("mine")


def test_lines_are_what_stands_between_newlines(tmp_path):
    write(tmp_path, {"a.txt": "\ufeffone\u2028half\r\n two \x85\n"})
    with Files(SET, tmp_path, ["a.txt"]) as files:
        assert [row.value for row in files.lines("a.txt")] == ["one\u2028half", " two \x85"]


def test_json_lines(tmp_path):
    write(tmp_path, {"a.jsonl": '{"a": 1}\n{"a": \n[1]\n'})
    with pytest.raises(ValueError) as error, Files(SET, tmp_path, ["a.jsonl"]) as files:
        assert [row.value for row in files.objects("a.jsonl")] == [{"a": 1}]
    assert "a.jsonl:2: not JSON, column 7" in str(error.value) and "a.jsonl:3: a JSON list instead" in str(error.value)


def test_members():
    assert member({"a": 1.5}, "a", (int, float)) == 1.5
    for row, flaw in (
        ({"b": 1}, "no field 'a'; it has 'b'"),
        ({"a": 1}, "'a' is 1, expected a str that is not empty"),
        ({"a": " "}, "'a' is ' ', expected a str that is not empty"),
        ({"a": "x\ud800"}, "'a' holds half of a surrogate pair"),
    ):
        with pytest.raises(Flaw, match=flaw):
            member(row, "a")


def test_a_header_needs_its_columns(tmp_path):
    write(tmp_path, {"train.tsv": "index\tsentence1\tlabel\n0\ta\tentailment\n", "dev.tsv": "x\n"})
    with pytest.raises(ValueError, match=r"train.tsv:1: no column sentence2; it has index, sentence1, label"):
        load("rte", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "flaw"),
    [
        ("stsb", "stsb-en-train.csv", "a,b,x\n", r"train.csv:1: the score 'x' is no number from 0 to 5"),
        ("stsb", "stsb-en-train.csv", "a,b,5.5\n", r"the score '5.5' is no number from 0 to 5"),
        ("stsb", "stsb-en-train.csv", "a,b,-1\n", r"the score '-1' is no number from 0 to 5"),
        ("stsb", "stsb-en-train.csv", "a,b,nan\n", r"the score 'nan' is no number from 0 to 5"),
        ("stsb", "stsb-en-train.csv", 'a,"b,1\n', r"train.csv:1: unexpected end of data"),
        ("sms_spam", "sms.tsv", "eggs\tx\n", r"sms.tsv:1: the label 'eggs' is none of ham, spam"),
        ("mr", "rt-polarity.neg", "a\n\nb\n", r"rt-polarity.neg:2: an empty line(.|\n)*rt-polarity.pos is missing"),
        ("si_nli", "dev.tsv", "premise\thypothesis\tlabel\na\tb\tE\n", r"dev.tsv:2: the label 'E' is none of entail"),
        ("slo_boolq", "HumanT/BoolQ/val.jsonl", '{"idx": 0}\n', r"BoolQ/val.jsonl:1: no field 'question'"),
        ("slo_cb", "HumanT/CB/val.jsonl", '{"idx": 0, "premise": "a", "hypothesis": "b", "label": 1}\n',
         r"the label '1' is none of entailment, contradiction, neutral"),
        ("slo_cb", "HumanT/CB/val.jsonl", '{"idx": 0, "premise": "a", "hypothesis": "b"}\n', r"no field 'label'"),
        ("slo_copa", "HumanT/COPA/val.jsonl", '{"idx": 0, "premise": "a", "question": "why"}\n',
         r"the question 'why' is none of cause, effect"),
        ("slo_copa", "HumanT/COPA/val.jsonl", '{"idx": 0, "premise": "a", "question": "cause", "choice1": "x",'
         ' "choice2": "y", "label": 2}\n', r"the label '2' is none of 0, 1"),
        ("slo_wsc", "HumanT/WSC/val.jsonl", '{"idx": 0, "text": "a b", "target": {"span2_text": "c", "span2_index": 0}'
         "}", r"the word 'c' is not in the text"),
        ("few_wic", "WiC/val.jsonl", '{"sentence1": "a b", "start1": 2, "end1": 9, "idx": 0}\n',
         r"sentence1 has no characters 2 to 9"),
        ("few_multirc", "MultiRC/val.jsonl", '{"idx": 0, "passage": {"text": "a", "questions": {"0": 1}}}',
         r"'questions' is {'0': 1}, expected a list"),
        ("few_multirc", "MultiRC/val.jsonl", '{"idx": 0, "passage": {"text": "a", "questions": [{"idx": 1, '
         '"question": "q", "answers": [{"idx": 1, "text": "t", "label": 7}]}]}}',
         r"the label '7' is none of false, true"),
        ("slo_multirc", "HumanT/MultiRC/val.jsonl", '{"idx": "a", "passage": {"text": "a", "questions": {}}}',
         r"'idx' is 'a', expected a whole number"),
        ("slo_multirc", "HumanT/MultiRC/val.jsonl", '{"idx": 1, "passage": {"text": "a", "questions": {"x": {}}}}',
         r"'questions' has the key 'x', expected places from 0"),
        ("chemprot", "chemprot/dev.txt", '{"text": "a", "label": "EATS"}\n', r"dev.txt:1: the label 'EATS' is none"),
        ("ud_en_pos", "en_ewt-ud-dev.conllu", "1\ta\tb\n", r"dev.conllu:1: 3 cells, not the 10 of CoNLL-U"),
        ("ud_en_pos", "en_ewt-ud-dev.conllu", "1\ta\t_\tNN\t_\t_\t_\t_\t_\t_\n", r"the label 'NN' is none of ADJ, ADP"),
        ("ud_sl_ner", "sl_ssj-ud-dev.conllu", "1\ta\t_\tX\t_\t_\t_\t_\t_\t_\n", r"the last column '_' has no NER="),
        ("ud_sl_ner", "sl_ssj-ud-dev.conllu", "1\ta\t_\tX\t_\t_\t_\t_\t_\tNER=B-x\n", r"the label 'B-x' is none of O"),
        ("wnut17", "emerging.dev.conll", "a O\n", r"dev.conll:1: 'a O': expected a word, a tab and a tag"),
        ("wnut17", "emerging.dev.conll", "a\tB-x,B-y\n", r"the label 'B-x,B-y' is none of O, B-corporation"),
        ("slo_multirc", "HumanT/MultiRC/val.jsonl", '{"idx": 1, "Passage": 3, "passage": {"text": "a", "questions": {}}'
         "}", r"'Passage' is 3, expected a dict"),
        ("chemprot", "chemprot/dev.txt", "\n", r"dev.txt is empty"),
        ("chemprot", "chemprot/dev.txt", "[" * 100_000, r"dev.txt:1: nested too deeply"),
        ("multi30k", "val.en", "a\n\nb\n", r"val.en:2: an empty line"),
        ("en_sl", "rte_human.tsv", "a\tb\tc\n", r"rte_human.tsv:1: 3 cells, not 2 \(english, slovene\)"),
        ("scitldr", "dev.jsonl", '{"source": ["a"], "target": []}\n', r"dev.jsonl:1: 'target' is \[\], expected"),
        ("scitldr", "dev.jsonl", '{"source": "a", "target": ["b"]}\n', r"'source' is 'a', expected a list"),
    ],
)  # fmt: skip
def test_a_flaw_of_each_family(tmp_path, name, file, content, flaw):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=flaw):
        load(name, tmp_path)


def test_crows_pairs_flaws(tmp_path):
    rows = ",sent_more,sent_less,stereo_antistereo,bias_type\n0,a,b,stereo,height\n1,a,b,pro,age\n2,a,,stereo,age\n"
    (tmp_path / "data_crows_pairs_anonymized.csv").write_text(rows)
    flaws = (
        "csv:2: the label 'height' is none of age",
        ":3: the label 'pro' is none of stereo",
        ":4: 'sent_less' is ''",
    )
    with pytest.raises(ValueError, match=r"(.|\n)*".join(flaws)):
        crows_pairs(tmp_path)


def test_no_test_file_for_a_submission(tmp_path):
    with pytest.raises(ValueError, match=r"Get HumanT/CB/test.jsonl from .* at 2f4125ba"):
        unlabelled("slo_cb", tmp_path)
    with pytest.raises(ValueError, match="no published set 'mr': one of rte, si_nli, slo_boolq"):
        unlabelled("mr", tmp_path)


def test_an_unexpected_leak_is_refused(tmp_path):
    write(tmp_path, {"train.tsv": "a\t1\nb\t0\nc\t0\n", "dev.tsv": "a\t1\nb\t0\n", "test.tsv": "c\t1\n"})
    with pytest.raises(ValueError, match=r"3 records of valid and test are also in train \(known: 2\)"):
        load("sst2", tmp_path)


def test_cut_keeps_groups_and_shares():
    records = [(f"g{i // 4}", i % 2) for i in range(400)]
    rest, part = cut(records, 0.25, key=lambda r: r[0], stratum=lambda r: r[1])
    assert (len(rest), len(part)) == (300, 100) and sorted(rest + part) == sorted(records)
    assert not {g for g, _ in rest} & {g for g, _ in part}
    assert sum(label for _, label in part) == 50
    assert rest == [record for record in records if record in set(rest)]  # the old order
    again, _ = cut(records[::-1], 0.25, key=lambda r: r[0], stratum=lambda r: r[1])
    assert set(again) == set(rest)


def test_cut_gives_every_class_something():
    records = [(str(i), "rare" if i < 2 else "common") for i in range(50)]
    rest, part = cut(records, 0.1, key=lambda r: r[0], stratum=lambda r: r[1])
    assert sum(label == "rare" for _, label in part) == 1 and len(part) == 6 and len(rest) == 44
