"""One document a row, filled up to the longest: for tuning on examples that should not see each other."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.data.loader import Loader
from minillm.data.tokens import TokenFile
from minillm.ops import IGNORE


class PaddedLoader(Loader):
    """Batches of whole documents with `mask` (B,T), True = a real token; T is that of the batch's longest document.

    The labels are the completion and the end-of-text token, or, for a plain text, all but its first token. A row has at
    most `length` inputs: longer documents lose their end, which a warning counts, and it is an error if a document
    would lose all its labels. Every document is in each epoch once.
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
        padding: str = "right",
        shuffle: bool = True,
    ):
        super().__init__(token_file, batch_size, length, seed, rank, world_size, shuffle)
        if padding not in ("left", "right"):
            raise ValueError(f"padding is 'left' or 'right', got {padding!r}")
        self.padding = padding
        self._ends = np.minimum(token_file.ends, token_file.starts + length + 1)
        self._report_truncation()
        self._start()

    def _report_truncation(self) -> None:
        file = self.token_file
        lost = file.ends - self._ends
        without = np.flatnonzero(self._ends <= np.maximum(file.counted, file.starts + 1))
        if len(without):
            raise ValueError(
                f"{len(without)} of {len(lost)} documents keep no label within length {self.length} (prompt too long, "
                f"or nothing after the first token); their numbers: {without[:10].tolist()}. Their longest prompt has "
                f"{(file.counted - file.starts)[without].max()} tokens: raise length, shorten or remove them."
            )
        if lost.any():
            warnings.warn(
                f"{np.count_nonzero(lost)} of {len(lost)} documents are longer than length {self.length}: "
                f"{lost.sum()} of {len(file)} tokens at their ends are not used (longest: "
                f"{(file.ends - file.starts).max() - 1} inputs)",
                stacklevel=3,
            )

    def rows(self, epoch: int) -> np.ndarray:
        """The numbers of the documents."""
        return np.arange(self.token_file.meta.num_documents)

    def batch(self, rows: np.ndarray, mine: slice) -> dict[str, Tensor]:
        width = int((self._ends[rows] - self.token_file.starts[rows]).max()) - 1
        rows = rows[mine]
        tokens = np.full((len(rows), width), self.token_file.meta.pad_id, dtype=np.int64)
        labels = np.full_like(tokens, IGNORE)
        mask = np.zeros_like(tokens, dtype=bool)
        for i, document in enumerate(rows):
            start, end = self.token_file.starts[document], self._ends[document]
            ids = self.token_file.tokens[start:end].astype(np.int64)
            real = slice(0, len(ids) - 1) if self.padding == "right" else slice(width - len(ids) + 1, width)
            counts = np.arange(start + 1, end) >= self.token_file.counted[document]
            tokens[i, real], labels[i, real], mask[i, real] = ids[:-1], np.where(counts, ids[1:], IGNORE), True
        batch = {"tokens": tokens, "labels": labels, "mask": mask}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def identity(self) -> dict[str, Any]:
        return {**self._common_identity(), "padding": self.padding}
