"""How each kind of task becomes a base's examples, and its answers become what metrics read."""

import statistics

import pytest
import torch
from tiny_tasks import COLOURS

from minillm.data.tasks import Choice, Question, Rewrite, Tagged, Task, Text
from minillm.recipes.compare import CompareConfig
from minillm.recipes.compare.examples import make_problem
from minillm.recipes.compare.find import find_base
from minillm.recipes.compare.questions import OUTSIDE
from minillm.training.losses.base import model_inputs

KINDS = ("decoder", "encoder", "encoder_decoder")


@pytest.fixture
def problem(bases, task):
    """problem(kind of base, kind of task or a Task, **config)"""

    def make(base, what, **settings):
        config = CompareConfig(base="b", task="t", **{"batch_size": 4, "length": 48, **settings})
        return make_problem(find_base(str(bases[base]))[0], task(what) if isinstance(what, str) else what, config)

    return make


def small(kind, record, labels=(), metric="accuracy"):
    """A task whose splits hold (nearly) this record alone, so that batches of one can be looked at."""
    others = {"train": "a", "valid": "b", "test": "c"}

    def changed(split):
        fields = {"question_answering": "question", "tagging": "words", "rewriting": "source"}
        field = fields.get(kind, "text")
        value = getattr(record, field)
        new = (*value, others[split]) if kind == "tagging" else f"{others[split]} {value}"
        extra = {"tags": (*record.tags, 0)} if kind == "tagging" else {}
        return type(record)(**{**vars(record), field: new, **extra})

    splits = {split: (record,) if split == "train" else (changed(split),) for split in others}
    return Task("small", kind, splits, (metric,), labels)


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("kind", ["classification", "regression", "choice", "tagging", "question_answering"])
def test_every_kind_on_every_base(base, kind, problem):
    """One answer for each record of test, of a type that the task's metric takes, and a loss that has a gradient."""
    made = problem(base, kind)
    model = made.new_model(0)
    said, right = made.predict(model, "test"), made.references("test")
    assert len(said) == len(right) == 16
    from minillm.evaluation.metrics import METRICS

    assert isinstance(METRICS[made.task.score](said, right), float)
    assert METRICS[made.task.score](made.perfect("test"), right) == pytest.approx(1)
    loss = made.loss_fn(model, next(made.loader(0)))
    loss.value.backward()
    assert model.body.embed_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("base", ["decoder", "encoder_decoder"])
def test_texts_are_written(base, problem):
    made = problem(base, "rewriting")
    model = made.new_model(0)
    said = made.predict(model, "test")
    assert len(said) == 16 and all(isinstance(text, str) for text in said)
    assert made.references("test")[0] == [made.task["test"][0].targets[0]]
    made.loss_fn(model, next(made.loader(0))).value.backward()


def test_an_encoder_writes_none(problem):
    with pytest.raises(
        ValueError, match="asks for texts, and an encoder writes none: choose a decoder or an encoder-d"
    ):
        problem("encoder", "rewriting")


def test_answers_come_in_the_order_of_the_records(problem):
    """A model that copies what it reads: predictions of texts, generated in another order, are put back."""
    made = problem("decoder", "rewriting")
    splits = dict(made.task.splits, valid=tuple(Rewrite("dog " * n + str(n), ("red",)) for n in (5, 1, 3)))
    made.task = Task("mixed", "rewriting", splits, ("exact_match",))
    prompts = {}

    def copy(model, tokenizer, texts, max_new_tokens):
        prompts.update(dict.fromkeys(texts))
        return [f" {text.strip()} " for text in texts]

    import minillm.recipes.compare.rewriting as rewriting

    before, rewriting.generate_text = rewriting.generate_text, copy
    try:
        assert made.predict(made.new_model(0), "valid") == [record.source for record in made.records("valid")]
    finally:
        rewriting.generate_text = before
    assert set(prompts) == {record.source + "\n" for record in made.records("valid")}


