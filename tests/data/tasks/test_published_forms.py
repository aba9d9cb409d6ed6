"""Every published set's parser on files of the same form, written here."""

import pytest
from published_files import conllu, load, write

from minillm.data.tasks import Rewrite, Tagged, Text
from minillm.data.tasks.published import PUBLISHED, UNLABELLED, unlabelled
from minillm.data.tasks.published.bias import SentencePair, crows_pairs
from minillm.ops import IGNORE


def numbered(word, n=10):
    return [f"{word} number {i}" for i in range(n)]


def test_sst2(tmp_path):
    write(tmp_path, {
        "train.tsv": [("a \" fine film", "1"), ("a dull film", "0")], "dev.tsv": [("so so", "0")],
        "test.tsv": [("grand", "1")],
    })  # fmt: skip
    task = load("sst2", tmp_path)
    assert task["train"] == (Text('a " fine film', 1), Text("a dull film", 0))
    assert task.labels == ("negative", "positive") and task.score == "accuracy"
    assert "Socher" in task.source and "457ffd83" in task.source


@pytest.mark.parametrize(
    ("name", "files", "labels"),
    [
        ("mr", ("rt-polarity.neg", "rt-polarity.pos"), ("negative", "positive")),
        ("subj", ("plot.tok.gt9.5000", "quote.tok.gt9.5000"), ("objective", "subjective")),
    ],
)
def test_ten_folds(tmp_path, name, files, labels):
    write(tmp_path, {file: "".join(f"{line} \n" for line in numbered(file, 23)) for file in files})
    tasks = [load(name, tmp_path, fold=fold) for fold in range(10)]
    assert tasks[0]["test"] == tuple(
        Text(f"{file} number {i}", label) for label, file in enumerate(files) for i in (0, 10, 20)
    )
    assert tasks[0].labels == labels and [task.name for task in tasks[:2]] == [name, f"{name}-1"]
    tested = [record for task in tasks for record in task["test"]]
    assert len(tested) == len(set(tested)) == 46  # every record is tested once
    for task in tasks:
        parts = [set(task[split]) for split in task.splits]
        assert len(set().union(*parts)) == sum(map(len, parts)) == 46
    assert all(tasks[i]["valid"] == tasks[(i + 1) % 10]["test"] for i in range(10))
    with pytest.raises(ValueError, match=r"fold=10: one of 0, 1, .*9"):
        load(name, tmp_path, fold=10)


def test_sms_spam_has_no_message_twice(tmp_path):
    rows = [("ham", f'"hello {i}') for i in range(40)] + [("spam", f"win {i}") for i in range(20)]
    task = load("sms_spam", write(tmp_path, {"sms.tsv": rows + rows[:30]}))
    records = [record for split in task.splits.values() for record in split]
    assert len(records) == len(set(records)) == 60
    assert [(len(s), sum(r.label for r in s)) for s in task.splits.values()] == [(48, 16), (6, 2), (6, 2)]
    backwards = load("sms_spam", write(tmp_path, {"sms.tsv": rows[::-1]}))
    assert set(backwards["test"]) == set(task["test"])  # the cut does not hang on the order
    assert Text('"hello 0', 0) in records


def test_rte(tmp_path):
    header = ("index", "sentence1", "sentence2", "label")
    labels = ("entailment", "not_entailment")
    train = [(str(i), f"premise {i // 2}", f'"h {i}', labels[i % 2]) for i in range(40)]
    write(tmp_path, {
        "train.tsv": [header, *train], "dev.tsv": [header, ("0", "a", "b", "entailment")],
        "test.tsv": [header[:3], ("0", "c", "d")],
    })  # fmt: skip
    task = load("rte", tmp_path)
    assert task["test"] == (Text("a", 0, "b"),) and task.labels == labels
    assert [len(task[split]) for split in task.splits] == [36, 4, 1]
    assert not {r.text for r in task["train"]} & {r.text for r in task["valid"]}  # premises stay together
    assert unlabelled("rte", tmp_path) == [("0", Text("c", IGNORE, "d"))]


