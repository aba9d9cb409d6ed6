"""Documents end to end, cut into windows of equal length: no position is wasted on padding."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.data.loader import Loader
from minillm.data.tokens import TokenFile
from minillm.ops import IGNORE


class PackedLoader(Loader):
    """Windows of `length` inputs from the documents laid end to end, in batches without end.

    In one epoch every token is a label exactly once, except: prompts and the very first token never, with
    `isolate_documents` also no document's first token, for there is nothing to predict it from.

    random_offset      moves the cuts by 0..length-1 tokens in each epoch, so that contexts differ between epochs
    isolate_documents  adds `mask` (B,T,T), True = same document, and `positions` (B,T), restarting with each document
    """

    def __init__(
        self,
        token_file: TokenFile,
        batch_size: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        isolate_documents: bool = False,
        shuffle: bool = True,
        random_offset: bool = False,
    ):
        super().__init__(token_file, batch_size, length, seed, rank, world_size, shuffle)
        self.isolate_documents, self.random_offset = isolate_documents, random_offset
        self._start()

    def rows(self, epoch: int) -> np.ndarray:
        """The first input of each window; the first window begins before the corpus when the offset moves the cuts.

        A window with no label, inside a long prompt, teaches nothing and is left out.
        """
        offset = 0
        if self.random_offset:  # a stream of its own: 1 keeps it apart from the one that shuffles
            offset = int(np.random.default_rng([self.seed, epoch, 1]).integers(self.length))
        return with_labels(self.token_file, np.arange(-offset, len(self.token_file) - 1, self.length), self.length)

    def batch(self, rows: np.ndarray, mine: slice) -> dict[str, Tensor]:
        return windows(self.token_file, rows[mine], self.length, self.isolate_documents)

    def identity(self) -> dict[str, Any]:
        own = {"isolate_documents": self.isolate_documents, "random_offset": self.random_offset}
        return {**self._common_identity(), **own}


def sequential_batches(
    token_file: TokenFile, batch_size: int, length: int, *, isolate_documents: bool = False
) -> Iterator[dict[str, Tensor]]:
    """One pass over the corpus in order, for evaluation: each token counts once, apart from those PackedLoader names.

    The last batch may have fewer rows, and its last row ends in padding.
    """
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch_size {batch_size} and length {length} must be positive")
    begins = with_labels(token_file, np.arange(0, len(token_file) - 1, length), length)
    for first in range(0, len(begins), batch_size):
        yield windows(token_file, begins[first : first + batch_size], length, isolate_documents)


def with_labels(token_file: TokenFile, begins: np.ndarray, length: int) -> np.ndarray:
    """The windows in which some label counts; every document's last token, the end of text, does."""
    first = np.maximum(begins, 0) + 1  # where the first label stands
    document = np.searchsorted(token_file.ends, first, side="right")
    return begins[np.maximum(token_file.counted[document], first) <= begins + length]


def windows(token_file: TokenFile, begins: np.ndarray, length: int, isolate_documents: bool) -> dict[str, Tensor]:
    """The batch whose row i has the inputs begins[i] .. begins[i] + length - 1 and as labels the tokens one further.

    What lies outside the corpus, or has no next token, is padding with label -100 at the end of the row.
    """
    first = np.maximum(begins, 0)[:, None]
    last = np.minimum(begins + length, len(token_file) - 1)[:, None]  # labels end here, inputs one before
    at = first + np.arange(length)  # (B, T) where each input stands in the corpus
    real = at < last
    at = np.where(real, at, 0)
    tokens = np.where(real, token_file.tokens[at].astype(np.int64), token_file.meta.pad_id)
    target = at + real  # one further, if there is one
    document = np.searchsorted(token_file.starts, target, side="right") - 1
    counts = real & (target >= token_file.counted[document])
    if isolate_documents:
        counts &= target > token_file.starts[document]
    labels = np.where(counts, token_file.tokens[target].astype(np.int64), IGNORE)  # uint16 would make -100 a token
    batch = {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
    return {**batch, **_isolation(token_file, at, real, first)} if isolate_documents else batch


def _isolation(token_file: TokenFile, at: np.ndarray, real: np.ndarray, first: np.ndarray) -> dict[str, Tensor]:
    """`mask` and `positions`. Padding is a document of its own, so that no row of attention is without a key."""
    document = np.where(real, np.searchsorted(token_file.starts, at, side="right") - 1, -1)
    begin = np.maximum(token_file.starts[document], first)  # a document cut by the window counts from the cut
    positions = np.where(real, at - begin, 0)
    return {
        "mask": torch.from_numpy(document[:, :, None] == document[:, None, :]),
        "positions": torch.from_numpy(positions),
    }
