"""Tasks whose answer is a text: translation, summaries, instructions. The base answers with its own LM head."""

from collections.abc import Sequence
from functools import cached_property

from torch import nn

from minillm.data import Example, Pair, pair_examples
from minillm.data.tasks import Rewrite
from minillm.generation import generate_text
from minillm.ops import IGNORE
from minillm.recipes.compare.problem import EVALUATED, Problem
from minillm.training import causal_lm_loss, seq2seq_loss

BETWEEN = "\n"  # a decoder's prompt and its answer


class Rewriting(Problem):
    """A text from a text, generated greedily, at most as long as the longest answer of train."""

    @cached_property
    def new_tokens(self) -> int:
        """The longest answer of train and its end."""
        return 1 + max(len(self.tokenizer.encode(record.targets[0])) for record in self.records("train"))

    def prompt(self, record: Rewrite) -> str:
        """What the model is given."""
        return record.source

    def predict(self, model: nn.Module, split: str) -> list[str]:
        prompts, training, most = list(map(self.prompt, self.records(split))), model.training, self.new_tokens
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike in length: little padding
        found = [""] * len(prompts)
        model.eval()
        for start in range(0, len(order), EVALUATED):
            some = order[start : start + EVALUATED]
            texts = generate_text(model, self.tokenizer, [prompts[i] for i in some], max_new_tokens=most)
            for i, text in zip(some, texts, strict=True):
                found[i] = text.strip()
        model.train(training)
        return found

    def reference(self, record: Rewrite) -> list[str]:
        return list(record.targets)

    def perfect(self, split: str) -> list[str]:
        return [targets[0] for targets in self.references(split)]


class Translating(Rewriting):
    """An encoder-decoder reads the source and writes the target."""

    loss_fn = staticmethod(seq2seq_loss)

    def make_examples(self, records: Sequence[Rewrite]) -> list[Pair]:
        sources, targets = [self.prompt(record) for record in records], [record.targets[0] for record in records]
        return pair_examples(self.tokenizer, sources, targets, max_length=self.settings.length)

    def prompt(self, record: Rewrite) -> str:
        """The source, cut to `length` tokens as in training."""
        room = self.settings.length - len(self.tokenizer.with_specials([])[0])
        ids = self.tokenizer.encode(record.source)
        return record.source if len(ids) <= room else self.tokenizer.decode(ids[:room])


class Completing(Rewriting):
    """A decoder reads the source and a line's end as its prompt, and goes on with the target and its end-of-text."""

    loss_fn = staticmethod(causal_lm_loss)

    def make_examples(self, records: Sequence[Rewrite]) -> list[Example]:
        if (least := self.new_tokens + self._around() + 1) > self.settings.length:
            raise ValueError(
                f"length={self.settings.length}: the longest answer of train and its prompt need {least}: raise it"
            )
        return [self._example(record) for record in records]

    def prompt(self, record: Rewrite) -> str:
        """The source, cut so that prompt and answer have `length` tokens at most."""
        room = self.settings.length - self.new_tokens - self._around()
        ids = self.tokenizer.encode(record.source)
        source = record.source if len(ids) <= room else self.tokenizer.decode(ids[: max(1, room)])
        return source + BETWEEN

    def _around(self) -> int:
        """Tokens of a prompt that are not the source's."""
        return len(self.tokenizer.encode(BETWEEN)) + len(self._begun([]))

    def _begun(self, ids: list[int]) -> list[int]:
        """The prompt's ids as `generate_text` gives them to the model."""
        open_ended = self.tokenizer.input_format.single[-1][0] == "A"
        return self.tokenizer.with_specials(ids)[0] if open_ended else ids

    def _example(self, record: Rewrite) -> Example:
        prompt = self._begun(self.tokenizer.encode(self.prompt(record)))
        answer = self.tokenizer.encode_continuation(record.targets[0])[: self.new_tokens - 1]
        answer.append(self.tokenizer.eos_id)
        row = [*prompt, *answer]
        labels = [IGNORE] * (len(prompt) - 1) + answer
        return Example(tuple(row[:-1]), tuple(labels), per_token=True)
