"""Labelled examples: texts with classes or numbers, sentences with a tag for each word, pairs of texts.

examples = text_examples(tokenizer, texts, labels)             # lists of strings and of class numbers
loader = ExampleLoader(examples, batch_size=16, pad_id=tokenizer.pad_id)
Trainer(classifier, classification_loss, loader, config, run_dir).fit()
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.data.encoder_decoder import encoder_decoder_batch, pad_rows
from minillm.data.loader import Loader
from minillm.ops import IGNORE
from minillm.tokenizers import Tokenizer


@dataclass(frozen=True)
class Example:
    """A text as the model's input, special tokens included, and what is to be said of it.

    labels: a class number, a number (float), or several of either for the whole text (labels that hold together, the
    first and last place of an answer). With `per_token` one class number for each token, -100 where none counts.
    """

    tokens: tuple[int, ...]
    labels: int | float | tuple[int, ...] | tuple[float, ...]
    token_types: tuple[int, ...] | None = None
    per_token: bool = False


@dataclass(frozen=True)
class Pair:
    """A source and the target that an encoder-decoder should make of it, both with their special tokens."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def text_examples(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    seconds: Sequence[str] | None = None,
    max_length: int = 512,
) -> list[Example]:
    """One example for each text, or for each pair of a text and the one in `seconds` (premise and hypothesis).

    The input has the tokenizer's format (`with_specials`); texts that make more than `max_length` tokens lose their
    end, of a pair the longer one first. Labels as in `Example`.
    """
    counts = {len(texts), len(labels), len(texts if seconds is None else seconds)}
    _check("text_examples", counts, max_length, tokenizer, pair=seconds is not None)
    examples = []
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        rows = [tokenizer.encode(text)] + ([] if seconds is None else [tokenizer.encode(seconds[i])])
        room = max_length - len(tokenizer.with_specials(*([] for _ in rows))[0])
        while sum(map(len, rows)) > room:
            max(reversed(rows), key=len).pop()
        tokens, types = tokenizer.with_specials(*rows)
        several = isinstance(label, list | tuple | np.ndarray | Tensor)
        answer = tuple(torch.as_tensor(label).tolist()) if several else _number(label)
        examples.append(Example(tuple(tokens), answer, tuple(types) if any(types) else None))
    return examples


def tagged_examples(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], *, max_length: int = 512
) -> list[Example]:
    """One example for each sentence of words; each word's tag stands at its first piece, -100 at the others.

    Source: Devlin et al. 2018 (arXiv:1810.04805), section 5.3.
    """
    _check("tagged_examples", {len(sentences), len(tags)}, max_length, tokenizer)
    unequal = [i for i, (words, own) in enumerate(zip(sentences, tags, strict=True)) if len(words) != len(own)]
    if unequal:
        raise ValueError(f"tagged_examples: sentences {unequal[:10]} have another number of tags than of words")
    examples = []
    room = max_length - len(tokenizer.with_specials([])[0])
    for words, own in zip(sentences, tags, strict=True):
        ids, words_of = tokenizer.encode_words(words)
        ids, words_of = ids[:room], words_of[:room]
        firsts = [own[at] if i == 0 or words_of[i - 1] != at else IGNORE for i, at in enumerate(words_of)]
        places, _ = tokenizer.with_specials(range(-len(ids), 0))  # where each id comes to stand: no id is negative
        tokens = tuple(ids[place] if place < 0 else place for place in places)
        labels = tuple(firsts[place] if place < 0 else IGNORE for place in places)
        examples.append(Example(tokens, labels, per_token=True))
    return examples


def pair_examples(
    tokenizer: Tokenizer, sources: Sequence[str], targets: Sequence[str], *, max_length: int = 512
) -> list[Pair]:
    """One pair for each source and target, in the format in which `generate_text` gives a source to the model."""
    _check("pair_examples", {len(sources), len(targets)}, max_length, tokenizer)
    room = max_length - len(tokenizer.with_specials([])[0])

    def row(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.with_specials(tokenizer.encode(text)[:room])[0])

    return [Pair(row(source), row(target)) for source, target in zip(sources, targets, strict=True)]