def test_si_nli(tmp_path):
    header = ("pair_id", "premise", "hypothesis", "comment", "label")
    labels = ("entailment", "neutral", "contradiction")
    rows = [(f"P{i}", f"čaša {i}", "h", "", labels[i % 3]) for i in range(30)]
    write(tmp_path, {
        "train.tsv": [header, *rows], "dev.tsv": [header, ("P", "a", "b", "", "contradiction")],
        "test_without_labels.tsv": [("premise", "hypothesis"), ("c", "d"), ("e", "f")],
    })  # fmt: skip
    task = load("si_nli", tmp_path)
    assert task["test"] == (Text("a", 2, "b"),)
    assert sorted(r.label for r in task["valid"]) == [0, 1, 2]
    assert unlabelled("si_nli", tmp_path)[1] == ("1", Text("e", IGNORE, "f"))


def test_stsb(tmp_path):
    for language in ("en", "de"):
        write(tmp_path, {f"stsb-{language}-{split}.csv": f'"a, ""{split}""",b,2.5\nc {split},d,5\n' for split in
                         ("train", "dev", "test")})  # fmt: skip
    task = load("stsb", tmp_path)
    assert task["test"] == (Text('a, "test"', 2.5, "b"), Text("c test", 5.0, "d")) and task.kind == "regression"
    assert task.metrics == ("pearson", "spearman") and load("stsb", tmp_path, language="de").name == "stsb-de"
    write(tmp_path, {"stsb-de-train.csv": 'a,b,1\nc test,d,5\n"a, ""dev""",b,2.5\n'})
    assert load("stsb", tmp_path, language="de")["train"] == (Text("a", 1.0, "b"),)  # unmeasured leaks leave train
    with pytest.raises(ValueError, match="language='it': one of 'en', 'de', 'fr'"):
        load("stsb", tmp_path, language="it")


@pytest.mark.parametrize(
    ("name", "place", "label"),
    [
        ("chemprot", "chemprot", "AGONIST"),
        ("acl_arc", "citation_intent", "Uses"),
        ("scicite", "sci-cite", "method"),
        ("scierc", "sciie-relation-extraction", "USED-FOR"),
    ],
)
def test_science(tmp_path, name, place, label):
    rows = {f"{place}/{part}.txt": [{"text": f"a {part}", "label": label, "metadata": []}] for part in
            ("train", "dev", "test")}  # fmt: skip
    task = load(name, write(tmp_path, rows))
    assert task["valid"] == (Text("a dev", task.labels.index(label)),)
    assert task.labels == tuple(sorted(task.labels))


def test_english_parts_of_speech(tmp_path):
    contraction = "1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_\n"
    body = conllu("do/AUX n't/PART go/VERB").replace("1\tdo", contraction + "1\tdo")
    body = body.replace("3\tgo", "2.1\tghost\t_\tVERB\t_\t_\t_\t_\t_\t_\n3\tgo")
    write(tmp_path, {
        "en_ewt-ud-train.conllu": body, "en_ewt-ud-dev.conllu": conllu("yes/INTJ", "a/DET b/X"),
        "en_ewt-ud-test.conllu": conllu("no/INTJ"),
    })  # fmt: skip
    task = load("ud_en_pos", tmp_path)
    assert task["train"] == (Tagged(("do", "n't", "go"), tuple(map(task.labels.index, ("AUX", "PART", "VERB")))),)
    assert len(task["valid"]) == 2 and len(task.labels) == 17 and task.metrics == ("accuracy",)


def test_slovene_tags(tmp_path):
    sentences = [f"čaša{i}/NOUN" for i in range(10)]
    write(tmp_path, {
        "sl_ssj-ud-dev.conllu": conllu(*sentences, misc="NER=B-per|SpaceAfter=No"),
        "sl_ssj-ud-test.conllu": conllu("test/X", misc="NER=O"),
    })  # fmt: skip
    entities = load("ud_sl_ner", tmp_path)
    assert entities["test"] == (Tagged(("test",), (0,)),) and entities.metrics == ("span_f1",)
    assert {entities.labels[r.tags[0]] for r in entities["train"]} == {"B-per"}
    assert [len(entities[split]) for split in entities.splits] == [9, 1, 1]  # dev is cut
    write(tmp_path, {"sl_ssj-ud-train.conllu": conllu("vlak/NOUN", misc="NER=B-misc")})
    words = load("ud_sl_pos", tmp_path)
    assert [len(words[split]) for split in words.splits] == [1, 10, 1]  # there is a train


