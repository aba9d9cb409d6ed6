"""T5's span corruption: spans of a text are cut out, and the model says what stood in the gaps.

    text     Thank you for inviting me to your party last week .      ("for inviting" and "last" are cut out)
    source   Thank you <X> me to your party <Y> week . </s>
    target   <X> for inviting <Y> last <Z> </s>

Source: Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4 and figure 2. As in the authors' code a drawn text begins
with a kept span and ends with a cut one, so there is no last sentinel <Z>; it stands only where kept text ends a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.data.encoder_decoder import encoder_decoder_batch
from minillm.data.objective import Objective, check_rows


def sentinel_ids(vocab_size: int, count: int = 100) -> tuple[int, ...]:
    """T5's sentinels: <extra_id_0> is the last id of the vocabulary, <extra_id_1> the one before it, and so on."""
    if not 1 <= count <= vocab_size:
        raise ValueError(f"{count} sentinels do not fit into a vocabulary of {vocab_size}")
    return tuple(range(vocab_size - 1, vocab_size - 1 - count, -1))


def span_counts(length: int, noise_density: float = 0.15, mean_span_length: float = 3.0) -> tuple[int, int]:
    """(tokens cut out, spans cut out) of a text of `length` tokens; both are fixed, only the places are drawn.

    Halves are rounded to even, as in T5. At least one token is cut and one kept (a single token is kept), and never
    more spans than can be kept apart.
    """
    if wrong := _wrong(noise_density, mean_span_length):
        raise ValueError("; ".join(wrong))
    if length < 2:
        return 0, 0
    noise = min(max(round(length * noise_density), 1), length - 1)
    return noise, min(max(round(noise / mean_span_length), 1), length - noise)


def _wrong(noise_density: float, mean_span_length: float) -> list[str]:
    wrong = [] if 0 < noise_density < 1 else [f"noise_density={noise_density}: a share between 0 and 1"]
    return wrong + ([] if mean_span_length >= 1 else [f"mean_span_length={mean_span_length}: must be at least 1"])


def random_spans(
    length: int, generator: torch.Generator, noise_density: float = 0.15, mean_span_length: float = 3.0
) -> Tensor:
    """(length,) True where a token is cut out: kept and cut spans take turns, a kept one first.

    Every way to divide the kept tokens, and the cut ones, into the given number of spans is equally likely.
    """
    noise, spans = span_counts(length, noise_density, mean_span_length)
    if not noise:
        return torch.zeros(length, dtype=torch.bool)
    lengths = torch.stack([_random_parts(length - noise, spans, generator), _random_parts(noise, spans, generator)], 1)
    return torch.tensor([False, True]).repeat(spans).repeat_interleave(lengths.flatten())


def _random_parts(total: int, parts: int, generator: torch.Generator) -> Tensor:
    """(parts,) positive lengths that sum to `total`."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]).diff()


def corrupt_spans(row: Tensor, noise: Tensor, sentinels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(source, target) of a text `row` (N,) that loses the runs where `noise` (N,) is True; no end-of-text token.

    The i-th run is replaced by sentinels[i] in the source, and in the target follows it.
    """
    if not len(row) or row.shape != noise.shape or row.dim() != 1:
        raise ValueError(f"row {tuple(row.shape)} and noise {tuple(noise.shape)} must be one row of tokens, not empty")
    begins = noise.clone()
    begins[1:] &= ~noise[:-1]
    closed = bool(noise[-1])
    needed = int(begins.sum()) + (not closed)
    if needed > len(sentinels):
        raise ValueError(
            f"a row of {len(row)} tokens needs {needed} sentinels and there are {len(sentinels)}: make rows shorter, "
            "noise_density lower or mean_span_length longer, or give the vocabulary more sentinels"
        )
    table = torch.tensor(sentinels)
    if len(found := row[torch.isin(row, table)].unique()):
        raise ValueError(
            f"the text itself holds the sentinels {found[:5].tolist()}: it could not be told from the gaps"
        )
    marks = table[(begins.cumsum(0) - 1).clamp(min=0)]  # the sentinel of the run that a token is in
    source = torch.where(begins, marks, row)[~noise | begins]
    target = torch.stack([marks, row], 1)[torch.stack([begins, noise], 1)]
    return source, target if closed else torch.cat([target, table[needed - 1 : needed]])


