"""summarisation: the headline of a short report, which is the weightiest of the facts that it tells.

The rule: what happened to people goes before what happened to things, and this before plans and customs (`WEIGHTS`).
The facts stand in any order, told with a pronoun or another word for the same; each report has one of the greatest
weight. The headline says who, what and where, in the present: "Fire destroys mill at Dover".
"""

from typing import NamedTuple

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import DAYS, MEN, NUMBERED, TOWNS, TRADES, WOMEN
from minillm.data.tasks.task import Rewrite, Task

WEIGHTS = ("custom", "plan", "thing", "person")  # the later, the weightier
BUILDINGS = ("mill", "barn", "church", "bridge", "inn", "theatre", "school", "tower", "lighthouse", "market hall")


class Event(NamedTuple):
    """A headline without its place, and the ways in which the report tells it."""

    headline: str
    told: tuple[str, ...]


EVENTS = {
    "person": (
        Event("{trade} saves {n} children", ("{n} children would have drowned, had not a {trade} pulled them out",
            "it was a {trade} who brought {n} children safely out of the flood")),
        Event("{n} sailors drown", ("a boat turned over, and {n} sailors were lost",
            "the sea has taken {n} sailors, whose boat went down")),
        Event("{trade} wounds thief", ("a thief was shot in the leg by a {trade}",
            "a {trade} heard steps, fired, and hit a thief")),
        Event("{trade} is killed by horse", ("a {trade} fell under a horse, and died",
            "a horse threw its rider, a {trade}, who did not live till evening")),
        Event("{n} soldiers fall sick", ("fever has come to the barracks, and {n} soldiers lie in bed",
            "the doctor was called to {n} soldiers, who had eaten bad meat")),
        Event("lost {trade} is found alive", ("a {trade}, who had been lost for days, came home alive",
            "nobody had hoped to see the {trade} again, but he lives")),
    ),
    "thing": (
        Event("fire destroys {building}", ("the {building} was burnt to the ground",
            "flames broke out in the {building}, and nothing of it is left")),
        Event("storm damages {building}", ("the wind tore the roof from the {building}",
            "since the storm the {building} has no windows")),
        Event("thieves rob {building}", ("the {building} was broken into, and {n} pounds are gone",
            "somebody carried {n} pounds out of the {building} by night")),
        Event("flood carries off {building}", ("the river rose and took the {building} away",
            "where the {building} stood, there is only water now")),
    ),
    "plan": (
        Event("new {building} is planned", ("the mayor spoke of a new {building}",
            "{n} pounds have been gathered for another {building}")),
        Event("{building} is for sale", ("the owner of the {building} wishes to sell it for {n} pounds",
            "who has {n} pounds may buy the {building}")),
        Event("{trade} hopes to be mayor", ("a {trade} said that he would like to be mayor",
            "there is a {trade} who thinks that he would make a good mayor")),
    ),
    "custom": (
        Event("{building} keeps its feast", ("there was dancing before the {building}, as every year",
            "the yearly feast of the {building} was held")),
        Event("{trade} grows large pumpkin", ("a {trade} showed a pumpkin of {n} pounds",
            "all admired the pumpkin of a {trade}")),
        Event("weather stays fine", ("the sun shone all day", "there was not a cloud to be seen")),
    ),
}  # fmt: skip
OPENINGS = ("{town}, {day}.", "our friend {name} writes from {town}.", "news has come from {town} by the {day} mail.")
JOINTS = ("", "", "besides, ", "we also hear that ", "it is said that ", "the letter says: ", "so much is sure: ")


def report(draw: Draw, kind: int) -> Rewrite:
    """`kind` + 1: the weight of the headline, so that every sort of fact is one."""
    weightiest = kind + 1
    lighter = [event for weight in WEIGHTS[:weightiest] for event in EVENTS[weight]]
    main = draw.one(EVENTS[WEIGHTS[weightiest]])
    others = draw.random.sample(lighter, min(len(lighter), draw.any((2, 3, 3))))
    trades, buildings, numbers = draw.several(TRADES, 4), draw.several(BUILDINGS, 4), draw.several(NUMBERED, 4)
    town, told, headline = draw.one(TOWNS), [], ""
    for event, trade, building, n in zip([main, *others], trades, buildings, numbers, strict=False):
        words = {"trade": trade, "building": building, "n": n}
        told.append(draw.any(JOINTS) + draw.one(event.told).format(**words) + ".")
        headline = headline or tidy(f"{event.headline.format(**words)} at {town}")
    opening = draw.any(OPENINGS).format(town=town, day=draw.any(DAYS), name=draw.one((*WOMEN, *MEN)))
    return Rewrite(tidy(" ".join([opening, *draw.shuffled(told)])), (headline,))


def summarisation(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """The headline of a short report: the weightiest of the facts that it tells, and where."""
    return make_task(
        "summarisation",
        "rewriting",
        (train, valid, test),
        seed,
        report,
        len(WEIGHTS) - 1,
        metrics=("rouge_l", "exact_match"),
        description="what happened to people goes before what happened to things, then plans, then customs",
    )