def collate(examples: Sequence[Example] | Sequence[Pair], pad_id: int, decoder_start_id: int = 0) -> dict[str, Tensor]:
    """The batch of these examples, padded on the right: tokens, mask, labels, and token_types if one has them.

    Of pairs it is that of `encoder_decoder_batch`.
    """
    if isinstance(examples[0], Pair):
        sources, targets = ([torch.tensor(row) for row in rows] for rows in zip(*map(_rows, examples), strict=True))
        return encoder_decoder_batch(sources, targets, pad_id=pad_id, decoder_start_id=decoder_start_id)
    tokens, mask = pad_rows([torch.tensor(example.tokens) for example in examples], pad_id)
    if examples[0].per_token:
        labels, _ = pad_rows([torch.tensor(example.labels) for example in examples], IGNORE)
    else:
        labels = torch.tensor([example.labels for example in examples])
    batch = {"tokens": tokens, "mask": mask, "labels": labels}
    if any(example.token_types for example in examples):
        types = [torch.tensor(example.token_types or [0] * len(example.tokens)) for example in examples]
        batch["token_types"], _ = pad_rows(types, 0)
    return batch


def example_batches(
    examples: Sequence[Example] | Sequence[Pair], batch_size: int, pad_id: int, decoder_start_id: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Each example once, in order: for evaluation."""
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], pad_id, decoder_start_id)


class ExampleLoader(Loader):
    """Batches of examples without end, shuffled by (seed, epoch); it resumes exactly.

    `decoder_start_id`: of pairs, what the decoder begins with (`model.config.decoder_start_id`).
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[Pair],
        batch_size: int,
        pad_id: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        decoder_start_id: int = 0,
        shuffle: bool = True,
    ):
        super().__init__(None, batch_size, 1, seed, rank, world_size, shuffle)
        self.examples, self.pad_id, self.decoder_start_id = list(examples), pad_id, decoder_start_id
        if len(self.examples) < batch_size:
            raise ValueError(
                f"ExampleLoader: there are {len(self.examples)} examples, fewer than batch_size {batch_size}: lower "
                "it, or bring more"
            )
        self._sha256 = hashlib.sha256(repr(self.examples).encode()).hexdigest()
        self._order = self._ordered(0)

    def rows(self, epoch: int) -> np.ndarray:
        """The numbers of the examples."""
        return np.arange(len(self.examples))

    def batch(self, rows: np.ndarray, mine: slice) -> dict[str, Tensor]:
        return collate([self.examples[row] for row in rows[mine]], self.pad_id, self.decoder_start_id)

    def identity(self) -> dict[str, Any]:
        return {
            "loader": "ExampleLoader",
            "examples_sha256": self._sha256,
            "batch_size": self.batch_size,
            "pad_id": self.pad_id,
            "decoder_start_id": self.decoder_start_id,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


def _rows(pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pair.source, pair.target


def _number(label: Any) -> int | float:
    """A class number stays whole, also one of numpy's or torch's."""
    number = label.item() if isinstance(label, np.generic | Tensor) else label
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"label {label!r}: expected a class number, a number, or several; number your classes from 0")
    return number


def _check(name: str, counts: set[int], max_length: int, tokenizer: Tokenizer, *, pair: bool = False) -> None:
    wrong = []
    if len(counts) > 1 or counts == {0}:
        wrong.append(f"there are {' and '.join(map(str, sorted(counts)))} of what should be equally many, and some")
    least = len(tokenizer.with_specials([], [])[0] if pair else tokenizer.with_specials([])[0]) + 1
    if max_length < least:
        wrong.append(f"max_length={max_length}: the special tokens and one of the text need {least}")
    if wrong:
        raise ValueError(f"{name}: " + "; ".join(wrong))
