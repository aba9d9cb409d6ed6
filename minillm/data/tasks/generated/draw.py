"""What generated tasks are made with: chance by seed, words and forms that training never sees, no record twice.

Of every list of words or sentence forms that `Draw.one` draws from, a fifth comes up in test alone and a tenth in valid
alone (lists of fewer than five are used whole). So test asks for words and combinations that no training record has.
"""

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from minillm.config import seed_flaw
from minillm.data.tasks.task import SPLITS, Record, content

T = TypeVar("T")
NEW = 1 / 3  # how often a test (valid) record takes what training has not, at each place where it could
TRIES = 2000  # in vain, until a task is said to hold no more different records
VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])(?!one\b|once\b|use|uni|eu)")


class Draw:
    """Chance for one split of a task: the same for the same name, seed and split, on every machine."""

    def __init__(self, name: str, seed: int, split: str):
        self.key, self.split = f"{name} {seed}", split
        self.random = random.Random(f"{name} {seed} {split}")  # a text seeds by SHA-512, not by its hash()

    def one(self, options: Sequence[T]) -> T:
        """One of the options, as far as this split may use them."""
        known, own = _shares(self.key, len(options), self.split)
        return options[self.random.choice(own if own and self.random.random() < NEW else known)]

    def several(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones."""
        if count > (most := len(set(options)) - len(options) // 5 - len(options) // 10):
            raise ValueError(f"{count} different ones of {most} that {self.split} is sure to have")
        chosen: list[T] = []
        while len(chosen) < count:
            if (option := self.one(options)) not in chosen:
                chosen.append(option)
        return chosen

    def any(self, options: Sequence[T]) -> T:
        """One of all options: for what every split must know."""
        return self.random.choice(options)

    def maybe(self, text: str, chance: float = 0.5) -> str:
        """The text, or nothing."""
        return text if self.random.random() < chance else ""

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.random.sample(items, len(items))


@functools.lru_cache(maxsize=4096)
def _shares(key: str, count: int, split: str) -> tuple[list[int], list[int]]:
    """(what all splits use, what this one has for itself) of `count` options, as their numbers."""
    order = random.Random(f"{key} {count}").sample(range(count), count)
    test, valid = count // 5, count // 10
    own = {"test": order[:test], "valid": order[test : test + valid]}.get(split, [])
    return order[test + valid :], own


def make_splits(
    name: str, seed: int, sizes: tuple[int, int, int], write: Callable[[Draw, int], Record], kinds: int = 1
) -> Mapping[str, tuple[Record, ...]]:
    """{split: as many records as asked}, equally many of each of `kinds`: `write(draw, kind)` makes one.

    No two records show a model the same letters and digits, in whatever splits they are. ValueError where the task
    cannot make as many.
    """
    check_sizes(name, seed, dict(zip(SPLITS, sizes, strict=True)))
    splits, seen = {}, set()
    for split, size in zip(SPLITS, sizes, strict=True):
        draw = Draw(name, seed, split)
        records = [new_one(draw, write, number % kinds, seen, f"{name}: {split}={size}") for number in range(size)]
        splits[split] = tuple(draw.shuffled(records))
    return splits


def new_one(draw: Draw, write: Callable[[Draw, int], T], kind: int, seen: set[str], asked: str) -> T:
    """What `write(draw, kind)` makes, unlike all in `seen`, where it is put; `asked`: how an error names it."""
    for _ in range(TRIES):
        made = write(draw, kind)
        if (letters := plain(made)) not in seen:
            seen.add(letters)
            return made
    raise ValueError(f"{asked} is more than there is: nothing new came up in {TRIES} tries. Ask for fewer")


def check_sizes(name: str, seed: int, sizes: Mapping[str, int]) -> None:
    wrong = seed_flaw(seed)
    for what, size in sizes.items():
        if type(size) is not int or size < 1:
            wrong.append(f"{what}={size!r}: how many, a whole number from 1")
    if wrong:
        raise ValueError(f"{name}: " + "; ".join(wrong))


def plain(made: Any) -> str:
    """What a model is shown of a record or text, in small letters and digits alone: near copies are the same."""
    shown = made if isinstance(made, str) else " ".join(map(str, content(made)))
    return re.sub(r"[\W_]+", " ", shown.lower()).strip()


def tidy(text: str) -> str:
    """Filled-in text as it is printed: single spaces, "an" before a vowel, a capital at every sentence's beginning."""
    text = re.sub(r"\s+([,.;:?!])", r"\1", re.sub(r"\s+", " ", text).strip())
    text = VOWEL.sub(r"\1n ", text)
    return re.sub(r"(^\W*|[.?!]\W+)([a-z])", lambda found: found[1] + found[2].upper(), text)
