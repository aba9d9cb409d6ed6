"""MultiRC: each of several answers to a question on a passage is right or wrong, judged alone and by questions."""

from collections.abc import Callable
from typing import Any

from minillm.data.tasks.published.files import Flaw, member
from minillm.data.tasks.published.superglue import TRUTH, Form, Named
from minillm.data.tasks.task import Text


def multirc(*, patchy: bool = False) -> Form:
    """An answer becomes Text(question and answer, label, passage), its group "passage/question".

    patchy: the Slovene files came through a spreadsheet. Lists are objects there, with the places as keys; a label is
    1.0, "1.0" or "1,0"; parts stand in a second object `Passage`; and answers and questions without a text, which are
    left out: 4 answers of human train, 3 of machine train.
    """

    def records(row: dict, label: Callable[[dict], int]) -> list[Named]:
        passage = member(row, "passage", dict)
        if patchy and "Passage" in row:
            passage = _merged(passage, member(row, "Passage", dict))
        text, place = member(passage, "text"), _number(row, patchy)
        made = []
        for question in _items(passage, "questions", patchy):
            number = _number(question, patchy)
            for answer in _items(question, "answers", patchy):
                if patchy and not (question.get("question") and answer.get("text")):
                    continue
                asked, said = member(question, "question"), member({"text": _words(answer.get("text"))}, "text")
                record = Text(f"{asked} {said}", label({"label": _truth(answer)}), text, f"{place}/{number}")
                made.append((f"{place}/{number}/{_number(answer, patchy)}", record))
        return made

    return Form("classification", TRUTH, ("f1a", "group_exact_match"), records, lambda r: r.second)


def _items(parent: dict, name: str, patchy: bool) -> list[dict]:
    items = member(parent, name, (list, dict) if patchy else list)
    if isinstance(items, dict):
        if strange := [key for key in items if not key.isdecimal()]:
            raise Flaw(f"{name!r} has the key {strange[0]!r}, expected places from 0")
        items = [items[key] for key in sorted(items, key=int)]
    if wrong := [item for item in items if not isinstance(item, dict)]:
        raise Flaw(f"{name!r} holds {wrong[0]!r}, expected objects")
    return items


def _number(item: dict, patchy: bool) -> int:
    if not patchy:
        return member(item, "idx", int)
    text = str(member(item, "idx", (int, float, str))).replace(",", ".")  # 16, 16.0 and "16,0"
    if not text.removesuffix(".0").isdecimal():
        raise Flaw(f"'idx' is {item['idx']!r}, expected a whole number")
    return int(text.removesuffix(".0"))


def _merged(whole: Any, part: Any) -> Any:
    """`whole` with what only `part` has, at every depth."""
    if not isinstance(whole, dict) or not isinstance(part, dict):
        return whole
    return {**part, **{key: _merged(value, part.get(key)) for key, value in whole.items()}}


def _truth(answer: dict) -> Any:
    value = answer.get("label", "missing")
    text = str(value).replace(",", ".")
    return text in ("1", "1.0") if text in ("0", "1", "0.0", "1.0") else value


def _words(text: Any) -> Any:
    """The spreadsheet made 1970.0 of the year 1970."""
    return f"{text:g}" if isinstance(text, float) else text
