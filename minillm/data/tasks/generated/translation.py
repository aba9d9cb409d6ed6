"""translation: English into Norvic, a small language that its grammar and dictionary below define whole.

Order: time, object, subject, place, verb. There are no articles; an adjective follows its noun. A noun takes -i in the
plural, then its case: subject none, object -n, place -sa; its adjective takes the same endings. A verb takes its time
(past -ta, present none, future -ru), then -k if its subject is plural; "not" is mu- before the verb; a question ends
with "ke" before its full stop.
"""

from dataclasses import dataclass

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.task import Rewrite, Task

PEOPLE = {  # English: (plural, Norvic)
    "king": ("kings", "tor"), "queen": ("queens", "tora"), "boy": ("boys", "pil"), "girl": ("girls", "pila"),
    "farmer": ("farmers", "gumar"), "sailor": ("sailors", "navar"), "doctor": ("doctors", "medar"),
    "child": ("children", "mik"), "wolf": ("wolves", "vulo"), "horse": ("horses", "kabo"), "dog": ("dogs", "hundo"),
    "woman": ("women", "fema"), "man": ("men", "masu"), "thief": ("thieves", "ladro"),
}  # fmt: skip
THINGS = {
    "house": ("houses", "dom"), "loaf": ("loaves", "pano"), "ship": ("ships", "navo"), "book": ("books", "libo"),
    "stone": ("stones", "pet"), "flower": ("flowers", "flor"), "lamp": ("lamps", "lum"), "knife": ("knives", "sek"),
    "coat": ("coats", "mantu"), "ring": ("rings", "anel"),
}  # fmt: skip
PLACES = {
    "wood": ("woods", "silv"), "town": ("towns", "burgo"), "garden": ("gardens", "hort"),
    "church": ("churches", "temo"),
    "castle": ("castles", "kast"), "field": ("fields", "agro"), "street": ("streets", "strato"),
    "cave": ("caves", "kava"),
}  # fmt: skip
ADJECTIVES = {
    "old": "velu", "young": "juno", "big": "gran", "little": "peti", "good": "bon", "bad": "mal", "white": "alvu",
    "black": "nero", "red": "rosu", "poor": "pove", "proud": "suber", "wild": "savu",
}  # fmt: skip
VERBS = {  # base: (third person, past, Norvic)
    "see": ("sees", "saw", "vid"), "love": ("loves", "loved", "amo"), "find": ("finds", "found", "trovu"),
    "fear": ("fears", "feared", "timo"), "carry": ("carries", "carried", "porto"), "hide": ("hides", "hid", "kelo"),
    "seek": ("seeks", "sought", "serk"), "sell": ("sells", "sold", "vendu"), "paint": ("paints", "painted", "pintu"),
    "watch": ("watches", "watched", "spek"), "want": ("wants", "wanted", "volu"), "lose": ("loses", "lost", "perti"),
}  # fmt: skip
TIMES = {"past": ("yesterday", "hier"), "present": ("today", "hodi"), "future": ("tomorrow", "kras")}
TENSES = {"past": "ta", "present": "", "future": "ru"}


@dataclass(frozen=True)
class Noun:
    """A noun with its article, number and perhaps an adjective, in both languages."""

    forms: tuple[str, str, str]  # singular, plural, Norvic
    plural: bool
    article: str
    adjective: str  # "" for none

    @property
    def english(self) -> str:
        return f"{self.article} {self.adjective} {self.forms[self.plural]}"

    def norvic(self, case: str) -> str:
        ending = "i" * self.plural + case
        return f"{self.forms[2]}{ending} {ADJECTIVES[self.adjective] + ending if self.adjective else ''}"


def noun(draw: Draw, nouns: dict[str, tuple[str, str]]) -> Noun:
    """All words stand in training; test has pairs of noun and adjective that do not."""
    word, adjective = draw.one([(word, adjective) for word in nouns for adjective in ADJECTIVES])
    plural = draw.any((False, True))
    article = draw.any(("the", "the", "" if plural else "a"))
    return Noun((word, *nouns[word]), plural, article, adjective if draw.maybe(adjective, 0.6) else "")


def english(subject: Noun, verb: str, thing: Noun, tense: str, negated: bool, question: bool, rest: str) -> str:
    third, past, _ = VERBS[verb]
    helper = {"past": "did", "present": "do" if subject.plural else "does", "future": "will"}[tense]
    if question:
        return f"{helper} {subject.english} {'not' * negated} {verb} {thing.english} {rest}?"
    plain = {"past": past, "present": verb if subject.plural else third, "future": f"will {verb}"}[tense]
    said = f"{helper} not {verb}" if negated else plain
    return f"{subject.english} {said} {thing.english} {rest}."


def pair(draw: Draw, kind: int) -> Rewrite:
    verb, subject, thing = draw.any(tuple(VERBS)), noun(draw, PEOPLE), noun(draw, draw.any((PEOPLE, THINGS)))
    tense, negated, question = draw.any(tuple(TENSES)), draw.any((False, False, True)), draw.any((False, False, True))
    place = noun(draw, PLACES) if draw.any((False, True)) else None
    time = TIMES[tense] if draw.any((False, False, True)) else ("", "")
    rest = f"{f'in {place.english}' if place else ''} {time[0]}"
    target = (
        f"{time[1]} {thing.norvic('n')} {subject.norvic('')} {place.norvic('sa') if place else ''} "
        f"{'mu' * negated}{VERBS[verb][2]}{TENSES[tense]}{'k' * subject.plural}{' ke' * question}."
    )
    return Rewrite(tidy(english(subject, verb, thing, tense, negated, question, rest)), (tidy(target),))


def translation(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """English into Norvic, a small language with another word order, cases and agreement."""
    return make_task(
        "translation",
        "rewriting",
        (train, valid, test),
        seed,
        pair,
        metrics=("chrf", "bleu", "exact_match"),
        description="English into a language defined by a grammar of six rules and sixty words; references are exact",
    )
