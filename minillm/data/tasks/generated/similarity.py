"""similarity: how alike in meaning are two sentences, from 0 (nothing in common) to 5 (the same)?

A second sentence is made of the first by edits whose worth is known. Some change many words and no meaning: another
word for the same thing, the passive, another order. Some change the meaning and hardly a word: who did it to whom,
whether it was done. score = max(0, 5 - the sum of `COSTS`).
"""

from dataclasses import dataclass, replace

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import DAYS
from minillm.data.tasks.task import Task, Text

COSTS = {
    "same": 0.0, "time": 0.5, "trait": 0.75, "place": 1.0, "act": 1.5, "object": 1.5, "agent": 2.0, "denied": 2.5,
    "roles": 3.0,
}  # fmt: skip
PEOPLE = (  # each with another word for the same person
    ("doctor", "physician"), ("teacher", "schoolmaster"), ("sailor", "seaman"), ("farmer", "husbandman"),
    ("lawyer", "attorney"), ("merchant", "trader"), ("robber", "thief"), ("child", "little one"),
    ("soldier", "warrior"), ("traveller", "wanderer"), ("king", "ruler"), ("servant", "attendant"),
)  # fmt: skip
TRAITS = (
    ("rich", "wealthy"), ("clever", "ingenious"), ("brave", "courageous"), ("old", "aged"), ("foolish", "silly"),
    ("tired", "weary"), ("sad", "sorrowful"), ("kind", "good-natured"), ("merry", "cheerful"), ("poor", "needy"),
    ("strange", "peculiar"), ("quiet", "silent"),
)  # fmt: skip
ACTS = (  # base form, past and another word for it; what passes between two people
    ("help", "helped", "assist", "assisted"), ("follow", "followed", "pursue", "pursued"),
    ("praise", "praised", "commend", "commended"), ("scold", "scolded", "rebuke", "rebuked"),
    ("cheat", "cheated", "deceive", "deceived"), ("save", "saved", "rescue", "rescued"),
    ("greet", "greeted", "salute", "saluted"), ("visit", "visited", "call upon", "called upon"),
    ("fear", "feared", "dread", "dreaded"), ("answer", "answered", "reply to", "replied to"),
    ("hate", "hated", "detest", "detested"), ("ask", "asked", "question", "questioned"),
)  # fmt: skip
PLACES = (
    ("in the wood", "in the forest"), ("on the road", "on the highway"), ("by the sea", "on the shore"),
    ("in the church", "in the chapel"), ("at the inn", "at the tavern"), ("in the meadow", "on the grass"),
    ("at the market", "at the fair"), ("in the castle", "within the fortress"),
    ("near the bridge", "close to the bridge"), ("in the cottage", "in the hut"),
)  # fmt: skip
TIMES = (
    ("in the evening", "at nightfall"), ("in the morning", "at daybreak"), ("at noon", "at midday"),
    *((f"on {day}", f"{day} last") for day in DAYS[:5]),
)  # fmt: skip
ORDERS = (
    "{agent} {active} {patient} {place} {time}",
    "{time}, {place}, {agent} {active} {patient}",
    "{place} {agent} {active} {patient} {time}",
    "{patient} {passive} by {agent} {place} {time}",
    "{time} {patient} {passive} {place} by {agent}",
    "it was {place} that {agent} {active} {patient} {time}",
)


@dataclass(frozen=True)
class Scene:
    """Who did what to whom, where and when; each word is a tuple of words for the same."""

    agent: tuple[str, str]
    patient: tuple[str, str]
    trait: tuple[str, str]  # the agent's
    act: tuple[str, str, str, str]
    place: tuple[str, str]
    time: tuple[str, str]
    denied: bool = False

    def said(self, draw: Draw) -> str:
        """The scene in words: each one of those for the same, in one of the orders."""

        def word(options: tuple[str, str]) -> str:
            return options[draw.random.random() < 0.5]

        base, past = self.act[:2] if draw.random.random() < 0.5 else self.act[2:]
        return tidy(
            draw.one(ORDERS).format(
                agent=f"the {word(self.trait)} {word(self.agent)}",
                patient=f"the {word(self.patient)}",
                active=f"did not {base}" if self.denied else past,
                passive=f"was {'not ' if self.denied else ''}{past}",
                place=word(self.place),
                time=word(self.time),
            )
            + "."
        )


def scene(draw: Draw) -> Scene:
    agent, patient = draw.several(PEOPLE, 2)
    return Scene(agent, patient, draw.one(TRAITS), draw.one(ACTS), draw.one(PLACES), draw.one(TIMES))


def edited(draw: Draw, first: Scene, edits: list[str]) -> Scene:
    """The scene with other facts in the places that `edits` name."""
    second = first
    for edit in edits:
        if edit == "roles":
            second = replace(second, agent=first.patient, patient=first.agent)
        elif edit == "denied":
            second = replace(second, denied=True)
        elif edit != "same":
            options, field = {
                "time": (TIMES, "time"),
                "trait": (TRAITS, "trait"),
                "place": (PLACES, "place"),
                "object": (PEOPLE, "patient"),
                "agent": (PEOPLE, "agent"),
                "act": (ACTS, "act"),
            }[edit]
            taken = (getattr(first, field), second.agent, second.patient)
            second = replace(second, **{field: next(o for o in draw.several(options, 4) if o not in taken)})
    return second


def some_edits(draw: Draw, kind: int) -> list[str]:
    """0: none; 1: one; 2: roles; 3: denied; 4: several; 5: so many that nothing counts; 2 and 3 with another or not."""
    small, large = ("time", "trait", "place"), ("act", "object")
    if kind in (2, 3):
        return [("roles", "denied")[kind - 2], draw.any(("same", *small))]
    if kind == 4:
        return [*draw.random.sample(small, 2), draw.any(large), draw.any(("same", "denied"))]
    return {0: ["same"], 1: [draw.any((*small, *large))]}.get(kind, ["agent", *large, *draw.any(((), small))])


def pair(draw: Draw, kind: int) -> Text:
    first, edits = scene(draw), some_edits(draw, kind)
    score = max(0.0, 5 - sum(COSTS[edit] for edit in edits))
    return Text(first.said(draw), score, edited(draw, first, edits).said(draw))


def similarity(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """How alike in meaning are two sentences, from 0 to 5, when words and order change and meaning need not?"""
    return make_task(
        "similarity",
        "regression",
        (train, valid, test),
        seed,
        pair,
        6,
        metrics=("pearson", "spearman"),
        description="pairs made by known edits; score = 5 - "
        + ", ".join(f"{name} {cost}" for name, cost in COSTS.items()),
        counting=0.46,
    )
