"""qa: a question about a paragraph of facts, whose answer stands in it word for word among others of its kind.

Several people do the same things with other objects, in other towns, for other sums. The questions ask for who, what,
where, when and how much, some of them by two facts ("Where does the one live who bought the kettle?").
"""

from dataclasses import dataclass

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import DAYS, MEN, NUMBERED, THINGS, TOWNS, TRADES, WOMEN
from minillm.data.tasks.task import Question, Task

LIVES = (
    "{name}, a {trade}, lived at {home}.",
    "{name} of {home} was a {trade}.",
    "at {home} dwelt a {trade} called {name}.",
)
TRADE = (  # what each of them did once
    "on {day} {he} bought a {thing} from {other} for {sum} shillings.",
    "{he} paid {sum} shillings for a {thing} on {day}, and {other} took them.",
    "a {thing} was sold to {him} by {other} on {day}; it cost {sum} shillings.",
)
QUESTIONS = (  # (question, which fact answers it)
    ("where did {name} live?", "home"), ("in which town was {name} at home?", "home"),
    ("what was {name}?", "trade"), ("what was the trade of {name}?", "trade"),
    ("who lived at {home}?", "name"), ("who was the {trade}?", "name"), ("who bought the {thing}?", "name"),
    ("who paid {sum} shillings?", "name"), ("who went to a seller on {day}?", "name"),
    ("what did {name} buy?", "thing"), ("what did the {trade} buy?", "thing"), ("what did {other} sell?", "thing"),
    ("what was bought for {sum} shillings?", "thing"), ("what was bought on {day}?", "thing"),
    ("who sold the {thing}?", "other"), ("from whom did {name} buy something?", "other"),
    ("to whom did {name} pay {sum} shillings?", "other"),
    ("when did {name} buy the {thing}?", "day"), ("on which day did {other} sell the {thing}?", "day"),
    ("when did the {trade} buy something?", "day"),
    ("how many shillings did {name} pay?", "sum"), ("how many shillings did the {thing} cost?", "sum"),
    ("how many shillings did {other} receive?", "sum"),
    ("where did the one live who bought the {thing}?", "home"), ("where did the {trade} live?", "home"),
    ("what was the trade of the one who paid {other}?", "trade"), ("what was the one who bought the {thing}?", "trade"),
    ("where was the one at home who paid {sum} shillings?", "home"),
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """Somebody who bought something."""

    name: str
    he: str
    home: str
    trade: str
    day: str
    thing: str
    other: str  # who sold it
    sum: str

    def told(self, draw: Draw, by_name: bool) -> list[str]:
        """The two facts; the second may call the person he or she only right after the first."""
        he = self.name if by_name else self.he
        him = self.name if by_name else {"he": "him", "she": "her"}[self.he]
        return [draw.one(facts).format(**{**vars(self), "he": he, "him": him}) for facts in (LIVES, TRADE)]


def people(draw: Draw, count: int) -> list[Person]:
    names, sellers = draw.several((*WOMEN, *MEN), 2 * count)[:count], []
    while len(sellers) < count:
        if (seller := draw.one((*WOMEN, *MEN))) not in (*names, *sellers):
            sellers.append(seller)
    genders = ["she" if name in WOMEN else "he" for name in names]
    homes, trades, things = draw.several(TOWNS, count), draw.several(TRADES, count), draw.several(THINGS, count)
    days, sums = draw.several(DAYS[:5], count), draw.several(NUMBERED, count)
    return [Person(*facts) for facts in zip(names, genders, homes, trades, days, things, sellers, sums, strict=True)]


def question(draw: Draw, kind: int) -> Question:
    told = people(draw, draw.any((2, 3, 3)))
    by_name = [draw.any((True, False)) for _ in told]
    blocks = [
        [" ".join(p.told(draw, False))] if not named else p.told(draw, True)
        for p, named in zip(told, by_name, strict=True)
    ]
    context = tidy(" ".join(draw.shuffled([block for own in blocks for block in own])))
    asked, fact = draw.one(QUESTIONS)
    person = draw.any(told)
    answer = getattr(person, fact)
    starts = [at for at in range(len(context)) if context.startswith(answer, at) and whole(context, at, answer)]
    return Question(tidy(asked.format(**vars(person))), context, (answer,) * len(starts), tuple(starts))


def whole(context: str, at: int, answer: str) -> bool:
    """Whether what stands there is not a part of a longer word."""
    around = context[max(at - 1, 0) : at] + context[at + len(answer) : at + len(answer) + 1]
    return not any(letter.isalnum() or letter == "-" for letter in around)


def qa(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """A question about a paragraph of facts; the answer stands in it, among others of its kind."""
    return make_task(
        "qa",
        "question_answering",
        (train, valid, test),
        seed,
        question,
        metrics=("token_f1", "exact_match"),
        description="who lived where, bought what, from whom, when and for how much; one fact or two to be found",
        counting=0.27,
    )
