"""In which worlds each sentence of nli is true, by counting individuals and by tables worked by hand."""

import pytest

from minillm.data.tasks.generated import nli
from minillm.data.tasks.generated.words import NUMBERS


def truth(family: str) -> dict[str, str]:
    """{sentence: a 1 for each world in which it is true, in the order of the worlds}."""
    statements, worlds, _ = nli.FAMILIES[family]
    return {text: "".join(str(int(bool(holds(*world)))) for world in worlds) for text, holds in statements}


def test_quantities_by_individuals():
    """Two of the narrow kind and two others; none, one or both of each did it."""
    statements, worlds, _ = nli.FAMILIES["quantity"]
    for text, holds in statements:
        for narrow, rest in worlds:
            own, others = [i < narrow for i in range(2)], [i < rest for i in range(2)]
            which = own if "{narrow}" in text else own + others
            expected = {
                "all ": all(which), "ever": all(which), "some": any(which), "at l": any(which), "none": not any(which),
                "not one": not any(which), "not all": not all(which), "only": any(own) and not any(others),
            }  # fmt: skip
            assert bool(holds(narrow, rest)) == next(v for start, v in expected.items() if text.startswith(start)), text


def test_counts():
    tests = {"exactly": int.__eq__, "more than": int.__gt__, "fewer than": int.__lt__, "at least": int.__ge__,
             "not more than": int.__le__}  # fmt: skip
    statements, worlds, _ = nli.FAMILIES["count"]
    assert len(statements) == 30
    for text, holds in statements:
        words, number = text.removesuffix(" {many} {came}").rsplit(" ", 1)
        assert [holds(*world) for world in worlds] == [tests[words](n, NUMBERS.index(number)) for n in range(12)], text


@pytest.mark.parametrize(
    ("family", "table"),
    [
        (
            "roles",  # worlds: neither; b did it to a; a did it to b; both
            {
                "{a} {did} {b}": "0011", "{b} was {did} by {a}": "0011", "it was {a} who {did} {b}": "0011",
                "{a} did not {do} {b}": "1100", "{b} was never {did} by {a}": "1100", "{b} {did} {a}": "0101",
                "{a} was {did} by {b}": "0101", "{b} did not {do} {a}": "1010",
                "{a} {did} {b}, and {b} {did} {a}": "0001", "{a} and {b} did not {do} each other": "1000",
            },
        ),
        (
            "together",  # neither; b; a; both
            {
                "both {a} and {b} {did}": "0001", "{a} or {b} {did}, if not both": "0111",
                "neither {a} nor {b} {did}": "1000", "{a} {did}": "0011", "{b} {did}": "0101",
                "{a} never {did}": "1100", "{b} never {did}": "1010", "{a} {did}, but {b} did not": "0010",
                "only one of the two, {a} or {b}, {did}": "0110",
            },
        ),
        (
            "belief",  # false, not held; false, held; true, not held; true, held
            {
                "{a} knew that {fact}": "0001", "{a} believed that {fact}": "0101",
                "{a} was right to believe that {fact}": "0001", "{a} was wrong to believe that {fact}": "0100",
                "{a} did not know that {fact}": "0010", "{a} did not believe that {fact}": "1010",
                "it is true that {fact}": "0011", "{fact}": "0011", "it is not true that {fact}": "1100",
                "nobody could say with truth that {fact}": "1100",
            },
        ),
        (
            "order",  # when a and b came, 0 for never: 00 01 02 10 11 12 20 21 22
            {
                "{a} came to {town} before {b}": "000001000", "{b} came to {town} after {a} had come": "000001000",
                "{b} came to {town} before {a}": "000000010",
                "{a} did not come to {town} until {b} was there": "000000010",
                "{a} and {b} came to {town} at the same hour": "000010001",
                "both {a} and {b} came to {town}": "000011011", "{a} came to {town}": "000111111",
                "{b} never came to {town}": "100100100", "{a} came to {town}, where {b} was never seen": "000100100",
            },
        ),
    ],
)  # fmt: skip
def test_by_hand(family, table):
    assert truth(family) == table


def test_relation():
    assert [nli.relation(*sets) for sets in (({1}, {1, 2}), ({1, 2}, {1}), ({1}, {2}))] == list(nli.LABELS)
