"""topic: what is being done, when the sentence also names what is not done, but refused, remembered or compared with?

Both doings of a sentence come from the same lists and stand in the same verb forms, so the words tell two topics, and
only the way they are put together tells which of the two it is.
"""

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import MEN, TRADES, WOMEN
from minillm.data.tasks.task import Task, Text

DOINGS = {  # topic: what one does in it, to what
    "sea": {
        "mend": "sails nets ropes", "pull": "oars ropes anchor", "paint": "boat deck mast", "wash": "deck cabin",
        "sight": "lighthouse harbour island", "steer": "ship boat", "catch": "herrings cod",
    },
    "farm": {
        "milk": "cows goats", "feed": "pigs hens calves", "plough": "field meadow", "gather": "hay corn turnips",
        "mend": "fence barn plough", "drive": "cattle sheep geese", "plant": "potatoes cabbages",
    },
    "kitchen": {
        "stir": "soup sauce pudding", "bake": "bread pie cake", "wash": "pots pans plates", "peel": "potatoes onions",
        "light": "oven stove", "taste": "soup cheese pudding", "slice": "bacon ham",
    },
    "war": {
        "load": "cannon rifles muskets", "storm": "fortress trenches", "guard": "prisoners camp powder",
        "sharpen": "swords spears", "beat": "drums", "follow": "banner regiment colonel", "attack": "enemy army",
    },
    "school": {
        "learn": "alphabet lesson grammar", "correct": "sums spelling exercises", "wipe": "slates blackboard",
        "recite": "poem lesson", "teach": "pupils class", "draw": "maps circles", "open": "dictionary grammar",
    },
    "sickroom": {
        "measure": "drops medicine", "bandage": "wound arm ankle", "nurse": "patient invalid", "roll": "bandages pills",
        "feel": "pulse forehead", "prepare": "ointment medicine plaster", "cool": "fever forehead",
    },
}  # fmt: skip
IRREGULAR = {  # past, past participle
    "beat": ("beat", "beaten"), "catch": ("caught", "caught"), "draw": ("drew", "drawn"), "drive": ("drove", "driven"),
    "feed": ("fed", "fed"), "feel": ("felt", "felt"), "light": ("lit", "lit"), "teach": ("taught", "taught"),
    "learn": ("learnt", "learnt"),
}  # fmt: skip
DOUBLED = ("stir",)  # stirred, stirring
LABELS = tuple(DOINGS)
FORMS = (  # {now}: the topic; {not}: the other; the letter after it is the verb's form (b base, p past, i -ing)
    "instead of {not_i}, {who} {now_p}",
    "{who}, who used to {not_b}, was {now_i} now",
    "{who} {now_p} as gladly as others {not_b}",
    "{who} did not {not_b}, but {now_p}",
    "{who} {now_p}, and would not {not_b}",
    "nobody {not_p} at that hour, for all were {now_i}",
    "{who} had to {now_b}, and dreamed of {not_i}",
    "while {who} was {now_i}, {he} told how {his} uncle once {not_p}",
    "{he} who once {not_p} had now begun to {now_b}",
    "they asked {who} to {not_b}, and found {him} {now_i} all the same",
    "it was too late to {not_b}; {who} went on {now_i}",
    "{who} {not_p} in {his} dreams, but on waking {he} {now_p}",
    "before {he} could think of {not_i}, {who} must {now_b}",
    "{now_i} was the day's work of {who}, not {not_i}",
    "had {he} been able to, {he} would {not_b}; as it was, {who} {now_p}",
    "{who} laughed at those who {not_p}, and kept on {now_i}",
    "to {now_b} was harder for {who} than to {not_b}, but it had to be done",
    "{not_i} could wait, thought {who}, and {he} {now_p}",
    "{who} was {now_i}, though {he} had promised to {not_b}",
    "having {now_p2} since morning, {who} did not want to hear of {not_i}",
)


def forms(verb: str) -> dict[str, str]:
    """The base form, past, -ing form and past participle of a verb."""
    stem = verb + verb[-1] if verb in DOUBLED else verb.removesuffix("e")
    past, participle = IRREGULAR.get(verb, (stem + "ed", stem + "ed"))
    return {"b": verb, "p": past, "i": stem + "ing", "p2": participle}


def sentence(draw: Draw, label: int) -> Text:
    other = draw.any([topic for topic in LABELS if topic != LABELS[label]])
    woman = draw.any((True, False))
    who = draw.any((draw.one(WOMEN if woman else MEN), f"the {draw.one(TRADES)}"))
    words = {"he": "she", "his": "her", "him": "her"} if woman else {"he": "he", "his": "his", "him": "him"}
    for role, topic in (("now", LABELS[label]), ("not", other)):
        verb, thing = draw.one([(verb, thing) for verb, all_ in DOINGS[topic].items() for thing in all_.split()])
        words |= {f"{role}_{form}": f"{text} the {thing}" for form, text in forms(verb).items()}
    return Text(tidy(draw.one(FORMS).format(who=who, **words) + "."), label)


def topic(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """What is being done, when the sentence also names what is refused, remembered or compared with?"""
    return make_task(
        "topic",
        "classification",
        (train, valid, test),
        seed,
        sentence,
        len(LABELS),
        metrics=("accuracy", "macro_f1"),
        labels=LABELS,
        description="the topic is what is done, not what is wished, refused, remembered or dreamed of",
        counting=0.52,
    )
