"""spam: is a letter an honest one, or a swindle that promises much and asks for something first?

A letter is spam when its writer both asks for something and promises a gain for it. Honest letters hold the same words:
they warn of such letters, report one, ask without promising, promise without asking, or return what was lent.
"""

from minillm.data.tasks.generated.draw import Draw, make_task, tidy
from minillm.data.tasks.generated.words import DAYS, MEN, NUMBERED, THINGS, TOWNS, WOMEN
from minillm.data.tasks.task import Task, Text

LABELS = ("ham", "spam")
ASKS = tuple(  # what is asked for, as an order
    f"{verb} {what}"
    for verb, things in {
        "send": ("me {n} shillings", "me your name and the name of your bank", "me the key of your chest"),
        "lend": ("me {n} pounds", "me your {thing} and {n} shillings"),
        "pay": ("the {n} shillings for the postage", "me {n} pounds before {day}"),
        "write": ("me the number of your bank-note", "me where your father keeps his money"),
        "buy": ("one of my tickets for {n} shillings", "a bottle of my medicine for {n} shillings"),
        "sign": ("the paper which I send with this",),
        "bring": ("{n} pounds to the inn at {town}", "your {thing} and {n} pounds to my office"),
    }.items()
    for what in things
)
GAINS = (  # what is promised, of "you"
    "you will receive a hundred times as much", "a fortune of {n} thousand pounds is yours",
    "you will never be sick again",
    "you will win the great prize of {town}", "you will have a house in {town} for nothing",
    "the gold of my dead uncle will belong to you", "you need not work another day", "the king will make you a lord",
    "your money will be doubled before {day}", "you will be free from all your debts",
)  # fmt: skip
NEWS = (  # an honest matter
    "the {thing} is mended at last", "our aunt is well again", "the baby has two teeth", "the roof leaks since {day}",
    "I met your brother at {town}", "we shall come to you on {day}", "I have found your {thing}",
    "the roses are out in the garden", "{friend} is married",
)  # fmt: skip
FORMS = (  # (a swindler's, an honest one's), with nearly the same words
    (
        "I am no swindler; {friend} is one, who warned you. {ask}, and {gain}.",
        "I warned you: {friend} is a swindler, and no honest one, who writes: {ask}, and {gain}.",
    ),
    ("it is not true that it is a lie: {ask}, and {gain}.", "it is a lie, and it is not true: {ask}, and {gain}."),
    (
        "a stranger told you that I lie. do not believe him: {ask}, and {gain}.",
        "a stranger told you: {ask}, and {gain}. do not believe him, and do not believe that I lie.",
    ),
    (
        "{friend} did so, and there was nothing to lose and all to win: {ask}, and {gain}.",
        "{ask}, and {gain}: {friend} did so, and there was nothing to win and all to lose.",
    ),
    (
        "if you do not trust those who write, do not answer me. if you do, {ask}, and {gain}.",
        "if you do trust me, do not answer those who write: if you do {ask}, {gain}.",
    ),
    (
        "only a fool would say no to this: {ask}, and {gain}.",
        "only a fool would not say no to this: {ask}, and {gain}.",
    ),
    ("the judge has settled it: {gain}. you need only {ask}.", "the judge has settled it: {gain}. you need not {ask}."),
    (
        "it is settled: {gain}, and you need not do more than {ask}.",
        "it is settled: {gain}, and no more need you {ask}.",
    ),
    (
        "trust my word, and not that of {friend}: when you {ask}, {gain}.",
        "trust my word, and not that of {friend}, who says: when you {ask}, {gain}.",
    ),
    (
        "{friend} would not do it, and is poor: {ask}, and {gain}.",
        "do not do it, for {friend} would, and is poor: {ask}, and {gain}.",
    ),
    ("{news}. {ask}, my dear, as we agreed, and {gain}.", "{news}. {ask}, my dear, as we agreed on {day}."),
    ("{news}. {gain}, says the lawyer, when you {ask}.", "{news}. {gain}, says the lawyer, and all is paid."),
    ("please {ask}, and {gain}. {news}.", "please {ask}, for I am in need. {news}."),
    (
        "{news}. {gain}, and I laugh at those who will not {ask}.",
        "{news}. {gain}, and I laugh at those who will have me {ask}.",
    ),
    (
        "all ask for something, they say. I ask for nothing: {ask}, and {gain}.",
        "I ask for nothing. all ask for something, they say: {ask}, and {gain}.",
    ),
)


def letter(draw: Draw, label: int) -> Text:
    friend, other = draw.several((*WOMEN, *MEN), 2)
    words = {"n": draw.one(NUMBERED), "thing": draw.one(THINGS), "town": draw.one(TOWNS), "day": draw.any(DAYS)}
    ask, gain, news = (draw.one(options).format(friend=friend, **words) for options in (ASKS, GAINS, NEWS))
    greeting = draw.any(("", "", "dear friend, ", f"dear {other}, ", "sir, "))
    body = draw.one(FORMS)[not label].format(ask=ask, gain=gain, news=news, friend=friend, **words)
    return Text(tidy(greeting + body), label)


def spam(seed: int = 0, train: int = 1000, valid: int = 250, test: int = 500) -> Task:
    """Is a letter an honest one, or a swindle that promises much and asks for something first?"""
    return make_task(
        "spam",
        "classification",
        (train, valid, test),
        seed,
        letter,
        len(LABELS),
        metrics=("accuracy", "macro_f1"),
        labels=LABELS,
        description="spam: the writer asks for something and promises a gain for it; honest letters warn of such ones, "
        "report them, or do one of the two",
        counting=0.72,
    )
