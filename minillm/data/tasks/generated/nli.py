"""nli: does the second sentence follow from the first, contradict it, or neither?

The labels are computed. A family of sentences speaks about a few possible worlds (how many ships came, who helped
whom), and each sentence stands with the worlds in which it is true. If every world of the first is one of the second,
the second follows; if none is, they contradict each other. Test has pairs of forms that training never puts together.
"""

import functools
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

from minillm.data.tasks.generated import nli_worlds as say
from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import KINDS, MEN, THINGS, TOWNS, TRADES, TRAITS, WOMEN
from minillm.data.tasks.task import Task, Text

LABELS = ("entailment", "neutral", "contradiction")
ACTS = {
    "help": "helped", "thank": "thanked", "follow": "followed", "warn": "warned", "answer": "answered",
    "watch": "watched", "visit": "visited", "trust": "trusted", "blame": "blamed", "praise": "praised",
    "fear": "feared", "push": "pushed", "call": "called", "love": "loved", "scold": "scolded",
}  # fmt: skip
DEEDS = (
    "slept in the barn", "crossed the bridge", "drank from the well", "stood in the rain", "laughed at the clown",
    "ran along the river", "heard the bell", "lived near the mill", "went into the wood", "ate the bread",
    "waited for the king", "saw the ship", "sang in the church", "climbed the hill", "lost a shoe",
)  # fmt: skip
HAPPENED = {
    "bird": (
        "came to the well",
        "slept under the roof",
        "returned in spring",
        "died that winter",
        "fled from the fire",
    ),
    "animal": (
        "came to the well",
        "slept in the stable",
        "crossed the river",
        "died that winter",
        "fled from the fire",
    ),
    "tree": ("stood near the house", "lost its leaves", "died that winter", "fell in the storm", "grew in the valley"),
    "flower": ("stood near the house", "opened in the morning", "died that night", "smelt sweet", "grew in the valley"),
}
CAME = ("came to the harbour", "reached the town", "arrived too late", "stopped at the inn", "left before noon")
MANY = ("ships", "soldiers", "guests", "waggons", "riders", "boys", "strangers", "pedlars", "sailors", "travellers")


def relation(first: Iterable[Any], second: Iterable[Any]) -> str:
    """Of two sentences, by the sets of worlds in which they are true."""
    first, second = set(first), set(second)
    if first <= second:
        return "entailment"
    return "neutral" if first & second else "contradiction"


class Family(NamedTuple):
    """Sentences about the same worlds, and how their gaps are filled."""

    statements: say.Statements
    worlds: tuple[tuple[Any, ...], ...]
    words: Callable[[Draw], dict[str, str]]


def two_people(draw: Draw) -> dict[str, str]:
    a, b = draw.several((*WOMEN, *MEN), 2)
    c, d = draw.several(TRADES, 2)
    return draw.any(({"a": a, "b": b}, {"a": a, "b": f"the {d}"}, {"a": f"the {c}", "b": f"the {d}"}))


def who_did_what_to_whom(draw: Draw) -> dict[str, str]:
    act = draw.one(tuple(ACTS))
    return {**two_people(draw), "do": act, "did": ACTS[act]}


def kinds(draw: Draw) -> dict[str, str]:
    wide = draw.any(tuple(HAPPENED))
    return {"wide": wide, "narrow": draw.one(KINDS[wide]), "did": draw.one(HAPPENED[wide])}


def fact(draw: Draw) -> dict[str, str]:
    owner = f"the {draw.one(TRAITS)} {draw.one(TRADES)}"
    return {**two_people(draw), "fact": f"the {draw.one(THINGS)} belonged to {owner}"}


FAMILIES = {
    "count": Family(say.COUNT, tuple((n,) for n in range(12)), lambda d: {"many": d.one(MANY), "came": d.one(CAME)}),
    "quantity": Family(say.QUANTITY, tuple(product((say.NONE, say.SOME, say.ALL), repeat=2)), kinds),
    "roles": Family(say.ROLES, tuple(product((False, True), repeat=2)), who_did_what_to_whom),
    "together": Family(
        say.TOGETHER, tuple(product((False, True), repeat=2)), lambda d: {**two_people(d), "did": d.one(DEEDS)}
    ),
    "order": Family(say.ORDER, tuple(product(range(3), repeat=2)), lambda d: {**two_people(d), "town": d.one(TOWNS)}),
    "belief": Family(say.BELIEF, tuple(product((False, True), repeat=2)), fact),
}


@functools.lru_cache
def pairs(family: str, label: str) -> tuple[tuple[str, str], ...]:
    """All pairs of different sentences of the family that stand in this relation."""
    statements, worlds, _ = FAMILIES[family]
    true = [(text, [world for world in worlds if holds(*world)]) for text, holds in statements]
    return tuple((a, b) for a, in_a in true for b, in_b in true if a != b and relation(in_a, in_b) == label)


def pair(draw: Draw, label: int) -> Text:
    family = draw.any(tuple(FAMILIES))
    forms, words = draw.one(pairs(family, LABELS[label])), FAMILIES[family].words(draw)
    first, second = (tidy(form.format(**words) + ".") for form in forms)
    return Text(first, label, second)


def nli(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """Does the second sentence follow from the first, contradict it, or neither?"""
    return make_task(
        "nli",
        "classification",
        (train, valid, test),
        seed,
        pair,
        len(LABELS),
        metrics=("accuracy", "macro_f1"),
        labels=LABELS,
        description="counts, quantities with kinds and their members, who did it to whom, and or neither, before and "
        "after, knowing and believing; labels computed from the worlds in which a sentence is true",
        counting=0.61,
    )