def test_wnut17(tmp_path):
    write(tmp_path, {
        "wnut17train.conll": "@a\tO\n\t\nNew\tB-location\nYork\tI-location\n\n\n",
        "emerging.dev.conll": "b\tO\n", "emerging.test.annotated": "c\tB-product\n\n",
    })  # fmt: skip
    task = load("wnut17", tmp_path)
    place = task.labels.index("B-location")
    assert task["train"] == (Tagged(("@a",), (0,)), Tagged(("New", "York"), (place, place + 1)))
    assert len(task.labels) == 13


def test_multi30k(tmp_path):
    for part in ("train", "val", "test_2016_flickr", "test_2017_mscoco"):
        write(tmp_path, {f"{part}.{side}": f"{part} {side}\n" for side in ("en", "de", "fr")})
    task = load("multi30k", tmp_path)
    assert task["test"] == (Rewrite("test_2016_flickr en", ("test_2016_flickr de",)),) and task.name == "multi30k"
    other = load("multi30k", tmp_path, source="fr", target="en", test="test_2017_mscoco")
    assert other["test"][0].source == "test_2017_mscoco fr" and other.name == "multi30k-fr-en-test_2017_mscoco"
    with pytest.raises(ValueError, match="target='en': one of 'de', 'fr'"):
        load("multi30k", tmp_path, target="en")
    write(tmp_path, {"val.de": "eins\nzwei\n"})
    with pytest.raises(ValueError, match="val: 1 lines of en and 2 of de"):
        load("multi30k", tmp_path)


def test_english_slovene(tmp_path):
    write(tmp_path, {
        "rte_human.tsv": [("tested", "A")], "cb_human_val.tsv": [("too", "B")],
        "rte_mt.val.tsv": [("tested", "A'"), ("chosen", "C")],
        "rte_mt.train.tsv": [("tested", "A''"), ("chosen", "C'"), ("learned", "D"), ("other", "B")],
        "boolq_questions_mt.tsv": [("asked", "E")],
    })  # fmt: skip
    task = load("en_sl", tmp_path)
    assert task["test"] == (Rewrite("tested", ("A",)), Rewrite("too", ("B",)))
    assert task["valid"] == (Rewrite("chosen", ("C",)),)
    assert task["train"] == (Rewrite("learned", ("D",)), Rewrite("asked", ("E",)))
    assert load("en_sl", tmp_path, direction="sl-en")["train"][0] == Rewrite("D", ("learned",))


def test_scitldr(tmp_path):
    row = {"source": ["One. ", "", "Two."], "target": [" Both.", "Two things."], "paper_id": "x"}
    parts = {f"{part}.jsonl": [{**row, "source": [part, *row["source"]]}] for part in ("train", "dev", "test")}
    task = load("scitldr", write(tmp_path, parts))
    assert task["valid"] == (Rewrite("dev One. Two.", ("Both.", "Two things.")),) and task.score == "rouge_l"


def test_crows_pairs(tmp_path):
    content = (
        ',sent_more,sent_less,stereo_antistereo,bias_type,annotations\n0,"A, more",less,stereo,age,"[[\'age\']]"\n'
    )
    pairs = crows_pairs(write(tmp_path, {"data_crows_pairs_anonymized.csv": content}))
    assert pairs == (SentencePair("A, more", "less", "stereo", "age"),)


def test_names():
    assert set(UNLABELLED) < set(PUBLISHED)
    with pytest.raises(ValueError, match="no published set 'sst': one of acl_arc, chemprot"):
        load("sst", ".")
    with pytest.raises(ValueError, match="mr has no option folds; it has fold"):
        load("mr", ".", folds=3)
