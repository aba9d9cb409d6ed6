"""What `minillm pretrain` asks of a model: the next token, tokens that are hidden, or spans that are cut out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from minillm.data import MaskedLanguageModeling, Objective, ObjectiveLoader, SpanCorruption, WordBoundaries
from minillm.data.spans import span_counts
from minillm.evaluation import language_model_loss
from minillm.models import HeadConfig, ModelConfig, build, build_with_head
from minillm.ops import IGNORE
from minillm.recipes.rows import Rows
from minillm.tokenizers import Tokenizer
from minillm.training import Loss, causal_lm_loss, masked_lm_loss, seq2seq_loss, world

MASK = "<mask>"
RATE = 0.15  # of the tokens are hidden or cut out: BERT's and T5's share, and the one that is measured
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(32))  # T5's names; enough for the 26 spans of 512 tokens


@dataclass(frozen=True)
class Kind:
    """An objective: the models it is for, why it is for no others, its loss, the special tokens it needs."""

    model: str
    why: str
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Loss]
    symbols: tuple[str, ...] = ()


KINDS = {
    "next": Kind("decoder", "predicts each token from those before it", causal_lm_loss),
    "masked": Kind("encoder", "sees a hidden token's neighbours on both sides", masked_lm_loss, (MASK,)),
    "spans": Kind("encoder_decoder", "reads a text with gaps and writes what stood there", seq2seq_loss, SENTINELS),
}
DEFAULTS = {kind.model: name for name, kind in KINDS.items()}


def misfit(objective: str, model: ModelConfig) -> list[str]:
    """Why a model cannot be trained by an objective, if it cannot."""
    kind = KINDS[objective]
    if model.kind == kind.model:
        return []
    fits = f"objective={DEFAULTS[model.kind]} is for model.kind={model.kind}"
    return [f"objective={objective} is for model.kind={kind.model}, which {kind.why}; {fits}"]


def new_model(config: ModelConfig) -> nn.Module:
    """A model with random weights and the head that its objective needs."""
    return build_with_head(config, HeadConfig(task="masked_lm")) if config.kind == "encoder" else build(config)


def make_objective(
    name: str, tokenizer: Tokenizer, model: ModelConfig, length: int, *, words: bool, rate: float = RATE
) -> Objective:
    """The denoising objective `name`; ValueError where the tokenizer lacks what it needs."""
    if name == "masked":
        return _masked(tokenizer, words, rate)
    sentinels: list[int] = []
    while (found := tokenizer.special_ids.get(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels.append(found)
    if len(sentinels) < (needed := span_counts(length, rate)[1] + 1):  # where a row is cut short, one more closes it
        raise ValueError(
            f"objective=spans with hide={rate} cuts up to {needed} spans out of data.length={length} tokens, and the "
            f"tokenizer has {len(sentinels)} sentinels (<extra_id_0>, ...): shorten the rows, or give it more with "
            "tokenizer.special_symbols"
        )
    ids = tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, model.decoder_start_id
    return SpanCorruption(tuple(sentinels), *ids, noise_density=rate)


def affixes(name: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and after a row: those that stand around a text when an encoder is tuned."""
    if name != "masked":
        return (), ()
    marker = -1  # no token's id
    row = tuple(tokenizer.with_specials([marker])[0])
    return row[: row.index(marker)], row[row.index(marker) + 1 :]


def _masked(tokenizer: Tokenizer, words: bool, rate: float) -> MaskedLanguageModeling:
    if tokenizer.mask_id is None:
        raise ValueError(
            f"objective=masked needs a token that hides others, and the tokenizer has no {MASK}: let it be trained "
            f"with tokenizer.special_symbols={MASK}, or leave tokenizer.folder out"
        )
    boundaries = None
    if words:
        pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        boundaries = WordBoundaries(pieces, "##" if any(piece.startswith("##") for piece in pieces) else "▁")
    special = tuple(sorted(tokenizer.special_ids.values()))
    return MaskedLanguageModeling(tokenizer.mask_id, tokenizer.vocab_size, special, rate, words=boundaries)


def gap_places(source: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> Tensor:
    """Where in the text the tokens stood that `target` gives back: between its sentinels, the final </s> left out."""
    lengths: dict[int, int] = {}
    for token in target[:-1]:
        if token in sentinels:
            gap = token
            lengths[gap] = 0
        else:
            lengths[gap] += 1
    places, place = [], 0
    for token in source:
        length = lengths.get(token)
        places += range(place, place + (length or 0))
        place += 1 if length is None else length
    return torch.tensor(places, dtype=torch.int64)


@dataclass(frozen=True)
class DenoisedRows(Rows):
    """Rows of text that `objective` corrupts, each time otherwise in training and always alike in measuring.

    `affixes`: what the model reads before and after each text, such as <s> and </s>.
    """

    objective: Objective | None = None
    tokenizer: Tokenizer | None = None
    affixes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def loader(self) -> ObjectiveLoader:
        return self._loader(self.data.batch_size, world().rank, world().size)

    def _loader(self, batch_size: int, rank: int = 0, size: int = 1) -> ObjectiveLoader:
        prefix, suffix = self.affixes
        return ObjectiveLoader(
            self.file, self.objective, batch_size, self.data.length, self.data.seed, rank, size,
            packed=not self.padded, prefix=prefix, suffix=suffix,
        )  # fmt: skip

    def batches(self) -> Iterator[dict[str, Tensor]]:
        return self._loader(1).one_pass(self.data.batch_size)

    def text_batches(self) -> Iterator[dict[str, Tensor]]:
        """The same, of whose labels only those count that stand for text: no sentinel and no end of text."""
        sizes = self._sizes()
        for batch in self.batches():
            labels = batch["labels"]
            yield {**batch, "labels": labels.masked_fill(sizes[labels.clamp(min=0)] == 0, IGNORE)}

    def text_bytes(self) -> int:
        """The UTF-8 bytes of the text that the labels stand for."""
        sizes = self._sizes()
        found = (batch["labels"] for batch in self.batches())
        return sum(int(sizes[labels[labels != IGNORE]].sum()) for labels in found)

    def text_places(self) -> np.ndarray:
        """(N,) where in the file the labels of `text_batches` stand, in their order."""
        begins, found = iter(self._loader(1).begins), []
        for batch in self.batches():
            for row, labels in enumerate(batch["labels"]):
                counts = labels != IGNORE
                if "source" in batch:
                    at = gap_places(batch["source"][row].tolist(), labels[counts].tolist(), self.objective.sentinels)
                else:
                    at = counts.nonzero().squeeze(1) - len(self.affixes[0])
                found.append(next(begins) + at.numpy())
        places = np.concatenate(found)
        return places[self._sizes().numpy()[self.file.tokens[places]] > 0]

    def _sizes(self) -> Tensor:
        """(V,) the UTF-8 bytes that each id stands for."""
        return torch.tensor([len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size)])

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss over all labels, and bits per byte of the text among them: the pieces that were hidden or cut out."""
        num_bytes = self.text_bytes()
        values = language_model_loss(model, self.batches(), loss_fn=self.loss_fn)
        text = language_model_loss(model, self.text_batches(), num_bytes=num_bytes, loss_fn=self.loss_fn)
        return values | {"bits_per_byte": text["bits_per_byte"], "text_tokens": text["tokens"], "text_bytes": num_bytes}