def test_a_decoder_is_asked_as_it_was_trained(problem):
    """Prompt and answer of an example: the prompt as generation gives it, then the target and the end, and only they
    have labels."""
    made = problem("decoder", small("rewriting", Rewrite("cat", ("red",)), metric="exact_match"), batch_size=1)
    (example,) = made.examples("train")
    tokenizer = made.tokenizer
    row = [*tokenizer.encode("cat\n"), *tokenizer.encode("red"), tokenizer.eos_id]
    assert list(example.tokens) == row[:-1]
    assert list(example.labels) == [-100] * 3 + row[4:]
    batch = made.collate([example])
    assert batch["tokens"].tolist() == [row[:-1]] and batch["labels"][0, 3:].tolist() == row[4:]


def test_long_sources_are_cut_and_the_answer_is_not(problem):
    made = problem("decoder", small("rewriting", Rewrite("cat " * 40, ("red",)), metric="exact_match"), batch_size=1)
    (example,) = made.examples("train")
    assert len(example.tokens) <= 48 and example.labels[-1] == made.tokenizer.eos_id
    assert made.prompt(made.records("train")[0]).endswith("\n")
    with pytest.raises(ValueError, match="length=8: the longest answer of train and its prompt need"):
        problem("decoder", small("rewriting", Rewrite("cat", ("red " * 9,)), metric="exact_match"), batch_size=1,
                length=8).examples("train")  # fmt: skip


CONTEXTS = [
    ("the hat is red.", "red"),
    ("  two  spaces\tand a\n\nbreak, red hat ", "break, red"),
    ("čšž 🙂 is a naïve café — ja", "naïve café"),
    ("🙂🙂 then 犬 here", "犬"),
    ("e\u0301clair\u00a0rouge now", "e\u0301clair"),
    ("answer first", "answer"),
    ("it ends so", "so"),
]


@pytest.mark.parametrize(("context", "answer"), CONTEXTS)
@pytest.mark.parametrize("base", KINDS)
def test_the_place_of_an_answer_leads_back_to_it(base, context, answer, problem):
    """Perfect scores for the labels' places give the answer's text, through tokens and offsets and back."""
    record = Question("Which?", context, (answer,), (context.index(answer),))
    made = problem(base, small("question_answering", record, metric="exact_match"), batch_size=1, length=90)
    (example,) = made.examples("train")
    start, end = example.labels
    tokens = made.collate([example])["tokens"][0]
    assert made.tokenizer.decode(tokens[start : end + 1].tolist()).strip() == answer
    scores = torch.zeros(1, len(tokens), 2)
    scores[0, start, 0] = scores[0, end, 1] = 9.0
    assert made.answers(scores, [example]) == [answer]


def test_an_answer_lies_inside_the_paragraph_and_ends_after_it_begins(problem):
    record = Question("Which?", "red or blue", ("blue",), (7,))
    made = problem("encoder", small("question_answering", record, metric="exact_match"), batch_size=1)
    (example,) = made.examples("train")
    scores = torch.zeros(1, len(example.tokens), 2)
    scores[0, 1] = 50.0  # in the question
    scores[0, example.first + 7, 0] = scores[0, example.first + 10, 1] = 9.0
    scores[0, example.first + 2, 1] = 12.0  # an end before that start: better by itself, and not allowed together
    assert made.answers(scores, [example]) == ["blue"]


def test_an_answer_that_is_cut_off_teaches_nothing(problem, monkeypatch):
    context = "word " * 30 + "red"
    record = Question("Which?", context, ("red",), (context.index("red"),))
    made = problem("encoder", small("question_answering", record, metric="exact_match"), batch_size=1)
    with pytest.raises(ValueError, match="length=48: 1 of 1 answers stand behind what fits into so many tokens: raise"):
        made.examples("train")
    monkeypatch.setattr("minillm.recipes.compare.questions.MOST_LOST", 1.0)
    (example,) = made.examples("train")
    assert example.labels == (OUTSIDE, OUTSIDE) and len(example.tokens) == 48
    assert float(made.loss_fn(made.new_model(0), made.collate([example])).weight) == 0


