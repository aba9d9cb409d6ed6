"""pos: the part of speech of each word, when most words could be several.

Nouns, verbs and adjectives come from words that are two of these or all three ("light", "run", "cook"), each as often
the one as the other. The tags are those of Universal Dependencies (universaldependencies.org/u/pos).
"""

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.task import Tagged, Task

LABELS = ("NOUN", "VERB", "ADJ", "ADV", "DET", "ADP", "PRON", "AUX", "CCONJ", "SCONJ", "PART", "PUNCT")
WORDS = {  # what a gap of this name is filled with; each word is of another part of speech in another gap
    "who": "guard guide judge cook scout pilot coach fool",  # nouns; verbs in {on_who}
    "thing": "watch sail plant ship dress lock saddle house iron book picture hide",  # nouns; verbs in {on_thing}
    "deed": "walk talk rest dream cry laugh smile dance march race jump climb swim work play fight",  # or {act}
    "on_who": "guard guide judge help watch answer fear love trust scout hunt picture",
    "on_thing": "guard watch ship lock paint hide show love want plant iron book",
    "act": "walk talk rest dream cry laugh smile dance march race jump climb swim work play fight sail hunt cook",
    "people": "rich poor sick young old wise blind deaf",  # as a noun: all who are so
    "state": "light dark cold wet dry open hollow plain",  # of things; as a noun: where it is so
    "worth": "right wrong good evil sweet ideal",  # of what is done; as a noun: what is so
    "treat": "dry warm open clean cool clear empty free blind quiet smooth right",  # what is done to make it so
    "how": "fast hard late early straight long",  # adjective and adverb
}
FORMS = (  # {gap}, with s for the plural of a noun or the third person of a verb, and the tag that is meant
    "the/DET {who}/NOUN {on_thing}s/VERB the/DET {thing}s/NOUN ./PUNCT",
    "the/DET {who}s/NOUN {on_who}/VERB the/DET {people}/NOUN ./PUNCT",
    "they/PRON {act}/VERB to/PART {on_who}/VERB us/PRON ,/PUNCT and/CCONJ that/DET {deed}/NOUN was/AUX {worth}/ADJ "
    "./PUNCT",
    "his/PRON {deed}/NOUN was/AUX {how}/ADJ and/CCONJ {worth}/ADJ ./PUNCT",
    "will/AUX you/PRON {treat}/VERB the/DET {state}/ADJ {thing}/NOUN ?/PUNCT",
    "the/DET {people}/ADJ {who}/NOUN must/AUX {on_who}/VERB the/DET {people}/NOUN ./PUNCT",
    "we/PRON {treat}/VERB that/DET {thing}/NOUN {how}/ADV ./PUNCT",
    "we/PRON {act}/VERB in/ADP the/DET {state}/NOUN ./PUNCT",
    "{people}/ADJ {who}s/NOUN {act}/VERB {how}/ADV ,/PUNCT but/CCONJ {people}/ADJ {who}s/NOUN {act}/VERB in/ADP "
    "the/DET {state}/NOUN ./PUNCT",
    "that/PRON was/AUX the/DET {deed}/NOUN of/ADP the/DET {people}/NOUN ./PUNCT",
    "the/DET {people}/NOUN {act}/VERB {how}/ADV ./PUNCT",
    "she/PRON {on_who}s/VERB the/DET {who}s/NOUN that/PRON {act}/VERB ./PUNCT",
    "she/PRON {on_thing}s/VERB that/DET {thing}/NOUN after/ADP a/DET {how}/ADJ {deed}/NOUN ./PUNCT",
    "a/DET {people}/ADJ {who}/NOUN can/AUX {treat}/VERB {state}/ADJ {thing}s/NOUN ./PUNCT",
    "do/AUX not/PART {on_thing}/VERB the/DET {thing}/NOUN so/ADV {how}/ADV ./PUNCT",
    "the/DET {who}s/NOUN {treat}/VERB the/DET {thing}s/NOUN ,/PUNCT for/CCONJ they/PRON are/AUX {state}/ADJ ./PUNCT",
    "the/DET {who}/NOUN {act}s/VERB like/ADP a/DET {people}/ADJ {who}/NOUN ./PUNCT",
    "they/PRON like/VERB the/DET {deed}s/NOUN of/ADP the/DET {people}/NOUN ./PUNCT",
    "{on_thing}/VERB the/DET {thing}/NOUN ,/PUNCT or/CCONJ {treat}/VERB the/DET {state}/ADJ {thing}/NOUN ./PUNCT",
    "{deed}/NOUN and/CCONJ {deed}/NOUN are/AUX {worth}/ADJ for/ADP the/DET {people}/ADJ {who}s/NOUN ./PUNCT",
    "{who}s/NOUN that/PRON {act}/VERB {how}/ADV are/AUX {people}/ADJ ./PUNCT",
    "you/PRON like/VERB to/PART {treat}/VERB the/DET {thing}/NOUN before/ADP the/DET {deed}/NOUN ./PUNCT",
    "before/SCONJ they/PRON {act}/VERB ,/PUNCT the/DET {people}/ADJ {who}s/NOUN {act}/VERB {how}/ADV ./PUNCT",
    "his/PRON {how}/ADJ {deed}s/NOUN {treat}/VERB the/DET {thing}/NOUN ./PUNCT",
    "to/PART {act}/VERB is/AUX {worth}/ADJ ,/PUNCT and/CCONJ to/PART {act}/VERB {how}/ADV is/AUX {worth}/ADJ ./PUNCT",
    "from/ADP {deed}/NOUN to/ADP {deed}/NOUN the/DET {who}s/NOUN {on_who}/VERB us/PRON ./PUNCT",
    "the/DET {people}/ADJ {who}/NOUN {act}s/VERB {how}/ADV ,/PUNCT since/SCONJ the/DET {people}/NOUN {on_who}/VERB "
    "it/PRON ./PUNCT",
    "{people}/ADJ {who}s/NOUN {on_who}/VERB the/DET {worth}/NOUN since/ADP that/DET {how}/ADJ {deed}/NOUN ./PUNCT",
)


def sentence(draw: Draw, kind: int) -> Tagged:
    words, tags = [], []
    for piece in draw.one(FORMS).split():
        word, tag = piece.rsplit("/", 1)
        if word.startswith("{"):
            gap, ending = word[1:].split("}")
            word = draw.one(WORDS[gap].split())
            word = with_s(word) if ending else word
        words.append(word)
        tags.append(LABELS.index(tag))
    words = [
        tidy(f"x a {after}").split()[1] if word == "a" else word
        for word, after in zip(words, [*words[1:], ""], strict=True)
    ]
    words[0] = tidy(words[0])
    return Tagged(tuple(words), tuple(tags))


def with_s(word: str) -> str:
    """The plural of a noun, the third person of a verb."""
    if word == "cry":
        return "cries"
    return word + ("es" if word.endswith(("ch", "sh", "ss")) else "s")


def pos(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """The part of speech of each word, when most words could be several."""
    return make_task(
        "pos",
        "tagging",
        (train, valid, test),
        seed,
        sentence,
        metrics=("accuracy",),
        labels=LABELS,
        description="Universal Dependencies' tags of sentences in which nouns, verbs and adjectives share their words",
        counting=0.73,
    )
