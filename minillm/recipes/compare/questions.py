"""Extractive question answering: where in the paragraph does the answer begin and end?"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minillm.data import Example
from minillm.data.tasks import Question
from minillm.recipes.compare.problem import HeadProblem
from minillm.tokenizers.offsets import Span, offsets
from minillm.training import span_loss

LONGEST = 30  # tokens of an answer (Devlin et al. 2018's code has the same)
MOST_LOST = 0.5  # of the answers, from which on the task is another one
OUTSIDE = -100  # the place of an answer that was cut off


@dataclass(frozen=True)
class Reading(Example):
    """A question and its paragraph as tokens; which of the tokens are the paragraph's, and what each stands for."""

    context: str = ""
    first: int = 0  # the place of the paragraph's first token
    spans: tuple[Span, ...] = ()  # of its tokens, in characters


class Questions(HeadProblem):
    """The answer is a part of the paragraph. What does not fit into `length` tokens is cut from the paragraph's end."""

    head, loss_fn, names = "span", staticmethod(span_loss), ("start", "end")

    def make_examples(self, records: Sequence[Question]) -> list[Reading]:
        found = [self._example(record) for record in records]
        lost = sum(example.labels == (OUTSIDE, OUTSIDE) for example in found)
        if lost > len(found) * MOST_LOST:
            raise ValueError(
                f"length={self.settings.length}: {lost} of {len(found)} answers stand behind what fits into so many "
                "tokens: raise it"
            )
        return found

    def _example(self, record: Question) -> Reading:
        question, context = self.tokenizer.encode(record.question), self.tokenizer.encode(record.context)
        around = len(self.tokenizer.with_specials([], [])[0])
        question = question[: max(1, (self.settings.length - around) // 2)]
        context = context[: max(1, self.settings.length - around - len(question))]
        tokens, types = self.tokenizer.with_specials(question, context)
        places, _ = self.tokenizer.with_specials(question, range(-len(context), 0))  # no id is negative
        first = next((place for place, token in enumerate(places) if token < 0), 0)
        spans = tuple(offsets(self.tokenizer, record.context)[: len(context)])
        place = _place(spans, record.starts[0], record.starts[0] + len(record.answers[0]))
        answer = (OUTSIDE, OUTSIDE) if place is None else (first + place[0], first + place[1])
        return Reading(tuple(tokens), answer, tuple(types) if any(types) else None, False, record.context, first, spans)

    def reference(self, record: Question) -> list[str]:
        return list(record.answers)

    def perfect(self, split: str) -> list[str]:
        return [answers[0] for answers in self.references(split)]

    def answers(self, scores: Tensor, examples: Sequence[Reading]) -> list[str]:
        return [_best(row, example) for row, example in zip(scores, examples, strict=True)]


def _place(spans: Sequence[Span], begin: int, end: int) -> tuple[int, int] | None:
    """The first and the last token that have characters of the answer; None if its end was cut off."""
    inside = [i for i, (a, b) in enumerate(spans) if a < end and b > begin]
    return (inside[0], inside[-1]) if inside and spans[inside[-1]][1] >= end else None


def _best(scores: Tensor, example: Reading) -> str:
    """The text of the likeliest place: start and end inside the paragraph, in this order and not far apart."""
    places = slice(example.first, example.first + len(example.spans))
    start, end = scores[places].log_softmax(0).unbind(-1)
    both = start[:, None] + end[None, :]
    allowed = both.new_ones(both.shape).triu().tril(LONGEST - 1).bool()
    best = int(both.masked_fill(~allowed, float("-inf")).argmax())
    first, last = divmod(best, len(example.spans))
    return example.context[example.spans[first][0] : example.spans[last][1]].strip()