def test_every_word_has_a_tag_also_one_that_was_cut_off_or_has_no_token(problem):
    words, tags = ("", "red", "hat", *["word"] * 12), (1, 1, 0, *[0] * 12)
    made = problem("encoder", small("tagging", Tagged(words, tags), ("O", "B-n")), batch_size=1, length=24)
    (example,) = made.examples("train")
    assert [label for label in example.labels if label != -100][:2] == [1, 0]  # the first word has no token
    scores = torch.zeros(1, len(example.tokens), 2)
    for place, label in enumerate(example.labels):
        scores[0, place, 1 if label == 1 else 0] = 5.0

    class Perfect(torch.nn.Linear):
        def forward(self, *inputs, **named):
            return scores

    (said,) = made.predict(Perfect(1, 1), "train")
    assert said == ["O", "B-n", "O"] + ["O"] * 12  # what was cut off, or is not there: the commonest tag of train
    assert made.reference(made.records("train")[0]) == ["B-n", "B-n", "O"] + ["O"] * 12


def test_choices_are_read_behind_the_text(problem):
    made = problem("encoder", "choice")
    batch = made.collate(made.examples("train")[:3])
    assert batch["tokens"].shape[:2] == batch["mask"].shape[:2] == (3, 2)
    record, row = made.records("train")[0], batch["tokens"][0]
    for choice, ids, mask in zip(COLOURS, row, batch["mask"][0], strict=True):
        expected = made.tokenizer.with_specials(*map(made.tokenizer.encode, (record.text, choice)))[0]
        assert ids[mask].tolist() == expected
    assert batch["labels"].tolist() == [record.label for record in made.records("train")[:3]]
    splits = {
        s: (Choice(f"x {s}", ("a", "b"), 0), Choice(f"y {s}", ("a", "b", "c"), 2)) for s in ("train", "valid", "test")
    }
    with pytest.raises(ValueError, match="has records of 2 and 3 choices: in a batch all need the same number"):
        problem("encoder", Task("uneven", "choice", splits, ("accuracy",)), batch_size=1).examples("train")


def test_scores_are_learned_in_trains_units_and_said_in_the_tasks(problem):
    made = problem("encoder", "regression")
    labels = [record.label for record in made.records("train")]
    learned = [example.labels for example in made.examples("train")]
    assert statistics.fmean(learned) == pytest.approx(0, abs=1e-6) and statistics.pstdev(learned) == pytest.approx(1)
    scores = torch.tensor(learned)[:, None]
    assert made.answers(scores, made.examples("train")) == pytest.approx(labels, abs=1e-5)
    assert made.reference(Text("x", 2.5)) == 2.5


def test_token_types_go_to_bases_that_know_them(problem):
    """A pair has types, which a decoder does not take."""
    assert "token_types" in next(problem("encoder", "regression").batches("valid"))
    assert "token_types" not in next(problem("decoder", "regression").batches("valid"))


def test_a_head_is_the_same_for_every_method_of_a_seed(problem):
    made = problem("encoder", "classification")
    one, again, other = (made.new_model(seed) for seed in (1, 1, 2))
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    inputs, named = model_inputs(next(made.batches("valid")))
    body = made.base.model.body
    assert torch.equal(one.body.hidden(*inputs, **named), body.eval().hidden(*inputs, **named))  # and so is the base


def test_fewer_records_are_drawn_the_same_for_all(problem):
    one, other = (problem("encoder", "classification", train_records=10, task_seed=seed) for seed in (0, 1))
    assert len(one.records("train")) == 10 and one.records("train") == one.records("train")
    assert one.records("train") != other.records("train")
    assert [r for r in one.task["train"] if r in one.records("train")] == one.records("train")  # in their order


def test_what_does_not_go_together_is_said(problem):
    with pytest.raises(ValueError, match="length=97 is more than the base's max_positions=96: lower it"):
        problem("encoder", "classification", length=97)
    with pytest.raises(ValueError, match="train has 24 records, fewer than batch_size=25: lower it"):
        problem("encoder", "classification", batch_size=25)
