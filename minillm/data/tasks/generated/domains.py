"""Corpora of another register than the bases were pretrained on: documents, not records with answers.

For adapting a base to a domain before it is tuned for a task in it: `domain_corpus("recipes")` gives (training,
held-out) documents; held-out ones use words and phrases that no training document has, as test does in tasks.
"""

from collections.abc import Callable

from minillm.config import nearest
from minillm.data.documents import Document
from minillm.data.tasks.generated.draw import Draw, check_sizes, new_one, tidy
from minillm.data.tasks.generated.words import DAYS, MEN, NUMBERED, THINGS, TOWNS, TRADES, WOMEN, listed

FOODS = listed(
    "potatoes onions apples pears carrots mushrooms beans peas plums cherries turnips leeks eggs chestnuts "
    "cabbage spinach tomatoes currants"
)
SPICES = listed("salt pepper ginger cinnamon parsley thyme sugar mustard nutmeg vinegar honey mint")
FATS = listed("butter lard cream milk oil broth")
COOKING = (
    "Wash the {food} and cut them small.", "Peel the {food}; throw nothing away.", "Boil the {food} for {n} minutes.",
    "Melt {amount} of {fat} in a pan, but let it not turn brown.", "Add {amount} of {spice}, and stir.",
    "Put the {food} into the {fat}, and cook them over a slow fire.", "Beat in the {fat}, a spoonful at a time.",
    "Strain the whole through a cloth.", "Leave it to stand for {n} minutes.", "Season with {spice} to taste.",
    "Bake in a hot oven for {n} minutes.", "Cover the pan, and shake it now and then.",
)  # fmt: skip
COURSES = (
    "Put the helm down", "Tacked ship", "Set the top-sails", "Took in the main-sail", "Sounded, {n} fathoms",
    "Sighted {thing} adrift", "Spoke the brig {name} of {town}, bound for {town2}", "Hove to for the night",
    "Carpenter at work on the pumps", "Hands employed mending sails", "Served out {n} gallons of water",
    "Let go the anchor in {n} fathoms off {town}", "Sent the boat ashore for wood",
)  # fmt: skip
PORTS = listed(
    "London Dover Bristol Plymouth Venice Naples Lisbon Boston Dublin Hamburg Genoa Calais Portsmouth Southampton"
)
WINDS = ("N.", "N.E.", "E.", "S.E.", "S.", "S.W.", "W.", "N.W.", "calm", "light airs", "a fresh gale from the S.W.")
CLAUSES = (
    "The {one} shall pay to the {other} the sum of {n} pounds on or before the first {day} of each quarter.",
    "The {one} shall not let or sell the said {thing} without the consent in writing of the {other}.",
    "If the {one} fails to deliver the {thing} within {n} days, the {other} may end this agreement by notice.",
    "Any notice under this agreement shall be left at the last known dwelling of the {one} in {town}.",
    "The {other} shall keep the {thing} in good repair, fire and flood excepted.",
    "In case of dispute the matter shall be laid before {name}, whose award shall be final.",
    "Nothing in this agreement shall bind the heirs of the {one} beyond the term of {n} years.",
    "The {one} warrants that the {thing} is free from all debts and claims whatsoever.",
    "Every payment that is {n} days late shall bear interest for the benefit of the {other}.",
    "This agreement shall be governed by the law of {town}, and by no other.",
)


def recipe(draw: Draw) -> str:
    food, spice, fat = draw.one(FOODS), draw.one(SPICES), draw.one(FATS)
    title = draw.one(
        ("Stewed {food}", "{food} in {fat}", "A dish of {food} with {spice}", "{food} pie", "Soup of {food}")
    )
    amounts = ("a pound", "half a pound", "a pint", "two spoonfuls", "a pinch", "a cupful")
    steps = [
        step.format(food=food, spice=spice, fat=fat, n=draw.one(NUMBERED), amount=draw.any(amounts))
        for step in draw.several(COOKING, draw.any((4, 5, 6)))
    ]
    needed = [f"{draw.any(NUMBERED)} {food}", f"{draw.any(amounts)} of {fat}", f"{draw.any(amounts)} of {spice}"]
    heading = tidy(title.format(food=food, spice=spice, fat=fat)).upper()
    return "\n".join([heading, f"Take {', '.join(needed)}.", *(f"{i}. {s}" for i, s in enumerate(steps, start=1))])


def ship_log(draw: Draw) -> str:
    town, town2 = draw.several(PORTS, 2)
    lines = [f"LOG of the barque {draw.one((*WOMEN, *MEN))}, {draw.any(DAYS)}, from {town} towards {town2}"]
    for hour in sorted(draw.random.sample(range(1, 25), draw.any((4, 5, 6)))):
        words = {"n": draw.one(NUMBERED), "name": draw.one(WOMEN), "thing": f"a {draw.one(THINGS)}", "town": town}
        lines.append(f"{hour:02}.00  Wind {draw.one(WINDS)}  {draw.one(COURSES).format(**words, town2=town2)}.")
    return "\n".join([*lines, f"Lat. {draw.random.randint(20, 60)}.{draw.random.randint(10, 59)} N."])


def contract(draw: Draw) -> str:
    one, other = draw.several(TRADES, 2)
    name, name2 = draw.several((*WOMEN, *MEN), 2)
    words = {"thing": draw.one(THINGS), "town": draw.one(TOWNS), "name": draw.one((*WOMEN, *MEN))}
    head = f"AGREEMENT between {name}, hereinafter called the {one}, and {name2}, hereinafter called the {other}."
    clauses = (
        clause.format(one=a, other=b, n=draw.one(NUMBERED), day=draw.any(DAYS), **words)
        for clause in draw.several(CLAUSES, draw.any((3, 4, 5)))
        for a, b in [draw.any(((one, other), (other, one)))]
    )
    return "\n".join([head, *(f"({number}) {clause}" for number, clause in enumerate(clauses, start=1))])


DOMAINS: dict[str, Callable[[Draw], str]] = {"recipes": recipe, "ship-logs": ship_log, "contracts": contract}


def domain_corpus(
    name: str, seed: int = 0, documents: int = 1000, held_out: int = 100
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents of the domain, all different; ValueError where it cannot make as many."""
    if name not in DOMAINS:
        raise ValueError(f"there is no domain {name!r}; did you mean {nearest(str(name), DOMAINS)}?")
    check_sizes(name, seed, {"documents": documents, "held_out": held_out})
    seen: set[str] = set()

    def side(split: str, what: str, size: int) -> list[Document]:
        draw = Draw(name, seed, split)
        texts = (new_one(draw, lambda d, _: DOMAINS[name](d), 0, seen, f"{name}: {what}={size}") for _ in range(size))
        return [Document(f"{name} {what} {number}", text) for number, text in enumerate(texts, start=1)]

    return side("train", "documents", documents), side("test", "held_out", held_out)
