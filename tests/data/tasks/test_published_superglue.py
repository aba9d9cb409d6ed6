"""SuperGLUE's parsers, in Slovene and in English, on files of the same form, written here."""

import pytest
from published_files import load, write

from minillm.data.tasks import Choice, Text
from minillm.data.tasks.published import unlabelled

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


def test_valid_has_the_classes_of_train(tmp_path):
    rows = [{**CB, "premise": f"p{i}", "label": "neutral" if i < 2 else "entailment"} for i in range(200)]
    task = load("slo_cb", write(tmp_path, {"HumanT/CB/train.jsonl": rows, "HumanT/CB/val.jsonl": [CB]}))
    assert sorted(record.label for record in task["valid"]) == [0] * 20 + [2]  # a tenth of 198, and one of 2


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
