"""Metrics against hand-worked examples, the libraries' own functions, and their papers."""

import math

import numpy as np
import pytest
import torch

from minillm.data.tasks.published.bias import SentencePair
from minillm.evaluation import METRICS, find_metric, stereotype_scores

CORPUS = {  # sacrebleu's README has this example
    "predictions": ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
    "references": [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ],
}
LABELS = [(0, 0), (1, 1), (2, 1), (1, 2), (2, 2), (0, 2)]  # predicted, wanted


def columns(pairs):
    return [p for p, _ in pairs], [w for _, w in pairs]


def test_every_metric_is_one_on_what_is_right():
    right = {
        "span_f1": [["B-a", "I-a", "O"], ["O", "B-b"]],
        "pearson": [0.0, 1.0, 3.0],
        "spearman": [0.0, 1.0, 3.0],
        "bleu": ["one two three four five", "six seven eight nine"],
    }
    texts = {"chrf", "exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l"}
    for name, metric in METRICS.items():
        values = right.get(name, ["a b c d e", "f g h i"] if name in texts else [0, 1, 1])
        assert metric(values, values, groups=["x"] * len(values)) == pytest.approx(1.0), name


def test_accuracy_by_hand():
    assert find_metric("accuracy")(*columns(LABELS)) == 3 / 6
    assert METRICS["accuracy"](["yes", "no"], ["yes", "yes"]) == 0.5
    assert METRICS["accuracy"]([["A", "B"], ["A"]], [["A", "A"], ["A"]]) == pytest.approx(2 / 3)
    assert METRICS["accuracy"](torch.tensor([1, 0]), np.array([1, 1])) == 0.5


def test_f1_by_hand():
    # class 1: 2 right of 3 predicted, of 4 wanted
    predicted, wanted = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]
    assert METRICS["f1"](predicted, wanted) == pytest.approx(2 * 2 / (3 + 4))
    assert METRICS["f1a"](predicted, wanted) == METRICS["f1"](predicted, wanted)
    # classes 0, 1, 2: 2*1/(2+1), 2*1/(2+2), 2*1/(2+3)
    assert METRICS["macro_f1"](*columns(LABELS)) == pytest.approx((2 / 3 + 1 / 2 + 2 / 5) / 3)
    assert METRICS["macro_f1"](["a", "a"], ["a", "b"]) == pytest.approx((2 / 3 + 0) / 2)


def test_matthews_by_hand():
    # tp 2, tn 1, fp 1, fn 2
    expected = (2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3)
    assert METRICS["matthews"]([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]) == pytest.approx(expected)
    assert METRICS["matthews"]([1, 0, 1, 1], [1, 0, 0, 1]) == pytest.approx((2 * 1 - 0) / math.sqrt(3 * 2 * 2 * 1))
    assert METRICS["matthews"]([0, 1], [1, 0]) == -1


def test_of_one_class_only():
    assert METRICS["matthews"]([1, 1, 1], [1, 0, 1]) == 0
    assert METRICS["matthews"]([1, 0, 1], [1, 1, 1]) == 0
    assert METRICS["f1"]([0, 0], [0, 0]) == 0
    assert METRICS["f1"]([0, 0], [1, 1]) == 0
    assert METRICS["macro_f1"]([1, 1], [1, 1]) == 1
    assert METRICS["span_f1"]([["O"]], [["O"]]) == 0
    assert METRICS["span_f1"]([["O", "O"]], [["B-a", "O"]]) == 0


def test_groups_are_right_as_a_whole():
    predicted, wanted, groups = [1, 0, 1, 1], [1, 0, 0, 1], ["q1", "q1", "q2", "q3"]
    assert METRICS["group_exact_match"](predicted, wanted, groups=groups) == pytest.approx(2 / 3)
    for wrong in (None, ["q1"], ["q1", "q1", "q2", ""]):
        with pytest.raises(ValueError, match="needs groups="):
            METRICS["group_exact_match"](predicted, wanted, groups=wrong)