def restore_spans(source: Tensor, target: Tensor, sentinels: Sequence[int]) -> Tensor:
    """The text (N,) whose corrupted form is `source` and `target` (without end-of-text tokens).

    ValueError when they do not fit together, as what a model generates may not.
    """
    places = {sentinel: i for i, sentinel in enumerate(sentinels)}
    gaps: list[list[int]] = []
    wrong = []
    for token in target.tolist():
        if token in places:
            if places[token] != len(gaps):
                wrong.append(f"the target's sentinel {len(gaps)} is number {places[token]}")
            gaps.append([])
        elif gaps:
            gaps[-1].append(token)
        else:
            wrong.append(f"the target begins with {token} and not with a sentinel")
    asked = [places[token] for token in source.tolist() if token in places]
    if asked != list(range(len(asked))) or not len(asked) <= len(gaps) <= len(asked) + 1 or any(gaps[len(asked) :]):
        wrong.append(f"the source has the gaps {asked}, the target fills {len(gaps)}")
    if wrong:
        raise ValueError("source and target do not fit together: " + "; ".join(wrong[:5]))
    filled = [gaps[places[token]] if token in places else [token] for token in source.tolist()]
    return torch.tensor([token for part in filled for token in part], dtype=torch.int64)


def corrupted_lengths(length: int, noise_density: float = 0.15, mean_span_length: float = 3.0) -> tuple[int, int]:
    """(source, target) lengths, end-of-text tokens included, of a text of `length` >= 2 tokens."""
    noise, spans = span_counts(length, noise_density, mean_span_length)
    return length - noise + spans + 1, noise + spans + 1


def text_length(source_length: int, noise_density: float = 0.15, mean_span_length: float = 3.0) -> int:
    """The longest text whose source has at most `source_length` tokens: 568 for 512. So no source is cut or padded."""
    if source_length < corrupted_lengths(2)[0]:
        raise ValueError(f"source_length {source_length}: the shortest corrupted text, of 2 tokens, has a source of 3")
    length = 2
    while corrupted_lengths(length + 1, noise_density, mean_span_length)[0] <= source_length:
        length += 1
    return length


@dataclass(frozen=True)
class SpanCorruption(Objective):
    """15 % of the tokens, in spans of 3 on average, are cut out; the batch is an encoder-decoder's.

    sentinels: as `sentinel_ids` gives them, or the ids of special symbols of your tokenizer.
    decoder_start_id: T5 starts with its padding token.

    Example: SpanCorruption(sentinel_ids(32100), vocab_size=32100, eos_id=1, pad_id=0, decoder_start_id=0)
    """

    sentinels: tuple[int, ...]
    vocab_size: int
    eos_id: int
    pad_id: int
    decoder_start_id: int
    noise_density: float = 0.15
    mean_span_length: float = 3.0

    def __post_init__(self):
        wrong = _wrong(self.noise_density, self.mean_span_length)
        if not self.sentinels or len(set(self.sentinels)) < len(self.sentinels):
            wrong.append("sentinels must be different ids, at least one")
        ids = {*self.sentinels, self.eos_id, self.pad_id, self.decoder_start_id}
        if outside := sorted(i for i in ids if not 0 <= i < self.vocab_size):
            wrong.append(f"ids {outside[:5]} are outside the vocabulary 0..{self.vocab_size - 1}")
        if wrong:
            raise ValueError("SpanCorruption: " + "; ".join(wrong))

    def __call__(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """{"source", "source_mask", "tokens", "labels", "mask"}; see `encoder_decoder_batch`."""
        check_rows(self, tokens, mask, self.vocab_size)
        eos = torch.tensor([self.eos_id])
        sources, targets = [], []
        for row, real in zip(tokens, mask, strict=True):
            text = row[real]
            noise = random_spans(len(text), generator, self.noise_density, self.mean_span_length)
            source, target = corrupt_spans(text, noise, self.sentinels)
            sources.append(torch.cat([source, eos]))
            targets.append(torch.cat([target, eos]))
        return encoder_decoder_batch(sources, targets, pad_id=self.pad_id, decoder_start_id=self.decoder_start_id)
