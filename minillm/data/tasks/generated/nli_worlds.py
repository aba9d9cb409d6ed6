"""What the sentences of `nli` say: each with the worlds, of a few possible ones, in which it is true."""

import functools
from collections.abc import Callable

from minillm.data.tasks.generated.words import NUMBERS

NONE, SOME, ALL = range(3)
Statements = tuple[tuple[str, Callable[..., bool]], ...]  # a sentence, and whether it is true in a world

COUNT: Statements = tuple(
    (f"{words} {{many}} {{came}}", functools.partial(compare, number))
    for number in range(2, 8)
    for words, compare in (
        (f"exactly {NUMBERS[number]}", lambda k, n: n == k),
        (f"more than {NUMBERS[number]}", lambda k, n: n > k),
        (f"fewer than {NUMBERS[number]}", lambda k, n: n < k),
        (f"at least {NUMBERS[number]}", lambda k, n: n >= k),
        (f"not more than {NUMBERS[number]}", lambda k, n: n <= k),
    )
)
QUANTITY: Statements = (  # worlds: how many of the narrow kind, how many of the others of the wide kind
    ("all the {wide}s {did}", lambda narrow, rest: narrow == rest == ALL),
    ("every {wide} {did}", lambda narrow, rest: narrow == rest == ALL),
    ("some of the {wide}s {did}", lambda narrow, rest: narrow or rest),
    ("at least one {wide} {did}", lambda narrow, rest: narrow or rest),
    ("none of the {wide}s {did}", lambda narrow, rest: not (narrow or rest)),
    ("not one {wide} {did}", lambda narrow, rest: not (narrow or rest)),
    ("not all the {wide}s {did}", lambda narrow, rest: not narrow == rest == ALL),
    ("all the {narrow}s {did}", lambda narrow, rest: narrow == ALL),
    ("every {narrow} {did}", lambda narrow, rest: narrow == ALL),
    ("some of the {narrow}s {did}", lambda narrow, rest: narrow),
    ("at least one {narrow} {did}", lambda narrow, rest: narrow),
    ("none of the {narrow}s {did}", lambda narrow, rest: not narrow),
    ("not one {narrow} {did}", lambda narrow, rest: not narrow),
    ("not all the {narrow}s {did}", lambda narrow, rest: narrow != ALL),
    ("only the {narrow}s {did}", lambda narrow, rest: narrow and not rest),
)
ROLES: Statements = (  # worlds: whether a did it to b, whether b did it to a
    ("{a} {did} {b}", lambda ab, ba: ab),
    ("{b} was {did} by {a}", lambda ab, ba: ab),
    ("it was {a} who {did} {b}", lambda ab, ba: ab),
    ("{a} did not {do} {b}", lambda ab, ba: not ab),
    ("{b} was never {did} by {a}", lambda ab, ba: not ab),
    ("{b} {did} {a}", lambda ab, ba: ba),
    ("{a} was {did} by {b}", lambda ab, ba: ba),
    ("{b} did not {do} {a}", lambda ab, ba: not ba),
    ("{a} {did} {b}, and {b} {did} {a}", lambda ab, ba: ab and ba),
    ("{a} and {b} did not {do} each other", lambda ab, ba: not (ab or ba)),
)
TOGETHER: Statements = (  # worlds: whether a did, whether b did
    ("both {a} and {b} {did}", lambda a, b: a and b),
    ("{a} or {b} {did}, if not both", lambda a, b: a or b),
    ("neither {a} nor {b} {did}", lambda a, b: not (a or b)),
    ("{a} {did}", lambda a, b: a),
    ("{b} {did}", lambda a, b: b),
    ("{a} never {did}", lambda a, b: not a),
    ("{b} never {did}", lambda a, b: not b),
    ("{a} {did}, but {b} did not", lambda a, b: a and not b),
    ("only one of the two, {a} or {b}, {did}", lambda a, b: a != b),
)
ORDER: Statements = (  # worlds: when a came, when b came (0: never)
    ("{a} came to {town} before {b}", lambda a, b: 0 < a < b),
    ("{b} came to {town} after {a} had come", lambda a, b: 0 < a < b),
    ("{b} came to {town} before {a}", lambda a, b: 0 < b < a),
    ("{a} did not come to {town} until {b} was there", lambda a, b: 0 < b < a),
    ("{a} and {b} came to {town} at the same hour", lambda a, b: 0 < a == b),
    ("both {a} and {b} came to {town}", lambda a, b: a and b),
    ("{a} came to {town}", lambda a, b: a),
    ("{b} never came to {town}", lambda a, b: not b),
    ("{a} came to {town}, where {b} was never seen", lambda a, b: a and not b),
)
BELIEF: Statements = (  # worlds: whether it is so, whether she believes it
    ("{a} knew that {fact}", lambda true, held: true and held),
    ("{a} believed that {fact}", lambda true, held: held),
    ("{a} was right to believe that {fact}", lambda true, held: true and held),
    ("{a} was wrong to believe that {fact}", lambda true, held: held and not true),
    ("{a} did not know that {fact}", lambda true, held: true and not held),
    ("{a} did not believe that {fact}", lambda true, held: not held),
    ("it is true that {fact}", lambda true, held: true),
    ("{fact}", lambda true, held: true),
    ("it is not true that {fact}", lambda true, held: not true),
    ("nobody could say with truth that {fact}", lambda true, held: not true),
)
