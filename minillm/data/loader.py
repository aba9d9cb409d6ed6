"""What both loaders share: the order of an epoch, the share of each rank, and resuming."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from minillm.config import seed_flaw
from minillm.data.tokens import TokenFile


class Loader(ABC):
    """An endless iterator of batches over the rows (windows or examples) of a token file.

    The rows of an epoch are shuffled by (seed, epoch); epochs follow each other without a gap, so a batch may hold the
    end of one and the start of the next. `batch_size` is that of all ranks together: rank r takes rows r,
    r + world_size, ... of each global batch, so the ranks see together exactly what one process would see.
    """

    def __init__(
        self,
        token_file: TokenFile | None,
        batch_size: int,
        length: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool,
    ):
        wrong = []
        if length < 1:
            wrong.append(f"length {length} is not positive")
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            wrong.append(f"batch_size {batch_size} (of all ranks together) does not divide by world_size {world_size}")
        if not 0 <= rank < world_size:
            wrong.append(f"rank {rank} is not in 0..{world_size - 1}")
        wrong += seed_flaw(seed)
        if wrong:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(wrong))
        self.token_file, self.batch_size, self.length = token_file, batch_size, length
        self.seed, self.rank, self.world_size, self.shuffle = seed, rank, world_size, shuffle
        self.epoch, self.row = 0, 0  # the next row to give is the row-th of the epoch's order

    @abstractmethod
    def rows(self, epoch: int) -> np.ndarray:
        """One number for each row of the epoch, in corpus order."""

    @abstractmethod
    def batch(self, rows: np.ndarray, mine: slice) -> dict[str, Tensor]:
        """The batch of `rows[mine]`; `rows` are those of all ranks, so that all can pad alike."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything besides the position that decides what the next batch is, apart from the rank."""

    def _common_identity(self) -> dict[str, Any]:
        return {
            "loader": type(self).__name__,
            "tokens_sha256": self.token_file.meta.tokens_sha256,
            "documents_sha256": self.token_file.meta.documents_sha256,
            "batch_size": self.batch_size,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _start(self) -> None:
        """Order the first epoch. A batch larger than it is refused: it would hold the same row twice."""
        count = len(self.rows(0))
        if count < self.batch_size:
            raise ValueError(
                f"{type(self).__name__}: {self.token_file.folder} has {count} rows of length {self.length} "
                f"({len(self.token_file)} tokens, {self.token_file.meta.num_documents} documents), fewer than "
                f"batch_size {self.batch_size}. Lower batch_size or length, or bring more text."
            )
        self._order = self._ordered(0)

    def _ordered(self, epoch: int) -> np.ndarray:
        rows = self.rows(epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        rows = self._order[self.row : self.row + self.batch_size]
        self.row += len(rows)
        while len(rows) < self.batch_size:
            self.epoch, self.row = self.epoch + 1, self.batch_size - len(rows)
            self._order = self._ordered(self.epoch)
            rows = np.concatenate([rows, self._order[: self.row]])
        return self.batch(rows, slice(self.rank, None, self.world_size))

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; JSON-able. The next batch after `load_state_dict` is the next one here."""
        return {"epoch": self.epoch, "row": self.row, "identity": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. The number of ranks may have changed; data, order and batches must be the same."""
        saved, own = state["identity"], self.identity()
        differing = [key for key in {**own, **saved} if saved.get(key) != own.get(key)]
        if differing:
            raise ValueError(
                "this loader cannot continue from that state, it would give other batches:\n  "
                + "\n  ".join(f"{key}: saved {saved.get(key)!r}, now {own.get(key)!r}" for key in differing)
                + "\nResume with the data and settings of the run, or start a new run."
            )
        self.epoch, self.row = state["epoch"], state["row"]
        self._order = self._ordered(self.epoch)
