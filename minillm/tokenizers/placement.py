"""How a checkpoint uses a sentencepiece model: which ids the pieces have, and what is done to text beforehand."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Placement:
    """Where the pieces of a sentencepiece model stand among the checkpoint's ids, and what is done to text before.

    Piece i has the id moved[i], or else i + offset. See `families.Layout`.
    """

    offset: int = 0
    moved: Mapping[int, int] = field(default_factory=dict)
    prepare: tuple[str, ...] = ()
    first_only: bool = False  # only the first word of an input gets a space before it, not each one after a special

    def to_json(self) -> dict[str, Any]:
        moved = {str(piece): i for piece, i in self.moved.items()}
        return {"offset": self.offset, "moved": moved, "prepare": list(self.prepare), "first_only": self.first_only}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Placement":
        moved = {int(piece): i for piece, i in values["moved"].items()}
        return cls(values["offset"], moved, tuple(values["prepare"]), values["first_only"])

    def prepared(self, text: str) -> str:
        """`text` as sentencepiece is to see it. ALBERT: plain quotes, no accents, lower case."""
        if self.prepare:
            text = text.replace("``", '"').replace("''", '"')
        if "strip_accents" in self.prepare:
            text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
        return text.lower() if "lower" in self.prepare else text

    def id_of(self, piece: int) -> int:
        return self.moved.get(piece, piece + self.offset)
