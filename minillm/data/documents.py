"""A document, and what can be said and done about a list of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Document:
    """One text that belongs together. With a `completion`, `text` is its prompt and only the completion is learned."""

    name: str
    text: str
    completion: str | None = None

    @property
    def full_text(self) -> str:
        return self.text + (self.completion or "")


def corpus_summary(documents: Sequence[Document]) -> dict[str, Any]:
    """{"documents", "characters", "bytes" (UTF-8), "sha256"}; the hash is over texts in order, names do not matter."""
    digest, characters, size = hashlib.sha256(), 0, 0
    for document in documents:
        for text in (document.text, document.completion):
            data = b"" if text is None else text.encode()
            # the length before each text keeps ("ab", "c") and ("a", "bc") apart, and no completion from an empty one
            digest.update(f"{-1 if text is None else len(data)}:".encode() + data)
            characters, size = characters + len(text or ""), size + len(data)
    return {"documents": len(documents), "characters": characters, "bytes": size, "sha256": digest.hexdigest()}


def split_documents(
    documents: Sequence[Document], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: whole ones, drawn by seed until about `held_out` of all characters are reached.

    Documents with the same text stay on one side, so nothing held out was seen in training. A document is held out
    only if that brings the share nearer to `held_out`; so the share is at most half of the largest document off,
    unless that would leave one side empty. Both sides keep the order of `documents`.
    One single text, such as a book, is cut in two at a line's end, and its end is held out.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is a share between 0 and 1, got {held_out}")
    if len(documents) == 1 and documents[0].completion is None and (parts := _cut(documents[0], held_out)):
        return parts
    groups: dict[tuple[str, str | None], list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault((document.text, document.completion), []).append(i)
    if len(groups) < 2:
        raise ValueError(
            f"cannot hold anything out of {len(documents)} documents with {len(groups)} different texts: training and "
            "held-out side need a different text each. Cut the text into several files, or give held-out text yourself."
        )
    members = list(groups.values())
    sizes = [sum(len(documents[i].full_text) for i in group) for group in members]
    chosen = _draw(sizes, held_out, seed)
    held = {i for group in chosen for i in members[group]}
    return (
        [document for i, document in enumerate(documents) if i not in held],
        [document for i, document in enumerate(documents) if i in held],
    )


def _cut(document: Document, held_out: float) -> tuple[list[Document], list[Document]] | None:
    """Beginning and end of a text, parted at the last line's end that leaves at least `held_out` of it to the end."""
    at = document.text.rfind("\n", 0, round(len(document.text) * (1 - held_out))) + 1
    sides = document.text[:at], document.text[at:]
    if not all(side.strip() for side in sides):
        return None
    names = f"{document.name} (beginning)", f"{document.name} (end)"
    training, held = (Document(name, text) for name, text in zip(names, sides, strict=True))
    return [training], [held]


def _draw(sizes: list[int], share: float, seed: int) -> set[int]:
    """Indices whose sizes sum to about `share` of all; neither none nor all of them."""
    target, total = share * sum(sizes), 0
    chosen: set[int] = set()
    for i in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        if sizes[i] <= 2 * (target - total):  # taking it ends nearer to the target than leaving it
            chosen.add(i)
            total += sizes[i]
    smallest = min(range(len(sizes)), key=sizes.__getitem__)
    if not chosen:
        return {smallest}
    return chosen - {smallest} if len(chosen) == len(sizes) else chosen
