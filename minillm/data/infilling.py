"""BART's noise: spans of a text become one mask token each, its sentences change places; the text itself is the target.

Sources: Lewis et al. 2019 (arXiv:1910.13461), section 2.2: 30 % of the tokens, span lengths ~ Poisson(3); Liu et al.
2020 (arXiv:2001.08210), section 2.2, for many languages: 35 %, Poisson(3.5), language ids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.encoder_decoder import encoder_decoder_batch
from minillm.data.objective import Objective, check_rows


def infill(
    row: Tensor, generator: torch.Generator, *, mask_id: int, rate: float = 0.3, mean_span_length: float = 3.0
) -> Tensor:
    """`row` (N,) with ceil(rate N) tokens gone, in spans that are each replaced by one mask.

    Span lengths are drawn from Poisson(mean_span_length) until they reach that number; the last is cut to fit. A span
    of length 0 takes nothing away: it is a mask put in, so that the model learns that a mask may stand for nothing. All
    orders of spans and kept tokens are equally likely; spans may touch and still give two masks.
    """
    wrong = _wrong(rate, mean_span_length)
    if row.dim() != 1 or not len(row):
        wrong.append(f"the row is {tuple(row.shape)}: one row of tokens, not empty, is needed")
    if wrong:
        raise ValueError("infill: " + "; ".join(wrong))
    lengths = _span_lengths(math.ceil(round(rate * len(row), 9)), mean_span_length, generator)
    slots = len(row) - int(lengths.sum()) + len(lengths)  # kept tokens and spans
    spans = torch.randperm(slots, generator=generator)[: len(lengths)]
    steps = torch.ones(slots, dtype=torch.int64)  # how far in the text each slot goes
    steps[spans] = lengths
    begins = (steps.cumsum(0) - steps).clamp(max=len(row) - 1)  # an empty span at the end begins behind it
    source = row[begins]
    source[spans] = mask_id
    return source


def _wrong(rate: float, mean_span_length: float) -> list[str]:
    wrong = [] if 0 <= rate <= 1 else [f"rate={rate}: must be from 0 to 1"]
    if not 1 <= mean_span_length < math.inf:  # far below 1 nearly every span would be empty
        wrong.append(f"mean_span_length={mean_span_length}: must be at least 1")
    return wrong


def _span_lengths(total: int, mean: float, generator: torch.Generator) -> Tensor:
    """Poisson draws up to the one with which their sum reaches `total`, that one cut to make it equal."""
    lengths = torch.zeros(0, dtype=torch.int64)
    while lengths.sum() < total:
        draws = torch.poisson(torch.full((total,), float(mean)), generator=generator)
        lengths = torch.cat([lengths, draws.long()])
    sums = lengths.cumsum(0)
    before = sums - lengths
    return torch.minimum(lengths, total - before)[before < total]


def permute_sentences(row: Tensor, generator: torch.Generator, ends: Sequence[int]) -> Tensor:
    """`row` (N,) with its sentences in random order; a token of `ends` closes a sentence and stays its last token."""
    if row.dim() != 1 or not len(row):
        raise ValueError(f"permute_sentences: the row is {tuple(row.shape)}: one row of tokens, not empty, is needed")
    closes = torch.isin(row, torch.tensor(ends, dtype=row.dtype))
    sentence = closes.cumsum(0) - closes.long()
    order = torch.randperm(int(sentence[-1]) + 1, generator=generator)
    return row[order[sentence].argsort(stable=True)]


@dataclass(frozen=True)
class TextInfilling(Objective):
    """Sentences permuted, then spans masked; the labels are the text as it was. The batch is an encoder-decoder's.

    sentence_ends   ids that close a sentence (a full stop, a line's end); () leaves the order alone
    bos_id          stands before source and labels, as in BART's own checkpoints
    language_id     mBART's: the source is "text </s> language", and the decoder begins with the language's id instead
                    of decoder_start_id, so that it reads "language text" and says "text </s>"
    The noise takes a row as it is: special tokens belong into these fields and not into the row.

    Example: TextInfilling(mask_id=4, vocab_size=8000, eos_id=3, pad_id=0, decoder_start_id=3)
    """

    mask_id: int
    vocab_size: int
    eos_id: int
    pad_id: int
    decoder_start_id: int | None = None
    rate: float = 0.3
    mean_span_length: float = 3.0
    sentence_ends: tuple[int, ...] = ()
    bos_id: int | None = None
    language_id: int | None = None

    def __post_init__(self):
        wrong = _wrong(self.rate, self.mean_span_length)
        if (self.decoder_start_id is None) == (self.language_id is None):
            wrong.append("give either decoder_start_id or language_id: with one of them the decoder begins")
        ids = {self.mask_id, self.eos_id, self.pad_id, self.bos_id, self.decoder_start_id, self.language_id}
        if outside := sorted(i for i in ids | {*self.sentence_ends} if i is not None and not 0 <= i < self.vocab_size):
            wrong.append(f"ids {outside[:5]} are outside the vocabulary 0..{self.vocab_size - 1}")
        if wrong:
            raise ValueError("TextInfilling: " + "; ".join(wrong))

    def __call__(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """{"source", "source_mask", "tokens", "labels", "mask"}; see `encoder_decoder_batch`."""
        check_rows(self, tokens, mask, self.vocab_size)
        before, after, language = (
            torch.tensor([i for i in ids if i is not None], dtype=torch.int64)
            for ids in ([self.bos_id], [self.eos_id], [self.language_id])
        )
        sources, targets = [], []
        for row, real in zip(tokens, mask, strict=True):
            text = row[real]
            noised = permute_sentences(text, generator, self.sentence_ends) if self.sentence_ends else text
            noised = infill(
                noised, generator, mask_id=self.mask_id, rate=self.rate, mean_span_length=self.mean_span_length
            )
            sources.append(torch.cat([before, noised, after, language]))
            targets.append(torch.cat([before, text, after]))
        start = self.decoder_start_id if self.language_id is None else self.language_id
        return encoder_decoder_batch(sources, targets, pad_id=self.pad_id, decoder_start_id=start)
