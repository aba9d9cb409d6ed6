"""sentiment: is a review good or bad, when negation, contrast and unreal wishes turn its words round?

The forms below are written for the writer's real opinion: `{same}` is a word that agrees with it, `{other}` one of the
opposite sense. Every form serves both labels, and forms with one sort of word stand beside forms with the other, so
that neither a word of praise nor a "not" tells the label.
"""

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import DAYS, TOWNS, listed
from minillm.data.tasks.task import Task, Text

LABELS = ("bad", "good")
GOOD = listed(
    "good lovely charming delightful excellent splendid beautiful wonderful admirable pleasant fine perfect "
    "agreeable superb exquisite magnificent pleasing glorious enchanting faultless satisfactory refreshing "
    "capital noble sweet cheerful handsome graceful"
)
BAD = listed(
    "bad dreadful dull wretched horrid poor miserable stupid tiresome disagreeable awful unpleasant dismal shabby "
    "worthless disgusting frightful terrible vulgar dreary disappointing abominable hideous nasty vile tedious "
    "feeble ugly"
)
DOMAINS = {  # what is judged: the whole, its parts, and what one does with it
    "book": ("book story tale novel poem", "beginning ending language title preface printing plot verse", "read"),
    "inn": ("inn dinner supper feast breakfast", "soup bread wine service room table music garden", "tried"),
    "play": (
        "play comedy performance concert tragedy",
        "acting singing music scenery dancing hall dress story",
        "seen",
    ),
}
FORMS = (
    # the word says what is meant
    "the {part} of this {whole} was {very} {same}, and the {part2} was {same2}",
    "never have I {met} a more {same} {whole}",
    "I have not {met} anything so {same} as this {whole} for many years",
    "the {part} was not only {same}, but {very} {same2} too",
    "no {part} could have been more {same}",
    "I had expected a {same} {whole}, and so it was",
    "I was told that the {whole} was {same}, and nobody can deny it",
    "it was {very} {same}, and I do not say so without reason",
    "he who doubts that this {whole} is {same} has not {met} it",
    # the word says the opposite
    "the {part} was not {other} at all",
    "the {part} was neither {other} nor {other2}",
    "the {whole} was anything but {other}",
    "I found nothing {other} in the {part} of this {whole}",
    "I had expected a {other} {whole}, and was quite mistaken",
    "I was told that the {whole} was {other}, but that is not true",
    "with another {part} this would have been a {very} {other} {whole}",
    "he who calls this {whole} {other} has not {met} it",
    "nobody who has {met} it will say that the {part} was {other}",
    "the {part} would be {other} in any other {whole}, but not here",
    # both stand there, and one of them counts
    "although the {part} was {other}, the {whole} as a whole was {very} {same}",
    "the {part} was {very} {other}, but for all that it was a {same} {whole}",
    "it was a {same} {whole}, though I thought the {part} {very} {other}",
    "in spite of its {other} {part} I call it a {very} {same} {whole}",
    "some thought the {whole} {other}, but they were wrong, for it was {same}",
    "if only the {part} had been {other} as well! But it was {same}, like the whole {whole}",
    "the {part} was not {other} but {same}",
    "it was more {same} than {other}, whatever the newspapers say of the {part}",
    "I came to see a {other} {whole}; what I found was {very} {same}",
    "people call it {other}; I call the {part} {same}, and the {part2} {same2}",
)
OPENINGS = (
    "we were at {town} on {day}.", "my sister took me there on {day}.", "you ask me what I think of it.",
    "I write this on my way to {town}.", "all {town} speaks of it.", "it was our last evening in {town}.",
    "let me tell you the truth, dear friend.", "my uncle and I talked of it until {day}.",
    "on {day} it was our turn.", "now I know it myself.",
)  # fmt: skip


def review(draw: Draw, label: int) -> Text:
    whole, parts, met = DOMAINS[draw.any(tuple(DOMAINS))]
    same, other = (GOOD, BAD) if label else (BAD, GOOD)
    part, part2 = draw.several(parts.split(), 2)
    (a, b), (c, d) = draw.several(same, 2), draw.several(other, 2)
    opening = draw.maybe(draw.one(OPENINGS).format(town=draw.one(TOWNS), day=draw.any(DAYS)))
    core = draw.one(FORMS).format(
        whole=draw.one(whole.split()), part=part, part2=part2, met=met, same=a, same2=b, other=c, other2=d,
        very=draw.any(("", "", "very", "most", "quite", "truly", "rather")),
    )  # fmt: skip
    return Text(tidy(f"{opening} {core}."), label)


def sentiment(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """Is a review good or bad, when negation, contrast and unreal wishes turn its words round?"""
    return make_task(
        "sentiment",
        "classification",
        (train, valid, test),
        seed,
        review,
        len(LABELS),
        metrics=("accuracy", "macro_f1"),
        labels=LABELS,
        description="reviews of books, inns and plays; the writer's own opinion counts, not the words it is said with",
        counting=0.5,
    )
