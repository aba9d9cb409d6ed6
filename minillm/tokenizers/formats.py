"""Where special tokens stand in a model's input: `[CLS] a [SEP] b [SEP]`, `a </s>`, `<s> a`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Item = tuple[int | str, int]  # (a special id, or "A" or "B" for the first or second text; token type)


@dataclass(frozen=True)
class InputFormat:
    """The items of an input made of one text and of two texts, in order, each with its token type."""

    single: tuple[Item, ...]
    pair: tuple[Item, ...]

    @classmethod
    def parse(cls, single: str, pair: str, ids: Mapping[str, int]) -> "InputFormat":
        """From words separated by spaces; ":1" gives a word token type 1.

        Example: parse("cls A sep", "cls A sep B:1 sep:1", {"cls": 101, "sep": 102}).
        """
        return cls(*(tuple(_item(word, ids) for word in words.split()) for words in (single, pair)))

    @classmethod
    def from_lists(cls, single: Sequence[Sequence], pair: Sequence[Sequence]) -> "InputFormat":
        """What `to_lists` wrote."""
        return cls(*(tuple((what, kind) for what, kind in items) for items in (single, pair)))

    def to_lists(self) -> dict[str, list[list]]:
        """JSON-able form."""
        return {"single": [list(item) for item in self.single], "pair": [list(item) for item in self.pair]}

    @property
    def ids(self) -> set[int]:
        """The special ids that stand in it."""
        return {what for what, _ in (*self.single, *self.pair) if isinstance(what, int)}

    def fill(self, ids: Sequence[int], pair: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """(ids, token types) with the texts' ids in their places."""
        texts = {"A": ids, "B": pair if pair is not None else ()}
        rows = [(texts.get(what, [what]), kind) for what, kind in (self.single if pair is None else self.pair)]
        return [int(i) for row, _ in rows for i in row], [kind for row, kind in rows for _ in row]

    def swap(self, old: Collection[int], new: int) -> "InputFormat":
        """The same places with the special id `new` where one of `old` stood."""
        both = (self.single, self.pair)
        return InputFormat(*(tuple((new if what in old else what, kind) for what, kind in items) for items in both))


def _item(word: str, ids: Mapping[str, int]) -> Item:
    name, _, kind = word.partition(":")
    return (name if name in ("A", "B") else ids[name]), int(kind or 0)


def plain_format(bos: int | None, eos: int | None) -> InputFormat:
    """`bos A eos` and `bos A eos bos B eos`, without what is None; the second text has type 1."""
    first, second = (
        [*([(bos, kind)] if bos is not None else []), (text, kind), *([(eos, kind)] if eos is not None else [])]
        for text, kind in (("A", 0), ("B", 1))
    )
    return InputFormat(tuple(first), (*first, *second))


def format_of(post_processor: Mapping[str, Any] | None) -> InputFormat | None:
    """The input format of tokenizer.json's post_processor; None when it puts no special token."""
    match post_processor:
        case None | {"type": "ByteLevel"}:
            return None
        case {"type": "Sequence", "processors": steps}:
            formats = [found for step in steps if (found := format_of(step)) is not None]
            if len(formats) > 1:
                raise ValueError(f"its post_processor puts special tokens {len(formats)} times: {post_processor}")
            return formats[0] if formats else None
        case {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}:
            return InputFormat(*(tuple(i for item in items for i in _items(item, tokens)) for items in (single, pair)))
        case {"type": "BertProcessing", "cls": [_, cls], "sep": [_, sep]}:
            return InputFormat.parse("cls A sep", "cls A sep B:1 sep:1", {"cls": cls, "sep": sep})
        case {"type": "RobertaProcessing", "cls": [_, cls], "sep": [_, sep]}:
            return InputFormat.parse("cls A sep", "cls A sep sep B sep", {"cls": cls, "sep": sep})
    raise ValueError(f"its post_processor of type {post_processor.get('type')!r} is not known here")


def _items(item: Mapping[str, Any], tokens: Mapping[str, Any]) -> list[Item]:
    (kind, place), *_ = item.items()
    if kind == "Sequence":
        return [(place["id"], place["type_id"])]
    if place["id"] not in tokens:
        raise ValueError(f"its post_processor puts {place['id']!r} and does not say which id that is")
    return [(i, place["type_id"]) for i in tokens[place["id"]]["ids"]]
