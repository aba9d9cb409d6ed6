"""What a denoising objective is, and the loader that applies one anew to every row in every epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.data.encoder_decoder import pad_rows
from minillm.data.loader import Loader
from minillm.data.tokens import TokenFile


class Objective(ABC):
    """Turns rows of text into a training batch. Its `repr` must name every setting: a frozen dataclass's does."""

    @abstractmethod
    def __call__(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The batch of `tokens` (B, T), of which those are real where `mask` (B, T) is True.

        All chance comes from `generator`; nothing given is changed. Each tensor returned has B rows, one for each row.
        """


def check_rows(objective: Objective, tokens: Tensor, mask: Tensor, vocab_size: int) -> None:
    """ValueError unless `tokens` and `mask` are as an objective expects them."""
    wrong = []
    if tokens.dim() != 2 or tokens.shape != mask.shape or mask.dtype != torch.bool:
        wrong.append(
            f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} ({mask.dtype}): both (B, T), mask bool"
        )
    else:
        if empty := (~mask.any(1)).nonzero().squeeze(1).tolist():
            wrong.append(f"rows {empty[:10]} are empty: they hold no real token")
        if len(outside := tokens[(tokens < 0) | (tokens >= vocab_size)].unique()):
            wrong.append(f"ids {outside[:5].tolist()} are outside the vocabulary 0..{vocab_size - 1}")
    if wrong:
        raise ValueError(f"{type(objective).__name__}: " + "; ".join(wrong))


class ObjectiveLoader(Loader):
    """Batches of `objective` over the rows of a token file, in batches without end, drawn anew in every epoch.

    A row is a piece of one document of at most `length` tokens, its end-of-text token left out; with `packed`, a window
    of `length` tokens of the documents laid end to end, the end-of-text tokens between them kept. In one epoch every
    token is in one row. `prefix` and `suffix` are put around each row and not counted in `length`: BERT's [CLS] and
    [SEP], or a language's id.

    What is drawn is a function of (seed, place in the run, row): a row met again in another epoch is corrupted
    otherwise (dynamic masking: Liu et al. 2019, arXiv:1907.11692, section 4.1), a resumed run goes on exactly, and all
    ranks together see what one process would. For that each rank draws the whole batch and keeps its rows.
    """

    def __init__(
        self,
        token_file: TokenFile,
        objective: Objective,
        batch_size: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        packed: bool = False,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        shuffle: bool = True,
    ):
        super().__init__(token_file, batch_size, length, seed, rank, world_size, shuffle)
        self.objective, self.packed = objective, packed
        self.prefix, self.suffix = np.array(prefix, dtype=np.int64), np.array(suffix, dtype=np.int64)
        if " at 0x" in repr(objective):
            raise ValueError(
                f"a run with {objective!r} could not be resumed, its repr does not say what it does: make the "
                "objective a frozen dataclass that extends Objective"
            )
        self.begins, self._ends = self._pieces()  # where in the corpus each row begins and ends
        self._start()

    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each row begins and ends in the corpus."""
        file = self.token_file
        starts, ends = (np.array([0]), np.array([len(file)])) if self.packed else (file.starts, file.ends - 1)
        counts = -(-(ends - starts) // self.length)
        document = np.repeat(np.arange(len(starts)), counts)
        place = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # of the piece in its document
        begins = starts[document] + place * self.length
        return begins, np.minimum(begins + self.length, ends[document])

    def rows(self, epoch: int) -> np.ndarray:
        """The numbers of the rows."""
        return np.arange(len(self.begins))

    def batch(self, rows: np.ndarray, mine: slice) -> dict[str, Tensor]:
        return {name: values[mine] for name, values in self._drawn(rows, self.epoch, self.row).items()}

    def one_pass(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every row once, in corpus order, for evaluation: the same at each call, wherever this loader stands.

        The last batch may have fewer rows.
        """
        rows = self.rows(0)
        for end in range(batch_size, len(rows) + batch_size, batch_size):
            yield self._drawn(rows[end - batch_size : end], 0, end)

    def _drawn(self, rows: np.ndarray, epoch: int, end: int) -> dict[str, Tensor]:
        """The batch of `rows` that ends at place `end` of an epoch."""
        texts = [self.token_file.tokens[self.begins[row] : self._ends[row]].astype(np.int64) for row in rows]
        whole = [torch.from_numpy(np.concatenate([self.prefix, text, self.suffix])) for text in texts]
        tokens, mask = pad_rows(whole, self.token_file.meta.pad_id)
        seeds = np.random.SeedSequence([self.seed, epoch, end, 2])  # 2: not the streams that shuffle and move the cuts
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        return self.objective(tokens, mask, generator)

    def identity(self) -> dict[str, Any]:
        own = {"packed": self.packed, "prefix": self.prefix.tolist(), "suffix": self.suffix.tolist()}
        return {**self._common_identity(), **own, "objective": repr(self.objective)}
