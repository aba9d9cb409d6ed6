"""Tasks that a head answers: classes, scores, choices, tags."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from minillm.data import Example, tagged_examples, text_examples
from minillm.data.tasks import Choice, Tagged, Text
from minillm.ops import IGNORE
from minillm.recipes.compare.problem import HeadProblem
from minillm.training import choice_loss, classification_loss, regression_loss, tagging_loss


class Classification(HeadProblem):
    """A class for a text or a pair of texts."""

    head, loss_fn = "classification", staticmethod(classification_loss)

    def make_examples(self, records: Sequence[Text]) -> list[Example]:
        seconds = [record.second or "" for record in records] if any(r.second is not None for r in records) else None
        labels, length = [self.label(record) for record in records], self.settings.length
        texts = [record.text for record in records]
        return text_examples(self.tokenizer, texts, labels, seconds=seconds, max_length=length)

    def label(self, record: Text) -> int | float:
        """What the head is to say."""
        return record.label

    def reference(self, record: Text) -> int | float:
        return record.label

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[Any]:
        return scores.argmax(-1).tolist()


class Regression(Classification):
    """A number for a text or a pair of texts. It is learned in units of train's spread, around train's mean."""

    head, loss_fn, names = "regression", staticmethod(regression_loss), ("score",)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """(mean, standard deviation) of train's scores."""
        scores = [record.label for record in self.records("train")]
        return statistics.fmean(scores), statistics.pstdev(scores) or 1.0

    def label(self, record: Text) -> float:
        mean, spread = self.scale
        return (record.label - mean) / spread

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[float]:
        mean, spread = self.scale
        return [mean + spread * score for score in scores.squeeze(-1).tolist()]


@dataclass(frozen=True)
class Candidates:
    """A text with each of its choices, and the number of the right one."""

    rows: tuple[Example, ...]
    label: int


class Choices(HeadProblem):
    """Which of several texts fits? Each choice is read behind the text."""

    head, loss_fn, names = "choice", staticmethod(choice_loss), ("score",)

    def make_examples(self, records: Sequence[Choice]) -> list[Candidates]:
        if len(counts := {len(record.choices) for record in records}) > 1:
            raise ValueError(
                f"the task {self.task.name!r} has records of {' and '.join(map(str, sorted(counts)))} choices: in a "
                "batch all need the same number"
            )
        made = []
        for record in records:
            texts, zeros = [record.text] * len(record.choices), [0] * len(record.choices)
            rows = text_examples(self.tokenizer, texts, zeros, seconds=record.choices, max_length=self.settings.length)
            made.append(Candidates(tuple(rows), record.label))
        return made

    def collate(self, examples: Sequence[Candidates]) -> dict[str, Tensor]:
        flat = super().collate([row for example in examples for row in example.rows])
        flat["labels"] = flat["labels"].new_tensor([example.label for example in examples])
        return {n: x if n == "labels" else x.unflatten(0, (len(examples), -1)) for n, x in flat.items()}

    def reference(self, record: Choice) -> int:
        return record.label

    def answers(self, scores: Tensor, examples: Sequence[Candidates]) -> list[int]:
        return scores.argmax(-1).tolist()


class Tagging(HeadProblem):
    """A tag for each word, said at its first token. A word that was cut off gets the commonest tag of train."""

    head, loss_fn = "tagging", staticmethod(tagging_loss)

    @cached_property
    def commonest(self) -> int:
        """The tag that is right most often in train."""
        return Counter(tag for record in self.records("train") for tag in record.tags).most_common(1)[0][0]

    def make_examples(self, records: Sequence[Tagged]) -> list[Example]:
        words, tags = [record.words for record in records], [record.tags for record in records]
        return tagged_examples(self.tokenizer, words, tags, max_length=self.settings.length)

    def reference(self, record: Tagged) -> list[str]:
        return [self.labels[tag] for tag in record.tags]

    def predict(self, model: nn.Module, split: str) -> list[list[str]]:
        found = []
        for said, record in zip(super().predict(model, split), self.records(split), strict=True):
            read = dict.fromkeys(self.tokenizer.encode_words(record.words)[1])  # a word may have no token at all
            tag_of = dict(zip(read, said, strict=False))  # and the last ones may be cut off
            found.append([self.labels[tag_of.get(word, self.commonest)] for word in range(len(record.words))])
        return found

    def answers(self, scores: Tensor, examples: Sequence[Example]) -> list[list[int]]:
        """The tags said at the first tokens of the words."""
        best = scores.argmax(-1).tolist()
        return [
            [tag for tag, label in zip(tags, example.labels, strict=False) if label != IGNORE]
            for tags, example in zip(best, examples, strict=True)
        ]
