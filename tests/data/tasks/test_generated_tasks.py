"""What holds of every task that minillm writes itself, whatever it is about."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from word_counting import (
    answers_by_overlap,
    bag_of_words,
    majority,
    most_frequent_tags,
    tag_scores,
    word_by_word,
)

from minillm.data.tasks import SPLITS, TASKS, Rewrite, Tagged, Text, load_task
from minillm.data.tasks.generated.domains import DOMAINS, domain_corpus
from minillm.data.tasks.generated.draw import Draw, make_splits, tidy

GENERATED = [name for name in TASKS if "generated" in TASKS[name].__module__]
MADE: dict = {}
CODE = """
import hashlib
from minillm.data.tasks import TASKS, load_task
from minillm.data.tasks.generated.domains import DOMAINS, domain_corpus
names = [name for name in TASKS if "generated" in TASKS[name].__module__]
made = [repr(load_task(name, seed=3, train=30, valid=10, test=20).splits) for name in names]
made += [repr(domain_corpus(name, 3, 20, 10)) for name in DOMAINS]
print(hashlib.sha256("".join(made).encode()).hexdigest())
"""


def task(name: str):
    """The task at its default size, made once."""
    if name not in MADE:
        MADE[name] = load_task(name)
    return MADE[name]


def shown(record) -> str:
    """All that a model is shown of a record."""
    if isinstance(record, Tagged):
        return " ".join(record.words)
    if isinstance(record, Text):
        return f"{record.text} {record.second or ''}"
    return record.source if isinstance(record, Rewrite) else f"{record.question} {record.context}"


def letters(record) -> str:
    return "".join(c for c in shown(record).lower() if c.isalnum())


def vocabulary(records) -> set[str]:
    return {word for record in records for word in re.findall(r"[a-z'-]+", shown(record).lower())}


def test_there_are_eleven():
    assert len(GENERATED) == 11


def test_the_same_in_every_process():
    digests = set()
    for hash_seed in ("0", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1 and len(digests.pop().strip()) == 64


@pytest.mark.parametrize("name", GENERATED)
def test_sizes_seeds_and_what_it_says_of_itself(name):
    found = task(name)
    assert [len(found[split]) for split in SPLITS] == [1000, 250, 500]
    other = load_task(name, seed=1, train=40, valid=10, test=20)
    assert [len(other[split]) for split in SPLITS] == [40, 10, 20]
    assert len(set(other["train"]) & set(load_task(name, train=40, valid=10, test=20)["train"])) < 10
    assert found.name == name and found.description and found.source and found.licence
    assert found.ceiling == 1.0 and found.metrics


@pytest.mark.parametrize("name", GENERATED)
def test_no_record_comes_twice_not_even_nearly(name):
    seen = Counter(letters(record) for split in SPLITS for record in task(name)[split])
    assert max(seen.values()) == 1


@pytest.mark.parametrize("name", GENERATED)
def test_labels_are_balanced_and_guessing_is_at_chance(name):
    found = task(name)
    for split in SPLITS:
        if found.kind == "classification":
            counts = Counter(record.label for record in found[split])
            assert len(counts) == len(found.labels) and max(counts.values()) - min(counts.values()) <= 1
        elif found.kind == "rewriting":
            assert Counter(record.targets for record in found[split]).most_common(1)[0][1] < 0.1 * len(found[split])
        elif found.kind == "question_answering":
            assert Counter(record.answers[0] for record in found[split]).most_common(1)[0][1] < 0.1 * len(found[split])
        elif found.kind == "tagging":
            assert {tag for record in found[split] for tag in record.tags} == set(range(len(found.labels)))
    if found.kind == "classification":
        assert majority(found) <= 1 / len(found.labels) + 0.01


@pytest.mark.parametrize("name", GENERATED)
def test_it_is_written_like_english(name):
    for split in SPLITS:
        for record in task(name)[split]:
            text = shown(record)
            assert not re.search(r"[{}\[\]]|  \w|\ba [aeio]", text), text
            assert 3 <= len(text.split()) <= 90 and text[0].upper() == text[0], text
            if not isinstance(record, Rewrite) or name != "instructions":
                assert text.rstrip().endswith((".", "?", "!")), text


@pytest.mark.parametrize("name", [name for name in GENERATED if name != "translation"])
def test_test_asks_for_words_that_training_has_not(name):
    known = vocabulary(task(name)["train"])
    new = [record for record in task(name)["test"] if vocabulary([record]) - known]
    assert len(new) > 0.2 * len(task(name)["test"]), len(new)


def test_translation_asks_for_known_words_in_new_pairs():
    """A word that was never translated cannot be; a pair of words can."""
    found = task("translation")
    assert vocabulary(found["test"]) <= vocabulary(found["train"])

    def pairs(split):
        texts = (shown(record).lower().rstrip(".?").split() for record in found[split])
        return {pair for words in texts for pair in pairwise(words)}

    assert len(pairs("test") - pairs("train")) > 50


@pytest.mark.parametrize("name", ["sentiment", "topic", "nli", "spam", "similarity"])
def test_counting_words_does_not_solve_it(name):
    """As much as it says that counting reaches, and at most 60 % of the way from chance to the ceiling."""
    found = task(name)
    reached = bag_of_words(found)
    chance = 1 / len(found.labels) if found.labels else 0.0
    assert reached <= found.counting + 0.05
    assert found.counting <= chance + 0.6 * (found.ceiling - chance)


@pytest.mark.parametrize(("name", "metric"), [("pos", "accuracy"), ("entities", "span_f1")])
def test_the_commonest_tag_of_a_word_does_not_solve_it(name, metric):
    found = task(name)
    reached = tag_scores(found, most_frequent_tags(found))[metric]
    assert found.score == metric and reached <= found.counting + 0.03
    assert found.counting <= 0.75


def test_overlap_of_words_does_not_answer_questions():
    found = task("qa")
    assert answers_by_overlap(found) <= found.counting + 0.05
    assert 0.2 < found.counting <= 0.6


def test_no_translation_is_right_word_by_word():
    assert word_by_word(task("translation")) < 0.05


@pytest.mark.parametrize(("name", "least"), [("pos", 30), ("entities", 30)])
def test_words_have_several_tags(name, least):
    tags: dict[str, set[str]] = {}
    for record in task(name)["train"]:
        for word, tag in zip(record.words, record.tags, strict=True):
            tags.setdefault(word.lower(), set()).add(task(name).labels[tag].split("-")[-1])
    assert sum(len(own) >= (2 if name == "pos" else 3) for own in tags.values()) >= least


def test_bad_sizes_and_seeds_are_one_error():
    with pytest.raises(ValueError, match=r"sentiment: train=0: how many, .*; test=2\.5: how many"):
        load_task("sentiment", train=0, test=2.5)
    with pytest.raises(ValueError, match=r"nli: seed=-1: a whole number from 0"):
        load_task("nli", seed=-1)


def test_more_than_there_is_is_an_error():
    def write(draw: Draw, kind: int) -> Text:
        return Text(draw.any(("One.", "one!", "Two.", "three")), kind)

    assert len(make_splits("few", 0, (1, 1, 1), write)["train"]) == 1
    with pytest.raises(ValueError, match=r"few: test=5 is more than there is: nothing new came up in 2000 tries"):
        make_splits("few", 0, (1, 1, 5), write)


def test_what_is_held_out_is_held_out():
    options = tuple(range(50))
    draws = {split: Draw("x", 0, split) for split in SPLITS}
    got = {split: {draw.one(options) for _ in range(3000)} for split, draw in draws.items()}
    assert len(got["train"]) == 35 and len(got["test"] - got["train"]) == 10 and len(got["valid"] - got["train"]) == 5
    assert got["test"] - got["train"] != got["valid"] - got["train"]
    assert not (got["test"] - got["train"]) & (got["valid"] - got["train"])
    assert draws["train"].several(options, 35) and {*range(4)} == {draws["train"].one(range(4)) for _ in range(99)}
    with pytest.raises(ValueError, match="36 different ones of 35 that train is sure to have"):
        draws["train"].several(options, 36)


def test_tidy():
    assert tidy(" a old  man , he said. so? yes ! a use of a hour") == "An old man, he said. So? Yes! A use of a hour"


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_documents_that_differ(name):
    training, held_out = domain_corpus(name)
    assert (len(training), len(held_out)) == (1000, 100)
    texts = ["".join(c for c in d.text.lower() if c.isalnum()) for d in training + held_out]
    assert len(set(texts)) == 1100 and all(60 < len(d.text) < 1500 and "\n" in d.text for d in training + held_out)
    words = set(re.findall(r"[a-z]+", " ".join(d.text for d in training).lower()))
    new = [d for d in held_out if set(re.findall(r"[a-z]+", d.text.lower())) - words]
    assert len(new) > 20 and domain_corpus(name, 0, 5, 5)[0] == training[:5]
    assert domain_corpus(name, 1, 5, 5)[0] != training[:5]


def test_a_domain_that_is_none():
    with pytest.raises(ValueError, match="there is no domain 'recipe'; did you mean recipes"):
        domain_corpus("recipe")
    with pytest.raises(ValueError, match=r"recipes: seed=-1: .*; held_out=0: how many"):
        domain_corpus("recipes", -1, held_out=0)


def test_the_digest_of_the_test_itself():
    """The code of the other process does what this one does."""
    made = [repr(load_task(name, seed=3, train=30, valid=10, test=20).splits) for name in GENERATED]
    made += [repr(domain_corpus(name, 3, 20, 10)) for name in DOMAINS]
    here = hashlib.sha256("".join(made).encode()).hexdigest()
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here
