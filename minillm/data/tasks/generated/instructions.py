"""instructions: do what the first line says with the second, in the form that is asked for.

Each instruction is said in several ways, one or two of them at a time; test has wordings and pairs of instructions
that training has not. The right answer is computed, so it is exact.
"""

from collections.abc import Callable
from typing import NamedTuple

from minillm.data.tasks.generated.draw import Draw, make_task
from minillm.data.tasks.generated.words import COLOURS, KINDS, MEN, THINGS, TRADES, WOMEN
from minillm.data.tasks.task import Rewrite, Task

Words = list[str]


class Step(NamedTuple):
    """From words to words, and the ways to ask for it; {word} is one of the words."""

    do: Callable[[Words, str], Words]
    asked: tuple[str, ...]


STEPS = {  # can follow one another
    "reverse": Step(
        lambda words, _: words[::-1],
        ("write the words in reverse order", "turn the order of the words round", "begin with the last word and go "
         "back to the first", "give the words from last to first", "write the list backwards"),
    ),
    "sort": Step(
        lambda words, _: sorted(words, key=str.lower),
        ("put the words in the order of the alphabet", "sort the words from a to z", "write the words as a dictionary "
         "orders them", "order the words by the alphabet", "arrange the words in alphabetical order"),
    ),
    "capitals": Step(
        lambda words, _: [word.upper() for word in words],
        ("write the words in capital letters", "use capital letters alone", "make every letter a capital", "turn all "
         "letters into capitals", "write it all in large letters"),
    ),
    "without": Step(
        lambda words, word: [other for other in words if other != word],
        ("leave out the word {word}", "write the words without {word}", "drop {word} from the words", "take the word "
         "{word} away", "copy all words but {word}"),
    ),
    "ends": Step(
        lambda words, _: [words[0], words[-1]],
        ("keep the first and the last word", "give only the first word and the last", "write the first word and then "
         "the last", "leave nothing between the first word and the last", "take the two words at the ends"),
    ),
    "twice": Step(
        lambda words, _: [word for word in words for _ in range(2)],
        ("write each word twice", "say every word two times", "let each word stand there two times",
         "double every word", "put each word beside itself"),
    ),
    "longest": Step(
        lambda words, _: [max(words, key=len)],
        ("write the longest word", "tell the word with the most letters", "choose the word that has the most letters",
         "find the word that is longest", "keep only the longest word"),
    ),
}  # fmt: skip
ENDS: dict[str, tuple[Callable[[Words], str], tuple[str, ...]]] = {  # stand last
    "plain": (" ".join, ("",)),
    "count": (
        lambda words: str(len(words)),
        (" and say how many words that makes", " and write only the number of words", " and count the words",
         " and give the number of words that you have", " and answer with their number"),
    ),
    "commas": (
        ", ".join,
        (" and part the words by commas", " and put a comma after each word but the last", " with commas between",
         " and set commas between the words", " as a list with commas"),
    ),
    "sentence": (
        lambda words: f"The answer is {' '.join(words)}.",
        (' and begin with "The answer is"', ' as a sentence: "The answer is", and then the words',
         ' and answer in the form "The answer is ..."', ' and put "The answer is" before it',
         ' and say it so: "The answer is ..."'),
    ),
}  # fmt: skip
LISTS = (COLOURS, THINGS, TRADES, (*WOMEN, *MEN), KINDS["bird"], KINDS["animal"])
PAIRS = tuple((first, second) for first in STEPS for second in STEPS if first not in (second, "longest"))


def one_longest(words: Words) -> bool:
    most = max(map(len, words))
    return len({word for word in words if len(word) == most}) == 1


def instruction(draw: Draw, kind: int) -> Rewrite:
    """`kind` 0, 1: one step; 2: two."""
    words = draw.several(draw.any(LISTS), draw.any((3, 4, 5, 6)))
    chosen = draw.any(words)
    names = draw.one(PAIRS) if kind == 2 else (draw.any(tuple(STEPS)),)
    done = words
    for name in names:
        word = chosen if chosen in done else chosen.upper()
        if (name == "longest" and not one_longest(done)) or (name == "without" and word not in done):
            return instruction(draw, kind)  # what is asked for is not there, or not one
        done = STEPS[name].do(done, word)
    end, asked_end = ENDS[draw.any(("plain", *ENDS)) if kind else "plain"]
    asked = ", then ".join(draw.one(STEPS[name].asked).format(word=chosen) for name in names) + draw.one(asked_end)
    return Rewrite(f"{asked[0].upper()}{asked[1:]}: {' '.join(words)}", (end(done),))


def instructions(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """Do with a list of words what is asked, in the form that is asked for: reverse, sort, leave out, count, ..."""
    return make_task(
        "instructions",
        "rewriting",
        (train, valid, test),
        seed,
        instruction,
        3,
        metrics=("exact_match", "chrf"),
        description="one step or two of seven, each asked for in five ways, and four forms of the answer",
    )
