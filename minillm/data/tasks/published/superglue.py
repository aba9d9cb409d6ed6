"""The tasks of SuperGLUE as records: one JSON object a line, the same fields in every language and translation.

Wang et al. 2019, SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems. BoolQ: Clark et
al. 2019; CB: de Marneffe et al. 2019; COPA: Roemmele et al. 2011; MultiRC: Khashabi et al. 2018; RTE: Dagan et al. 2006
and after; WSC: Levesque et al. 2012; WiC: Pilehvar and Camacho-Collados 2019.
"""

import html
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minillm.data.tasks.published.cut import cut
from minillm.data.tasks.published.files import Files, Flaw, member, number_of
from minillm.data.tasks.task import Choice, Kind, Record, Text
from minillm.ops import IGNORE

TRUTH = ("false", "true")
Named = tuple[str, Record]  # a record with its `idx`, which a submission names


@dataclass(frozen=True)
class Form:
    """How the rows of one task become records. `records(row, label)` asks `label(row)` for the label's number."""

    kind: Kind
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    records: Callable[[dict, Callable[[dict], int]], list[Named]]
    key: Callable[[Any], str]  # records of one key stay in one split


def read(files: Files, name: str, form: Form, *, labelled: bool = True, unescape: bool = False) -> list[Named]:
    """The records of a file with their `idx`; without labels each has IGNORE. unescape: `&quot;` is a quote."""

    def label(row: dict) -> int:
        if not labelled:
            return IGNORE
        value = member(row, "label", (str, int))
        return number_of(TRUTH[value] if isinstance(value, bool) else str(value), form.labels or ("0", "1"))

    rows = files.objects(name)
    made = files.records(rows, lambda row: form.records(_unescaped(row) if unescape else row, label))
    return [named for part in made for named in part]


def splits(train: list[Named], test: list[Named], form: Form) -> dict[str, list[Record]]:
    """SuperGLUE's val is test here, because the labels of its test are secret; valid is a tenth of train."""
    kept, valid = cut([r for _, r in train], 0.1, key=form.key, stratum=lambda r: r.label)
    return {"train": kept, "valid": valid, "test": [r for _, r in test]}


def _unescaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unescaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unescaped(inner) for inner in value]
    return html.unescape(value) if isinstance(value, str) else value


def _name(row: dict) -> str:
    return str(member(row, "idx", int))


def _boolq(row: dict, label: Callable[[dict], int]) -> list[Named]:
    return [(_name(row), Text(member(row, "question"), label(row), member(row, "passage")))]


def _inference(row: dict, label: Callable[[dict], int]) -> list[Named]:
    return [(_name(row), Text(member(row, "premise"), label(row), member(row, "hypothesis")))]


def _wsc(row: dict, label: Callable[[dict], int]) -> list[Named]:
    """The pronoun between asterisks (as T5 has it), and what it may refer to."""
    target = member(row, "target", dict)
    marked = _mark(member(row, "text"), member(target, "span2_text"), member(target, "span2_index", int))
    return [(_name(row), Text(marked, label(row), member(target, "span1_text")))]


def _mark(text: str, word: str, index: int) -> str:
    """`text` with *word* marked: at `index`, or where it stands nearest to it; some published indices are off."""
    words, bare = text.split(), word.strip(string.punctuation)
    places = [i for i, w in enumerate(words) if w.strip(string.punctuation + "»«„“”") == bare]
    if not places:
        raise Flaw(f"the word {word!r} is not in the text")
    place = min(places, key=lambda i: abs(i - index))
    words[place] = words[place].replace(bare, f"*{bare}*", 1)
    return " ".join(words)


def _wic(row: dict, label: Callable[[dict], int]) -> list[Named]:
    """Both sentences with the word marked: does it mean the same?"""
    marked = []
    for which in ("1", "2"):
        text = member(row, f"sentence{which}")
        start, end = member(row, f"start{which}", int), member(row, f"end{which}", int)
        if not 0 <= start < end <= len(text):
            raise Flaw(f"sentence{which} has no characters {start} to {end}")
        marked.append(f"{text[:start]}*{text[start:end]}*{text[end:]}")
    return [(_name(row), Text(marked[0], label(row), marked[1]))]


def copa(questions: Mapping[str, str]) -> Form:
    """Which of two alternatives is the cause, or the effect? `questions` says how each is asked for in the language."""

    def records(row: dict, label: Callable[[dict], int]) -> list[Named]:
        if member(row, "question") not in questions:
            raise Flaw(f"the question {row['question']!r} is none of {', '.join(questions)}")
        text = f"{member(row, 'premise')} {questions[row['question']]}"
        return [(_name(row), Choice(text, (member(row, "choice1"), member(row, "choice2")), label(row)))]

    return Form("choice", (), ("accuracy",), records, lambda r: r.text)


RTE = Form("classification", ("entailment", "not_entailment"), ("accuracy",), _inference, lambda r: r.text)
CB_LABELS = ("entailment", "contradiction", "neutral")
CB = Form("classification", CB_LABELS, ("accuracy", "macro_f1"), _inference, lambda r: r.text)
BOOLQ = Form("classification", TRUTH, ("accuracy",), _boolq, lambda r: r.second)
WSC = Form("classification", TRUTH, ("accuracy",), _wsc, lambda r: r.text.replace("*", ""))
WIC = Form("classification", TRUTH, ("accuracy",), _wic, lambda r: r.text)
