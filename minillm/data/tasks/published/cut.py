"""Splits where a published set has none: the same on every machine, in every order of the records."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")
FOLDS = 10


def cut(
    records: Sequence[T], share: float, *, key: Callable[[T], str], stratum: Callable[[T], Hashable] = lambda _: None
) -> tuple[list[T], list[T]]:
    """(the rest, `share` of the records), both in their old order.

    Records of one `key`, such as questions on the same passage, stay together; every `stratum`, such as a class, gives
    its share. Groups are taken in the order of the SHA-256 of their keys, so nothing hangs on a random generator.
    """
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(key(record), []).append(i)
    wanted = {s: max(1, round(share * n)) for s, n in Counter(map(stratum, records)).items()}
    taken: set[int] = set()
    for text in sorted(groups, key=lambda text: hashlib.sha256(text.encode()).digest()):
        strata = Counter(stratum(records[i]) for i in groups[text])
        if all(2 * wanted[s] >= n for s, n in strata.items()):  # the nearest a whole group can come
            taken.update(groups[text])
            wanted = {s: max(0, n - strata[s]) for s, n in wanted.items()}
    rest = [record for i, record in enumerate(records) if i not in taken]
    return rest, [record for i, record in enumerate(records) if i in taken]


def folds(classes: Sequence[Sequence[T]], fold: int) -> dict[str, list[T]]:
    """Ten-fold cross-validation: line i of every class is tested in fold i mod 10, and chosen by one fold earlier."""
    parts = [[r for records in classes for r in records[i::FOLDS]] for i in range(FOLDS)]
    valid = (fold + 1) % FOLDS
    train = [record for i, part in enumerate(parts) if i not in (fold, valid) for record in part]
    return {"train": train, "valid": parts[valid], "test": parts[fold]}
