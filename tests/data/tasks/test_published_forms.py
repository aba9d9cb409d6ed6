"""Every published set's parser on files of the same form, written here."""

import json

import pytest

from minillm.data.tasks import Choice, Rewrite, Tagged, Text, published
from minillm.data.tasks.published import PUBLISHED, UNLABELLED, unlabelled
from minillm.data.tasks.published.bias import SentencePair, crows_pairs
from minillm.evaluation import METRICS
from minillm.ops import IGNORE


def load(name, folder, **options):
    task = published.load(name, folder, **options)
    assert set(task.metrics) <= set(METRICS) and task.licence and "\n" not in task.description
    return task


def write(folder, files):
    """name -> text, rows of cells (joined by tabs), or JSON objects, one a line."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            lines = [
                json.dumps(row, ensure_ascii=False) if isinstance(row, dict) else "\t".join(row) for row in content
            ]
            content = "".join(f"{line}\n" for line in lines)
        path.write_text(content, encoding="utf-8")
    return folder


def conllu(*sentences, misc="_"):
    """A sentence is words and tags "the/DET cat/NOUN"."""
    blocks = []
    for i, sentence in enumerate(sentences):
        words = [word.rsplit("/", 1) for word in sentence.split()]
        rows = [f"{n}\t{w}\t_\t{tag}\t_\t_\t0\t_\t_\t{misc}" for n, (w, tag) in enumerate(words, start=1)]
        blocks.append(f"# newdoc id = d{i}\n# text = x\n" + "\n".join(rows) + "\n\n")
    return "".join(blocks)


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


BOOLQ = {"question": "je to res", "passage": "To &quot;je&quot; tako.", "label": True, "idx": 3}
CB = {"premise": "Kdo ve?", "hypothesis": "je", "label": "neutral", "idx": 0}
COPA = {"premise": "P.", "choice1": "A.", "choice2": "B.", "question": "effect", "label": 1, "idx": 0}
WSC = {
    "text": "Ana je Evi dala žogo, ker jo je imela. »Rada jo imam,« je rekla.",
    "target": {"span1_text": "Ana", "span2_text": "jo", "span1_index": 0, "span2_index": 9},
    "label": False,
    "idx": 4,
}


def superglue(folder, task, row, place="HumanT", n=20):
    """Train of `n` rows with a number in a text, and val of `row`."""
    text = next(key for key in ("premise", "passage", "text") if key in row)
    train = [{**row, text: f"{row[text]} {i}"} for i in range(n)]
    return write(folder, {f"{place}/{task}/train.jsonl": train, f"{place}/{task}/val.jsonl": [row]})


def test_slovene_superglue(tmp_path):
    superglue(tmp_path, "BoolQ", BOOLQ)
    assert load("slo_boolq", tmp_path)["test"] == (Text("je to res", 1, "To &quot;je&quot; tako."),)
    task = load("slo_cb", superglue(tmp_path, "CB", CB))
    assert task["test"] == (Text("Kdo ve?", 2, "je"),) and task.metrics == ("accuracy", "macro_f1")
    assert [len(task[split]) for split in task.splits] == [18, 2, 1]
    task = load("slo_copa", superglue(tmp_path, "COPA", COPA))
    assert task["test"] == (Choice("P. Kaj se je zgodilo zaradi tega?", ("A.", "B."), 1),)
    rte = {**CB, "label": "not_entailment"}
    assert load("slo_rte", superglue(tmp_path, "RTE", rte))["test"] == (Text("Kdo ve?", 1, "je"),)


def test_machine_translation_is_unescaped(tmp_path):
    superglue(tmp_path, "BoolQ", BOOLQ, "GoogleMT")
    (tmp_path / "GoogleMT/BoolQ/train.jsonl").rename(tmp_path / "GoogleMT/BoolQ/train.rebuilt.jsonl")
    task = load("slo_boolq", tmp_path, translation="machine")
    assert task["test"] == (Text("je to res", 1, 'To "je" tako.'),) and task.name == "slo_boolq-machine"
    with pytest.raises(ValueError, match="translation='google': one of 'human', 'machine'"):
        load("slo_boolq", tmp_path, translation="google")
    with pytest.raises(ValueError, match="slo_wsc has no option translation; it has none"):
        load("slo_wsc", tmp_path, translation="machine")


def test_winograd_marks_the_pronoun(tmp_path):
    (record,) = load("slo_wsc", superglue(tmp_path, "WSC", WSC))["test"]
    assert record == Text("Ana je Evi dala žogo, ker jo je imela. »Rada *jo* imam,« je rekla.", 0, "Ana")
    first = {**WSC, "target": {**WSC["target"], "span2_index": 5}}  # the published place may be a few words off
    (record,) = load("slo_wsc", superglue(tmp_path, "WSC", first))["test"]
    assert record.text.startswith("Ana je Evi dala žogo, ker *jo* je")


def test_multirc_from_a_spreadsheet(tmp_path):
    def row(i):
        answers = {
            "1": {"text": "ne", "label": "0,0", "idx": "2,0"},
            "0": {"text": 1970.0, "label": 1.0, "idx": 1.0},
            "2": {"label": "1.0", "idx": 3},
            "10": {"text": "da", "label": "1.0", "idx": 4},
        }
        passage = {"text": f"Beseda {i}", "questions": {"0": {"question": "Kdaj?", "idx": "5.0", "answers": answers}}}
        return {"version": 1.1, "idx": f"{i},0", "passage": passage}

    part = {"questions": {"0": {"answers": {"2": {"text": "morda"}, "1": {"text": "other"}}}}}
    write(tmp_path, {
        "HumanT/MultiRC/train.jsonl": [row(i) for i in range(1, 12)],
        "HumanT/MultiRC/val.jsonl": [{**row(0), "Passage": part}],
        "HumanT/MultiRC/test.jsonl": [row(30)],
    })  # fmt: skip
    task = load("slo_multirc", tmp_path)
    expected = [("1970", 1), ("ne", 0), ("morda", 1), ("da", 1)]
    assert task["test"] == tuple(Text(f"Kdaj? {a}", label, "Beseda 0", "0/5") for a, label in expected)
    assert len(task["train"]) + len(task["valid"]) == 11 * 3  # the answer without a text is left out
    assert not {r.second for r in task["train"]} & {r.second for r in task["valid"]}
    assert [name for name, _ in unlabelled("slo_multirc", tmp_path)] == ["30/5/1", "30/5/2", "30/5/4"]


def test_fewglue(tmp_path):
    def multirc(text):
        questions = [{"question": "Who?", "idx": 8, "answers": [{"text": "Ann", "label": 0, "idx": 9}]}]
        return {"idx": 1, "passage": {"text": text, "questions": questions}}

    wic = {
        "word": "class", "sentence1": "A class.", "sentence2": "Real class!", "start1": 2, "end1": 7, "start2": 5,
        "end2": 10, "label": False, "idx": 0,
    }  # fmt: skip
    copa = {**COPA, "question": "cause"}
    rows = {"WiC": (wic, "word"), "COPA": (copa, "premise"), "BoolQ": (BOOLQ, "question"), "CB": (CB, "premise"),
            "WSC": ({**WSC, "label": True}, "text"), "RTE": ({**CB, "label": "entailment"}, "premise")}  # fmt: skip
    parts = ("train", "dev32", "val")
    for task, (row, _) in rows.items():
        first = next(key for key in ("sentence1", "premise", "question", "text") if key in row)
        write(tmp_path, {f"{task}/{part}.jsonl": [{**row, first: f"{row[first]} {part}"}] for part in parts})
    write(tmp_path, {f"MultiRC/{part}.jsonl": [multirc(part)] for part in parts})
    assert load("few_wic", tmp_path)["test"] == (Text("A *class*. val", 0, "Real *class*!"),)
    assert load("few_copa", tmp_path)["train"] == (Choice("P. train What was the cause?", ("A.", "B."), 1),)
    assert load("few_boolq", tmp_path)["valid"] == (Text("je to res dev32", 1, BOOLQ["passage"]),)
    assert load("few_multirc", tmp_path)["test"] == (Text("Who? Ann", 0, "val", "1/8"),)
    assert [load(f"few_{n}", tmp_path)["test"][0].label for n in ("cb", "wsc", "rte")] == [2, 1, 0]


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
