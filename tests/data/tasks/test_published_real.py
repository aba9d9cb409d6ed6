"""The real published sets, where a folder of them is at hand: their counts, classes, and a record that is known."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from minillm.data.tasks import SPLITS, Choice, Rewrite, Text
from minillm.data.tasks.published import PUBLISHED, load, unlabelled
from minillm.data.tasks.published.bias import crows_pairs
from minillm.data.tasks.published.fetching import PINS

BESIDE = Path(__file__).parents[4] / "shared" / "data"
DATA = Path(os.environ.get("MINILLM_DATA") or BESIDE)
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the published sets are not here: MINILLM_DATA names no folder of them"
)


def real(name, **options):
    """The task, or a skip where its files are not among those at hand."""
    try:
        return load(name, DATA, **options)
    except ValueError as error:
        if "none of the files of the set" in str(error) or " is missing; its folder holds" in str(error):
            pytest.skip(f"{name}: not all its files are in {DATA}")
        raise


# the numbers published with the sets; where valid is cut from train, their sum is
SIZES = {
    "acl_arc": (1688, 114, 139),
    "chemprot": (4169, 2427, 3469),
    "few_boolq": (32, 32, 3270),
    "few_cb": (32, 32, 56),
    "few_copa": (32, 32, 100),
    "few_multirc": (154, 167, 4848),
    "few_rte": (32, 32, 277),
    "few_wic": (32, 32, 638),
    "few_wsc": (32, 32, 104),
    "mr": (8528, 1066, 1068),
    "rte": (2490, None, 277),
    "scicite": (7320, 916, 1861),
    "scierc": (3219, 455, 974),
    "scitldr": (1992, 619, 618),
    "si_nli": (4392, None, 547),
    "slo_boolq": (92, None, 18),
    "slo_cb": (250, None, 56),
    "slo_copa": (400, None, 100),
    "slo_multirc": (942, None, 145),
    "slo_rte": (232, None, 29),
    "slo_wsc": (554, None, 104),
    "sms_spam": (5160 - 516, None, 516),
    "sst2": (6920, 872, 1821),
    "stsb": (5749, 1500, 1379),
    "subj": (8000, 1000, 1000),
    "ud_en_pos": (12544, 2001, 2077),
    "ud_sl_ner": (1250, None, 1282),
    "ud_sl_pos": (1250, None, 1282),
    "wnut17": (3394, 1009, 1287),
    "en_sl": (7258, 523, 568),
}
MACHINE = {
    "slo_boolq": (9427, 3270),
    "slo_cb": (250, 56),
    "slo_copa": (400, 100),
    "slo_multirc": (27240, 4848),
    "slo_rte": (2490, 277),
}


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"multi30k"}))
def test_sizes(name):
    task = real(name)
    train, valid, test = SIZES[name]
    learned = len(task["train"]) + (0 if valid else len(task["valid"]))
    unmeasured = name in ("scicite", "scierc")  # train loses what also stands in valid or test
    assert learned == train or (unmeasured and 0.9 * train < learned < train)
    assert len(task["test"]) == test and len(task["valid"]) == (valid or len(task["valid"]))
    if not valid:
        assert 0.07 < len(task["valid"]) / train < 0.13


@pytest.mark.parametrize("name", sorted(MACHINE))
def test_sizes_of_machine_translations(name):
    task = real(name, translation="machine")
    assert (len(task["train"]) + len(task["valid"]), len(task["test"])) == MACHINE[name]
    texts = [text for split in SPLITS for r in task[split] for text in (r.text, getattr(r, "second", ""))]
    assert not any(entity in text for text in texts for entity in ("&quot;", "&#39;", "&amp;"))


# of all records that are not test, then of test
CLASSES = {
    "sst2": ({1: 3610 + 444, 0: 3310 + 428}, {1: 909, 0: 912}),
    "rte": ({0: 1249, 1: 1241}, {0: 146, 1: 131}),
    "sms_spam": ({0: 3614 + 452, 1: 514 + 64}, {0: 452, 1: 64}),
    "slo_cb": ({0: 115, 1: 119, 2: 16}, {0: 23, 1: 28, 2: 5}),
    "slo_boolq": ({1: 59, 0: 33}, {1: 14, 0: 4}),
    "slo_copa": ({1: 205, 0: 195}, {0: 55, 1: 45}),
    "slo_wsc": ({0: 295, 1: 259}, {0: 66, 1: 38}),
    "few_wic": ({1: 33, 0: 31}, {0: 319, 1: 319}),
    "acl_arc": ({0: 926, 5: 338, 1: 326, 4: 81, 2: 67, 3: 64}, {0: 71, 5: 26, 1: 25, 4: 7, 2: 5, 3: 5}),
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes(name):
    task = real(name)
    found = (
        Counter(r.label for split in ("train", "valid") for r in task[split]),
        Counter(r.label for r in task["test"]),
    )
    assert found == CLASSES[name]


def test_ten_folds_of_film_reviews():
    tests = [real("mr", fold=fold)["test"] for fold in range(10)]
    assert Counter(r.label for test in tests for r in test) == {0: 5331, 1: 5331}


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("rte", Text("Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, "
                     "according to the Christopher Reeve Foundation.", 1, "Christopher Reeve had an accident.")),
        ("stsb", Text("A girl is styling her hair.", 2.5, "A girl is brushing her hair.")),
        ("slo_copa", Choice("Dekle je v kosmičih našlo žuželko. Kaj se je zgodilo zaradi tega?",
                            ("V skodelico je nalila mleko.", "Izgubila je apetit."), 1)),
        ("slo_rte", Text("Dana Reeve, vdova igralca Christopherja Reeva, je v 44. letu umrla za pljučnim rakom, je "
                         "sporočila fundacija Christopherja Reeva.", 1, "Christopher Reeve je imel nesrečo.")),
        ("few_wic", Text("An emerging professional *class*.", 0, "Apologizing for losing your temper, even though you "
                         "were badly provoked, showed real *class*.")),
        ("en_sl", Rewrite("Weapons of Mass Destruction Found in Iraq.",
                          ("V Iraku našli orožja za množično uničevanje.",))),
    ],
)  # fmt: skip
def test_the_first_record_of_test(name, record):
    assert real(name)["test"][0] == record


def test_winograd_pronouns_are_marked_once():
    task = real("slo_wsc")
    assert all(record.text.count("*") == 2 for split in SPLITS for record in task[split])


def test_words_and_entities():
    english, slovene = real("ud_en_pos"), real("ud_sl_ner")
    assert [sum(len(r.words) for r in english[split]) for split in SPLITS] == [204_577, 25_147, 25_094]
    assert english["valid"][0].words[:5] == ("From", "the", "AP", "comes", "this")
    assert english.labels[english["valid"][0].tags[2]] == "PROPN"
    begins = {i for i, label in enumerate(slovene.labels) if label.startswith("B-")}
    entities = [sum(tag in begins for r in slovene[split] for tag in r.tags) for split in SPLITS]
    assert (entities[0] + entities[1], entities[2]) == (376, 187)


def test_pictures_and_papers():
    task = real("multi30k", target="fr")
    assert [len(task[split]) for split in SPLITS] == [29000, 1014, 1000]
    assert task["test"][0].source == "A man in an orange hat starring at something."
    papers = real("scitldr")
    assert [sum(len(r.targets) for r in papers[split]) for split in SPLITS] == [1992, 1453, 1967]


def test_crows_pairs():
    try:
        pairs = crows_pairs(DATA)
    except ValueError as error:
        pytest.skip(str(error)[:80])
    assert Counter(pair.direction for pair in pairs) == {"stereo": 1290, "antistereo": 218}
    assert Counter(pair.bias_type for pair in pairs).most_common(3) == [
        ("race-color", 516), ("gender", 262), ("socioeconomic", 172),
    ]  # fmt: skip


def test_records_for_submissions():
    real("rte"), real("si_nli")  # or skip
    assert len(unlabelled("rte", DATA)) == 3000 and len(unlabelled("si_nli", DATA)) == 998


def test_the_pinned_hashes_are_those_of_the_files():
    wrong = []
    for name, content in json.loads(PINS.read_text()).items():
        for file, pin in content["files"].items():
            path = DATA / name / file
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != pin["sha256"]:
                wrong.append(str(path))
    assert not wrong
