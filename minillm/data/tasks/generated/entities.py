"""entities: persons, places and organisations, when the same name may be any of them.

Every name comes from one list and is as often a person's as a town's and a firm's; what stands around it decides.
"""

import re

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import DAYS, THINGS, listed
from minillm.data.tasks.task import Tagged, Task

LABELS = ("O", "B-person", "I-person", "B-place", "I-place", "B-organisation", "I-organisation")
NAMES = listed(
    "Washington Paris Jordan Lincoln Chester Kent Florence Virginia Victoria Sydney Georgia Charlotte Austin "
    "Houston Hamilton Jackson Madison Cleveland Wellington Nelson Lancaster York Stafford Warwick Kingston "
    "Preston Milton Clifton Melbourne Dallas Carlisle Derby Bradford Lawrence Douglas Gordon Raleigh Vernon "
    "Burton Ashton Hilton Carolina Chelsea Sterling Windsor Perry Graham Howard Marlow Wells Barton Denver"
)
SHAPES = {  # how a name is written: {n} and {m} are names, what else stands here belongs to the name
    "person": ("{n}", "{n}", "{n}", "{n} {m}", "{n} {m}"),
    "place": ("{n}", "{n}", "{n}", "New {n}", "Port {n}"),
    "organisation": ("{n}", "{n}", "{n}", "{n} {m}", "{n} and {m}"),
}
FORMS = (  # [person], [place], [organisation]; no word in it tells the kind of the name beside it by itself
    "[person] put on a hat and walked from [place] to the sea .",
    "the road from [place] to [place] was closed on {day} .",
    "on {day} [organisation] was sold to [organisation] for ten thousand pounds .",
    "my brother has been a clerk with [organisation] since he came to [place] .",
    "[person] told [person] that the {thing} was lost .",
    "a servant brought [person] the {thing} , and went back to [place] .",
    "the clerks of [organisation] are paid on {day} .",
    "the hills of [place] are covered with snow .",
    "the hands of [person] were cold , and the {thing} fell .",
    "[organisation] will build no more ships this year , said [person] .",
    "[place] lies on a river , two days from [place] .",
    "[person] lies in bed with a fever , and asks for [person] .",
    "[organisation] lies to those who bought its shares , wrote [person] .",
    "we saw [place] from the deck on {day} .",
    "we saw [person] on the deck on {day} .",
    "the shares of [organisation] fell after the fire in [place] .",
    "[person] fell on the ice , and lost a {thing} .",
    "[place] fell after a siege of three months .",
    "[organisation] fell into debt , and sold its ships to [organisation] .",
    "nobody in [place] had ever seen a {thing} .",
    "nobody at [organisation] would give me credit for a {thing} .",
    "nobody had ever beaten [person] at chess .",
    "the streets of [place] were full of soldiers , and [person] wept .",
    "is [person] your cousin , or do you only write to [person] ?",
    "is [place] far from here , or shall we be in [place] by {day} ?",
    "is [organisation] safe , or should I take my money to [organisation] ?",
    "[person] married a lady from [place] , and left [organisation] .",
    "[place] has two churches and a market .",
    "[person] has two children and a {thing} .",
    "[organisation] has two partners and a factory in [place] .",
    "they named the child [person] after its uncle .",
    "they left [place] by the north gate on {day} .",
    "they left [person] weeping at the gate on {day} .",
    "they owed [organisation] forty pounds , and could not pay on {day} .",
)


def sentence(draw: Draw, kind: int) -> Tagged:
    names = iter(draw.several(NAMES, 8))
    words, tags = [], []
    for piece in draw.one(FORMS).format(day=draw.any(DAYS), thing=draw.one(THINGS)).split():
        if not (found := re.fullmatch(r"\[(\w+)\]", piece)):
            words.append(piece)
            tags.append(0)
            continue
        own = draw.any(SHAPES[found[1]]).format(n=next(names), m=next(names)).split()
        first = LABELS.index(f"B-{found[1]}")
        words += own
        tags += [first] + [first + 1] * (len(own) - 1)
    words[0] = tidy(words[0])
    return Tagged(tuple(words), tuple(tags))


def entities(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """Persons, places and organisations, when the same name may be any of them."""
    return make_task(
        "entities",
        "tagging",
        (train, valid, test),
        seed,
        sentence,
        metrics=("span_f1", "accuracy"),
        labels=LABELS,
        description="BIO tags; every name is as often a person's, a town's and a firm's, and the sentence decides",
        counting=0.13,
    )