def test_correlations():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    wanted = generator.normal(size=40).round(1)  # with ties
    predicted = wanted + generator.normal(size=40).round(1)
    assert METRICS["pearson"](predicted, wanted) == pytest.approx(stats.pearsonr(predicted, wanted).statistic)
    ranks = stats.rankdata(predicted), stats.rankdata(wanted)
    assert METRICS["spearman"](predicted, wanted) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert METRICS["spearman"]([1, 8, 27], [1, 2, 3]) == pytest.approx(1)
    assert METRICS["pearson"]([1, 8, 27], [1, 2, 3]) == pytest.approx(26 / math.sqrt(2 * 362))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_of_constants(name):
    assert METRICS[name]([2.5, 2.5, 2.5], [1.0, 2.0, 3.0]) == 0
    with pytest.raises(ValueError, match=r"needs references that differ; all 2 are 1\.0"):
        METRICS[name]([1.0, 2.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="needs references that differ; all 1 are"):
        METRICS[name]([1.0], [1.0])


def test_spans_by_hand():
    wanted = [["B-per", "I-per", "O", "B-loc"], ["B-org", "O"]]
    predicted = [["B-per", "I-per", "O", "B-org"], ["B-org", "I-org"]]  # right; wrong kind; wrong end
    assert METRICS["span_f1"](predicted, wanted) == pytest.approx(2 * 1 / (3 + 3))
    neighbours = [["B-a", "B-a"]]  # two entities, not one
    assert METRICS["span_f1"]([["B-a", "I-a"]], neighbours) == 0
    assert METRICS["span_f1"]([["I-a", "O"]], [["B-a", "O"]]) == 1  # as conlleval: a lone I- begins an entity


def test_squad_by_hand():
    assert METRICS["exact_match"](["The  Eiffel tower!", "1 a"], [["Eiffel Tower", "x"], "2"]) == 0.5
    # shared: "new", "york"; 3 words predicted, 2 wanted; the nearest of two references counts
    assert METRICS["token_f1"](["in New York"], [["Boston", "New York"]]) == pytest.approx(2 * 2 / (3 + 2))
    assert METRICS["token_f1"](["the"], ["a"]) == 1  # both are empty without articles
    assert METRICS["token_f1"](["", "a b b"], ["b", "b b b"]) == pytest.approx((0 + 2 * 2 / (2 + 3)) / 2)


def test_bleu_and_chrf_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = list(map(list, zip(*CORPUS["references"], strict=True)))
    assert METRICS["bleu"](predictions, CORPUS["references"]) * 100 == pytest.approx(48.53, abs=0.005)  # their README
    assert METRICS["bleu"](**CORPUS) == pytest.approx(1)
    assert METRICS["chrf"](predictions, CORPUS["references"]) == pytest.approx(
        sacrebleu.corpus_chrf(predictions, references).score / 100
    )
    uneven = [["a b c d e f"], ["g h i j k", "g h i j z"]]
    assert METRICS["bleu"](["a b c d e f", "g h i j z"], uneven) == pytest.approx(1)
    assert METRICS["chrf"](["a b c d e f", "g h i j z"], uneven) == pytest.approx(1)


def test_chrf_by_hand():
    # character 1-grams of "ab" and "ac": 1 of 2; 2-grams: 0 of 1; longer ones are in neither
    assert METRICS["chrf"](["ab"], ["ac"]) == pytest.approx((1 / 2 + 0) / 2)


def test_rouge_by_hand():
    # Lin 2004, section 3.1: "police killed the gunman" has the longest common subsequences "police the gunman" and
    # "the gunman" with these two, so 3 and 2 of 4 words
    for predicted, common in (("police kill the gunman", 3), ("the gunman kill police", 2)):
        assert METRICS["rouge_l"]([predicted], ["police killed the gunman"]) == pytest.approx(common / 4)
    assert METRICS["rouge_1"](["a b c"], [["a x", "c b y"]]) == pytest.approx(2 * 2 / 6)
    assert METRICS["rouge_2"](["a b c"], ["b c d e"]) == pytest.approx(2 * 1 / (2 + 3))
    assert METRICS["rouge_1"](["Šola, čas."], ["čas šola"]) == 1  # letters beyond a to z are letters
    assert METRICS["rouge_l"](["", "a"], ["a", "a"]) == 0.5


def test_rouge_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    words = ["the", "a", "cat", "dog", "sat", "on", "mat,", "3", "(red)", "it's"]
    generator = np.random.default_rng(0)
    for _ in range(50):
        text, reference = (" ".join(generator.choice(words, size=generator.integers(2, 12))) for _ in range(2))
        expected = scorer.score(reference, text)
        for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            assert METRICS[ours]([text], [reference]) == pytest.approx(expected[theirs].fmeasure), (text, reference)


def test_bad_input_is_one_error():
    with pytest.raises(ValueError, match="accuracy cannot be computed: there are no records"):
        METRICS["accuracy"]([], [])
    with pytest.raises(
        ValueError,
        match="pearson cannot be computed: 3 predictions for 2 references; 2 predictions are "
        "no numbers: number 1 is nan; 1 references are no numbers: number 0 is inf",
    ):
        METRICS["pearson"]([1.0, math.nan, None], [math.inf, 1.0])  # fmt: skip
    with pytest.raises(ValueError, match="record 1 has 1 predicted tags for 2 words"):
        METRICS["span_f1"]([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ValueError, match=r"not 0.7 .a score. take the likeliest class"):
        METRICS["accuracy"]([0.7], [1])
    with pytest.raises(ValueError, match="for the classes 0 and 1, not 2; macro_f1 takes more"):
        METRICS["f1"]([2, 1], [0, 1])
    with pytest.raises(ValueError, match=r"needs lists of tags such as .*; number 0 has 3"):
        METRICS["span_f1"]([[3]], [["O"]])
    with pytest.raises(ValueError, match=r"needs lists of tags such as .*; number 0 has 'B-a'"):
        METRICS["span_f1"](["B-a"], [["B-a"]])
    for name in ("bleu", "rouge_l", "exact_match"):
        with pytest.raises(ValueError, match="predictions must be texts, not 7"):
            METRICS[name]([7], ["a"])
        with pytest.raises(ValueError, match="a reference must be a text or a list of texts, not "):
            METRICS[name](["a"], [[]])
    with pytest.raises(ValueError, match="no metric 'acuracy': one of accuracy, f1"):
        find_metric("acuracy")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r'needs sacrebleu, which is missing: pip install "minillm\[metrics\]"'):
        METRICS["bleu"](["a"], ["a"])


def test_stereotypes_by_hand():
    pairs = [SentencePair("m", "l", direction, kind) for direction, kind in (
        ("stereo", "age"), ("stereo", "age"), ("stereo", "gender"), ("antistereo", "gender"),
    )]  # fmt: skip
    scores = stereotype_scores(pairs, [1.5, -0.5, 0.0, 2.0])
    expected = {"all": 0.5, "ties": 0.25, "stereo": 0.5, "antistereo": 1.0, "age": 0.5, "gender": 0.5}
    assert scores == expected
    with pytest.raises(ValueError, match="4 pairs and 2 differences, 1 of them no numbers"):
        stereotype_scores(pairs, [1.0, math.nan])
